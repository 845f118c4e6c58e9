"""The feature index, the Features API and the viewer: what the latents of a run mean.

run = viewer.open("runs/demo");  run.layer(9)[123];  run.find(token=" Paris")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from viewer.compare import Comparison
    from viewer.features import Feature, Site
    from viewer.runs import Run, open

__all__ = ["Comparison", "Feature", "Run", "Site", "open"]
_MODULES = {
    "Comparison": "viewer.compare",
    "Feature": "viewer.features",
    "Site": "viewer.features",
    "Run": "viewer.runs",
    "open": "viewer.runs",
}


def __getattr__(name: str) -> Any:
    # the viewer's server starts while torch is still being imported
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
