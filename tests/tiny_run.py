"""A whole small run that has its language model: for what pages do with it."""

from pathlib import Path

from dictionaries import config_of, tensors_of
from viewer_fakes import fake_blocks

import sae
from activations.models import load_model
from activations.sites import site_name
from train.run_folder import RunFolder
from viewer.index.build import build_index

SITES = [site_name(layer, "resid_post") for layer in range(3)]
D_SAE, SILENT = 40, 2
"""Latents of each dictionary, and one of them that never fires."""


def tiny_run(path: Path, model: Path | str, *, index: bool = True) -> Path:
    """A run on the model of `conftest.tiny_folder`, with dictionaries of random weights and their index."""
    run = RunFolder.create(path, {"model": str(model), "corpus": "made up"}, sites=SITES, device="cpu")
    dictionaries = {}
    for number, site in enumerate(SITES):
        cfg = config_of("jumprelu", d_in=32, d_sae=D_SAE, site_in=site, model=str(model))
        tensors = tensors_of(cfg, seed=number)
        tensors["W_enc"] /= cfg.d_in**0.5
        tensors["threshold"][SILENT] = 1e6
        dictionaries[site] = sae.build(cfg, tensors)
        sae.save(dictionaries[site], run.site_dir(site))
    if index:
        live = load_model(str(model), dtype="fp32", progress=False)
        build_index(
            live, dictionaries, lambda start: fake_blocks(), run.index_root,
            text={"corpus": "made up"}, examples=6,
        )  # fmt: skip
    run.set_state("done")
    return run.path
