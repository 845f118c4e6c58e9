"""`jumpscope view RUN...`."""

import socket
from collections.abc import Sequence

from train.cli.console import say
from train.cli.options import ViewOptions
from train.cli.parsing import parse
from viewer.app.launch import launch, reach
from viewer.places import find_place


def run(argv: list[str]) -> None:
    """Serves the viewer until it is stopped."""
    examples = ["view runs/gemma", "view runs/gemma runs/other", "view runs/gemma --headless --port 8600"]
    serve(parse(ViewOptions, argv, verb="view", examples=examples))


def serve(options: ViewOptions) -> None:
    """Says where the viewer is and who can reach it, and runs it."""
    for path in options.runs:
        find_place(path)  # refuses before anything is said
    say(where(options.address, options.port, options.runs))
    launch(options.runs, port=options.port, headless=options.headless, address=options.address)


def where(address: str, port: int, runs: Sequence[str]) -> str:
    """What a user is told: where the viewer is, and who can reach it when that is not only themselves."""
    near = reach(address)
    local, anywhere = near == "this machine", near == "any network"
    host = "localhost" if local and ":" not in address else socket.gethostname() if anywhere else address
    host = f"[{host}]" if ":" in host else host
    text = f"The viewer of {', '.join(runs)}: http://{host}:{port} (Ctrl-C ends it)."
    if local:
        return text
    machines = "on any network of this one" if anywhere else f"that can reach {address}"
    return f"{text} It has no password: every machine {machines} can read these runs and change labels."
