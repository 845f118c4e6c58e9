"""What an index says of a site as a whole: how often its latents fire, and how well their thresholds sit."""

from typing import Any

import numpy as np
import pyarrow as pa

from viewer.tables import SiteTables

LOG10_EDGES = np.arange(-24, 1) / 4
"""Bins of density: log10 of the share of tokens on which a latent fires, as in eval.json."""
NUMBERS = (
    *("latents", "live", "silent", "dense", "duplicates"),
    *("threshold_low", "threshold_middle", "threshold_high", "barely", "open"),
)
BARELY = 1.5
"""A latent whose highest activation is below this many thresholds never stands out."""


def site_health(tables: SiteTables) -> dict[str, Any]:
    """A site's numbers: latents, live, silent, dense and duplicates (counts), and

    density: counts of firing latents in LOG10_EDGES; threshold_low, threshold_middle, threshold_high: the
    first decile, median and last decile, over firing latents, of threshold over mean activation (NaN where
    the architecture has no thresholds); barely: the share of firing latents whose highest activation is
    under BARELY thresholds; open: the share of all latents whose threshold is 0 or below, which nothing but
    their bias holds back.
    """
    names = ["state", "log10_density", "mean", "max", "threshold", "firings", "duplicate_of"]
    table = tables.latents.columns(names)
    state = table["state"].to_numpy(zero_copy_only=False)
    mean, highest, threshold = (_numbers(table[name]) for name in ("mean", "max", "threshold"))
    fired = table["firings"].to_numpy() > 0
    logs = np.clip(_numbers(table["log10_density"])[fired], LOG10_EDGES[0], LOG10_EDGES[-1])
    known = np.isfinite(threshold)
    both = fired & known
    share = threshold[both] / np.maximum(mean[both], 1e-30)
    low, middle, high = np.quantile(share, (0.1, 0.5, 0.9)) if len(share) else (np.nan,) * 3
    return {
        "latents": len(state),
        "live": int((state == "live").sum()),
        "silent": int((state == "silent").sum()),
        "dense": int((state == "dense").sum()),
        "duplicates": len(state) - table["duplicate_of"].null_count,
        "density": np.histogram(logs, LOG10_EDGES)[0].tolist(),
        "threshold_low": float(low),
        "threshold_middle": float(middle),
        "threshold_high": float(high),
        "barely": float((highest[both] < BARELY * threshold[both]).mean()) if both.any() else float("nan"),
        "open": float((threshold[known] <= 0).mean()) if known.any() else float("nan"),
    }


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column as floats [latent], NaN for null."""
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
