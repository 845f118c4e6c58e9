"""Dictionaries as live objects of the package sae-lens, and back."""

from pathlib import Path
from typing import Any

from sae.dialects import saelens
from sae.dialects.found import Found
from sae.dictionary import Dictionary
from sae.errors import UserError


def to_saelens(dictionary: Dictionary) -> Any:
    """The `sae_lens` object of a dictionary: JumpReLUSAE, StandardSAE, TopKSAE, GatedSAE or a transcoder.

    It is what `sae_lens.SAE.load_from_disk` makes of the folder that `sae.save` writes, with config and
    metadata, but on the dictionary's device, and its tensors are the dictionary's own, not copies;
    gradients are off. A batchtopk dictionary becomes the jumprelu one that it equals. At `hook_z` the object
    wants heads apart, [..., head, d_head], as SAELens's own do.

    Raises UserError when sae-lens is not installed, and for transcoders of an architecture that it lacks.
    """
    registry = _installed().registry.SAE_CLASS_REGISTRY
    config = saelens.config_of(dictionary)
    name = config["architecture"]
    if name not in registry:
        raise UserError(
            "sae-lens must have a class for the dictionary",
            f"{name}: it has {', '.join(sorted(registry))}",
            "go on with the dictionary itself; activations.hooks.spliced puts it into a model",
        )
    made_class, config_class = registry[name]
    # on no device at first: it would fill weights of its own
    made = made_class(config_class.from_dict(config | {"device": "meta"}))
    made.load_state_dict(saelens.tensors_of(dictionary), assign=True)
    device = dictionary.W_enc.device
    made.cfg.device, made.device = str(device), device
    return made.requires_grad_(False).eval()


def from_saelens(theirs: Any) -> Dictionary:
    """The dictionary of a live SAELens object, its input bias, scales and decoder norms folded in.

    Tensors that need no folding are shared. Raises UserError for what is no such object, and as `sae.load`
    does for the same object on disk: an architecture or a normalisation that has no equal here.
    """
    if not isinstance(theirs, _installed().SAE):
        must = "from_saelens takes an sae_lens.SAE"
        raise UserError(must, type(theirs).__name__, "sae.load opens folders and hub ids")
    label = f"a live {type(theirs).__name__}"
    found = Found(
        # in a folder that is not there, so that nobody's probe lies beside it
        path=Path(label) / saelens.WEIGHTS,
        kind="safetensors",
        tensors=theirs.state_dict(),
        config=theirs.cfg.to_dict(),
        label=label,
    )
    return saelens.read(found).dictionary


def _installed() -> Any:
    try:
        import sae_lens
        import sae_lens.registry
    except ImportError as error:
        raise UserError(
            "sae-lens must be installed to use its objects", str(error), "pip install 'sae-lens>=6.54,<7'"
        ) from error
    return sae_lens
