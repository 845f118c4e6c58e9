"""Checkpoints: all that a run needs to go on exactly, in folders that are whole or are not there.

RUN/checkpoints/step_N/
  SITE.safetensors   every tensor of a site: weights, both moments, counters, sums since the last logging
  state.json         step, place in the order of the rows, numbers of each site, config, versions, checksums

No generator's state is kept, for none is used after the start: orders are hashes of (seed, position).
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.errors import UserError
from sae.files import disk_errors, make_folder, read_json, sha256_file, sync_folder, write_json
from sae.tensor_files import load_tensors, save_tensors

_log = logging.getLogger(__name__)

CHECKPOINTS, STATE = "checkpoints", "state.json"
FORMAT = 1
KEPT = 2


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps made when it was written."""
        return self.state["step"]

    def tensors(self, site: str) -> dict[str, Tensor]:
        """Every tensor of a site, on the CPU."""
        return load_tensors(self.path / f"{site}.safetensors")


def write_checkpoint(
    run: Path, step: int, sites: Iterable[tuple[str, Mapping[str, Tensor]]], state: Mapping[str, Any]
) -> None:
    """Writes a checkpoint beside the others, gives it its name, and removes all but the newest two.

    A step's checkpoint that is there already is left as it is. Raises UserError or OSError when the disk
    refuses; the older ones are untouched then.
    """
    folder = make_folder(run / CHECKPOINTS)
    sweep(run)
    target, partial = folder / f"step_{step}", folder / f".step_{step}.partial"
    if target.exists():
        return
    try:
        with disk_errors(partial):
            partial.mkdir()
            for site, tensors in sites:
                save_tensors(partial / f"{site}.safetensors", tensors)
            files = {path.name: sha256_file(path) for path in sorted(partial.iterdir())}
            body = {"format": FORMAT, "step": step, **state, "files": files}
            write_json(partial / STATE, {**body, "sha256": _digest(body)})
            partial.rename(target)
            sync_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in _by_step(run)[KEPT:]:
        _remove(old)


def newest_whole(run: Path) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold; None when the run never wrote one.

    Newer ones that are torn are named in a warning and removed. Raises UserError when none is whole, or when
    a newer version of this program wrote one.
    """
    torn: list[tuple[Path, str]] = []
    for path in _by_step(run):
        found = _read(path)
        if isinstance(found, Checkpoint):
            for bad, why in torn:
                _log.warning("%s is torn (%s) and removed; the run goes on from %s", bad, why, path.name)
                _remove(bad)
            return found
        torn.append((path, found))
    if torn:
        raise UserError(
            "the run must have a whole checkpoint",
            "; ".join(f"{path}: {why}" for path, why in torn),
            f"restore one from a copy, or delete {run / CHECKPOINTS} to begin again",
        )
    return None


def newest_step(run: Path) -> int | None:
    """Step of the newest checkpoint, whole or not; None when there is none."""
    return next((_step(path) for path in _by_step(run)), None)


def remove_checkpoints(run: Path) -> None:
    """Removes all checkpoints of a run that is done."""
    if (run / CHECKPOINTS).is_dir():
        _remove(run / CHECKPOINTS)


def sweep(run: Path) -> None:
    """Removes what a killed process left half written or half removed."""
    for path in (*run.glob(".checkpoints.old"), *(run / CHECKPOINTS).glob(".*")):
        shutil.rmtree(path, ignore_errors=True)


def _by_step(run: Path) -> list[Path]:
    """The checkpoints that have their name, newest first."""
    found = [
        path for path in (run / CHECKPOINTS).glob("step_*") if path.name.removeprefix("step_").isdecimal()
    ]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _read(path: Path) -> Checkpoint | str:
    """The checkpoint, or what is wrong with it."""
    try:
        state = read_json(path / STATE)
    except UserError as error:
        return f"{STATE}: {error.found}"
    if not isinstance(state, dict) or state.pop("sha256", None) != _digest(state):
        return f"{STATE}: its checksum does not hold"
    if state["format"] > FORMAT:
        raise UserError(
            f"this program reads checkpoints of format {FORMAT}",
            f"format {state['format']} in {path}",
            "update jumpscope",
        )
    for name, digest in state["files"].items():
        if not (path / name).is_file():
            return f"no {name}"
        if sha256_file(path / name) != digest:
            return f"{name}: its checksum does not hold"
    return Checkpoint(path, state)


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _remove(path: Path) -> None:
    # renamed first, so that a folder that is half gone is never taken for a whole one
    gone = path.with_name(f".{path.name.lstrip('.')}.old")
    shutil.rmtree(gone, ignore_errors=True)
    with disk_errors(path):
        path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
