"""Packages that import their parts when these are first asked for. Needs no torch, which takes seconds."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def attributes_of(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__`: each name of `modules` is fetched from the module that it stands for."""

    def fetch(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return fetch
