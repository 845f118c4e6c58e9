"""`jumpscope --distributed`: torchrun with our verbs, and with exit codes that schedulers understand.

torchrun itself does as well (`torchrun --no-python jumpscope train ...`), but it ends with a traceback of its
own and with code 1, whatever its ranks ended with.
"""

import logging
import os
import signal
import sys

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args
from torch.distributed.run import run as torchrun

from activations.watch import LOST, USAGE
from sae.errors import UserError

# -P: a file train.py in the user's folder is not ours
_RANK = ("-P", "-c", "import sys; from train.cli.main import main; sys.exit(main())")
_OURS = (USAGE, LOST, 1, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def run(words: list[str]) -> int:
    """Starts the ranks, waits for them, and returns 0 or the exit code of the one that failed first.

    `words` are torchrun's flags, the verb, and the verb's flags. A rank that a signal killed counts as lost.
    Raises UserError when machines cannot meet.
    """
    args = parse_args(words)
    args.training_script_args = [*_RANK, args.training_script, *args.training_script_args]
    args.training_script, args.no_python = sys.executable, True
    # the ranks say in one line what went wrong
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # torchrun would choose one thread and warn of it at length
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        torchrun(args)
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return code if code in _OURS else LOST
    except SignalException as stopped:
        return 128 + stopped.sigval
    except (DistError, RendezvousError) as error:
        where = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port}"
        raise UserError(
            f"the machines of a run must be able to meet at {where}",
            str(error).partition("\n")[0],
            "choose a free port there (--rdzv-endpoint HOST:PORT) that all can reach",
        ) from error
    return 0
