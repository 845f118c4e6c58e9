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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from activations.ranks import Ranks, alone
from sae.errors import UserError
from sae.files import (
    disk_errors,
    load_tensors,
    make_folder,
    read_json,
    save_tensors,
    sha256_file,
    sync_folder,
    write_json,
)
from train.together import by_first, together

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
    run: Path,
    step: int,
    sites: Iterable[tuple[str, Mapping[str, Tensor]]],
    state: Mapping[str, Any],
    *,
    ranks: Ranks | None = None,
    join: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]] = lambda states: states[0],
) -> None:
    """Writes a checkpoint beside the others, gives it its name, and removes all but the newest two.

    Each of the `ranks` gives the `sites` that it owns and its `state`, of which `join` makes one; rank 0
    names the folder once all files are there. A step's checkpoint that is there already is left as it is.
    Raises UserError or OSError when the disk refuses one of them; the older ones are untouched then.
    """
    ranks = ranks or alone()
    folder = run / CHECKPOINTS
    target, partial = folder / f"step_{step}", folder / f".step_{step}.partial"
    if by_first(ranks, "a checkpoint's folder", lambda: _begin(run, target, partial)):
        return
    try:
        parts = together(ranks, "a checkpoint's files", lambda: [_write_sites(partial, sites), dict(state)])
        by_first(ranks, "a checkpoint's end", lambda: _finish(target, partial, step, parts, join))
    except BaseException:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _begin(run: Path, target: Path, partial: Path) -> bool:
    """Makes the folder to fill; returns whether the checkpoint is there already."""
    make_folder(partial.parent)
    sweep(run)
    if target.exists():
        return True
    with disk_errors(partial):
        partial.mkdir()
    return False


def _write_sites(partial: Path, sites: Iterable[tuple[str, Mapping[str, Tensor]]]) -> dict[str, str]:
    """Writes a file for each site; returns their checksums, by name."""
    digests = {}
    for site, tensors in sites:
        path = partial / f"{site}.safetensors"
        save_tensors(path, tensors)
        digests[path.name] = sha256_file(path)
    return digests


def _finish(
    target: Path,
    partial: Path,
    step: int,
    parts: Sequence[Sequence[Mapping[str, Any]]],
    join: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
) -> None:
    files = {name: digest for digests, _ in parts for name, digest in digests.items()}
    body = {"format": FORMAT, "step": step, **join([state for _, state in parts])}
    body["files"] = dict(sorted(files.items()))
    with disk_errors(partial):
        write_json(partial / STATE, {**body, "sha256": _digest(body)})
        partial.rename(target)
        sync_folder(target.parent)
    for old in _by_step(target.parent.parent)[KEPT:]:
        _remove(old)


def at_step(run: Path, step: int) -> Checkpoint:
    """The checkpoint of that step, which rank 0 has found to be whole."""
    state = read_json(run / CHECKPOINTS / f"step_{step}" / STATE)
    return Checkpoint(run / CHECKPOINTS / f"step_{step}", state)


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
