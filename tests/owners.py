"""The owners' own code: the modules of their packages that hold dictionaries, without what else they import;
and what their results are compared by.

`sparsify` and `dictionary_learning` import trainers, data sets and nnsight in their `__init__`; the modules
need torch, einops, natsort and simple-parsing. So the packages are opened without their `__init__`.
The Makefile installs them without their dependencies. Where one is missing, the tests fail: a test
that is skipped unseen is worth nothing.
"""

import ast
import importlib
import importlib.util
import json
import os
import sys
import types
import typing
from contextlib import nullcontext
from typing import Any

import dialect_makers as make
import torch

import sae
from sae.dialects.parts import make_parts
from sae.dictionary import parameter_shapes

D_IN, D_SAE, K = make.D_IN, make.D_SAE, make.K
X = make.numbers(60, D_IN, seed=9)
SITE, PAIR = "blocks.5.hook_resid_post", ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out")


def module(name: str) -> types.ModuleType:
    """A module of a package whose `__init__` is passed over."""
    package = name.partition(".")[0]
    if package not in sys.modules:
        found = importlib.util.find_spec(package)
        assert found is not None, f"{package} must be installed: `make lint` installs it"
        bare = types.ModuleType(package)
        bare.__path__ = list(found.submodule_search_locations or ())
        sys.modules[package] = bare
    return importlib.import_module(name)


def sparse_coder() -> Any:
    """sparsify's SparseCoder and its config. Its Triton decoder has no CPU; its own switch turns it off."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    return module("sparsify.sparse_coder").SparseCoder, module("sparsify.config").SparseCoderConfig


def dictionary_learning() -> types.SimpleNamespace:
    """`load_dictionary`, `trainSAE` (which saves), every class and every trainer of dictionary_learning."""
    names = {
        "json": json,
        "os": os,
        "t": torch,
        "torch": torch,
        "nullcontext": nullcontext,
        "Optional": typing.Optional,
    }
    names |= {"tqdm": lambda data, **_: data, "print": lambda *_: None}
    for name in ("dictionary", *(f"trainers.{n}" for n in _TRAINERS)):
        found = module(f"dictionary_learning.{name}")
        names |= {key: value for key, value in vars(found).items() if isinstance(value, type)}
    package = next(iter(module("dictionary_learning").__path__))
    for file, functions in (("utils", ["load_dictionary"]), ("training", ["get_norm_factor", "trainSAE"])):
        # these modules cannot be imported without nnsight, of which these functions need nothing
        with open(f"{package}/{file}.py", encoding="utf-8") as source:
            tree = ast.parse(source.read())
        tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in functions]
        exec(compile(tree, f"{package}/{file}.py", "exec"), names)
    return types.SimpleNamespace(**{key: value for key, value in names.items() if not key.startswith("__")})


_TRAINERS = (
    "standard",
    "gdm",
    "p_anneal",
    "gated_anneal",
    "top_k",
    "batch_top_k",
    "matryoshka_batch_top_k",
    "jumprelu",
)


def agree(parts, acts, out):
    """Our latents and outputs are theirs, to a relative 1e-6 of the largest; so are a loaded dictionary's."""
    made = make.compute(parts.cfg, parts.tensors, X)
    opened = sae.build(sae.DictionaryConfig(**parts.cfg), parts.tensors)
    for ours, fp32, theirs in zip(made, (opened.encode(X), opened(X)), (acts, out), strict=True):
        assert theirs.dtype == torch.float64 and theirs.abs().max() > 0
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
        assert (fp32 - theirs).abs().max() <= 5e-6 * theirs.abs().max()


def randomise(module):
    with torch.no_grad():
        for seed, tensor in enumerate(module.parameters()):
            tensor.copy_(make.numbers(*tensor.shape, seed=seed) if tensor.ndim else tensor)


def ours(architecture, transcoder=False, d_out=None, site=SITE, **fields):
    """A dictionary of ours with random tensors."""
    k, skip = K if "topk" in architecture else 0, fields.pop("skip", False)
    cfg = sae.DictionaryConfig(
        architecture=architecture, d_in=D_IN, d_sae=D_SAE, d_out=d_out or D_IN, k=k, skip=skip
    )
    shapes = parameter_shapes(cfg)
    tensors = {name: make.numbers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    if "threshold" in tensors:
        same = torch.full((D_SAE,), 0.3)
        tensors["threshold"] = same if architecture == "batchtopk" else tensors["threshold"].abs()
    sites = PAIR if transcoder else (site, site)
    return make_parts(
        architecture,
        tensors,
        source="test",
        dialect="test",
        site_in=sites[0],
        site_out=sites[1],
        model="google/gemma-3-270m",
        k=k,
        **fields,
    )


def same_bits(found, expected):
    """Both directions of a format compare their arrays by this."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
