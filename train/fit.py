"""How well a dictionary fits rows of activations: what `train.diagnosis` compares its suspicions by."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.harvest import harvest_rows
from activations.models import LanguageModel
from sae.architectures import build
from sae.dictionary import Dictionary
from sae.errors import UserError
from sae.sparse import SparseEncoder
from train.evals import first_tokens

Text = Literal["BOS", "no BOS", "special tokens"]
"""How the text is read: behind BOS, without any, or behind BOS with the special tokens' rows counted too."""

Site = tuple[str, str]
"""Where a dictionary reads and where it writes."""

# octaves of a scale that are tried first, and the rows that are enough to compare them
_OCTAVES = range(-9, 10)
_SCALE_ROWS = 192
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclasses.dataclass(frozen=True)
class Fit:
    """L0, and the share of the variance about the rows' mean that the reconstruction leaves unexplained."""

    l0: float
    fvu: float


def measure(
    encoder: SparseEncoder,
    x: Float[Tensor, "row d_in"],
    y: Float[Tensor, "row d_out"],
    *,
    massive: bool = False,
) -> Fit:
    """How a dictionary that reads `x` reconstructs `y`. A fit that is not a number is infinitely bad.

    FVU leaves out the rows with massive activations unless `massive` asks for them: one can hold more
    variance than all others, and FVU would tell which rows there are, not how they are reconstructed.
    """
    x, y = x.to(encoder.dictionary.W_enc), y.to(encoder.dictionary.W_enc)
    with np.errstate(over="ignore"):  # a wrong guess may fire as hard as it likes
        latents = encoder.encode(x)
    error = (encoder.decode(latents, x) - y).double().square().sum(1)
    counted = torch.ones(len(y), dtype=torch.bool, device=y.device) if massive else ordinary(y)
    y = y[counted].double()
    fvu = float(error[counted].sum() / (y - y.mean(0)).square().sum())
    return Fit(len(latents.latent) / max(1, len(x)), fvu if math.isfinite(fvu) else math.inf)


def ordinary(y: Float[Tensor, "row d_out"]) -> Bool[Tensor, " row"]:
    """Rows not far from the median row: the square of the distance is within 8 times its own median."""
    distance = (y.double() - y.double().median(0).values).square().sum(1)
    return distance <= 8 * distance.median()


def scaled(dictionary: Dictionary, factor: float) -> Dictionary:
    """The dictionary that was trained on `factor` times the activations, made to read and write them raw."""
    with torch.no_grad():
        changed = {
            "W_enc": dictionary.W_enc * factor,
            "W_dec": dictionary.W_dec / factor,
            "b_dec": dictionary.b_dec / factor,
        }
    return build(dictionary.cfg, {**dict(dictionary.named_parameters()), **changed})


class ScaleScan:
    """A dictionary on some rows times a factor, for any factor: a search along a line."""

    def __init__(
        self, dictionary: Dictionary, x: Float[Tensor, "row d_in"], y: Float[Tensor, "row d_out"]
    ) -> None:
        self._dictionary, self._x, self._y = dictionary, x[:_SCALE_ROWS], y[:_SCALE_ROWS]
        self._known: dict[float, Fit] = {}

    def fit(self, factor: float) -> Fit:
        """How the dictionary fits when activations are multiplied before it and divided after."""
        if factor not in self._known:
            try:
                encoder = SparseEncoder(scaled(self._dictionary, factor))
            except UserError:  # narrow weights overflow
                self._known[factor] = Fit(0.0, math.inf)
            else:
                self._known[factor] = measure(encoder, self._x, self._y)
        return self._known[factor]

    def fvu(self, factor: float) -> float:
        """The FVU of `fit`."""
        return self.fit(factor).fvu

    def least_fvu(self) -> float:
        """The factor that leaves the least FVU. L0 has no part in it, so it can confirm what is found."""
        return self._least(self.fvu)

    def nearest_l0(self, octaves_off: Callable[[float], float]) -> float:
        """The factor whose L0 is as published; of several, the one that leaves the least FVU."""
        fit = self.fit
        return self._least(lambda factor: octaves_off(fit(factor).l0) + 1e-3 * min(fit(factor).fvu, 10.0))

    def _least(self, loss: Callable[[float], float]) -> float:
        """The least among octaves, and from there by golden sections."""
        centre = min(_OCTAVES, key=lambda octave: loss(2.0**octave))
        low, high = centre - 1.0, centre + 1.0
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        for _ in range(8):
            # one of the two inner points stays one, so each turn costs one new fit
            if loss(2.0**left) <= loss(2.0**right):
                high, right = right, left
                left = high - _GOLDEN * (high - low)
            else:
                low, left = left, right
                right = low + _GOLDEN * (high - low)
        return 2.0 ** ((low + high) / 2)


def usual_scales(x: Float[Tensor, "row d_in"]) -> dict[str, float]:
    """The constants that people multiply activations by before training, for these rows, by name."""
    x = x.double()
    root, norms = math.sqrt(x.shape[1]), x.norm(dim=1)
    mean_norm, rms_norm = float(norms.mean()), float(norms.square().mean().sqrt())
    spread = float((x - x.mean(0)).square().sum(1).mean().sqrt())
    found = {
        "sqrt(d_in) / mean norm, SAELens's expected_average_only_in": root / mean_norm,
        "1 / root mean square norm, Gemma Scope's unit mean square": 1 / rms_norm,
        "sqrt(d_in) / root mean square norm": root / rms_norm,
        "1 / mean norm": 1 / mean_norm,
        "1 / root mean square distance from the mean": 1 / spread,
        "sqrt(d_in) / root mean square distance from the mean": root / spread,
        "sqrt(d_in)": root,
        "1 / sqrt(d_in)": 1 / root,
    }
    return {name: factor for name, factor in found.items() if math.isfinite(factor) and factor > 0}


class Rows:
    """Rows of activations at any site of a model, on the first tokens of some blocks, made when asked for.

    Memory: `tokens` rows in the model's dtype for each site that was asked for.
    """

    def __init__(self, model: LanguageModel, blocks: Sequence[TokenBlocks], tokens: int) -> None:
        self._model = model
        self._blocks = list(first_tokens(blocks, tokens))
        self._found: dict[tuple[Text, str], Tensor] = {}

    def harvest(self, sites: Iterable[str], text: Text) -> None:
        """Makes the rows of several sites from the same forward passes."""
        wanted = [site for site in dict.fromkeys(sites) if (text, site) not in self._found]
        if wanted:
            parts = [part.rows for part in harvest_rows(self._model, self.blocks(text), wanted)]
            for site in wanted:
                self._found[text, site] = torch.cat([part[site] for part in parts])

    def at(self, site: str, text: Text) -> Float[Tensor, "row d_in"]:
        """The rows at a site."""
        self.harvest([site], text)
        return self._found[text, site]

    def blocks(self, text: Text) -> list[TokenBlocks]:
        """The blocks, read that way."""
        return [as_text(block, text, self._model.bos_id) for block in self._blocks]


def as_text(blocks: TokenBlocks, text: Text, bos_id: int | None) -> TokenBlocks:
    """The same text read otherwise: without its BOS, or with the special tokens among the kept."""
    if text == "special tokens":
        # padding follows the last token that is kept
        last = (blocks.keep * torch.arange(1, blocks.keep.shape[1] + 1)).amax(1, keepdim=True)
        return dataclasses.replace(blocks, keep=torch.arange(blocks.keep.shape[1]) < last)
    if text == "BOS" or bos_id is None:
        return blocks
    # what is not BOS, in its order, and the BOS behind it as padding that nothing attends to
    order = (blocks.tokens == bos_id).to(torch.int8).argsort(dim=1, stable=True)
    parts: Mapping[str, Tensor] = {
        name: getattr(blocks, name).gather(1, order) for name in ("tokens", "document", "position", "keep")
    }
    return TokenBlocks(**parts)


PER_TOKEN = ("layer_norm", "constant_norm_rescale")
"""Normalisations of each row by itself, by SAELens's names: no weights can do them."""


def per_token(kind: str, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
    """One of `PER_TOKEN`, in fp32."""
    rows = x.float()
    if kind == "layer_norm":
        rows = rows - rows.mean(1, keepdim=True)
    # both give rows of a mean square of 1
    return rows / rows.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)
