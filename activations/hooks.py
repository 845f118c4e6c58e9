"""Dictionaries in a TransformerLens model, through its own hooks: to watch latents, to replace, to edit."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from activations.edits import Addition, Edit
from activations.models import LanguageModel, special_ids
from activations.splice import put
from sae.dictionary import Dictionary
from sae.errors import UserError

Keep = Bool[Tensor, "batch pos"] | Callable[[Int[Tensor, "batch pos"]], Bool[Tensor, "batch pos"]]
"""Positions: a mask, or what makes one of the tokens of a forward pass."""

_TOKENS = "embed.hook_in"


class spliced:  # in lower case as torch.no_grad is: it is read as a statement
    """Within it, dictionaries stand at their sites in the model, whatever runs it.

        with spliced(bridge, dictionary, error_term=True, edit=ablate(123)) as at:
            logits = bridge(tokens)                 # or run_with_cache, run_with_hooks, generate
        at.latents[dictionary.cfg.site_out]         # [batch, pos, d_sae]

    Only hooks are added, by `bridge.hooks`, and removed at the end, after an error too.
    `bridge.run_with_hooks` takes them as well: `fwd_hooks=spliced(bridge, dictionary).fwd_hooks`.

    Without `error_term` the activation becomes the reconstruction. With it, what the dictionary misses is
    kept, which is done by adding nothing but what an edit changes: x + (edited - latents) W_dec, rounded once
    to the model's dtype. So a splice without an edit does not touch a bit, and ablating a latent takes away
    its activation times its row of W_dec, and nothing else, and steering by s adds s times its row.
    """

    latents: Mapping[str, Tensor]
    """Of the latest forward pass, by the site that is written: [batch, pos, d_sae], as the dictionary encodes
    them, before an edit; zero where nothing is spliced. They are computed whenever they are asked for: a pass
    keeps only what the dictionary reads, which is far smaller. With `gradients` they are in the graph."""
    fwd_hooks: list[tuple[str, Callable[..., Tensor | None]]]
    """Names of hook points and the functions for them, as `bridge.run_with_hooks` takes them."""

    def __init__(
        self,
        model: LanguageModel | TransformerBridge,
        dictionaries: Dictionary | Iterable[Dictionary],
        *,
        error_term: bool = False,
        edit: Edit | Mapping[str, Edit] | None = None,
        keep: Keep | str = "ordinary",
        gradients: bool = False,
    ) -> None:
        """Any number of dictionaries, transcoders too; a transcoder reads one site and is put in at another.

        `edit` gets a site's latents, a copy [batch, pos, d_sae], and returns them changed (or changes them in
        place): `activations.edits` has the usual ones. With several dictionaries it is a mapping from the
        sites that they write. `keep` says at which positions to splice: `ordinary` leaves out special tokens
        (BOS, EOS, padding), on which dictionaries are not trained; or `all`, a mask, or a function from the
        tokens of a pass to one. While a cache serves generation a pass has the new tokens alone, so that a
        mask will not do.

        With `gradients`, `latents` take part in the graph: after `loss.backward()` each has its `grad`, and
        `torch.autograd.grad(loss, list(at.latents.values()))` works: the loss's slope where the error stays
        as it is. Other gradients are those of the spliced model.

        The dictionary may have another dtype or device than the model; a pass leaves the model's.

        Raises UserError for a site that the model does not have, or that two dictionaries write, and for an
        edit at a site that none writes; a forward pass raises it for a wrong width or shape.
        """
        self._bridge = model.bridge if isinstance(model, LanguageModel) else model
        many = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
        points: dict[str, Any] = self._bridge.hook_dict
        written = [_point(points, made.cfg.site_out).name for made in many]
        if twice := sorted({name for name in written if written.count(name) > 1}):
            must = "a site can be written by one dictionary only"
            raise UserError(must, f"several at {', '.join(twice)}", "leave all but one of them out")
        edits = _edits([made.cfg.site_out for made in many], edit)
        where = _where(model, keep)
        stored: dict[str, Callable[[], Tensor]] = {}
        splices = [
            _Splice(made, where, stored, edits.get(made.cfg.site_out), error_term, gradients) for made in many
        ]
        self.latents = _Latents(stored)
        # a point's own name: for another one, a bridge in compatibility mode calls the function twice
        hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
        if callable(where):
            hooks.append((_point(points, _TOKENS).name, partial(_see, splices)))
        # at one site what is written comes first, since that is what the rest of the model reads there
        hooks += [(name, splice.write) for name, splice in zip(written, splices, strict=True)]
        hooks += [
            (_point(points, s.cfg.site_in).name, s.read) for s in splices if not s.reads_where_it_writes
        ]
        self.fwd_hooks = hooks
        self._open: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> "spliced":
        hooks = self._bridge.hooks(fwd_hooks=self.fwd_hooks)
        hooks.__enter__()
        self._open.append(hooks)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.pop().__exit__(kind, error, trace)


class _Splice:
    """One dictionary's way through a forward pass: reads at one site, writes at another or the same."""

    def __init__(
        self,
        dictionary: Dictionary,
        keep: Keep | None,
        stored: dict[str, Callable[[], Tensor]],
        edit: Edit | None,
        error_term: bool,
        gradients: bool,
    ) -> None:
        self.dictionary, self.cfg = dictionary, dictionary.cfg
        self.reads_where_it_writes = self.cfg.site_in == self.cfg.site_out
        self.positions = _Positions(keep)
        self._stored, self._edit = stored, edit
        self._error_term, self._gradients = error_term, gradients
        self._read: Tensor | None = None

    def read(self, activation: Tensor, hook: object) -> None:
        """Keeps what the dictionary reads until it writes."""
        self._read = _rows(activation, self.cfg.d_in, self.cfg.site_in)

    def write(self, activation: Tensor, hook: object) -> Tensor | None:
        """The activation that takes the place of this one; None where it stays as it is."""
        x_out = _rows(activation, self.cfg.d_out, self.cfg.site_out)
        x_in = x_out if self.reads_where_it_writes else self._read
        self._read = None
        if x_in is None:
            raise UserError(
                f"{self.cfg.site_in} must be computed before {self.cfg.site_out}",
                "the forward pass did not come by it",
                "check the dictionary's site_in and site_out",
            )
        made = self._output(x_in.to(self.dictionary.W_enc.device), x_out)
        return None if made is None else put(self.cfg.site_out, activation, made.reshape(activation.shape))

    def _output(
        self, x_in: Float[Tensor, "batch pos d_in"], x_out: Float[Tensor, "batch pos d_out"]
    ) -> Float[Tensor, "batch pos d_out"] | None:
        dictionary = self.dictionary
        keep = self.positions.mask(x_in)
        self._stored[self.cfg.site_out] = partial(self._encode_later, x_in.detach(), keep)
        if self._error_term and self._edit is None and not self._gradients:
            return None
        if self._error_term and isinstance(self._edit, Addition) and not self._gradients:
            # without going by the activations: (a + s) - a is s only to rounding
            added = self._edit.written(dictionary.W_dec).to(x_out.device)
            return (x_out + (added if keep is None else torch.where(keep.to(added.device), added, 0))).to(
                x_out.dtype
            )
        encoded = self._encode(x_in, keep)
        latents = self._recorded(encoded) if self._gradients else encoded
        edited = self._edited(latents)
        if self._error_term:
            change = edited - encoded
            written = _written(dictionary, change if keep is None else torch.where(keep, change, 0))
            return (x_out + written.to(x_out.device)).to(x_out.dtype)
        made = (dictionary.decode(edited) + dictionary.skip(x_in)).to(x_out)
        return made if keep is None else torch.where(keep.to(x_out.device), made, x_out)

    def _encode(
        self, x_in: Float[Tensor, "batch pos d_in"], keep: Bool[Tensor, "batch pos 1"] | None
    ) -> Float[Tensor, "batch pos d_sae"]:
        encoded = self.dictionary.encode(x_in)
        return encoded if keep is None else torch.where(keep, encoded, 0)

    @torch.no_grad()
    def _encode_later(
        self, x_in: Float[Tensor, "batch pos d_in"], keep: Bool[Tensor, "batch pos 1"] | None
    ) -> Float[Tensor, "batch pos d_sae"]:
        return self._encode(x_in, keep)

    def _recorded(self, encoded: Float[Tensor, "batch pos d_sae"]) -> Float[Tensor, "batch pos d_sae"]:
        """The latents as a node of the graph of their own, which takes a gradient, and stores them."""
        if not torch.is_grad_enabled():
            raise UserError(
                "gradients need torch to record the forward pass", "no_grad or inference_mode", "leave it"
            )
        if encoded.requires_grad:
            latents = encoded.clone()
            latents.retain_grad()
        else:
            latents = encoded.detach().requires_grad_()
        self._stored[self.cfg.site_out] = lambda: latents
        return latents

    def _edited(self, latents: Float[Tensor, "batch pos d_sae"]) -> Float[Tensor, "batch pos d_sae"]:
        if self._edit is None:
            return latents
        copy = latents.clone()
        made = self._edit(copy)
        made = copy if made is None else made
        if made.shape != latents.shape:
            must = f"an edit at {self.cfg.site_out} must keep the shape of the latents"
            raise UserError(must, f"{tuple(made.shape)} for {tuple(latents.shape)}", "return all latents")
        return made


class _Positions:
    """Where to splice, pass by pass."""

    def __init__(self, keep: Keep | None) -> None:
        self._keep: Any = keep
        self.tokens: Tensor | None = None

    def mask(self, x: Float[Tensor, "batch pos d_in"]) -> Bool[Tensor, "batch pos 1"] | None:
        """The positions of this pass, on the device of `x`; None for all."""
        if self._keep is None:
            return None
        # each pass brings its own: those of an earlier one must not serve a pass without tokens
        tokens, self.tokens = self.tokens, None
        if isinstance(self._keep, Tensor):
            mask, do = self._keep, "give a function of the tokens: generation runs on the new ones alone"
        elif tokens is None:
            raise UserError(
                "which positions are special is known from the tokens",
                "a forward pass that was not given tokens",
                "give a mask as keep, or keep='all'",
            )
        else:
            mask, do = self._keep(tokens), "check keep, and that the pass was given tokens"
        if mask.shape != x.shape[:2]:
            found = f"{tuple(mask.shape)} for {tuple(x.shape[:2])}"
            raise UserError("keep must have a value for each position of the pass", found, do)
        return mask.to(device=x.device, dtype=torch.bool)[..., None]


class _Ordinary:
    """Marks the tokens that are not special."""

    def __init__(self, model: LanguageModel | TransformerBridge) -> None:
        ids: Sequence[int] = ()
        if isinstance(model, LanguageModel):
            ids = model.special_ids
        elif model.tokenizer is not None:
            ids = special_ids(model.tokenizer)
        self._special = torch.tensor(ids, dtype=torch.long)

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        return ~torch.isin(tokens, self._special.to(tokens.device))


class _Latents(Mapping[str, Tensor]):
    """Latents by site, computed when they are asked for."""

    def __init__(self, stored: dict[str, Callable[[], Tensor]]) -> None:
        self._stored = stored

    def __getitem__(self, site: str) -> Tensor:
        return self._stored[site]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _edits(sites: Sequence[str], edit: Edit | Mapping[str, Edit] | None) -> Mapping[str, Edit]:
    """The edits by site, once it is sure that they go with the sites that are written."""
    if edit is None:
        return {}
    if not isinstance(edit, Mapping):
        if len(sites) != 1:
            must = "with several dictionaries an edit must say its site"
            raise UserError(must, f"one edit for {len(sites)} dictionaries", "give {site: edit}")
        return {sites[0]: edit}
    if unknown := sorted(set(edit) - set(sites)):
        must = "an edit must be at a site that a dictionary writes"
        raise UserError(must, ", ".join(unknown), f"the sites are {', '.join(sites)}")
    return edit


def _where(model: LanguageModel | TransformerBridge, keep: Keep | str) -> Keep | None:
    """The positions to splice at; None for all."""
    if not isinstance(keep, str):
        return keep
    if keep not in ("ordinary", "all"):
        must = "keep must be ordinary, all, a mask or a function of the tokens"
        raise UserError(must, repr(keep), "choose one of them")
    return _Ordinary(model) if keep == "ordinary" else None


def _point(points: Mapping[str, Any], site: str) -> Any:
    if site not in points:
        close = ", ".join(difflib.get_close_matches(site, points, n=3, cutoff=0.7))
        raise UserError(
            "a dictionary's sites must be hook points of the model",
            repr(site),
            f"{f'did you mean {close}? ' if close else ''}Set site_in and site_out in the dictionary's cfg",
        )
    return points[site]


def _see(splices: Sequence[_Splice], tokens: Tensor, hook: object) -> None:
    """The tokens of the pass that begins."""
    for splice in splices:
        splice.positions.tokens = tokens


def _rows(activation: Tensor, width: int, site: str) -> Float[Tensor, "batch pos width"]:
    """The activation with its heads concatenated, where the model keeps them apart."""
    # a copy: a site may be written in place, by another splice too, and what was there is still asked for
    activation = activation.flatten(-2).clone() if activation.ndim == 4 else activation.clone()
    if activation.shape[-1] != width:
        raise UserError(
            f"the dictionary must be as wide as the activation at {site}",
            f"{width} for {activation.shape[-1]}",
            "check that it belongs to this model",
        )
    return activation


def _written(
    dictionary: Dictionary, change: Float[Tensor, "batch pos d_sae"]
) -> Float[Tensor, "batch pos d_out"]:
    """What a change of the latents adds to the output."""
    if change.requires_grad:
        return change @ dictionary.W_dec
    # an edit changes few latents: the product with the others would be most of the work
    changed = change.flatten(0, -2).any(0).nonzero()[:, 0]
    return change[..., changed] @ dictionary.W_dec[changed]
