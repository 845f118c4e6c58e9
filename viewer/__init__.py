"""The feature index, the Features API and the viewer: what the latents of a run mean.

run = viewer.open("runs/demo");  run.layer(9)[123]
"""

from viewer.features import Feature, Run, Site, open

__all__ = ["Feature", "Run", "Site", "open"]
