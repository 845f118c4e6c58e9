"""`jumpscope`: finds the verb, runs it, and turns what goes wrong into one line and an exit code.

Nothing heavy is imported here, so that `jumpscope --help` answers at once.
"""

import contextlib
import difflib
import importlib
import importlib.metadata
import keyword
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from activations.collector import resting_collector
from activations.torchrun import this_rank, under_torchrun

VERBS: dict[str, tuple[str, str]] = {
    "demo": (
        "plan, train, eval, index and view a dictionary for every layer of Gemma 3 270M",
        "demo --out runs/mine",
    ),
    "models": ("list the language models that can be loaded here", "models"),
    "corpora": ("list the texts that can be read here", "corpora"),
    "plan": (
        "memory, disk and time that a training run will take",
        "plan --width 16k --tokens 10M --memory 8G",
    ),
    "harvest": (
        "write activations to a folder, to train from later",
        "harvest --layers 3-8 --tokens 1M --out stores/mid",
    ),
    "train": (
        "train one dictionary a site, all from the same forward passes",
        "train --width 4k --l0 50 --out runs/gemma",
    ),
    "eval": ("measure a run's dictionaries on held-out text", "eval runs/gemma"),
    "index": ("collect what makes each latent fire, for the viewer", "index runs/gemma"),
    "view": ("browse a run in the browser", "view runs/gemma"),
    "import": (
        "bring a dictionary from another library's format into ours",
        "import google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 --out dictionaries/gemma",
    ),
    "export": (
        "write a dictionary in another library's format",
        "export runs/gemma/sites/blocks.9.hook_resid_post --to sparsify --out for-them",
    ),
    "check": (
        "whether a dictionary fits its model, and if not, why",
        "check google/gemma-scope-2-270m-pt/resid_post_all/layer_9_width_16k_l0_small --model gemma-3-270m",
    ),
    "info": ("what a run, a dictionary (here or at the hub), a store or this machine is", "info runs/gemma"),
}
DISTRIBUTED = ("train", "harvest", "eval", "index")
"""The verbs that divide their work over the ranks of torchrun."""
USAGE, INTERRUPTED, TERMINATED, BROKEN_PIPE = 2, 130, 143, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0, 2 for what the user can put right, 130, 143 or 141,
    and under torchrun 75 when another rank is lost.

    Anything unforeseen is a bug of ours and keeps its traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _sigterm_as_interrupt():
            if under_torchrun():
                # the launcher holds Ctrl-C back from a rank until here, where it is understood
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            code = _dispatch(words)
            sys.stdout.flush()
            return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt as interrupt:
        terminated = "SIGTERM" in interrupt.args
        return _say("stopped by SIGTERM", TERMINATED) if terminated else _say("stopped", INTERRUPTED)
    except BrokenPipeError:
        # the reader (`| head`) has gone; what is still buffered must not raise again at exit
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except ValueError as error:
        if not _is_user_error(error):
            _report_bug()
        # a rank that is lost has a code of its own, and another rank to speak of it when it was rank 0
        return _say(str(error), getattr(error, "code", USAGE), getattr(error, "speaker", 0))
    except OSError as error:
        if error.errno is None:
            _report_bug()
        where = f" ({error.filename})" if error.filename else ""
        return _say(
            f"the system refused: {error.strerror}{where}. Check the path, its permissions and free space.",
            USAGE,
        )
    except Exception:
        _report_bug()


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0
    if words[0] == "--version":
        sys.stdout.write(f"jumpscope {importlib.metadata.version('jumpscope')}\n")
        return 0
    if words[0] == "--distributed" and not under_torchrun():
        _quiet_libraries()
        return importlib.import_module("train.cli.launch").run(words[1:])
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        return _say(f"no verb {verb!r}. {hint}The verbs: {', '.join(VERBS)}.", USAGE)
    _quiet_libraries()
    # a module may not be called as a keyword is
    module = f"{verb}_" if keyword.iskeyword(verb) else verb
    with resting_collector():
        run = importlib.import_module(f"train.cli.{module}").run
    return _run_as_rank(verb, run, rest) if under_torchrun() else run(rest) or 0


def _run_as_rank(verb: str, run: Callable[[list[str]], int | None], rest: list[str]) -> int:
    if verb not in DISTRIBUTED:
        ours = ", ".join(DISTRIBUTED)
        return _say(
            f"{verb} is the work of one process, and torchrun started several; it runs {ours}.", USAGE
        )
    from activations.ranks import open_ranks

    with contextlib.ExitStack() as stack:
        if this_rank():
            # tables and lists are rank 0's to print
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(open_ranks())
        return run(rest) or 0


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(
        f"  {name:<{width}}  {line}\n  {'':<{width}}  $ jumpscope {example}"
        for name, (line, example) in VERBS.items()
    )
    return (
        "usage: jumpscope VERB [options]\n\n"
        "A microscope for every layer of a small open language model: harvest activations, train a\n"
        "dictionary per layer, measure them, browse what their latents mean.\n\n"
        f"{verbs}\n\n"
        f"{', '.join(DISTRIBUTED)} also run on many processes and machines, started by torchrun:\n"
        "  $ jumpscope --distributed --nproc-per-node 8 train --width 16k --out runs/gemma\n\n"
        "Numbers take k, M and B (1M is a million), sizes take K, M and G (8G of memory).\n"
        "`jumpscope VERB --help` teaches each verb; `jumpscope --version` says which this is.\n"
    )


def _quiet_libraries() -> None:
    """Keeps other libraries' bars and advice off the console; what the user set in the environment wins."""
    quiet = {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "DATASETS_VERBOSITY": "error",
        "WANDB_SILENT": "true",
        # stack traces of a lost connection, of which an error speaks anyway
        "TORCH_CPP_LOG_LEVEL": "FATAL",
        "PYTHONWARNINGS": "ignore",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        # stops the program where it stands, as Ctrl-C does
        raise KeyboardInterrupt("SIGTERM")

    # only the main thread may set handlers; tests call `main` from others
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _is_user_error(error: ValueError) -> bool:
    # an error of this type can only exist if its module was imported
    errors = sys.modules.get("sae.errors")
    return errors is not None and isinstance(error, errors.UserError)


def _say(message: str, code: int, speaker: int = 0) -> int:
    if this_rank() != speaker:
        return code
    with contextlib.suppress(OSError):
        sys.stderr.write(f"jumpscope: {' '.join(message.split())}\n")
    return code


def _report_bug() -> NoReturn:
    sys.stderr.write("jumpscope: this is a bug in jumpscope; please report it with the lines below.\n")
    raise
