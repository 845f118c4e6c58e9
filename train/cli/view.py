"""`jumpscope view RUN`."""

from train.cli.console import say
from train.cli.options import ViewOptions
from train.cli.parsing import parse
from train.run_folder import RunFolder
from viewer.app.launch import launch


def run(argv: list[str]) -> None:
    """Serves the viewer until it is stopped."""
    options = parse(
        ViewOptions, argv, verb="view", examples=["view runs/gemma", "view runs/gemma --headless --port 8600"]
    )
    serve(options)


def serve(options: ViewOptions) -> None:
    """Says where the viewer is, and runs it."""
    RunFolder.open(options.run)  # refuses before anything is said
    say(f"The viewer of {options.run}: http://localhost:{options.port} (Ctrl-C ends it)")
    launch(options.run, port=options.port, headless=options.headless)
