"""What torchrun's environment says of this process; nothing heavy, for `jumpscope --help` imports it."""

import os


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun, or what speaks like it, has started."""
    return os.environ.get("WORLD_SIZE", "1").strip() not in ("", "0", "1")


def this_rank() -> int:
    """The number of this process among the ranks of its run; 0 where it is alone."""
    text = os.environ.get("RANK", "0").strip()
    return int(text) if under_torchrun() and text.isdecimal() else 0


def restarts() -> int:
    """How often torchrun has started the same command again because a rank was lost."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0").strip()
    return int(text) if under_torchrun() and text.isdecimal() else 0
