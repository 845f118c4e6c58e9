"""A process that imports everything once and trains in forks of itself, some of which kill themselves.

Each line of its input is an order: the config's fields, whether to resume, and the call to die in, as
``[name, n]``. It answers with the child's process id and, when the child has ended, with its exit code.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import safetensors.torch
import torch
from conftest import wrapped_model

from activations.models import LanguageModel
from sae.errors import UserError
from sae.kernels.cpu import CpuKernel
from train.config import TrainConfig
from train.run_folder import RunFolder
from train.trainer import train_run

PLACES = {
    "step": (CpuKernel, "step"),
    "forward": (LanguageModel, "activations"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "unlink": (os, "unlink"),
    "save": (safetensors.torch, "save_file"),
    "log": (RunFolder, "log"),
}


def break_off(name: str, nth: int, number: int) -> None:
    """Makes the nth call of a function send a signal to this process before it does anything."""
    owner, attribute = PLACES[name]
    inner, calls = getattr(owner, attribute), [0]

    def counted(*args, **options):
        calls[0] += 1
        if calls[0] == nth:
            os.kill(os.getpid(), number)
        return inner(*args, **options)

    setattr(owner, attribute, counted)


def child(order: dict, model: LanguageModel) -> int:
    """Trains as told; returns the exit code."""
    config = TrainConfig(**order["config"])
    with Path(order["errors"]).open("w") as errors, contextlib.redirect_stderr(errors):
        try:
            if order["at"]:
                break_off(*order["at"], signal.Signals[order["signal"]])
            train_run(config, model=None if config.store else model, resume=order["resume"])
        except KeyboardInterrupt:
            return 130
        except UserError as error:
            errors.write(str(error))
            return 2
        except Exception:
            traceback.print_exc()
            return 1
    return 0


def main() -> None:
    """Answers orders until the input ends."""
    torch.set_num_threads(1)
    model = wrapped_model("gemma3")
    warm_up = json.loads(sys.argv[1])
    folder = tempfile.mkdtemp()
    train_run(TrainConfig(**warm_up, out=f"{folder}/run"), model=model)  # loads the compiled step
    shutil.rmtree(folder)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os._exit(child(json.loads(line), model))
        say("child", pid)
        # left unreaped until it was told: whoever signals an ended child must not hit another process
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        sys.stdin.readline()
        say("code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def say(what: str, number: int) -> None:
    """Answers with a line."""
    sys.stdout.write(f"{what} {number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
