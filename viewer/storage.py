"""The feature index on disk: a folder a site, Parquet that anyone can query, a manifest that vouches for it.

latents.parquet, a row a latent in order: latent, firings, density (firings over tokens), mean and max (over
firings; 0 for a silent latent), threshold (null where the architecture has none), histogram_first and
histogram (counts of consecutive bins from that one; edges in `accumulate.histogram_edges`), top_tokens,
top_logits, bottom_tokens, bottom_logits (ten each, most extreme first; empty where the site does not write
to the residual stream). examples.parquet, sorted by latent and rank: latent, rank, document, position (of
the peak in its document), token, activation, peak (index of the peak in the lists), tokens and values (the
window around it, within one document). tokens.parquet: id and text of every token named in the other two,
so that browsing needs no model.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from sae.errors import UserError
from sae.files import atomic_write, make_folder, read_json, sha256_file, write_json
from viewer.accumulate import SiteAccumulator

_AGAIN = "build the index again with `jumpscope index`"
FORMAT, VERSION = "jumpscope feature index", 1
MANIFEST, LATENTS, EXAMPLES, TOKENS = "manifest.json", "latents.parquet", "examples.parquet", "tokens.parquet"
# readers fetch one latent: small row groups, so that Parquet's statistics skip nearly all of the file
_LATENTS_PER_GROUP = 64
_LATENT_ROWS_PER_GROUP = 1024


def write_site(
    folder: Path,
    accumulator: SiteAccumulator,
    *,
    threshold: np.ndarray | None,
    logit_tokens: np.ndarray | None,
    logits: np.ndarray | None,
    token_strings: Callable[[Sequence[int]], Sequence[str]],
    manifest: dict[str, Any],
) -> None:
    """Writes one site's index. The manifest goes first when it is old and comes last when it is new.

    `logit_tokens` and `logits` are [latent, 20], top then bottom, or None. Raises UserError when the disk
    refuses.
    """
    make_folder(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    used = _marked(np.zeros(0, bool), np.zeros(0, np.int32) if logit_tokens is None else logit_tokens)
    latents = _latents_table(accumulator, threshold, logit_tokens, logits)
    atomic_write(
        folder / LATENTS, lambda path: pq.write_table(latents, path, row_group_size=_LATENT_ROWS_PER_GROUP)
    )

    def write_examples(path: Path) -> None:
        nonlocal used
        with pq.ParquetWriter(path, _EXAMPLES_SCHEMA, compression="zstd") as writer:
            for start in range(0, accumulator.d_sae, _LATENTS_PER_GROUP):
                table = _examples_table(accumulator, slice(start, start + _LATENTS_PER_GROUP))
                if table.num_rows:
                    writer.write_table(table)
                    used = _marked(used, table["tokens"].combine_chunks().values.to_numpy())

    atomic_write(folder / EXAMPLES, write_examples)
    ids = np.flatnonzero(used).astype(np.int32)
    # a byte-level token need not be text on its own
    text = [t.encode("utf-8", "replace").decode() for t in token_strings(ids.tolist())]
    tokens = pa.table({"id": pa.array(ids), "text": pa.array(text, pa.string())})
    atomic_write(folder / TOKENS, lambda path: pq.write_table(tokens, path))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in (LATENTS, EXAMPLES, TOKENS)
    }
    write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, **manifest, "files": files})


def _marked(used: Bool[np.ndarray, "d_vocab"], tokens: Int[np.ndarray, "..."]) -> Bool[np.ndarray, "longer"]:
    """The marks of tokens used, with these too; as long as the largest needs."""
    longer = np.zeros(max(len(used), int(tokens.max(initial=-1)) + 1), bool)
    longer[: len(used)] = used
    longer[tokens.reshape(-1)] = True
    return longer


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole index. Raises UserError naming what is missing, torn or too new."""
    if not (folder / MANIFEST).is_file():
        state = "was cut short" if folder.is_dir() and any(folder.iterdir()) else "is not there"
        raise UserError("the site must have a feature index", f"{folder / MANIFEST} {state}", _AGAIN)
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"{manifest.get('format')!r} version {manifest.get('version')} in {folder}"
        raise UserError(f"the index must be a {FORMAT} of version {VERSION}", found, _AGAIN)
    for name, file in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"] or _checksum(path, path.stat().st_mtime_ns) != file["sha256"]:
            found = (
                f"{path} is missing"
                if size is None
                else f"{path} ({size} bytes) is not what the manifest says"
            )
            raise UserError("every file of the index must be whole", found, _AGAIN)
    return manifest


def read_rows(path: Path, *, columns: list[str] | None = None, latent: int | None = None) -> pa.Table:
    """A file of the index, or only one latent's rows of it. Raises UserError when it is torn or gone."""
    try:
        return pq.read_table(
            path, columns=columns, filters=None if latent is None else [("latent", "==", latent)]
        )
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} must be a whole Parquet file", str(error), _AGAIN) from error


@functools.lru_cache(maxsize=1024)
def _checksum(path: Path, modified: int) -> str:
    """The checksum of a file, computed once as long as nobody touches it."""
    return sha256_file(path)


def _latents_table(
    found: SiteAccumulator,
    threshold: np.ndarray | None,
    logit_tokens: np.ndarray | None,
    logits: np.ndarray | None,
) -> pa.Table:
    first, lengths, counts = _trimmed(found.histogram)
    columns = {
        "latent": pa.array(np.arange(found.d_sae, dtype=np.int32)),
        "firings": pa.array(found.firings),
        "density": pa.array(found.firings / found.tokens_seen),
        "mean": pa.array((found.total / np.maximum(found.firings, 1)).astype(np.float32)),
        "max": pa.array(found.maximum),
        "threshold": pa.nulls(found.d_sae, pa.float32())
        if threshold is None
        else pa.array(threshold.astype(np.float32)),
        "histogram_first": pa.array(first),
        "histogram": _lists(lengths, counts),
    }
    sides = {"top": slice(None, None), "bottom": slice(None, None)}
    if logit_tokens is not None:
        half = logit_tokens.shape[1] // 2
        sides = {"top": slice(0, half), "bottom": slice(half, 2 * half)}
    for side, span in sides.items():
        for name, values, dtype in (("tokens", logit_tokens, np.int32), ("logits", logits, np.float32)):
            rows = np.zeros((found.d_sae, 0)) if values is None else values[:, span]
            lengths = np.full(found.d_sae, rows.shape[1])
            columns[f"{side}_{name}"] = _lists(lengths, np.ascontiguousarray(rows, dtype).reshape(-1))
    return pa.table(columns)


def _trimmed(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row from its first to its last filled bin: first bins, lengths, and all counts in one array."""
    filled = histogram > 0
    some = filled.any(1)
    first = np.where(some, filled.argmax(1), 0)
    last = np.where(some, histogram.shape[1] - filled[:, ::-1].argmax(1), 0)
    bins = np.arange(histogram.shape[1])
    return first.astype(np.int32), last - first, histogram[(bins >= first[:, None]) & (bins < last[:, None])]


_EXAMPLES_SCHEMA = pa.schema(
    [
        ("latent", pa.int32()),
        ("rank", pa.int32()),
        ("document", pa.int64()),
        ("position", pa.int32()),
        ("token", pa.int32()),
        ("activation", pa.float32()),
        ("peak", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float32())),
    ]
)


def _examples_table(found: SiteAccumulator, latents: slice) -> pa.Table:
    tokens, values = found.windows(latents)
    index, rank = np.nonzero(found.document[latents] >= 0)
    tokens, values = tokens[index, rank], values[index, rank]
    inside = tokens >= 0
    lengths = inside.sum(1)
    where = (index + latents.start, rank)
    columns = [
        where[0].astype(np.int32),
        rank.astype(np.int32),
        found.document[where],
        found.position[where],
        tokens[:, found.context_tokens],
        found.activation[where],
        inside[:, : found.context_tokens].sum(1).astype(np.int32),
        _lists(lengths, tokens[inside]),
        _lists(lengths, values[inside]),
    ]
    return pa.Table.from_arrays(
        [pa.array(c) if isinstance(c, np.ndarray) else c for c in columns], schema=_EXAMPLES_SCHEMA
    )


def _lists(lengths: np.ndarray, flat: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
