"""The feature index on disk: texts shared by all sites, and a folder a site.

    index/texts/manifest.json, texts.safetensors   the text read, in token blocks (`firings.Texts`)
          tokens.parquet                           id and text of every token named in it
          SITE/manifest.json                       model, site, d_sae, ...; checksums of all files
               firings.safetensors                 every firing, by latent (`firings.Firings`)
               latents.parquet                     a row a latent, in order
               examples.parquet                    by latent, band and rank
               drivers.parquet                     tokens that drive it; by latent, order and rank
               related.parquet                     other latents; by latent, kind and rank

The schemas below are the documentation of the Parquet files: every column says what it holds. They need no
reader of ours, and `select label, density from 'index/*/latents.parquet'` works in DuckDB as it stands.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae.errors import UserError
from sae.files import atomic_write, make_folder, read_json, sha256_file, write_json
from sae.tensor_files import load_tensors, save_tensors
from viewer.index.firings import Firings, Texts
from viewer.once import Kept
from viewer.places import MANIFEST, TEXTS

_AGAIN = "build the index again with `jumpscope index`"
FORMAT, VERSION = "jumpscope feature index", 2
TOKENS = "tokens.parquet"
FIRINGS, LATENTS, EXAMPLES = "firings.safetensors", "latents.parquet", "examples.parquet"
DRIVERS, RELATED = "drivers.parquet", "related.parquet"
_TEXTS_FILE = "texts.safetensors"
_CHECKSUMS: Kept[str] = Kept()
# readers fetch one latent: small row groups, so that Parquet's statistics skip nearly all of the file
_ROWS_PER_GROUP = {LATENTS: 512, EXAMPLES: 4096, DRIVERS: 16384, RELATED: 8192}

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_NEURON = pa.struct([("neuron", pa.int32()), ("value", pa.float32()), ("share", pa.float32())])
_NEURONS = pa.list_(_NEURON)


def _field(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, metadata={"meaning": meaning})


LATENTS_SCHEMA = pa.schema(
    [
        _field("latent", pa.int32(), "number of the latent in its dictionary"),
        _field(
            "state", pa.string(), "live, silent (never fired here) or dense (on more than a tenth of tokens)"
        ),
        _field("label", pa.string(), "automatic label, made from the other columns without a language model"),
        _field("label_evidence", pa.string(), "what the label rests on"),
        _field("label_kind", pa.string(), "silent, rare, mixed, or the property of the text that it names"),
        _field("label_share", pa.float32(), "of its activation, what the label explains"),
        _field("firings", pa.int64(), "tokens on which it fires"),
        _field("density", pa.float64(), "firings over tokens"),
        _field("log10_density", pa.float32(), "null for a silent latent"),
        _field("mean", pa.float32(), "mean activation over firings; 0 for a silent latent"),
        _field("max", pa.float32(), "highest activation; 0 for a silent latent"),
        _field("threshold", pa.float32(), "it fires above this pre-activation; null where it has none"),
        _field("histogram_first", pa.int32(), "first filled bin of `histogram.histogram_edges`"),
        _field("histogram", _INTS, "firings in that bin and the next ones, to the last filled one"),
        _field("quantiles", _FLOATS, "lower edges of the bands 1 to 5; the upper edge of band 1 is `max`"),
        _field("top_tokens", _INTS, "tokens whose logits the decoder row raises most, best first"),
        _field("top_logits", _FLOATS, "their logits, per unit of activation"),
        _field("bottom_tokens", _INTS, "tokens whose logits it lowers most, lowest first"),
        _field("bottom_logits", _FLOATS, "their logits, per unit of activation"),
        _field("logit_mean", pa.float32(), "mean over the vocabulary, which the other logits are about"),
        _field("logit_std", pa.float32(), "its standard deviation"),
        _field(
            "logit_skew", pa.float32(), "its skewness, where there are thousands of latents to about 0.02"
        ),
        _field("logit_histogram", _INTS, "tokens, of a spread sample, in the manifest's bins of std"),
        _field("neuron_alignment", _NEURONS, "largest entries of the decoder row, and shares of its L1 norm"),
        _field("duplicate_of", pa.int32(), "first latent with nearly this decoder row and firings, if any"),
        _field("decoder_norm", pa.float32(), "L2 norm of the decoder row"),
        _field("encoder_decoder_cosine", pa.float32(), "cosine of encoder column and decoder row"),
    ]
)
EXAMPLES_SCHEMA = pa.schema(
    [
        _field("latent", pa.int32(), "number of the latent"),
        _field(
            "band", pa.int32(), "0: the highest; 1 to 5: fifths of its range of activations, highest first"
        ),
        _field("rank", pa.int32(), "from 0, within the band"),
        _field("block", pa.int32(), "block of the texts"),
        _field("peak", pa.int32(), "position in the block of its highest activation in that document"),
        _field("activation", pa.float32(), "activation there"),
        _field("token", pa.int32(), "token there"),
    ]
)
DRIVERS_SCHEMA = pa.schema(
    [
        _field("latent", pa.int32(), "number of the latent"),
        _field("order", pa.string(), "activation: by share of its activation; lift: by lift"),
        _field("rank", pa.int32(), "from 0, within the order"),
        _field("token", pa.int32(), "token on which it fires"),
        _field("count", pa.int64(), "firings on that token"),
        _field("mean", pa.float32(), "mean activation over those"),
        _field("share", pa.float32(), "their share of its total activation"),
        _field("lift", pa.float32(), "the token's share of its firings over the token's share of all tokens"),
    ]
)
RELATED_SCHEMA = pa.schema(
    [
        _field("latent", pa.int32(), "number of the latent"),
        _field("kind", pa.string(), "cosine, previous, next (decoder rows) or cofiring (same tokens)"),
        _field("rank", pa.int32(), "from 0, within the kind"),
        _field("other_site", pa.string(), "the site of the other latent"),
        _field("other", pa.int32(), "number of the other latent"),
        _field("value", pa.float32(), "cosine of decoder rows; for cofiring the phi coefficient"),
        _field("count", pa.int64(), "tokens on which both fire; null for cosines"),
    ]
)
SCHEMAS = {
    LATENTS: LATENTS_SCHEMA,
    EXAMPLES: EXAMPLES_SCHEMA,
    DRIVERS: DRIVERS_SCHEMA,
    RELATED: RELATED_SCHEMA,
}


def make_table(schema: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    """A table of one of the schemas from arrays; a column that is not given is null."""
    unknown = columns.keys() - set(schema.names)
    if unknown:
        raise ValueError(f"no such column: {', '.join(sorted(unknown))}")
    rows = len(columns["latent"])
    arrays = [
        pa.nulls(rows, field.type)
        if columns.get(field.name) is None
        else _array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def make_lists(lengths: np.ndarray, flat: np.ndarray | pa.Array) -> pa.ListArray:
    """Lists of these lengths [row], one after the other in `flat`."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), flat if isinstance(flat, pa.Array) else pa.array(flat))


def make_words(codes: np.ndarray, words: Sequence[str]) -> pa.Array:
    """Strings that are `words` at the places `codes` [row]: numpy's own would be slow and wide."""
    names = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(words, pa.string()))
    return names.cast(pa.string())


def write_site(
    folder: Path, *, firings: Firings, tables: Mapping[str, pa.Table], manifest: Mapping[str, Any]
) -> None:
    """Writes one site's index. The manifest goes first when it is old and comes last when it is new.

    `tables` has a table of each of SCHEMAS. `manifest` must hold `texts`, what `write_texts` gave. Raises
    UserError when the disk refuses.
    """
    _make_ready(folder)
    save_tensors(folder / FIRINGS, firings.tensors())
    for name, schema in SCHEMAS.items():
        write_table(folder / name, tables[name].cast(schema), rows_per_group=_ROWS_PER_GROUP[name])
    _write_manifest(folder, manifest, (FIRINGS, *SCHEMAS))


def write_texts(root: Path, texts: Texts, manifest: Mapping[str, Any]) -> str:
    """Writes the texts of an index; returns their checksum, by which sites say what text they are of."""
    folder = root / TEXTS
    _make_ready(folder)
    save_tensors(folder / _TEXTS_FILE, texts.tensors())
    return _write_manifest(folder, manifest, (_TEXTS_FILE,))[_TEXTS_FILE]["sha256"]


def write_tokens(root: Path, strings: Mapping[int, str]) -> None:
    """Writes tokens.parquet, in the order of the ids."""
    ids = sorted(strings)
    # a byte-level token need not be text on its own
    text = [strings[i].encode("utf-8", "replace").decode() for i in ids]
    table = pa.table({"id": pa.array(ids, pa.int32()), "text": pa.array(text, pa.string())})
    write_table(root / TOKENS, table)


def write_table(path: Path, table: pa.Table, *, rows_per_group: int = 65536) -> None:
    """Writes a Parquet file atomically. Raises UserError when the disk refuses."""
    # lz4 is read in half the time of zstd, and takes the same room where only words have a dictionary
    words = [field.name for field in table.schema if pa.types.is_string(field.type)]
    how: dict[str, Any] = {"compression": "lz4", "use_dictionary": words}
    atomic_write(
        path, lambda temporary: pq.write_table(table, temporary, row_group_size=rows_per_group, **how)
    )


def find_index(source: Path | str) -> Path:
    """The feature index of a dictionary of a run, or the folder itself where it is a site's index.

    Raises UserError when there is none, with what to do.
    """
    source = Path(source)
    run = source.parent.parent if source.parent.name == "sites" else None
    folder = source if run is None else run / "index" / source.name
    if not (folder / MANIFEST).is_file():
        do = f"`jumpscope index {run or 'RUN'}` makes it"
        if run is None:
            do = f"give RUN/sites/SITE, or the site's folder in an index; {do}"
        raise UserError("this export needs a feature index", f"no {MANIFEST} in {folder}", do)
    return folder


def read_manifest(folder: Path, *, finished: bool = True) -> dict[str, Any]:
    """The manifest of a site's whole index. Raises UserError naming what is missing, torn, old or too new.

    Also when the texts beside it are not those that it was made from, and, if it has to be `finished`, when
    the build came no further than this site. Checksums are compared once for a file that nobody touches; of
    the firings, which are large, the size: `verify_firings` compares theirs.
    """
    manifest = _read_manifest(folder)
    _check_files(folder, {name: f for name, f in manifest["files"].items() if name != FIRINGS})
    _check_size(folder / FIRINGS, manifest["files"][FIRINGS]["bytes"])
    if finished and not (folder.parent / TOKENS).is_file():
        found = f"{folder.parent} has no {TOKENS}: it was cut short"
        raise UserError("the index must be finished", found, _AGAIN)
    texts = _read_manifest(folder.parent / TEXTS)["files"][_TEXTS_FILE]["sha256"]
    if texts != manifest["texts"]:
        raise UserError(
            "a site's index must be of the texts beside it",
            f"{folder} is of other texts than {folder.parent / TEXTS}",
            _AGAIN,
        )
    return manifest


def is_whole(folder: Path) -> bool:
    """Whether a site has a whole index of this version."""
    try:
        read_manifest(folder)
    except UserError:
        return False
    return True


def verify_firings(folder: Path) -> None:
    """Reads every byte of a site's firings. Raises UserError when they are not what was written."""
    _check_files(folder, {FIRINGS: _read_manifest(folder)["files"][FIRINGS]})


def read_firings(folder: Path) -> Firings:
    """A site's firings, mapped: nothing is read before it is asked for."""
    return Firings.of(load_tensors(folder / FIRINGS))


def read_texts(root: Path) -> Texts:
    """The texts of an index, mapped. Raises UserError when they are torn or gone."""
    folder = root / TEXTS
    _check_files(folder, _read_manifest(folder)["files"])
    return Texts.of(load_tensors(folder / _TEXTS_FILE))


def read_tokens(root: Path) -> dict[int, str]:
    """The text of every token named in an index."""
    table = read_rows(root / TOKENS)
    return dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))


def read_rows(path: Path, *, columns: list[str] | None = None, latent: int | None = None) -> pa.Table:
    """A file of the index, or only one latent's rows of it. Raises UserError when it is torn or gone."""
    try:
        return pq.read_table(
            path, columns=columns, filters=None if latent is None else [("latent", "==", latent)]
        )
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} must be a whole Parquet file", str(error), _AGAIN) from error


def _make_ready(folder: Path) -> None:
    """Makes a folder what is not yet an index, without what a killed process left half-written."""
    make_folder(folder)
    for path in (folder / MANIFEST, *folder.glob(".*.tmp")):
        path.unlink(missing_ok=True)


def _write_manifest(folder: Path, manifest: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in names
    }
    write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, **manifest, "files": files})
    return files


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        state = "was cut short" if folder.is_dir() and any(folder.iterdir()) else "is not there"
        raise UserError("the site must have a feature index", f"{path} {state}", _AGAIN)
    manifest = read_json(path)
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (
        FORMAT,
        VERSION,
    ):
        known = manifest if isinstance(manifest, dict) else {}
        found = f"{known.get('format')!r} version {known.get('version')} in {folder}"
        raise UserError(f"the index must be a {FORMAT} of version {VERSION}", found, _AGAIN)
    return manifest


def _check_files(folder: Path, files: Mapping[str, Any]) -> None:
    for name, file in files.items():
        path = folder / name
        _check_size(path, file["bytes"])
        # computed once as long as nobody touches the file
        sha256 = _CHECKSUMS.get(path, path.stat().st_mtime_ns, functools.partial(sha256_file, path))
        if sha256 != file["sha256"]:
            raise _torn(f"{path} is not what the manifest says")


def _check_size(path: Path, n_bytes: int) -> None:
    if not path.is_file():
        raise _torn(f"{path} is missing")
    if path.stat().st_size != n_bytes:
        raise _torn(f"{path} has {path.stat().st_size} bytes, and the manifest says {n_bytes}")


def _torn(found: str) -> UserError:
    return UserError("every file of the index must be whole", found, _AGAIN)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values.cast(kind)
    if isinstance(values, np.ndarray) and values.ndim == 2:
        lengths = np.full(len(values), values.shape[1])
        return make_lists(lengths, np.ascontiguousarray(values).reshape(-1)).cast(kind)
    return pa.array(values, kind)
