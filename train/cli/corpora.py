"""`jumpscope corpora`."""

import dataclasses

from activations.corpora import known_corpora
from train.cli.console import note, stdout, table
from train.cli.parsing import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorporaOptions:
    """List the texts that go by a name, and whether they can be read here."""


def run(argv: list[str]) -> None:
    """Prints the table."""
    parse(
        CorporaOptions, argv, verb="corpora", examples=["corpora", "train --corpus my-notes.jsonl --layers 9"]
    )
    rows = table("corpus", "what it is", "licence", "here", "to get it")
    for corpus in known_corpora():
        here = "yes" if corpus.available else "no"
        rows.add_row(
            corpus.name, corpus.what, corpus.licence, here, "" if corpus.available else corpus.install
        )
    stdout.print(rows)
    note("--corpus also takes a .txt, .jsonl or .parquet file, a folder of these, or a `datasets` name.")
