"""`jumpscope demo`: from nothing to a viewer, in one command."""

from pathlib import Path
from typing import TYPE_CHECKING

from activations.collector import resting_collector
from train.cli import plan
from train.cli.console import note, say, stdout
from train.cli.options import DemoOptions, EvalOptions, IndexOptions, ViewOptions
from train.cli.parsing import parse
from train.cli.tables import eval_caption, eval_summary
from train.run_folder import RUN, RunFolder, refuse_occupied

if TYPE_CHECKING:
    from activations.models import LanguageModel

DEFAULT_OUT = Path("runs/demo")


def run(argv: list[str]) -> None:
    """Runs every step that is not done yet, then serves the viewer."""
    examples = [
        "demo",
        "demo --no-view --out runs/mine",
        "demo --headless --layers 3-8 --width 4k --l0 50 --tokens 500k",
    ]
    options = parse(DemoOptions, argv, verb="demo", examples=examples)
    out, model = Path(options.out) if options.out else _default_out(), None
    if (out / RUN).is_file() and not options.out:
        note(f"{out} holds a trained demo, which is opened again; --out makes another")
    else:
        refuse_occupied(out)
        model = _make(options, out)
    _finish(options, RunFolder.open(out), model)
    if options.view:
        from train.cli import view

        view.serve(ViewOptions(runs=(str(out),), port=options.port, headless=options.headless))


def _make(options: DemoOptions, out: Path) -> "LanguageModel":
    """Trains; returns the model, which the rest needs too."""
    config = options.train_config(str(out))
    plan.check(config)
    with resting_collector():  # late: mistakes above should not wait for transformers
        from train.cli import work

    model = work.load(config)
    # the pass over held-out text is made once for evaluation and index, so it is counted once
    work.train(config, model=model, loss_tokens=options.loss_tokens, index_tokens=options.held_out_tokens)
    return model


def _finish(options: DemoOptions, folder: RunFolder, model: "LanguageModel | None") -> None:
    """Evaluates and indexes what has not been, and prints the table."""
    from viewer.index.storage import is_whole  # late: it imports torch and pyarrow

    path = str(folder.path)
    measured = set(folder.eval_table()) >= set(folder.sites())
    indexed = all(is_whole(folder.index_dir(site)) for site in folder.sites())
    if not (measured and indexed):
        with resting_collector():
            from train.cli import indexing, work

        loaded = work.load_run(folder.path, dtype=options.dtype, device=options.device, model=model)
        tokens = options.held_out_tokens
        measuring = EvalOptions(run=path, tokens=tokens, loss_tokens=options.loss_tokens)
        if measured:
            indexing_options = IndexOptions(sources=(path,), tokens=tokens)
            indexing.build(indexing.of_run(loaded, indexing_options), indexing_options.examples)
        else:
            work.measure(loaded, measuring, index=not indexed)
    metrics = folder.eval_table()
    stdout.print(eval_summary(metrics))
    note(eval_caption(metrics))
    say("")
    say("What to do next:")
    say(f"  jumpscope view {path}                     browse the features")
    say(f"  jumpscope eval {path} --loss-tokens 16k   smaller standard errors")
    say(f"  jumpscope train --config {path}/{RUN} --width 8k --out runs/wider")
    say(f"  python: sae.load({str(folder.site_dir(folder.sites()[-1]))!r}).encode(activations)")


def _default_out() -> Path:
    """runs/demo, or the first of runs/demo-2, ... when an unfinished training holds it."""
    number = 1
    while True:
        path = DEFAULT_OUT if number == 1 else DEFAULT_OUT.with_name(f"{DEFAULT_OUT.name}-{number}")
        finished = (path / RUN).is_file() and RunFolder.open(path).state() == "done"
        if finished or not path.exists() or not any(path.iterdir()):
            return path
        note(f"{path} holds a run that was not finished: `jumpscope train --resume {path}` goes on with it")
        number += 1
