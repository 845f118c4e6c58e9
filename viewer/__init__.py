"""The feature index, the Features API and the viewer: what the latents of a run mean.

run = viewer.open("runs/demo");  run.layer(9)[123];  run.find(token=" Paris")
"""

from viewer.compare import Comparison
from viewer.features import Feature, Site
from viewer.runs import Run, open

__all__ = ["Comparison", "Feature", "Run", "Site", "open"]
