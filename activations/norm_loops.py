"""The loop of a root-mean-square norm on a CPU, compiled by numba."""

import numpy as np

from sae.kernels.compiled import compiled_as_written
from sae.kernels.cpu_loops import bfloat16_bits, widened


@compiled_as_written
def scale_rows(x, factor, weight, out):
    """out = bfloat16(x factor weight), with one factor a row; x and out are bfloat16 as uint16."""
    for b in range(len(x)):
        of_row = factor[b]
        for k in range(x.shape[1]):
            out[b, k] = bfloat16_bits((np.float32(widened(x[b, k])) * of_row) * weight[k])
