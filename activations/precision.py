"""Which device and which number format a model runs in."""

import torch

from sae.errors import UserError

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
        return torch.bfloat16 if _has_bf16(device) else torch.float32
    if name not in _DTYPES:
        raise UserError("the dtype must be known", repr(name), f"choose from auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        # not by emulation: cards before Ampere are faster in fp32
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    # private functions of torch: absent in some builds, where the safe answer is fp32
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)
