"""All that a training run leaves behind, and where each piece lies (DESIGN.md, "A run folder").

The viewer reads runs through this module alone, so it imports nothing of the training itself.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from sae.errors import UserError
from sae.files import append_whole, disk_errors, make_folder, read_json, write_json

_log = logging.getLogger(__name__)

RUN, METRICS, RANKS, EVAL, LOCK = "run.json", "metrics.jsonl", "ranks.jsonl", "eval.json", ".lock"
FORMAT = 1
_VERSIONS = ("jumpscope", "torch", "transformers", "transformer-lens")


class RunFolder:
    """A run's folder on disk. `create` makes one, `open` reads one; both raise UserError."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self._record = record

    @classmethod
    def create(
        cls, path: Path | str, config: Mapping[str, Any], *, sites: list[str], device: str
    ) -> "RunFolder":
        """Makes a new run folder. Refuses a folder that holds anything."""
        path = Path(path)
        refuse_occupied(path)
        make_folder(path)
        record = {
            "format": FORMAT,
            "config": dict(config),
            "sites": list(sites),
            "device": device,
            "state": "running",
            "git_commit": git_commit(),
            "versions": versions(),
        }
        run = cls(path, record)
        # of a run that was killed before it had this first file
        run.sweep()
        run._write()
        return run

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """Opens a run folder. Refuses one that a newer version wrote."""
        path = Path(path)
        if not (path / RUN).is_file():
            raise UserError(
                f"a run folder must hold {RUN}",
                f"none in {path}",
                "give the folder that `jumpscope train --out` made",
            )
        record = read_json(path / RUN)
        if not isinstance(record, dict) or record.get("format", 0) > FORMAT:
            found = record.get("format") if isinstance(record, dict) else type(record).__name__
            raise UserError(
                f"{path / RUN} must be of format {FORMAT} or older", f"{found}", "update jumpscope"
            )
        return cls(path, record)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    def config(self) -> dict[str, Any]:
        """The resolved training config."""
        return dict(self._record["config"])

    def record(self) -> dict[str, Any]:
        """All of run.json: config, sites, device, state, versions, git commit and the run's totals."""
        return dict(self._record)

    def sites(self) -> list[str]:
        """The sites trained, in layer order."""
        return list(self._record["sites"])

    def state(self) -> str:
        """`running`, `done`, `stopped: why` or `failed: why`."""
        return self._record["state"]

    def set_state(self, state: str, **totals: Any) -> None:
        """Records how the run stands, with any totals (steps, rows, seconds) beside it."""
        self._record.update(state=state, **totals)
        self._write()

    def site_dir(self, site: str) -> Path:
        """Folder of a site's dictionary: cfg.json and sae_weights.safetensors."""
        return self.path / "sites" / site

    @property
    def index_root(self) -> Path:
        """Folder of the feature index of all sites."""
        return self.path / "index"

    def index_dir(self, site: str) -> Path:
        """Folder of a site's feature index."""
        return self.index_root / site

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Appends lines to metrics.jsonl: all of them, or none when the disk refuses."""
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        append_whole(self.path / METRICS, text.encode())

    def log_ranks(self, line: dict[str, Any]) -> None:
        """Appends a line to ranks.jsonl: where the ranks of a run under torchrun spent their time."""
        append_whole(self.path / RANKS, (json.dumps(line, allow_nan=False) + "\n").encode())

    def sync_metrics(self) -> int:
        """Makes metrics.jsonl last as it stands; returns its bytes."""
        path = self.path / METRICS
        with disk_errors(path), path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def cut_metrics(self, n_bytes: int) -> None:
        """Takes metrics.jsonl back to an earlier length, and says so if it is shorter than that already."""
        path = self.path / METRICS
        with disk_errors(path), path.open("ab") as file:
            if file.tell() < n_bytes:
                _log.warning("%s has lost lines: %d bytes instead of %d", path, file.tell(), n_bytes)
            else:
                file.truncate(n_bytes)

    def metrics(self) -> pd.DataFrame:
        """metrics.jsonl, a row per logging step and site; a last line cut short by a kill is left out."""
        path = self.path / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        rows = []
        for number, line in enumerate(lines):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                if number < len(lines) - 1:
                    raise UserError(
                        f"{path} must hold a line of JSON per row",
                        f"line {number + 1}: {error}",
                        "restore the file",
                    ) from error
        return pd.DataFrame(rows)

    def metrics_stamp(self) -> tuple[int, int]:
        """What changes when metrics.jsonl does: its time and its bytes."""
        path = self.path / METRICS
        if not path.is_file():
            return 0, 0
        status = path.stat()
        return status.st_mtime_ns, status.st_size

    def write_eval(self, table: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes eval.json: {site: {metric: value}}."""
        write_json(self.path / EVAL, table)

    def eval_table(self) -> dict[str, dict[str, Any]]:
        """Held-out metrics by site; empty when `jumpscope eval` has not run yet."""
        return read_json(self.path / EVAL) if (self.path / EVAL).is_file() else {}

    def sweep(self) -> None:
        """Removes temporary files that a killed process left."""
        for pattern in (".*.tmp", "sites/*/.*.tmp"):
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)

    def _write(self) -> None:
        write_json(self.path / RUN, self._record)


@contextlib.contextmanager
def hold(path: Path | str, doing: str = "training into") -> Iterator[None]:
    """Makes this process the only one that works on a folder, which is made if need be; `doing` says what.

    The system lets go of it when the process ends, however it ends. Raises UserError at once when another
    process holds it.
    """
    lock = FileLock(make_folder(path) / LOCK, timeout=0)
    try:
        with disk_errors(path):
            lock.acquire()
    except Timeout:
        raise UserError(
            "a folder must be written by one process at a time",
            f"another one is {doing} {path}",
            "wait for it, stop it, or choose another --out",
        ) from None
    try:
        yield
    finally:
        lock.release()


def refuse_occupied(path: Path | str) -> None:
    """Raises UserError when something stands where a run folder is to be made."""
    path = Path(path)
    if (path / RUN).is_file():
        raise UserError(
            "--out must be a new folder",
            f"{path} holds another run",
            "choose another --out, or delete that run first",
        )
    # the lock and what a kill left of the first file are nobody's work
    ours = (LOCK, f".{RUN}.")
    if path.exists() and (
        not path.is_dir() or any(not entry.name.startswith(ours) for entry in path.iterdir())
    ):
        raise UserError(
            "--out must be a new or an empty folder", f"{path} holds other files", "choose another --out"
        )


def versions() -> dict[str, str | None]:
    """The versions of the packages that make a run's numbers."""
    return {name: _version(name) for name in _VERSIONS}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the code that runs; None where that is not known."""
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
