"""Progress of long work: bars with rate and time left on a terminal, a plain line now and then elsewhere."""

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from sae.numbers import format_count, format_time
from train.cli.console import stderr

_SECONDS_BETWEEN_LINES = 10.0


class Report(Protocol):
    """Told how far a piece of work is, as often as one likes; `what` tells the pieces apart."""

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None: ...


@contextlib.contextmanager
def progress(unit: str = "tokens") -> Iterator[Report]:
    """Shows progress while the block runs. `unit` names what `done` and `total` count."""
    if not stderr.is_terminal:
        yield _PlainLines(unit)
        return
    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        _RateColumn(unit),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("[dim]{task.fields[detail]}"),
    )
    with Progress(*columns, console=stderr, refresh_per_second=4, speed_estimate_period=60) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int, detail: str = "") -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, detail="")
            bars.update(tasks[what], completed=done, total=total, detail=detail)

        yield report


class _RateColumn(ProgressColumn):
    """Units a second, over the last minute while working, over the whole when finished."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{format_count(speed)} {self.unit}/s" if speed else "", style="dim")


class _PlainLines:
    """One line every ten seconds, and one at the end of each piece of work."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self._start: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._ended: set[str] = set()

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        started = self._start.setdefault(what, now)
        ended = done >= total
        if what in self._ended or not (
            ended or now - self._last.setdefault(what, now) >= _SECONDS_BETWEEN_LINES
        ):
            return
        self._last[what] = now
        if ended:
            self._ended.add(what)
        stderr.print(self._line(what, done, total, now - started, detail), soft_wrap=True)

    def _line(self, what: str, done: int, total: int, seconds: float, detail: str) -> str:
        parts = [f"{what}: {format_count(done)} of {format_count(total)} {self.unit}"]
        if seconds > 0 and done > 0:
            rate = done / seconds
            parts.append(f"{format_count(rate)} {self.unit}/s")
            parts.append(
                f"{format_time(seconds)} in all"
                if done >= total
                else f"{format_time((total - done) / rate)} left"
            )
        return ", ".join(parts + [detail] * bool(detail))
