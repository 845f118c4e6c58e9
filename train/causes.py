"""The usual causes of a dictionary that does not fit: each a change that puts it right, if it is the one."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from activations.models import LanguageModel
from activations.sites import KINDS, kind_of, layer_of, site_name
from sae.architectures import build
from sae.dialects.parts import shift_input
from sae.dictionary import Dictionary
from train.fit import PER_TOKEN, Site, Text, scaled

# norms that differ by less than this are all the same
_EVEN = 1e-3
# numbers of latents that a top-k gate of unknown k is tried with
_KS = (8, 16, 32, 64, 128, 256, 512)


Change = Callable[[Dictionary], Dictionary]


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
    make: Callable[[], Dictionary]
    """Makes the dictionary with the change; its config may still name the old sites. Candidates are many and
    dictionaries large, so none is kept."""
    site: Site
    """Where it reads and writes."""
    text: Text = "BOS"
    reading: str = ""
    """A normalisation of each row that stands before and after the dictionary (`train.fit.per_token`)."""
    stands_in: int = 0
    """Above 0 for what resembles the right dictionary and is not it: believed only where nothing lower is."""

    def put_right(self) -> Dictionary | None:
        """The dictionary with the change made, config included; None where no weights can make it."""
        if self.reading:
            return None
        made = self.make()
        cfg = dataclasses.replace(
            made.cfg, site_in=self.site[0], site_out=self.site[1], prepend_bos=self.text != "no BOS"
        )
        return build(cfg, tensors_of(made))

    def then(self, cause: str, what: str, remedy: str, change: Change, stands_in: int = 0) -> "Candidate":
        """The same with another change to the weights on top."""
        return dataclasses.replace(
            self,
            causes=(*self.causes, cause),
            what=f"{self.what}, and {what}" if self.causes else what,
            remedy=f"{self.remedy}; {remedy}" if self.causes else remedy,
            make=lambda: change(self.make()),
            stands_in=max(self.stands_in, stands_in),
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
    seen, chosen = {(_named(claimed[0]), _named(claimed[1]))}, []
    for reads, writes in places:
        pair = _named(reads), _named(writes)
        if _fits(pair, cfg.d_in, cfg.d_out, known) and pair not in seen:
            seen.add(pair)
            chosen.append(pair)
    return chosen


def _named(site: str) -> str:
    """One name for each tensor: the residual stream entering a layer is what left the one below."""
    entering = kind_of(site) == "resid_pre" and layer_of(site) > 0
    return site_name(layer_of(site) - 1, "resid_post") if entering else site


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
                stands_in=2,
            )
    if base.site[0] == base.site[1] and not base.make().cfg.skip:
        for kind in PER_TOKEN:
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
    cfg, bias = (made := base.make()).cfg, made.b_dec
    if cfg.d_in != cfg.d_out or not bias.any():
        return
    for sign, what, flag in (
        (-1, "b_dec has to be subtracted from its input", "true"),
        (1, "b_dec was subtracted from its input and must not be", "false"),
    ):
        change = functools.partial(_shifted, sign=sign)
        yield base.then("b_dec", what, f"apply_b_dec_to_input: {flag}", change)


def _shifted(dictionary: Dictionary, sign: int) -> Dictionary:
    tensors = tensors_of(dictionary)
    return build(dictionary.cfg, shift_input(tensors, sign, "the dictionary"))


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
        lambda dictionary: scaled(dictionary, factor),
    )


def gates(base: Candidate, l0: float | None) -> Iterator[Candidate]:
    """With another gate: relu, log thresholds, top-k (of `l0`, or of several where that is unknown)."""
    made = base.make()
    cfg = made.cfg
    if cfg.architecture == "gated":
        return
    if cfg.architecture != "relu":
        yield base.then("gate", "its gate is a plain relu", "architecture: relu", lambda d: _gated(d, "relu"))
    if cfg.architecture == "jumprelu" and bool((tensors_of(made)["threshold"] < 0).any()):
        yield base.then("gate", "its thresholds are logarithms", "threshold = exp(threshold)", _exponentiated)
    known = cfg.k or round(l0 or 0)
    for k in (known,) if known else _KS:
        if 0 < k < cfg.d_sae and (cfg.architecture, cfg.k) != ("topk", k):
            lost = "k is wrong" if cfg.architecture == "topk" else "thresholds are missing or wrong"
            yield base.then(
                "gate",
                f"its {lost}: the {k} largest of each row do",
                f"take the thresholds of another copy, or architecture: topk, k: {k}",
                lambda dictionary, k=k: _gated(dictionary, "topk", k),
                stands_in=1,
            )


def _gated(dictionary: Dictionary, architecture: str, k: int = 0) -> Dictionary:
    plain = {name: tensor for name, tensor in tensors_of(dictionary).items() if name != "threshold"}
    return build(dataclasses.replace(dictionary.cfg, architecture=architecture, k=k), plain)


def _exponentiated(dictionary: Dictionary) -> Dictionary:
    return _with(dictionary, threshold=tensors_of(dictionary)["threshold"].exp())


def _norms(base: Candidate) -> Iterator[Candidate]:
    made = base.make()
    norms = made.W_dec.norm(dim=1)
    if not bool((norms > 0).all()) or float(norms.max() / norms.min()) < 1 + _EVEN:
        return
    enc = ("W_enc", "b_enc") if made.gate_bias == "b_enc" else ("W_enc",)
    # what is multiplied by the norms, and what is divided
    changes: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "the decoder's norms count twice": ((), ("W_dec",)),
        "the decoder's norms are missing in the encoder": (enc, ()),
    }
    if "threshold" in tensors_of(made):
        changes |= {
            "the thresholds are in units of the decoder's norms": (("threshold",), ()),
            "the thresholds have the decoder's norms in them": ((), ("threshold",)),
        }
    else:  # with thresholds it would be the same as dividing them
        changes["latents are compared in units of the decoder's norms"] = enc, ("W_dec",)
    for what, (times, over) in changes.items():
        change = functools.partial(_renormed, times=times, over=over)
        line = [f"{', '.join(times)} *= norms"] * bool(times) + [f"{', '.join(over)} /= norms"] * bool(over)
        yield base.then("folded norms", what, f"{', '.join(line)}, where norms = W_dec.norm(dim=1)", change)


def _renormed(dictionary: Dictionary, times: tuple[str, ...], over: tuple[str, ...]) -> Dictionary:
    tensors = tensors_of(dictionary)
    norms = dictionary.W_dec.norm(dim=1)
    made = {name: tensors[name] * norms for name in times}
    # the decoder's latents are its rows
    made |= {name: tensors[name] / (norms[:, None] if name == "W_dec" else norms) for name in over}
    return _with(dictionary, **made)


def _transposed(base: Candidate) -> Iterator[Candidate]:
    tensors = tensors_of(base.make())
    square = {name for name in ("W_enc", "W_dec") if tensors[name].shape[0] == tensors[name].shape[1]}
    for names in (("W_enc",), ("W_dec",), ("W_enc", "W_dec")):
        if square.issuperset(names):
            said = " and ".join(names)
            yield base.then(
                "transposed",
                f"{said} {'are' if len(names) > 1 else 'is'} transposed",
                f"transpose {said}",
                lambda dictionary, names=names: _turned(dictionary, *names),
            )


def _turned(dictionary: Dictionary, *names: str) -> Dictionary:
    return _with(dictionary, **{name: tensors_of(dictionary)[name].T.contiguous() for name in names})


def _skips(base: Candidate) -> Iterator[Candidate]:
    cfg = base.make().cfg
    if not cfg.skip:
        return
    if cfg.d_in == cfg.d_out:
        what = "W_skip is transposed: x A, not x A^T"
        yield base.then("skip", what, "transpose W_skip", lambda dictionary: _turned(dictionary, "W_skip"))
    yield base.then("skip", "W_skip must be left out", "leave W_skip out", _without_skip)


def _without_skip(dictionary: Dictionary) -> Dictionary:
    tensors = {name: tensor for name, tensor in tensors_of(dictionary).items() if name != "W_skip"}
    return build(dataclasses.replace(dictionary.cfg, skip=False), tensors)


def _centred(base: Candidate) -> Iterator[Candidate]:
    """For models whose weights were centred: what a row shares over its coordinates passes it by."""
    if not base.make().cfg.skip and base.site[0] == base.site[1]:
        yield base.then(
            "centring",
            "it was trained on a residual stream that is centred (TransformerLens's center_writing_weights)",
            "subtract each row's mean over coordinates before it and add it after",
            _around_the_mean,
        )


def _around_the_mean(dictionary: Dictionary) -> Dictionary:
    W_enc, d = dictionary.W_enc, dictionary.cfg.d_in
    around = torch.full((d, d), 1 / d, dtype=W_enc.dtype, device=W_enc.device)
    tensors = tensors_of(dictionary) | {"W_enc": W_enc - W_enc.mean(0), "W_skip": around}
    return build(dataclasses.replace(dictionary.cfg, skip=True), tensors)


def norm_weight(base: Candidate, gain: Float[Tensor, " d_in"]) -> Iterator[Candidate]:
    """For a dictionary beside a norm that multiplies by `gain`, which Gemma stores as gain - 1.

    Taking the stored weight for the whole is the usual slip of who folds such a norm into an encoder.
    """
    stored = gain - 1
    for what, line, factor in (
        ("folded in as w instead of 1 + w", "W_enc *= (1 + w) / w", gain / stored),
        ("taken out as w instead of 1 + w", "W_enc *= w / (1 + w)", stored / gain),
    ):
        # a coordinate that is 0 in all rows tells no weight, and needs none
        known = factor.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)
        change = functools.partial(_weighted, factor=known)
        yield base.then("folded norms", f"the norm's weight was {what}", line, change)


def _weighted(dictionary: Dictionary, factor: Float[Tensor, " d_in"]) -> Dictionary:
    W_enc = dictionary.W_enc
    return _with(dictionary, W_enc=W_enc * factor.to(W_enc)[:, None])


def tensors_of(dictionary: Dictionary) -> dict[str, Tensor]:
    """A dictionary's tensors by name."""
    return {name: tensor.detach() for name, tensor in dictionary.named_parameters()}


def _with(dictionary: Dictionary, **changed: Tensor) -> Dictionary:
    return build(dictionary.cfg, tensors_of(dictionary) | changed)
