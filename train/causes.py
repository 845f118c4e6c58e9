"""The usual causes of a dictionary that does not fit: each a change that puts it right, if it is the one."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from activations.models import LanguageModel
from activations.sites import KINDS, kind_of, layer_of, site_name
from sae.architectures import build
from sae.dialects.parts import shift_input
from sae.dictionary import Dictionary
from train.fit import Site, Text, scaled

# norms that differ by less than this are all the same
_EVEN = 1e-3
# numbers of latents that a top-k gate of unknown k is tried with
_KS = (8, 16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A dictionary as it would be if one thing, or two, had been otherwise."""

    causes: tuple[str, ...]
    """The changes' kinds: hook, BOS, special tokens, scale, per-token norm, centring, b_dec, gate, folded
    norms, transposed, skip. None: the dictionary as it says of itself."""
    what: str
    """The change in words, what is wrong first."""
    remedy: str
    """What puts it right."""
    dictionary: Dictionary
    """With the change made; its config may still name the old sites."""
    site: Site
    """Where it reads and writes."""
    text: Text = "BOS"
    reading: str = ""
    """A normalisation of each row that stands before and after the dictionary (`train.fit.per_token`)."""

    def put_right(self) -> Dictionary | None:
        """The dictionary with the change made, config included; None where no weights can make it."""
        if self.reading:
            return None
        cfg = dataclasses.replace(
            self.dictionary.cfg,
            site_in=self.site[0],
            site_out=self.site[1],
            prepend_bos=self.text != "no BOS",
        )
        return build(cfg, dict(self.dictionary.named_parameters()))

    def then(self, cause: str, what: str, remedy: str, dictionary: Dictionary) -> "Candidate":
        """The same with another change to the weights on top."""
        return dataclasses.replace(
            self,
            causes=(*self.causes, cause),
            what=f"{self.what}, and {what}" if self.causes else what,
            remedy=f"{self.remedy}; {remedy}" if self.causes else remedy,
            dictionary=dictionary,
        )


def widths(model: LanguageModel) -> dict[str, int]:
    """Every site of the model and its width."""
    return {site: model.site_width(site) for site in model.sites}


def sites_to_try(dictionary: Dictionary, model: LanguageModel, *, far: bool) -> list[Site]:
    """The other places that the dictionary's widths allow, the nearest first.

    Near: any kind at its layer and the two beside it. Far: its own kind at every layer. Where it names no
    layer of the model, all places are near.
    """
    cfg, known = dictionary.cfg, widths(model)
    reads = [site for site, width in known.items() if width == cfg.d_in]
    claimed = (cfg.site_in, cfg.site_out)
    if claimed[0] not in known:
        places = (
            [(site, site) for site in reads if kind_of(site) != "resid_pre" or not layer_of(site)]
            if cfg.d_in == cfg.d_out
            else []
        )
        places += [pair for layer in range(model.n_layers) for pair in _transcoders(layer)]
        return [pair for pair in places if _fits(pair, cfg.d_in, cfg.d_out, known)]
    layer, kinds = layer_of(claimed[0]), [kind_of(site) for site in claimed if site in known]
    if far:
        at = [other for other in range(model.n_layers) if abs(other - layer) > 1]
        places = [(site_name(other, kinds[0]), site_name(other, kinds[-1])) for other in at]
    else:
        at = [other for other in (layer, layer - 1, layer + 1) if 0 <= other < model.n_layers]
        if cfg.site_in == cfg.site_out:
            places = [(site_name(other, kind),) * 2 for other in at for kind in KINDS]
            places += _transcoders(layer)
        else:
            places = [(site_name(other, kinds[0]), site_name(other, kinds[-1])) for other in at]
            places += [
                (site_name(other, kind), site_name(other, kinds[-1])) for other in at for kind in KINDS
            ]
            places += [(claimed[0], site_name(other, kind)) for other in at for kind in KINDS]
            places += [pair for other in at for pair in _transcoders(other)]
    seen, chosen = {_same(claimed)}, []
    for pair in places:
        pair = _same(pair)
        if _fits(pair, cfg.d_in, cfg.d_out, known) and pair not in seen:
            seen.add(pair)
            chosen.append(pair)
    return chosen


def _same(pair: Site) -> Site:
    """One name for each tensor: the residual stream entering a layer is what left the one below."""
    reads, writes = (
        site_name(layer_of(site) - 1, "resid_post")
        if kind_of(site) == "resid_pre" and layer_of(site) > 0
        else site
        for site in pair
    )
    return reads, writes


def _transcoders(layer: int) -> list[Site]:
    kinds = (("mlp_in", "mlp_out"), ("ln2_normalized", "mlp_out"), ("resid_mid", "mlp_out"))
    pairs = [(site_name(layer, reads), site_name(layer, writes)) for reads, writes in kinds]
    return [*pairs, (site_name(layer, "resid_pre"), site_name(layer, "resid_post"))]


def _fits(pair: Site, d_in: int, d_out: int, known: Mapping[str, int]) -> bool:
    return known.get(pair[0]) == d_in and known.get(pair[1]) == d_out


def moved(base: Candidate, site: Site) -> Candidate:
    """The dictionary at another site."""
    where = site[0] if site[0] == site[1] else f"{site[0]} -> {site[1]}"
    if site[0] == site[1] and kind_of(where) == "resid_post":
        where += f" ({site_name(layer_of(where) + 1, 'resid_pre')} is the same)"
    flags = f"--site {site[0]}" + (f" --site-out {site[1]}" if site[0] != site[1] else "")
    return dataclasses.replace(
        base,
        causes=("hook",),
        what=f"it belongs at {where}",
        remedy=f"jumpscope import with {flags}",
        site=site,
    )


def read_otherwise(base: Candidate, has_bos: bool) -> Iterator[Candidate]:
    """The same dictionary on the same text, read otherwise."""
    if has_bos:
        other: Text = "no BOS" if base.text == "BOS" else "BOS"
        what = "without BOS in front" if other == "no BOS" else "behind BOS"
        flag = "false" if other == "no BOS" else "true"
        yield dataclasses.replace(
            base, causes=("BOS",), what=f"it wants its text {what}", remedy=f"prepend_bos: {flag}", text=other
        )
        if base.text == "BOS":
            yield dataclasses.replace(
                base,
                causes=("special tokens",),
                what="its numbers count BOS and other special tokens",
                remedy="none is needed: compare numbers over all tokens, special ones included",
                text="special tokens",
            )
    if base.site[0] == base.site[1] and not base.dictionary.cfg.skip:
        for kind in ("layer_norm", "constant_norm_rescale"):
            yield dataclasses.replace(
                base,
                causes=("per-token norm",),
                what=f"each row has to be normalised by itself ({kind})",
                remedy="normalise each row before it and undo that after it: no weights can do it",
                reading=kind,
            )


def changed_weights(base: Candidate, l0: float | None) -> Iterator[Candidate]:
    """The same dictionary with one thing about its weights changed; `l0` is the published one."""
    yield from b_dec(base)
    for changes in (_norms, _transposed, _skips, _centred):
        yield from changes(base)
    yield from gates(base, l0)


def b_dec(base: Candidate) -> Iterator[Candidate]:
    """With b_dec subtracted from the input before the encoder, and with that undone."""
    tensors = _tensors(base.dictionary)
    if len(tensors["b_dec"]) != len(tensors["W_enc"]) or not tensors["b_dec"].any():
        return
    for sign, what, flag in (
        (-1, "b_dec has to be subtracted from its input", "true"),
        (1, "b_dec was subtracted from its input and must not be", "false"),
    ):
        made = shift_input(tensors, sign * tensors["b_dec"])
        yield base.then("b_dec", what, f"apply_b_dec_to_input: {flag}", _built(base.dictionary, made))


def rescaled(base: Candidate, factor: float, usual: Mapping[str, float]) -> Candidate | None:
    """On activations times a factor; the usual constant's name where one is that near. None: no change."""
    if abs(math.log2(factor)) < 0.1:
        return None
    near = min(usual, key=lambda name: abs(math.log(usual[name] / factor)), default="")
    named = f" (about {near})" if near and abs(math.log(usual[near] / factor)) < 0.1 else ""
    return base.then(
        "scale",
        f"activations have to be multiplied by {factor:.4g} before it and divided after{named}",
        f"W_enc *= {factor:.4g}, W_dec /= {factor:.4g}, b_dec /= {factor:.4g}",
        scaled(base.dictionary, factor),
    )


def gates(base: Candidate, l0: float | None) -> Iterator[Candidate]:
    """With another gate: none but relu, top-k, log thresholds."""
    dictionary, tensors = base.dictionary, _tensors(base.dictionary)
    architecture = dictionary.cfg.architecture
    if architecture == "gated":
        return
    plain = {name: tensor for name, tensor in tensors.items() if name != "threshold"}

    def other(architecture: str, what: str, tensors: dict[str, Tensor], k: int = 0) -> Candidate:
        cfg = dataclasses.replace(dictionary.cfg, architecture=architecture, k=k)
        return base.then(
            "gate", what, f"architecture: {architecture}" + f", k: {k}" * (k > 0), build(cfg, tensors)
        )

    if architecture != "relu":
        yield other("relu", "its gate is a plain relu", plain)
    if "threshold" in tensors and bool((tensors["threshold"] < 0).any()):
        logs = plain | {"threshold": tensors["threshold"].exp()}
        yield other(architecture, "its thresholds are logarithms", logs, dictionary.cfg.k)
    known = dictionary.cfg.k or round(l0 or 0)
    for k in (known,) if known else _KS:
        if 0 < k < dictionary.cfg.d_sae and (architecture, dictionary.cfg.k) != ("topk", k):
            lost = "thresholds are missing or wrong" if architecture != "topk" else "k is wrong"
            yield other("topk", f"its {lost}: the {k} largest of each row do", plain, k)


def _norms(base: Candidate) -> Iterator[Candidate]:
    tensors = _tensors(base.dictionary)
    norms = tensors["W_dec"].norm(dim=1)
    if not bool((norms > 0).all()) or float(norms.max() / norms.min()) < 1 + _EVEN:
        return
    enc = {"W_enc": tensors["W_enc"] * norms} | {b: tensors[b] * norms for b in ("b_enc",) if b in tensors}
    dec = {"W_dec": tensors["W_dec"] / norms[:, None]}
    changes: dict[str, dict[str, Tensor]] = {
        "the decoder's norms count twice: W_dec /= norms": dec,
        "the decoder's norms are missing in the encoder: W_enc, b_enc *= norms": enc,
        "latents are compared in units of the decoder's norms: W_enc, b_enc *= norms, W_dec /= norms": enc
        | dec,
    }
    if "threshold" in tensors:
        theta = tensors["threshold"]
        changes |= {
            "the thresholds are in units of the decoder's norms: threshold *= norms": {
                "threshold": theta * norms
            },
            "the thresholds have the decoder's norms in them: threshold /= norms": {
                "threshold": theta / norms
            },
        }
    for what, change in changes.items():
        words, _, line = what.partition(": ")
        yield base.then("folded norms", words, line, _built(base.dictionary, tensors | change))


def _transposed(base: Candidate) -> Iterator[Candidate]:
    tensors = _tensors(base.dictionary)
    square = {name for name in ("W_enc", "W_dec") if tensors[name].shape[0] == tensors[name].shape[1]}
    for names in (("W_enc",), ("W_dec",), ("W_enc", "W_dec")):
        if square.issuperset(names):
            made = tensors | {name: tensors[name].T.contiguous() for name in names}
            said = " and ".join(names)
            yield base.then(
                "transposed",
                f"{said} {'are' if len(names) > 1 else 'is'} transposed",
                f"transpose {said}",
                _built(base.dictionary, made),
            )


def _skips(base: Candidate) -> Iterator[Candidate]:
    tensors = _tensors(base.dictionary)
    skip = tensors.pop("W_skip", None)
    if skip is None:
        return
    if skip.shape[0] == skip.shape[1]:
        turned = _built(base.dictionary, tensors | {"W_skip": skip.T.contiguous()})
        yield base.then("skip", "W_skip is transposed: x A, not x A^T", "transpose W_skip", turned)
    cfg = dataclasses.replace(base.dictionary.cfg, skip=False)
    yield base.then("skip", "W_skip must be left out", "leave W_skip out", build(cfg, tensors))


def _centred(base: Candidate) -> Iterator[Candidate]:
    """For models whose weights were centred: what a row shares over its coordinates passes it by."""
    dictionary, tensors = base.dictionary, _tensors(base.dictionary)
    d = dictionary.cfg.d_in
    if dictionary.cfg.skip or base.site[0] != base.site[1]:
        return
    around = torch.full((d, d), 1 / d, dtype=tensors["W_enc"].dtype, device=tensors["W_enc"].device)
    made = tensors | {"W_enc": tensors["W_enc"] - tensors["W_enc"].mean(0), "W_skip": around}
    yield base.then(
        "centring",
        "it was trained on a residual stream that is centred (TransformerLens's center_writing_weights)",
        "subtract each row's mean over coordinates before it and add it after",
        build(dataclasses.replace(dictionary.cfg, skip=True), made),
    )


def norm_weight(base: Candidate, gain: Tensor) -> Iterator[Candidate]:
    """For a dictionary beside a norm that multiplies by `gain` [d_in], which Gemma stores as gain - 1.

    Taking the stored weight for the whole is the usual slip of who folds such a norm into an encoder.
    """
    stored = gain - 1
    if not bool(stored.abs().min() > 0):
        return
    tensors = _tensors(base.dictionary)
    for what, line, factor in (
        ("folded in as w instead of 1 + w", "W_enc *= (1 + w) / w", gain / stored),
        ("taken out as w instead of 1 + w", "W_enc *= w / (1 + w)", stored / gain),
    ):
        made = tensors | {"W_enc": tensors["W_enc"] * factor.to(tensors["W_enc"])[:, None]}
        yield base.then("folded norms", f"the norm's weight was {what}", line, _built(base.dictionary, made))


def _tensors(dictionary: Dictionary) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in dictionary.named_parameters()}


def _built(dictionary: Dictionary, tensors: dict[str, Tensor]) -> Dictionary:
    return build(dictionary.cfg, tensors)
