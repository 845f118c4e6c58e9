"""Labels and notes that people give to latents: a line of JSON each time, the last one wins.

    {"site": "blocks.9.hook_resid_post", "latent": 123, "label": "cities", "time": "2026-01-02T03:04:05Z"}

The file lies in the run folder, so a copy of the run keeps it; two files may be joined with `cat`.
"""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from sae.errors import UserError
from sae.files import append_whole, disk_errors, make_folder

ANNOTATIONS = "labels.jsonl"
FIELDS = ("label", "notes")
_LOCK, _PATIENCE = ".labels.lock", 10.0
_Values = dict[str, dict[int, dict[str, str]]]
_log = logging.getLogger(__name__)


class Annotations:
    """The labels and notes of one folder. Several processes may read and write them at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ANNOTATIONS
        self._kept: tuple[tuple[int, int, int] | None, _Values] = (None, {})

    def get(self, site: str, latent: int, field: str) -> str:
        """A latent's `label` or `notes`; "" for none."""
        return self._read().get(site, {}).get(latent, {}).get(field, "")

    def labels(self, site: str) -> dict[int, str]:
        """The labels of a site, by latent."""
        return {n: v["label"] for n, v in self._read().get(site, {}).items() if v.get("label")}

    def table(self) -> pd.DataFrame:
        """site, latent, label and notes of every latent that has either."""
        rows = [
            (site, latent, values.get("label", ""), values.get("notes", ""))
            for site, latents in self._read().items()
            for latent, values in latents.items()
            if any(values.values())
        ]
        return pd.DataFrame(rows, columns=["site", "latent", *FIELDS])

    def set(self, site: str, latent: int, field: str, text: str) -> None:
        """Writes a label or notes; "" takes them back. Raises UserError when the folder cannot be written."""
        record = {"site": site, "latent": latent, field: text, "time": datetime.now(UTC).isoformat()}
        line = json.dumps(record).encode() + b"\n"
        make_folder(self.path.parent)
        try:
            with disk_errors(self.path), FileLock(self.path.with_name(_LOCK), timeout=_PATIENCE):
                self._append(line)
        except Timeout:
            raise UserError(
                "labels must be written by one process at a time",
                f"another one has held {self.path.with_name(_LOCK)} for {_PATIENCE:.0f} s",
                "try again when it has ended",
            ) from None

    def _append(self, line: bytes) -> None:
        # a writer that was killed may have left half a line
        append_whole(self.path, line if self._ends_a_line() else b"\n" + line)

    def _ends_a_line(self) -> bool:
        if not self.path.is_file() or not self.path.stat().st_size:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"

    def _read(self) -> _Values:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return {}
        stamp, kept = (status.st_ino, status.st_size, status.st_mtime_ns), self._kept
        if stamp != kept[0]:
            # put in place as one: another thread must never find old values under a new stamp
            kept = self._kept = (stamp, self._parse())
        return kept[1]

    def _parse(self) -> _Values:
        values: _Values = {}
        for number, line in enumerate(self.path.read_bytes().splitlines(), start=1):
            try:
                record: Any = json.loads(line)
                texts = {field: _unicode(str(record[field])) for field in FIELDS if field in record}
                values.setdefault(str(record["site"]), {}).setdefault(int(record["latent"]), {}).update(texts)
            except (ValueError, KeyError, TypeError):
                # what a killed writer left must not hide all other labels
                _log.warning("%s: line %d is no label and is passed over", self.path, number)
        return values


def _unicode(text: str) -> str:
    """The text without half characters, which tables and pages refuse."""
    return text.encode("utf-8", "replace").decode()
