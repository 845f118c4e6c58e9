"""`jumpscope --distributed`: torchrun with our verbs, and with exit codes that schedulers understand.

torchrun itself does as well (`torchrun --no-python jumpscope train ...`), but it ends with a traceback of its
own and with code 1, whatever its ranks ended with.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import DEFAULT_PORT
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import determine_local_world_size, parse_args, parse_min_max_nnodes
from torch.distributed.run import run as torchrun

from activations.ports import NOTHING, OTHER, who_answers
from activations.watch import AGAIN, LOST, USAGE, RankLost, loss_record
from sae.errors import UserError

# -P: a file train.py in the user's folder is not ours
_RANK = ("-P", "-c", "import sys; from train.cli.main import main; sys.exit(main())")
_OURS = (USAGE, LOST, 1, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def run(words: list[str]) -> int:
    """Starts the ranks, waits for them, and returns 0 or the exit code of the one that failed first.

    `words` are torchrun's flags, the verb, and the verb's flags. A rank that a signal killed counts as lost.
    Raises UserError when machines cannot meet, and RankLost when one goes later.
    """
    args = parse_args(words)
    where = _meeting_place(args)
    args.training_script_args = [*_RANK, args.training_script, *args.training_script_args]
    args.training_script, args.no_python = sys.executable, True
    # the ranks say in one line what went wrong; torchrun's loggers have levels of their own
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    # torchrun would choose one thread and warn of it at length
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spent = _seconds_of_ranks()
    try:
        with _ctrl_c_kept_from_ranks_that_start(), _losses_found_by_ranks():
            torchrun(args)
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return code if code in _OURS else LOST
    except SignalException as stopped:
        return 128 + stopped.sigval
    except (DistError, RendezvousError) as error:
        # torchrun's own words only point to what stands behind them
        found = str(error.__cause__ or error).partition("\n")[0] or type(error).__name__
        where = where or "a port of this machine"
        if _seconds_of_ranks() > spent:
            raise _lost(where, found) from error
        raise _no_meeting(where, found) from error
    finally:
        logging.disable(before)
    return 0


def _meeting_place(args: argparse.Namespace) -> str:
    """Where the machines of a run meet, if that was said. Raises UserError where they never will."""
    try:
        determine_local_world_size(args.nproc_per_node)
        machines = parse_min_max_nnodes(args.nnodes)[1]
        if args.rdzv_backend == "static" and not args.rdzv_endpoint:
            host, port = args.master_addr, args.master_port or (29500 if machines > 1 else 0)
        else:
            host, port = parse_rendezvous_endpoint(args.rdzv_endpoint, DEFAULT_PORT)
    except (RuntimeError, ValueError) as error:
        must = "--nproc-per-node must be a number, --nnodes one or MIN:MAX, --rdzv-endpoint HOST:PORT"
        raise UserError(must, str(error), "put it right") from error
    # a file system, or a server of another kind
    elsewhere = args.rdzv_backend not in ("static", "c10d") or "store_type=file" in args.rdzv_conf
    if args.standalone or elsewhere or not port:
        return ""
    answers = who_answers(host, port)
    # the first of several machines may be there already
    if answers == OTHER or (machines == 1 and answers != NOTHING):
        raise _no_meeting(f"{host}:{port}", f"the port is in use: {answers} answers there")
    return f"{host}:{port}"


def _seconds_of_ranks() -> float:
    """What the processes that were started and have ended took of the processor: nothing if none was."""
    times = os.times()
    return times.children_user + times.children_system


@contextlib.contextmanager
def _ctrl_c_kept_from_ranks_that_start() -> Iterator[None]:
    """A terminal sends Ctrl-C to all its processes: to ranks that still start Python it comes when they have.

    They inherit that it is held back, until their `main` lets it through. Here another thread takes it.
    """
    done = threading.Event()
    taking = threading.Thread(target=done.wait, name="taking signals", daemon=True)
    taking.start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        done.set()
        taking.join()


@contextlib.contextmanager
def _losses_found_by_ranks() -> Iterator[None]:
    """A launcher that cannot ask any more whether machines wait to join leaves it to its ranks to look why.

    By itself it would stop them at once, before one could say who was lost.
    """
    ask = DynamicRendezvousHandler.num_nodes_waiting

    def waiting(self: DynamicRendezvousHandler) -> int:
        try:
            return ask(self)
        except RendezvousError:
            return 0

    DynamicRendezvousHandler.num_nodes_waiting = waiting
    try:
        yield
    finally:
        DynamicRendezvousHandler.num_nodes_waiting = ask


def _lost(where: str, found: str) -> RankLost:
    must = f"the machines of a run must stay in touch, at {where}, to its end"
    record = loss_record(0, where, 0, must, found, AGAIN, LOST)
    return RankLost(record)


def _no_meeting(where: str, found: str) -> UserError:
    flags = "--rdzv-endpoint HOST:PORT or --master-port PORT; one machine needs neither"
    must = f"the machines of a run must be able to meet at {where}"
    return UserError(must, found, f"choose a free port there that all can reach ({flags})")
