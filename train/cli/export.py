"""`jumpscope export`."""

import re
from pathlib import Path

import sae
from sae import dialects
from sae.errors import UserError
from train.cli.console import say
from train.cli.options import ExportOptions
from train.cli.parsing import parse


def run(argv: list[str]) -> None:
    """Reads the dictionary, or what is known of its features, and writes it in the format asked for."""
    examples = [
        "export runs/gemma/sites/blocks.9.hook_resid_post --to gemma-scope-2 --out for-them",
        "export google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 --to saelens --out here",
        "export runs/gemma/sites/blocks.9.hook_resid_post --to neuronpedia --out batches",
        "export runs/gemma/sites/blocks.9.hook_resid_post --to html --latents 1,5,7-20 --out pages",
    ]
    options = parse(ExportOptions, argv, verb="export", examples=examples)
    if options.to == "html":
        number = _html(options)
        say(f"{number:,} pages; open {Path(options.out) / 'index.html'}.")
        return
    if options.to == "neuronpedia":
        names = _neuronpedia(options)
        say(f"{len(names)} files, {names[0]} to {names[-1]}, in {options.out}.")
        return
    names = dialects.write(dialects.read(options.source), options.out, options.to)
    say(f"{', '.join(names)} in {options.out}.")


def _neuronpedia(options: ExportOptions) -> list[str]:
    """Writes the feature index; a dictionary beside it brings its decoder rows."""
    from train.cli.progress import progress
    from viewer.index.storage import find_index
    from viewer.neuronpedia import write_neuronpedia

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


def _html(options: ExportOptions) -> int:
    """Writes pages of a site, or of all sites of a run that have an index."""
    import viewer
    from train.cli.progress import progress
    from train.run_folder import RUN
    from viewer.index.storage import TEXTS, find_index
    from viewer.static import write_pages

    source = Path(options.source)
    several = (source / RUN).is_file() or any((at / TEXTS).is_dir() for at in (source, source / "index"))
    index = source if several else find_index(source)
    opened = viewer.open(index)
    sites = opened.indexed if several else [index.name]
    if not sites:
        raise UserError(
            "html needs a feature index", f"none in {source}", f"`jumpscope index {source}` makes it"
        )
    latents = _latents(options.latents) if options.latents else None
    with progress("latents") as report:
        return write_pages(
            opened,
            options.out,
            sites=sites,
            latents=latents,
            alone=not several,
            progress=lambda done, total: report("pages", done, total),
        )


def _latents(spec: str) -> list[int]:
    """The latents of `1,5,7-20`, both ends included. Raises UserError for what cannot be read."""
    numbers: list[int] = []
    for part in spec.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        # a range far beyond any dictionary would be written out before it is refused
        if last < first or last - first >= 10**7:
            raise UserError("--latents must be numbers and ranges", repr(part), "write it as 1,5,7-20")
        numbers += range(first, last + 1)
    return numbers
