"""`jumpscope export`."""

from sae import dialects
from train.cli.console import say
from train.cli.options import ExportOptions
from train.cli.parsing import parse


def run(argv: list[str]) -> None:
    """Reads the dictionary and writes it in the format that is asked for."""
    examples = [
        "export runs/gemma/sites/blocks.9.hook_resid_post --to gemma-scope-2 --out for-them",
        "export google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 --to saelens --out here",
    ]
    options = parse(ExportOptions, argv, verb="export", examples=examples)
    names = dialects.write(dialects.read(options.source), options.out, options.to)
    say(f"{', '.join(names)} in {options.out}.")
