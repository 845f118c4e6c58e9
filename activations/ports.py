"""What answers at a port where ranks are to meet."""

import contextlib
import socket
import threading
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

NOTHING, STORE, OTHER = "nothing", "a store", "another program"
_PATIENCE, _LOOK = 15.0, 0.1


def who_answers(host: str, port: int) -> str:
    """NOTHING, a torch STORE, or OTHER: a program that is none. Takes 15 seconds at most, for the last."""
    try:
        socket.create_connection((host, port), timeout=_PATIENCE).close()
    except OSError:
        return NOTHING
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(dist.DistError):
            timeout = timedelta(seconds=_PATIENCE / 2)
            TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
            answered.set()

    # the library waits for ever where a program takes the connection and says nothing
    asking = threading.Thread(target=ask, name="asking a port", daemon=True)
    asking.start()
    # looks, not time: a machine that was suspended finds nobody late when it wakes
    for _ in range(round(_PATIENCE / _LOOK)):
        asking.join(_LOOK)
    return STORE if answered.is_set() else OTHER
