"""An index folder, read lazily: each site's tables by latent, and what the sites share."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

import sae
from sae.errors import UserError
from viewer.annotations import Annotations
from viewer.index.firings import Firings, Texts
from viewer.index.storage import (
    DRIVERS,
    EXAMPLES,
    LATENTS,
    LATENTS_SCHEMA,
    MANIFEST,
    RELATED,
    TEXTS,
    TOKENS,
    read_firings,
    read_manifest,
    read_texts,
    read_tokens,
)
from viewer.once import Kept, once

T = TypeVar("T")

SCALARS = [f.name for f in LATENTS_SCHEMA if not pa.types.is_list(f.type) and f.name != "histogram_first"]
"""The columns of latents.parquet that say something on their own."""


class Rows:
    """A Parquet file that is sorted by latent, of which one latent's rows are read without the rest.

    Its footer is parsed once; no file stays open. Raises UserError when it is torn, gone, or was replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._modified = path.stat().st_mtime_ns
            self._metadata = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise _torn(path, error) from error
        groups = [self._metadata.row_group(i) for i in range(self._metadata.num_row_groups)]
        # `latent` is the first column of every schema
        bounds = [(n, g.column(0).statistics) for n, g in enumerate(groups) if g.num_rows]
        self._group = np.array([n for n, _ in bounds], dtype=np.int64)
        self._first = np.array([b.min for _, b in bounds], dtype=np.int64)
        self._last = np.array([b.max for _, b in bounds], dtype=np.int64)
        self._kept: tuple[list[int], pa.Table | None] = ([], None)

    def of(self, latent: int) -> pa.Table:
        """The rows of a latent, in order."""
        groups = self._group[(self._first <= latent) & (latent <= self._last)].tolist()
        self._check()
        # one thing after the other is asked of the same latent, and of the next one
        kept, table = self._kept
        if kept != groups or table is None:
            table = self._open(lambda file: file.read_row_groups(groups, use_threads=False))
            self._kept = (groups, table)
        low, high = np.searchsorted(table["latent"].to_numpy(), [latent, latent + 1])
        return table.slice(low, high - low)

    def columns(self, names: list[str]) -> pa.Table:
        """Some columns, of all latents."""
        return self._open(lambda file: file.read(names))

    def _open(self, read: Callable[[pq.ParquetFile], pa.Table]) -> pa.Table:
        self._check()
        try:
            with pq.ParquetFile(self.path, metadata=self._metadata) as file:
                return read(file)
        except (pa.ArrowException, OSError) as error:
            raise _torn(self.path, error) from error

    def _check(self) -> None:
        if _stamp(self.path) != self._modified:
            raise UserError(
                "an index must stay as it was opened",
                f"{self.path} was removed or written anew",
                "open the run again",
            )


class Strings:
    """The texts of tokens."""

    def __init__(self, strings: dict[int, str]) -> None:
        self._ids = np.array(sorted(strings), dtype=np.int64)
        self._text = np.array([*(strings[i] for i in self._ids.tolist()), None], dtype=object)

    def of(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Their texts; a token that the index does not name is shown by its number."""
        wanted = np.asarray(ids, dtype=np.int64)
        place = np.searchsorted(self._ids, wanted)
        known = np.append(self._ids, -1)[place] == wanted
        texts = self._text[np.where(known, place, -1)]
        return [f"⟨{i}⟩" if text is None else text for i, text in zip(wanted, texts, strict=True)]

    def ids(self, text: str) -> list[int]:
        """The tokens that read exactly so."""
        return self._ids[np.flatnonzero(self._text[:-1] == text)].tolist()

    @once
    def by_word(self) -> dict[str, list[int]]:
        """The tokens of each word, whatever their case, spaces and plural (`stem`)."""
        found: dict[str, list[int]] = {}
        for token, text in zip(self._ids.tolist(), self._text[:-1], strict=True):
            found.setdefault(stem(text), []).append(token)
        return found


class Inverted:
    """Where each value stands in an array of whole numbers; sorted once, a look-up reads its hits alone."""

    def __init__(self, values: Int[np.ndarray, " place"]) -> None:
        self._places = np.argsort(values, kind="stable").astype(np.int32)
        self._values = values[self._places]

    def of(self, wanted: Int[np.ndarray, " value"]) -> Int[np.ndarray, " hit"]:
        """The places of any of `wanted`, which has no value twice: in its order, and rising for each."""
        first, last = (np.searchsorted(self._values, wanted, side) for side in ("left", "right"))
        count = last - first
        # the n-th hit of a value lies n behind its first place
        behind = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return self._places[np.repeat(first, count) + behind]


class SiteTables:
    """One site's part of an index. Raises UserError when it is torn or absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = read_manifest(folder)
        self.n_latents: int = self.manifest["d_sae"]

    @once
    def firings(self) -> Firings:
        """Every firing, mapped."""
        return read_firings(self.folder)

    @once
    def latents(self) -> Rows:
        """latents.parquet, by latent."""
        return Rows(self.folder / LATENTS)

    @once
    def examples(self) -> Rows:
        """examples.parquet, by latent."""
        return Rows(self.folder / EXAMPLES)

    @once
    def drivers(self) -> Rows:
        """drivers.parquet, by latent."""
        return Rows(self.folder / DRIVERS)

    @once
    def related(self) -> Rows:
        """related.parquet, by latent."""
        return Rows(self.folder / RELATED)

    @once
    def scalars(self) -> pa.Table:
        """A row a latent: the columns SCALARS."""
        return self.latents.columns(SCALARS)

    @once
    def automatic_labels(self) -> list[str]:
        """Each latent's label made by rules; "" for none."""
        return pc.fill_null(self.latents.columns(["label"])["label"], "").to_pylist()

    @once
    def folded_labels(self) -> pa.Array:
        """The same in one case, to search in."""
        return pa.array([label.casefold() for label in self.automatic_labels], pa.string())

    @once
    def _label_text(self) -> tuple[str, Int[np.ndarray, " latent"]]:
        """All of them in one text, a line each, and where each begins: one string is searched far faster."""
        labels = [label.replace("\n", " ") for label in self.folded_labels.to_pylist()]
        lengths = np.array([0, *(len(label) + 1 for label in labels)])
        return "\n".join(labels), np.cumsum(lengths)[:-1]

    def labelled(self, part: str) -> list[int]:
        """The latents whose automatic label has a part, in one case and without a line break."""
        text, starts = self._label_text
        found, at = [], text.find(part)
        while at >= 0:
            found.append(int(np.searchsorted(starts, at, "right")) - 1)
            end = text.find("\n", at)
            at = text.find(part, end) if end >= 0 else -1
        return found

    @once
    def top_driver(self) -> Int[np.ndarray, " latent"]:
        """The token that drives each latent most, by share of its activation; -1 for none."""
        drivers = self.all_drivers
        # by activation comes before by lift, and rank 0 first
        latent, first = np.unique(drivers["latent"], return_index=True)
        token = np.full(self.n_latents, -1, np.int32)
        token[latent] = drivers["token"][first]
        return token

    @once
    def all_drivers(self) -> dict[str, np.ndarray]:
        """The columns of drivers.parquet that are numbers; a token may stand in both orders of a latent."""
        names = ["latent", "token", "count", "mean", "share", "lift"]
        table = self.drivers.columns(names)
        return {name: table[name].to_numpy() for name in names}

    @once
    def top_examples(self) -> dict[str, np.ndarray]:
        """latent, block and peak of every latent's highest examples."""
        table = self.examples.columns(["latent", "band", "block", "peak"])
        best = table["band"].to_numpy() == 0
        return {name: table[name].to_numpy()[best] for name in ("latent", "block", "peak")}

    @once
    def drivers_of(self) -> Inverted:
        """Rows of `all_drivers` by token."""
        return Inverted(self.all_drivers["token"])

    @once
    def raised_by(self) -> Inverted:
        """Rows of `raised` by token."""
        return Inverted(self.raised["token"])

    @once
    def examples_at(self) -> Inverted:
        """Rows of `top_examples` by `place_of` their peak."""
        return Inverted(place_of(self.top_examples["block"], self.top_examples["peak"]))

    @once
    def n_top_examples(self) -> Int[np.ndarray, " latent"]:
        """How many of these each latent has."""
        return np.bincount(self.top_examples["latent"], minlength=self.n_latents)

    @once
    def raised(self) -> dict[str, np.ndarray]:
        """latent, token and rank of every entry of `top_tokens`, best first within a latent."""
        table = self.latents.columns(["latent", "top_tokens"])
        lists = table["top_tokens"].combine_chunks().fill_null([])
        lengths = np.diff(lists.offsets.to_numpy())
        rank = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        tokens = lists.flatten().to_numpy()
        return {"latent": np.repeat(table["latent"].to_numpy(), lengths), "token": tokens, "rank": rank}

    @once
    def all_cosines(self) -> dict[str, np.ndarray]:
        """latent, other and value of every neighbour by decoder cosine within the site."""
        table = self.related.columns(["latent", "kind", "other", "value"])
        table = table.filter(pc.field("kind") == "cosine")
        return {name: table[name].to_numpy() for name in ("latent", "other", "value")}

    def warm(self) -> None:
        """Reads all that a search reads."""
        _ = (
            self._label_text,
            self.drivers_of,
            self.top_driver,
            self.examples_at,
            self.n_top_examples,
            self.raised_by,
            self.scalars,
        )


class IndexFolder:
    """The index of several sites, and what lies in the folder that it belongs to: labels, dictionaries."""

    def __init__(self, root: Path, home: Path) -> None:
        self.root, self.home = root, home
        self.annotations = Annotations(home)
        self._dictionaries: Kept[sae.Dictionary] = Kept()
        self._norms: Kept[Float[Tensor, " latent"]] = Kept()
        self._sites: Kept[SiteTables] = Kept()
        self._texts: Kept[Texts] = Kept()
        self._strings: Kept[Strings] = Kept()

    def sites(self) -> list[str]:
        """The sites that have an index, by name."""
        return sorted(p.parent.name for p in self.root.glob(f"*/{MANIFEST}") if p.parent.name != TEXTS)

    def site(self, name: str) -> SiteTables:
        """A site's tables. They are kept, and checked at each call: UserError when torn, gone or too old."""
        folder = self.root / name
        stamp = _stamp(folder / MANIFEST)
        return self._sites.get(name, (stamp, read_manifest(folder)), lambda: SiteTables(folder))

    def each(self, sites: Sequence[str], read: Callable[[str], T]) -> list[T]:
        """What `read` gives of each site, in their order; all processors read files."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(read, sites))

    @property
    def texts(self) -> Texts:
        """The text that was read, shared by all sites."""
        return self._texts.get(TEXTS, _stamp(self.root / TEXTS / MANIFEST), lambda: read_texts(self.root))

    @property
    def strings(self) -> Strings:
        """The texts of its tokens."""
        stamp = _stamp(self.root / TOKENS)
        return self._strings.get(TOKENS, stamp, lambda: Strings(read_tokens(self.root)))

    def labels(self, site: str) -> list[str]:
        """Each latent's label: people's own, else the automatic one, else nothing."""
        labels = list(self.site(site).automatic_labels)
        for latent, label in self.annotations.labels(site).items():
            if latent < len(labels):
                labels[latent] = label
        return labels

    def labels_of(self, site: str, latents: Sequence[int]) -> list[str]:
        """The labels of some of its latents."""
        automatic, own = self.site(site).automatic_labels, self.annotations.labels(site)
        return [own.get(latent) or automatic[latent] for latent in latents]

    def dictionary(self, site: str) -> sae.Dictionary:
        """A site's dictionary, opened once. Raises UserError when only its index is here."""
        return self._dictionaries.get(site, None, lambda: self._load(site))

    def decoder(self, site: str) -> Float[Tensor, "latent d_out"]:
        """The decoder rows of a site, on the CPU. Raises UserError as `dictionary` does."""
        return self.dictionary(site).W_dec.detach().float().cpu()

    def decoder_norm(self, site: str) -> Float[Tensor, " latent"]:
        """The L2 norms of a site's decoder rows, taken once; never 0."""
        return self._norms.get(site, None, lambda: self.decoder(site).norm(dim=1).clamp_min(1e-30))

    def _load(self, site: str) -> sae.Dictionary:
        # a dictionary's own folder may hold its index
        alone = [self.home] if self.sites() == [site] else []
        found = [f for f in (self.home / "sites" / site, *alone) if (f / "cfg.json").is_file()]
        if not found:
            raise UserError(
                f"the dictionary of {site} must be here",
                f"none in {self.home}",
                "open the folder of its run",
            )
        return sae.load(found[0])


def stem(text: str) -> str:
    """What a token or a word has in common with its plural and its other spellings."""
    word = text.strip().casefold()
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def place_of(
    block: Int[np.ndarray, " place"], position: Int[np.ndarray, " place"]
) -> Int64[np.ndarray, " place"]:
    """One number for a place in the text; they rise with block and position."""
    return block.astype(np.int64) << 32 | position


def containing(texts: pa.Array, part: str) -> Bool[np.ndarray, " text"]:
    """Which of the texts have a part."""
    found = pc.call_function("match_substring", [texts], pc.MatchSubstringOptions(part))
    return found.to_numpy(zero_copy_only=False).copy()


def _stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


def _torn(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} must be a whole Parquet file", str(error), "build the index again with `jumpscope index`"
    )
