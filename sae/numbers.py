"""Counts, widths and sizes as people write them on a command line, and back."""

import math
import re
from fractions import Fraction

from sae.errors import UserError

_COUNT = re.compile(r"^\s*(\d+(?:\.\d+)?|\.\d+)\s*([kKmMbB]?)\s*$")
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?|\.\d+)\s*([kKmMgGtT]?)(?:i?[bB])?\s*$")
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_SIZE_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_count(text: str | int) -> int:
    """A whole number with an optional k, M or B (powers of 1,000): ``"1.5M"`` is 1,500,000."""
    match = _COUNT.match(str(text))
    # a Fraction: a float would round whole numbers above 2^53
    value = Fraction(match[1]) * _COUNT_UNITS[match[2].lower()] if match else None
    if value is None or value.denominator != 1:
        raise UserError(
            "a count is a whole number with an optional k, M or B",
            repr(text),
            "write for example 4096, 16k or 1.5M",
        )
    return value.numerator


def parse_width(text: str | int) -> int:
    """A dictionary width. With a suffix it means the field's power of two: ``"16k"`` is 16,384, ``"65k"``
    65,536.

    A suffixed number with no power of two within 5 % is taken as it stands (``"12k"`` is 12,000).
    """
    value = parse_count(text)
    if value > 0 and not str(text).strip().isdigit():
        power = 2 ** round(math.log2(value))
        if abs(power - value) <= 0.05 * value:
            return power
    return value


def parse_size(text: str | int) -> int:
    """Bytes with an optional K, M, G or T (powers of 1,024): ``"8G"`` is 8 * 2**30."""
    match = _SIZE.match(str(text))
    if not match:
        raise UserError(
            "a size is a number of bytes with an optional K, M, G or T",
            repr(text),
            "write for example 8G or 512M",
        )
    return round(Fraction(match[1]) * _SIZE_UNITS[match[2].lower()])


def format_count(value: int | float) -> str:
    """``1234567`` as ``1.23M``: three figures, for tables and progress bars; ``?`` for what is not finite."""
    if not math.isfinite(value):
        return "?"
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(value) >= 0.9995 * unit:
            scaled = value / unit
            return f"{scaled:.3g}{name}" if abs(scaled) < 999.5 else f"{scaled:.0f}{name}"
    return f"{value:.3g}" if value != int(value) else str(int(value))


def format_size(n_bytes: int | float) -> str:
    """Bytes as ``1.5 GiB``; ``?`` for what is not finite."""
    if not math.isfinite(n_bytes):
        return "?"
    for power, name in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        # not at 2^power itself: just below it, the smaller unit would round to 1024.0
        if n_bytes >= (2**power if power == 10 else 2**power * (1 - 0.05 / 1024)):
            return f"{n_bytes / 2**power:.1f} {name}"
    return f"{n_bytes:.0f} B"


def format_time(seconds: int | float) -> str:
    """Seconds as ``42 s``, ``3 min 05 s`` or ``2 h 10 min``; ``?`` for what is not finite."""
    if not math.isfinite(seconds):
        return "?"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
