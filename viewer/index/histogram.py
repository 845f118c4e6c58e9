"""The bins of activations: the same for every latent of every site."""

import numpy as np
from jaxtyping import Float, Int

# A histogram bin is an eighth of an octave, cut at 2^e (1 + m/8): exponent and three leading mantissa bits
# of the fp32 value, so binning is a shift, exact on every machine, and the same bins serve every latent of
# every site.
BINS_PER_OCTAVE = 8
_LOWEST_EXPONENT, _OCTAVES = -16, 40
N_BINS = BINS_PER_OCTAVE * _OCTAVES
_MANTISSA_SHIFT = 20
_FIRST_CODE = (127 + _LOWEST_EXPONENT) * BINS_PER_OCTAVE


def histogram_edges() -> Float[np.ndarray, "edge"]:
    """The N_BINS + 1 edges shared by all latents; the end bins also hold what lies beyond them."""
    octave, part = np.divmod(np.arange(N_BINS + 1), BINS_PER_OCTAVE)
    return np.ldexp(1 + part / BINS_PER_OCTAVE, octave + _LOWEST_EXPONENT)


def histogram_bin(values: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """The bin of each positive value: `edges[bin] <= value < edges[bin + 1]`, clipped to the end bins."""
    code = np.ascontiguousarray(values, dtype=np.float32).view(np.int32) >> _MANTISSA_SHIFT
    return np.clip(code.astype(np.int64) - _FIRST_CODE, 0, N_BINS - 1)
