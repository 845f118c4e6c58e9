"""Dictionaries on disk: saved in the layout of SAELens 6, opened from any format that is known."""

import logging
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from sae import dialects
from sae.dialects.saelens import write_folder
from sae.dictionary import Dictionary
from sae.files import make_folder
from sae.probe import Probe, differences, make_probe

_log = logging.getLogger(__name__)


def save(
    dictionary: Dictionary, path: Path | str, *, probe: Float[Tensor, "row d_in"] | Probe | None = None
) -> None:
    """Writes a dictionary's folder: cfg.json, sae_weights.safetensors, and where there is one, its probe.

    The probe is made of `probe`, some real activations; `sae.probe.make_probe` makes that of a transcoder.
    Without it the dictionary's own is saved again, of the same rows where the dictionary has changed since.
    """
    write_folder(dictionary, make_folder(path), _probe_for(dictionary, probe))


def load(path: Path | str, *, device: str = "cpu") -> Dictionary:
    """Opens a dictionary of any format that `sae.dialects` reads: a folder, a weights file or a hub id.

    On a CPU the weights of a safetensors file that needs nothing folded are the file itself, mapped into
    memory: what is not used takes none. Raises UserError when files are missing, torn, unsafe or do not fit
    each other, when a value is not finite, and when the dictionary does not compute what its probe says.
    """
    parts = dialects.read(path)
    for note in parts.notes:
        _log.info("%s: %s", parts.source, note)
    return parts.dictionary.to(device)


def _probe_for(dictionary: Dictionary, given: Float[Tensor, "row d_in"] | Probe | None) -> Probe | None:
    probe = dictionary.probe if given is None else given
    if isinstance(probe, Tensor):
        return make_probe(dictionary, probe)
    if probe is not None and differences(dictionary, probe):
        return make_probe(dictionary, probe.rows_in, probe.rows_out)
    return probe
