"""`jumpscope view RUN...`."""

import ipaddress

import viewer
from train.cli.console import say
from train.cli.options import ViewOptions
from train.cli.parsing import parse
from viewer.app.launch import launch


def run(argv: list[str]) -> None:
    """Serves the viewer until it is stopped."""
    examples = ["view runs/gemma", "view runs/gemma runs/other", "view runs/gemma --headless --port 8600"]
    serve(parse(ViewOptions, argv, verb="view", examples=examples))


def serve(options: ViewOptions) -> None:
    """Says where the viewer is and who can reach it, and runs it."""
    for path in options.runs:
        viewer.open(path)  # refuses before anything is said
    here = _is_local(options.address)
    host = "localhost" if here else options.address
    reach = "" if here else " Every machine that reaches this address can read your runs and change labels."
    say(f"The viewer of {', '.join(options.runs)}: http://{host}:{options.port} (Ctrl-C ends it).{reach}")
    launch(options.runs, port=options.port, headless=options.headless, address=options.address)


def _is_local(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
