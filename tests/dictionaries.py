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
