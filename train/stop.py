"""Signals that stop a run, between two steps."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Turns Ctrl-C and SIGTERM into a KeyboardInterrupt that never falls inside a step.

    Of several ranks none stops alone: `agreed` is what all were told where they met, and only that is raised.
    """

    def __init__(self, *, alone: bool) -> None:
        self._alone, self._in_step = alone, False
        self.asked = self.agreed = ""

    def __enter__(self) -> "Stop":
        self._previous = {}
        # only the main thread may set handlers; elsewhere Ctrl-C keeps its usual meaning
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_step_boundary(self) -> Iterator[None]:
        """Within it a signal waits; it is raised at the end."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
        if stop := self.asked if self._alone else self.agreed:
            raise KeyboardInterrupt(stop)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.asked = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if self._alone and not self._in_step:
            raise KeyboardInterrupt(self.asked)
