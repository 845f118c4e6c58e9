"""The firings of a pass over some text while it runs: in memory until they are many, then in parts on disk.

A part is one file, whole or absent, and says where the pass goes on behind it; so a pass that was killed goes
on behind its last part, and the parts of two passes side by side are those of one.
"""

import dataclasses
import functools
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from activations.blocks import Cursor, TokenBlocks
from activations.ranks import Ranks, alone
from sae.files import atomic_write, disk_errors, make_folder, read_json, write_json
from sae.sparse import SparseLatents
from sae.tensor_files import save_tensors
from viewer.index.firings import RowLists, Texts

PASS = "pass.json"
# what a pass holds in memory at most, and loses at most when it is killed
_PART_BYTES, _PART_SECONDS = 256 * 2**20, 60.0
_TEXTS = tuple(field.name for field in dataclasses.fields(Texts))
_LISTS = ("counts", "latent", "activation")

_log = logging.getLogger(__name__)


class Parts:
    """What one pass has found: the blocks read, and for each site the latents that fire on each row.

    `facts`, plain JSON values, say what the pass is: its text, its sites, their weights. A folder that holds
    parts of the same facts is gone on with; others are removed. Without facts it always begins anew.

    Several `ranks` read the same text, each with a folder and sites of its own. They end parts together, so
    that all can go on from where the one that came least far does.
    """

    def __init__(
        self,
        folder: Path,
        sites: Sequence[str],
        facts: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or alone()
        self.folder, self.sites = folder, tuple(sites)
        self._facts = facts
        self._files: list[Path] = []
        self.next: Cursor | None = Cursor()
        """Where the pass goes on; None when it has come to its end."""
        self._batch: TokenBlocks | None = None
        self._added: set[str] = set()
        self._rows_on_disk = 0
        self._empty()
        if facts is None or not self._matches(facts):
            self.remove()
        else:
            self._go_on()
        self._fall_back(min(self._ranks.share("the parts of the pass", len(self._files))))

    @property
    def rows(self) -> int:
        """Rows found so far."""
        return self._rows_on_disk + self._rows

    def add(self, site: str, batch: TokenBlocks, latents: SparseLatents) -> None:
        """Takes in the latents at the kept positions of a batch; every site's, before the next batch."""
        if batch is not self._batch:
            self.begin(batch)
        if len(latents) != self._batch_rows or site not in self.sites or site in self._added:
            raise ValueError(f"{len(latents)} rows of {site} in a batch that keeps {self._batch_rows}")
        self._added.add(site)
        counts = latents.starts.diff().cpu().numpy().astype(np.int32)
        latent = latents.latent.cpu().numpy().astype(np.int32, copy=False)
        activation = latents.activation.float().cpu().numpy()
        self._found[site].append((counts, latent, activation))
        self._bytes += latent.nbytes + activation.nbytes

    def finish(self) -> None:
        """Says that the pass has come to its end; one that can be gone on with then lasts on disk."""
        self.next = None
        if self._facts is not None:
            self.write()

    def write(self) -> None:
        """Writes what is in memory as a part, behind which the pass goes on at `next`."""
        if not self._texts:
            return
        tensors = self._in_memory((*_TEXTS, *(f"{site}/{name}" for site in self.sites for name in _LISTS)))
        following = json.dumps(self.next and dataclasses.asdict(self.next))
        if self._facts is not None and not self._files:
            write_json(make_folder(self.folder) / PASS, self._facts)
        path = self.folder / _part_name(len(self._files))
        save_tensors(path, tensors, {"rows": str(self._rows), "next": following})
        self._files.append(path)
        self._rows_on_disk += self._rows
        self._empty()

    def take(self, other: "Parts") -> None:
        """Puts the parts of another pass, which has come to its end, behind those of this one."""
        if other.sites != self.sites:
            raise ValueError(f"parts of {other.sites} behind those of {self.sites}")
        for parts in (self, other):
            parts.write()
        for file in other._files:
            target = make_folder(self.folder) / _part_name(len(self._files))
            atomic_write(target, functools.partial(shutil.copyfile, file))
            self._files.append(target)
        self._rows_on_disk += other._rows_on_disk

    def texts(self) -> Texts:
        """The blocks of the whole pass."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in _TEXTS}
        for part in self._parts(_TEXTS):
            for name in _TEXTS:
                found[name].append(part[name].numpy())
        return Texts(**{name: np.concatenate(parts) for name, parts in found.items()})

    def lists(self, site: str) -> RowLists:
        """A site's firings on the rows of the whole pass."""
        names = tuple(f"{site}/{name}" for name in _LISTS)
        found = [[part[name].numpy() for name in names] for part in self._parts(names)]
        counts, latent, activation = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return RowLists(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]), latent, activation)

    def remove(self) -> None:
        """Removes all parts from the disk."""
        if self.folder.is_dir():
            with disk_errors(self.folder):
                # without it the rest is no pass to go on with
                (self.folder / PASS).unlink(missing_ok=True)
                shutil.rmtree(self.folder)
        self._files = []

    def begin(self, batch: TokenBlocks) -> None:
        """Makes room for a batch; everything before it is whole, and may go to the disk."""
        if self._batch is not None and len(self._added) != len(self.sites):
            raise ValueError(f"{len(self._added)} of {len(self.sites)} sites have brought the batch before")
        if self._facts is not None and batch.begin is None:
            raise ValueError("the blocks of a pass that can be gone on with must say where they begin")
        self.next = batch.begin
        late = self._facts is not None and time.monotonic() - self._since >= _PART_SECONDS
        if any(self._ranks.share("the end of a part", late or self._bytes >= _PART_BYTES)):
            self.write()
        self._batch, self._added = batch, set()
        self._batch_rows = int(batch.keep.sum())
        self._rows += self._batch_rows
        self._texts.append(batch)

    def _empty(self) -> None:
        self._texts: list[TokenBlocks] = []
        self._found: dict[str, list[tuple[np.ndarray, ...]]] = {site: [] for site in self.sites}
        self._rows, self._bytes, self._since = 0, 0, time.monotonic()

    def _matches(self, facts: Mapping[str, Any]) -> bool:
        path = self.folder / PASS
        return path.is_file() and read_json(path) == json.loads(json.dumps(facts))

    def _go_on(self) -> None:
        """Takes up the parts on disk, as far as they are whole; what is behind a torn one is removed."""
        for path in sorted(self.folder.glob("part-*.safetensors")):
            try:
                if path.name != _part_name(len(self._files)):
                    raise SafetensorError("a part before it is missing")
                with safetensors.safe_open(path, framework="pt") as file:
                    place = file.metadata()
            except SafetensorError as error:
                _log.warning("%s is not whole and is made again: %s", path, error)
                path.unlink()
                continue
            self._take_up(path, place)

    def _take_up(self, path: Path, place: Mapping[str, str]) -> None:
        following = json.loads(place["next"])
        self.next = following and Cursor(**following)
        self._rows_on_disk += int(place["rows"])
        self._files.append(path)

    def _fall_back(self, count: int) -> None:
        """Lets go of the parts behind the first `count`."""
        kept, more = self._files[:count], self._files[count:]
        if not more:
            return
        for path in more:
            path.unlink()
        self._files, self._rows_on_disk, self.next = [], 0, Cursor()
        for path in kept:
            with safetensors.safe_open(path, framework="pt") as file:
                self._take_up(path, file.metadata())

    def _parts(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        for path in self._files:
            with safetensors.safe_open(path, framework="pt") as file:
                yield {name: file.get_tensor(name) for name in names}
        if self._texts:
            yield self._in_memory(names)

    def _in_memory(self, names: Sequence[str]) -> dict[str, Tensor]:
        found = {}
        for name in names:
            if name in _TEXTS:
                part = torch.cat([getattr(batch, name) for batch in self._texts])
                found[name] = part.long() if name == "document" else part
            else:
                site, _, kind = name.rpartition("/")
                arrays = [lists[_LISTS.index(kind)] for lists in self._found[site]]
                found[name] = torch.from_numpy(np.concatenate(arrays))
        return found


def _part_name(number: int) -> str:
    return f"part-{number:05d}.safetensors"
