"""The feature index, the Features API and the viewer: what the latents of a run mean.

run = viewer.open("runs/demo");  run.layer(9)[123];  run.find(token=" Paris")
"""

from typing import TYPE_CHECKING

from sae.lazy import attributes_of

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
# the viewer's server starts while torch is still being imported
__getattr__ = attributes_of(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
