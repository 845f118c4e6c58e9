"""`jumpscope import`."""

import dataclasses

import sae
from sae import dialects
from sae.dialects.parts import Parts
from train.cli.console import note, say
from train.cli.options import ImportOptions
from train.cli.parsing import parse


def run(argv: list[str]) -> None:
    """Reads the dictionary, says what it is, and writes our own folder."""
    examples = [
        "import google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 --out dictionaries/gemma",
        "import gemma-scope-2b-pt-res-canonical:layer_20/width_16k/canonical --out dictionaries/gemma",
        "import downloads/params.npz --site blocks.20.hook_resid_post --model gemma-2-2b --out mine",
    ]
    options = parse(ImportOptions, argv, verb="import", examples=examples)
    parts = _told(dialects.read(options.source), options)
    for line in parts.notes:
        note(line)
    sae.save(parts.dictionary, options.out)
    cfg = parts.cfg
    where = cfg["site_in"] if cfg["site_in"] == cfg["site_out"] else f"{cfg['site_in']} -> {cfg['site_out']}"
    say(
        f"{cfg['architecture']} of {cfg['d_sae']:,} latents, {cfg['model'] or 'model unknown'}, "
        f"{where or 'site unknown'}, from {parts.dialect}, in {options.out}."
    )


def _told(parts: Parts, options: ImportOptions) -> Parts:
    cfg = parts.cfg
    if options.site:
        cfg |= {"site_in": options.site, "site_out": options.site}
    cfg |= {name: value for name in ("site_out", "model") if (value := getattr(options, name))}
    told = sae.build(sae.DictionaryConfig(**cfg), parts.tensors, source=parts.source)
    told.probe = parts.dictionary.probe
    return dataclasses.replace(parts, dictionary=told)
