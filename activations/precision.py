"""Which device and which number format a model runs in."""

import torch

from sae.errors import UserError
from sae.kernels.dispatch import product_dtype

_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
}


def pick_device(name: str) -> torch.device:
    """The device by name; auto is the GPU when there is one. Raises UserError when it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f"{name!r} ({str(error).splitlines()[0]})"
        raise UserError("the device must be usable here", reason, "choose auto, cpu or cuda") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype by name; auto is bf16 where the device multiplies it natively, else fp32."""
    if name == "auto":
        return product_dtype(device)
    if name not in _DTYPES:
        raise UserError("the dtype must be known", repr(name), f"choose from auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
