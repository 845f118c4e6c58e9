"""Names of the places in a model that a dictionary can read or write.

A site is its TransformerLens name (`blocks.9.hook_resid_post`); a kind is the short word for the
same place in any layer (`resid_post`); a layer range says which layers (`all`, `3-8`, `::2`).
"""

import difflib
import re

from sae.errors import UserError

_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "attn_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "ln2_normalized": "ln2.hook_normalized",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
"""Each kind's hook inside its block, in the order in which a block computes them."""

KINDS: tuple[str, ...] = tuple(_HOOKS)
"""resid_pre: the residual stream entering the block; attn_z: the heads' outputs, concatenated, before the
output projection; attn_out and mlp_out: what attention and MLP add to the residual stream (after their
post-norm, where the model has one); resid_mid: the residual stream between them; ln2_normalized: what the
MLP's norm gives before its learned weight (Gemma Scope 1's transcoders read it); mlp_in: what the MLP reads,
which is that times the weight (in Gemma times 1 + weight), plus the norm's bias where it has one; resid_post:
the residual stream leaving the block. TransformerLens's `hook_embed` is no layer's: where no positions are
added to the embeddings, as in Gemma, it is `blocks.0.hook_resid_pre`."""

_KIND_OF_HOOK = {hook: kind for kind, hook in _HOOKS.items()}
_SITE = re.compile(r"blocks\.(\d+)\.(.+)")
_SLICE = re.compile(r"(-?\d*):(-?\d*)(?::(-?\d*))?")
_RANGE = re.compile(r"(\d+)-(\d+)")


def parse_layers(spec: str, n_layers: int) -> tuple[int, ...]:
    """Layers named by `spec`, sorted, each once.

    `all`; `9`; `3-8` (both ends included); Python slices such as `::2` and `-4:`; and any of these joined by
    commas. Raises UserError for what cannot be read, for a layer the model does not have, and for an empty
    result.
    """
    layers: set[int] = set()
    for part in (piece.strip() for piece in spec.split(",")):
        layers.update(_layers_of(part, spec, n_layers))
    if not layers:
        raise UserError(
            "the layers must name at least one layer",
            f"{spec!r}, which names none of the {n_layers} layers",
            "ask for all, a number, or a range such as 3-8 or ::2",
        )
    return tuple(sorted(layers))


def expand_sites(kinds: str, layers: str, n_layers: int) -> tuple[str, ...]:
    """Site names for kinds and layers, sorted by layer and then in the order a block computes them.

    `kinds` is one kind or several joined by commas. A full TransformerLens name may stand among them: it is
    taken as it is, whatever `layers` says. Raises UserError for an unknown kind and for a layer out of range.
    """
    names = [name.strip() for name in kinds.split(",") if name.strip()]
    if not names:
        raise UserError(
            "the sites must name at least one kind", repr(kinds), f"choose from {', '.join(KINDS)}"
        )
    sites: set[str] = set()
    for name in names:
        if "." in name:
            layer = layer_of(name)
            if layer >= n_layers:
                raise _out_of_range(str(layer), name, n_layers)
            sites.add(name)
        elif name in _HOOKS:
            sites.update(site_name(layer, name) for layer in parse_layers(layers, n_layers))
        else:
            raise _unknown_kind(name)
    return tuple(sorted(sites, key=_order))


def site_name(layer: int, kind: str) -> str:
    """The site of one kind in one layer, for instance `blocks.9.hook_resid_post`."""
    if kind not in _HOOKS:
        raise _unknown_kind(kind)
    return f"blocks.{layer}.{_HOOKS[kind]}"


def layer_of(site: str) -> int:
    """The layer of a site. Raises UserError when it is no site name."""
    return _split(site)[0]


def kind_of(site: str) -> str:
    """The kind of a site. Raises UserError when it is no site name."""
    return _split(site)[1]


def site_label(site: str) -> str:
    """A short label for tables: `9 resid_post`."""
    layer, kind = _split(site)
    return f"{layer} {kind}"


def _split(site: str) -> tuple[int, str]:
    match = _SITE.fullmatch(site)
    if match is None or match[2] not in _KIND_OF_HOOK:
        names = [f"blocks.{match[1] if match else 0}.{hook}" for hook in _HOOKS.values()]
        raise UserError(
            "a site must be a TransformerLens name that jumpscope can read",
            repr(site),
            _hint(site, names) + f"the names are {', '.join(names)}",
        )
    return int(match[1]), _KIND_OF_HOOK[match[2]]


def _order(site: str) -> tuple[int, int]:
    layer, kind = _split(site)
    return layer, KINDS.index(kind)


def _layers_of(part: str, spec: str, n_layers: int) -> range:
    if part == "all":
        return range(n_layers)
    if part.isdecimal():
        first = last = int(part)
    elif match := _RANGE.fullmatch(part):
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise UserError("a range of layers must go upwards", repr(part), f"write {last}-{first}")
    elif match := _SLICE.fullmatch(part):
        start, stop, step = (int(number) if number else None for number in match.groups())
        if step is not None and step <= 0:
            raise UserError(
                "the step of a range of layers must be positive", repr(part), "write for instance ::2"
            )
        return range(n_layers)[start:stop:step]
    else:
        raise UserError(
            "layers must be all, a number, a range such as 3-8 or ::2, or several of these joined by commas",
            repr(spec),
            f"choose among 0 to {n_layers - 1}",
        )
    if last >= n_layers:
        raise _out_of_range(part, spec, n_layers)
    return range(first, last + 1)


def _out_of_range(layer: str, spec: str, n_layers: int) -> UserError:
    return UserError(
        f"layers must be between 0 and {n_layers - 1}: the model has {n_layers}",
        f"layer {layer} in {spec!r}",
        "choose among the layers that the model has",
    )


def _unknown_kind(name: str) -> UserError:
    return UserError(
        "a kind of site must be known", repr(name), _hint(name, KINDS) + f"the kinds are {', '.join(KINDS)}"
    )


def _hint(name: str, known: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}? Otherwise: " if close else ""
