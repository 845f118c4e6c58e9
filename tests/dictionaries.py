"""Dictionaries with random weights, of every architecture."""

import torch

import sae
from sae.dictionary import parameter_shapes


def config_of(architecture, **fields):
    k = {"topk": 5, "batchtopk": 5}.get(architecture, 0)
    return sae.DictionaryConfig(**{"d_in": 12, "d_sae": 40, "architecture": architecture, "k": k, **fields})


def tensors_of(cfg, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(cfg).items()}
    if "threshold" in tensors:
        tensors["threshold"].abs_()
    return tensors


def dictionary_of(architecture, **fields):
    cfg = config_of(architecture, **fields)
    return sae.build(cfg, tensors_of(cfg))


def placed(architecture="jumprelu", d_in=12, d_sae=200, dtype=torch.float32, **fields):
    """One that belongs to a site of a model."""
    where = {"site_in": "blocks.3.hook_resid_post", "model": "gemma-3-270m", "context": 256}
    return dictionary_of(architecture, d_in=d_in, d_sae=d_sae, **{**where, **fields}).to(dtype)


def rows(n=64, width=12, seed=1):
    return 3 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
