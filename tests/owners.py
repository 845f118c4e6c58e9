"""The owners' own code: the modules of their packages that hold dictionaries, without what else they import.

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

import torch


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
