"""Where the verbs write: results to stdout, progress and remarks to stderr."""

import math

from rich.console import Console
from rich.table import Table

from activations.torchrun import this_rank


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # rich would exit with code 1 here; `main` has a code for it
        raise BrokenPipeError


stdout = _Console(highlight=False, markup=False, emoji=False)
# of several ranks the first reports; errors go another way
stderr = _Console(stderr=True, highlight=False, markup=False, emoji=False, quiet=this_rank() > 0)


def say(text: str) -> None:
    """A line of results."""
    stdout.print(text, soft_wrap=True)


def note(text: str) -> None:
    """A line about the work itself."""
    stderr.print(text, soft_wrap=True, style="dim")


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table. Columns whose name begins with `>` are numbers, set to the right."""
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        made.add_column(
            column.removeprefix(">"),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=right,
            # numbers do not give way, and a narrow terminal must not squeeze names to nothing
            min_width=None if right else 8,
        )
    return made


def figure(value: float | int | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
