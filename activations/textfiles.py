"""Documents out of text files, JSON lines and Parquet, a piece at a time: no file is held whole."""

import codecs
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.errors import UserError

TEXT, LINES, TABLE = (".txt", ".md"), (".jsonl", ".ndjson"), (".parquet",)
SUFFIXES = (*TEXT, *LINES, *TABLE)
SECTION_CHARACTERS = 2_000
LONGEST_DOCUMENT = 1_000_000
_CHUNK_BYTES = 1 << 16
_ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class Record:
    """A text with what its source says about it."""

    text: str
    title: str | None = None
    label: str | None = None


def read_sections(path: Path) -> Iterator[Record]:
    """A text file as documents: whole paragraphs (ended by a blank line), gathered until 2,000 characters.

    One file as one document would leave nothing to hold out. A paragraph of more than 1,000,000 characters
    is cut, so that memory stays bounded.
    """
    gathered: list[str] = []
    size = 0
    for line in _lines(path, LONGEST_DOCUMENT):
        gathered.append(line)
        size += len(line)
        if size >= LONGEST_DOCUMENT or (size >= SECTION_CHARACTERS and not line.strip()):
            yield Record("".join(gathered).strip())
            gathered, size = [], 0
    if gathered:
        yield Record("".join(gathered).strip())


def read_whole(path: Path) -> Iterator[Record]:
    """A text file as one document titled with its name, or as several above 1,000,000 characters."""
    gathered: list[str] = []
    size = 0
    for line in _lines(path, LONGEST_DOCUMENT):
        if gathered and size + len(line) > LONGEST_DOCUMENT:
            yield Record("".join(gathered).strip(), title=path.stem)
            gathered, size = [], 0
        gathered.append(line)
        size += len(line)
    if gathered:
        yield Record("".join(gathered).strip(), title=path.stem)


def read_json_lines(path: Path, text_field: str) -> Iterator[Record]:
    """JSON lines: the text in `text_field`; "title" and "label" (or "topic") are kept where they are text."""
    for number, line in enumerate(_lines(path, None), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"each line of {path} must be a JSON object",
                f"line {number}: {error}",
                "correct or remove that line",
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"each line of {path} must be a JSON object",
                f"a {type(row).__name__} on line {number}",
                f'write {{"{text_field}": ...}}',
            )
        yield record_of(row, text_field, f"line {number} of {path}")


def read_parquet(path: Path, text_field: str) -> Iterator[Record]:
    """A Parquet file, 256 rows at a time; the same columns as for JSON lines."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_field(text_field, names, str(path))
            wanted = [name for name in names if name in (text_field, "title", "label", "topic")]
            for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=wanted):
                for row in batch.to_pylist():
                    yield record_of(row, text_field, str(path))
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} must be a whole, readable Parquet file",
            _first_line(error),
            "restore it or write it again",
        ) from error


def record_of(row: Mapping[str, Any], text_field: str, where: str) -> Record:
    """One row as a record. Raises UserError naming the fields there are when `text_field` holds no text."""
    _check_field(text_field, list(row), where)
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"the field {text_field!r} must hold text",
            f"{type(text).__name__} in {where}, fields: {', '.join(row)}",
            "name another with --text-field",
        )
    title, label = row.get("title"), row.get("label", row.get("topic"))
    return Record(
        text=whole_characters(text or ""),
        title=whole_characters(title) if isinstance(title, str) else None,
        label=None if label is None or isinstance(label, (dict, list)) else whole_characters(str(label)),
    )


def whole_characters(text: str) -> str:
    """The text with lone surrogates (JSON can spell them, UTF-8 and tokenizers cannot) replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _check_field(field: str, fields: Iterable[str], where: str) -> None:
    if field not in fields:
        raise UserError(
            f"the text must be in the field {field!r}",
            f"only the fields {', '.join(sorted(fields)) or '(none)'} in {where}",
            "name one of them with --text-field",
        )


def _lines(path: Path, longest: int | None) -> Iterator[str]:
    """Lines with their newline; one longer than `longest` characters comes in pieces."""
    pending: list[str] = []
    size = 0
    for chunk in _decoded(path):
        for piece in _split_newlines(chunk):
            pending.append(piece)
            size += len(piece)
            if piece.endswith("\n") or (longest is not None and size >= longest):
                yield "".join(pending)
                pending, size = [], 0
    if pending:
        yield "".join(pending)


def _split_newlines(text: str) -> list[str]:
    pieces = text.split("\n")
    return [piece + "\n" for piece in pieces[:-1]] + [piece for piece in pieces[-1:] if piece]


def _decoded(path: Path) -> Iterator[str]:
    """The file's characters in chunks. Raises UserError for what is no UTF-8 text, with the byte's offset."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(
            f"{path} must be readable", str(error), "check the path and its permissions"
        ) from error
    with file:
        while True:
            chunk = file.read(_CHUNK_BYTES)
            if (zero := chunk.find(b"\0")) >= 0:
                raise UserError(
                    f"{path} must be text", f"a NUL byte at offset {offset + zero}", "give a UTF-8 text file"
                )
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} must be UTF-8",
                    f"byte {error.object[error.start]:#04x} at offset {offset - waiting + error.start}",
                    "convert it, for example with iconv -t UTF-8",
                ) from error
            text = text.removeprefix("\ufeff") if offset == 0 else text
            yield newlines.decode(text, final=not chunk)
            if not chunk:
                return
            offset += len(chunk)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
