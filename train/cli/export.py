"""`jumpscope export`."""

from pathlib import Path

import sae
from sae import dialects
from train.cli.console import say
from train.cli.options import ExportOptions
from train.cli.parsing import parse


def run(argv: list[str]) -> None:
    """Reads the dictionary, or what is known of its features, and writes it in the format asked for."""
    examples = [
        "export runs/gemma/sites/blocks.9.hook_resid_post --to gemma-scope-2 --out for-them",
        "export google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 --to saelens --out here",
        "export runs/gemma/sites/blocks.9.hook_resid_post --to neuronpedia --out pages",
    ]
    options = parse(ExportOptions, argv, verb="export", examples=examples)
    if options.to == "neuronpedia":
        names = _neuronpedia(options)
        say(f"{len(names)} files, {names[0]} to {names[-1]}, in {options.out}.")
        return
    names = dialects.write(dialects.read(options.source), options.out, options.to)
    say(f"{', '.join(names)} in {options.out}.")


def _neuronpedia(options: ExportOptions) -> list[str]:
    """Writes the feature index; a dictionary beside it brings its decoder rows."""
    from train.cli.progress import progress
    from viewer.neuronpedia import find_index, write_neuronpedia

    index = find_index(options.source)
    # a site's folder in an index holds no dictionary
    dictionary = None if index == Path(options.source) else sae.load(options.source)
    vectors = None if dictionary is None else dictionary.W_dec.detach().float().numpy()
    with progress("latents") as report:
        return write_neuronpedia(
            index,
            options.out,
            vectors=vectors,
            progress=lambda done, total: report("pages for Neuronpedia", done, total),
        )
