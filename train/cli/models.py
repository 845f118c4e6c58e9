"""`jumpscope models`."""

import dataclasses

from activations.sources import known_models
from train.cli.console import note, stdout, table
from train.cli.parsing import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """List the language models that go by a name, and whether they can be loaded here."""


def run(argv: list[str]) -> None:
    """Prints the table."""
    parse(ModelsOptions, argv, verb="models", examples=["models", "train --model smollm2-135m --layers 9"])
    rows = table("model", "what it is", "licence", "here", "to get it")
    for model in known_models():
        here = "yes" if model["available"] else "no"
        cells = (
            model["name"],
            model["what"],
            model["licence"],
            here,
            "" if model["available"] else model["install"],
        )
        rows.add_row(*map(str, cells))
    stdout.print(rows)
    note("--model also takes a hub id (google/gemma-2-2b), a transformers folder or a .gguf file.")
