"""A verb's command line: tyro over a dataclass, our own errors as one line, and `--config FILE`."""

import contextlib
import inspect
import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro

from sae.errors import UserError
from sae.files import read_json

T = TypeVar("T")


def parse(
    kind: type[T],
    argv: list[str],
    *,
    verb: str,
    examples: list[str],
    from_dict: Callable[[Mapping[str, Any]], T] | None = None,
    also: str = "",
) -> T:
    """Reads a verb's words into its dataclass, or exits with code 2 (0 after --help).

    With `from_dict` the verb also takes `--config FILE`, a run's run.json or a JSON object of the same
    keys: its values take the place of the defaults. `also` is said in the help. Raises UserError for values
    that the dataclass refuses.
    """
    default: Any = None
    if from_dict is not None:
        argv, path = take_path(argv, "--config", "a run's run.json")
        default = None if path is None else _load_config(path, from_dict)
    about = inspect.cleandoc(kind.__doc__ or "")
    if from_dict is not None:
        about += "\n\n--config FILE takes the values of a run's run.json in place of the defaults below."
    if also:
        about += f"\n\n{also}"
    lines = "\n".join(f"  jumpscope {example}" for example in examples)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                kind,
                args=argv,
                prog=f"jumpscope {verb}",
                description=f"{about}\n\nexamples:\n{lines}",
                default=default,
            )
    except SystemExit as stop:
        refused = _user_error_behind(stop)
        if refused is not None:
            raise refused from None
        sys.stderr.write(errors.getvalue())
        raise


def take_path(argv: list[str], flag: str, what: str) -> tuple[list[str], Path | None]:
    """Takes `flag PATH` or `flag=PATH` out of a command line. Raises UserError when nothing follows it."""
    rest, path = [], None
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != flag:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value:
            raise UserError(f"{flag} must be followed by a path", "nothing after it", f"give {what}")
        path = Path(value)
    return rest, path


def _load_config(path: Path, from_dict: Callable[[Mapping[str, Any]], T]) -> T:
    path = path / "run.json" if path.is_dir() else path
    values = read_json(path)
    if isinstance(values, dict) and isinstance(values.get("config"), dict):
        values = values["config"]
    if not isinstance(values, dict):
        raise UserError(
            f"{path} must hold an object of flags", type(values).__name__, "give a run's run.json"
        )
    try:
        return from_dict(values)
    except TypeError as error:
        raise UserError(
            f"the values in {path} must be of the flags' types", str(error), "correct the file"
        ) from error


def _user_error_behind(stop: BaseException) -> UserError | None:
    """The error of ours that made tyro exit, if it was one; tyro itself would draw a box around it."""
    seen: BaseException | None = stop
    while seen is not None:
        if isinstance(seen, UserError):
            return seen
        seen = seen.__context__
    return None
