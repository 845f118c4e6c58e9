"""The norms of a model's blocks without what the bridge adds to them, and on a CPU in one pass: same bits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import BFloat16
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

from sae.kernels.workers import workers_for

# rows that a thread takes at a time
_ROWS = 256


class PlainNorms:
    """The norms of a bridge, to be the model's own while nobody looks inside them.

    The bridge computes each norm once more for its hooks, and Gemma's own takes many passes over memory where
    a few will do: on a CPU a tenth of a forward pass or so.
    """

    def __init__(self, bridge: nn.Module) -> None:
        self._norms = [module for module in bridge.modules() if _computes_twice(module)]
        self._quick: dict[nn.Module, bool] = {}

    @contextmanager
    def standing_in(self) -> Iterator[list[nn.Module]]:
        """Within it, norms whose insides nobody hooks, given, are the model's own, bit for bit."""
        plain = [norm for norm in self._norms if not _is_hooked_inside(norm)]
        try:
            for norm in plain:
                # an attribute of the instance hides the class's method; hooks of the norm itself still run
                norm.__dict__["forward"] = self._own(norm.original_component)
            yield plain
        finally:
            for norm in plain:
                norm.__dict__.pop("forward", None)

    def _own(self, norm: Any) -> Callable[[Tensor], Tensor]:
        """The model's norm, or what has been seen to compute the same."""
        if torch.is_inference_mode_enabled() and _may_be_quick(norm):
            # each is asked for itself: one whose weights are all zero looks like Gemma's, whatever its kind
            if norm not in self._quick:
                self._quick[norm] = _is_gemmas(norm)
            if self._quick[norm]:
                return lambda x: quick_norm(norm, x)
        return norm


@torch.inference_mode()
def quick_norm(norm: Any, x: BFloat16[Tensor, "*batch d"]) -> BFloat16[Tensor, "*batch d"]:
    """bfloat16(x / rms(x) (1 + weight)) in fp32, as Gemma's norm computes it, to the last bit.

    The mean of squares is torch's, whose sums have an order of their own.
    """
    from activations.norm_loops import scale_rows  # late: numba takes a second to import

    order = sorted(range(x.dim() - 1), key=lambda axis: -x.stride(axis))
    lying = x.permute(*order, -1)
    if x.dtype != torch.bfloat16 or not lying.is_contiguous():
        return norm(x)
    factor = torch.rsqrt(x.float().pow(2).mean(-1) + norm.eps).permute(*order).reshape(-1).numpy()
    weight, out = (1.0 + norm.weight.float()).numpy(), torch.empty_like(lying)
    rows, found = (part.view(torch.uint16).reshape(-1, x.shape[-1]).numpy() for part in (lying, out))

    def scale(start: int) -> None:
        part = slice(start, start + _ROWS)
        scale_rows(rows[part], factor[part], weight, found[part])

    workers_for(torch.get_num_threads()).run(scale, range(0, len(rows), _ROWS))
    back = [order.index(axis) for axis in range(len(order))]
    return out.permute(*back, -1)


def _may_be_quick(norm: Any) -> bool:
    weight = getattr(norm, "weight", None)
    on_cpu = isinstance(weight, Tensor) and weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return on_cpu and isinstance(getattr(norm, "eps", None), float)


def _is_gemmas(norm: Any) -> bool:
    """Whether a norm computes what `quick_norm` does: found out by asking it."""
    generator = torch.Generator().manual_seed(0)
    # epsilon shows in small rows alone
    sizes = torch.tensor([1e-4, 1e-3, 1.0, 30.0])[:, None]
    x = (torch.randn(4, len(norm.weight), generator=generator) * sizes).to(torch.bfloat16)
    return torch.equal(norm(x), quick_norm(norm, x))


def _computes_twice(module: nn.Module) -> bool:
    """Whether it is a norm of the bridge that gives the wrapped norm's own output."""
    native = getattr(module, "use_native_layernorm_autograd", False) or getattr(
        getattr(module, "config", None), "layer_norm_folding", False
    )
    return isinstance(module, NormalizationBridge) and bool(native)


def _is_hooked_inside(norm: nn.Module) -> bool:
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        for module in norm.modules()
        if module is not norm
    )
