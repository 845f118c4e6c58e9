"""The processes of one run under torchrun: who they are, and what they tell one another.

Small things (figures, configs) go as JSON through the store of torchrun's agent; rows go through a process
group, gloo on a CPU and nccl between GPUs. No wait blocks in a library: each one looks between pauses
whether a rank was lost, so that a death is an error here and not a process that hangs.
"""

import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped, UInt8
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore, Store

from activations.ports import OTHER, who_answers
from activations.torchrun import under_torchrun
from activations.watch import HANG_SECONDS, USAGE, RankLost, Watch, hang_seconds, loss_record
from sae.errors import UserError

__all__ = ["Group", "RankLost", "Ranks", "alone", "open_ranks"]

_FOREVER = timedelta(days=30)
"""The watch says when a wait has been too long, and knows why; the library's own clock must not."""
_ALIGNED = 16
"""Parts of an exchange begin at multiples of this many bytes, so that they can be viewed in any dtype."""
_opened = itertools.count()
_open: "list[Ranks]" = []


@dataclass(frozen=True)
class Group:
    """Some of the ranks, in the order given, with a channel of their own."""

    members: tuple[int, ...]
    handle: Any


class Ranks:
    """The ranks of a run as one of them sees them. A world of 1 needs no store and no process group.

    Every rank calls `share`, `agree`, `swap`, `group` and `lane` in the same order; all of them, and `beat`,
    raise RankLost when another rank is lost.
    """

    def __init__(
        self,
        place: tuple[int, int, int],
        connect: "Callable[[], Store] | None" = None,
        watch: Watch | None = None,
        lane: str = "main",
    ) -> None:
        self.rank, self.world, self.local_rank = self._place = place
        # a connection to the store serves one thread at a time, so each lane has its own
        self._connect, self._store = connect, connect() if connect else None
        self._watch, self._lane = watch, lane
        self._shares, self._lanes = itertools.count(), itertools.count()
        self._everyone: Group | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what there is one of."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU of this rank, or the CPU where there is none. Raises UserError for more ranks than GPUs."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                "each rank of a machine must have a GPU of its own",
                f"rank {self.local_rank} of this machine and {torch.cuda.device_count()} GPUs",
                "start no more processes on it than it has GPUs, or give --device cpu",
            )
        return torch.device("cuda", self.local_rank)

    def share(self, what: str, value: Any) -> list[Any]:
        """Every rank's value, by rank: what JSON can hold. `what` says in messages what is waited for.

        Raises RuntimeError when ranks are at different calls, which is a mistake of the program.
        """
        if self._store is None or self._watch is None:
            return [json.loads(json.dumps(value))]
        number, store = next(self._shares), self._store
        mine = f"{self._lane}/{number}/{self.rank}"
        theirs = [f"{self._lane}/{number}/{rank}" for rank in range(self.world)]
        everyone, before = f"{self._lane}/{number}/all", f"{self._lane}/{number - 1}/all"
        with self._asking():
            store.set(mine, json.dumps([what, value]))
            self._wait(lambda: store.check(theirs if self.first else [everyone]), f"waiting for {what}")
            if self.first:
                # all are at this call, so all have read the answer of the last one
                store.delete_key(before)
                store.set(everyone, f"[{','.join(store.get(key).decode() for key in theirs)}]")
                for key in theirs:
                    store.delete_key(key)
            answers = json.loads(store.get(everyone))
        others = {answer[0] for answer in answers}
        if others != {what}:
            raise RuntimeError(f"ranks are at different calls: {sorted(others)}")
        return [answer[1] for answer in answers]

    def agree(self, what: str, value: dict[str, Any]) -> None:
        """Raises UserError on every rank, naming keys, ranks and values, unless all give the same."""
        answers = self.share(what, value)
        keys = list(dict.fromkeys(key for answer in answers for key in answer))
        missing = object()
        differing = [
            key for key in keys if any(a.get(key, missing) != answers[0].get(key, missing) for a in answers)
        ]
        if differing:
            raise UserError(
                f"every rank must have the same {what}",
                "; ".join(self._versions(key, answers) for key in differing),
                "start all ranks with the same command, the same code and the same files",
            )

    def swap(self, parts: Sequence[Shaped[Tensor, "..."]]) -> list[UInt8[Tensor, " bytes"]]:
        """Sends `parts[r]` to rank r, as bytes, and returns what each rank sent here, by rank.

        Parts may differ in length, and be empty; all lie on one device, and so does what comes back. Each
        result begins at a multiple of 16 bytes, so that it can be viewed in any dtype.
        """
        if len(parts) != self.world:
            raise ValueError(f"there must be a part for each of {self.world} ranks, not {len(parts)}")
        sent = [part.contiguous().reshape(-1).view(torch.uint8) for part in parts]
        if self._connect is None:
            return sent
        device = sent[0].device
        lengths = torch.tensor([len(part) for part in sent])
        coming = torch.empty_like(lengths)
        self._collect(
            "rows", lambda group: dist.all_to_all_single(coming, lengths, group=group, async_op=True)
        )
        leaving, arriving = ([_aligned(n) for n in counts.tolist()] for counts in (lengths, coming))
        out = torch.empty(sum(leaving), dtype=torch.uint8, device=device)
        for part, room in zip(sent, out.split(leaving), strict=True):
            room[: len(part)] = part
        got = torch.empty(sum(arriving), dtype=torch.uint8, device=device)
        self._collect(
            "rows",
            lambda group: dist.all_to_all_single(got, out, arriving, leaving, group=group, async_op=True),
        )
        return [room[:count] for room, count in zip(got.split(arriving), coming.tolist(), strict=True)]

    def add(self, tensor: Shaped[Tensor, "..."], group: Group | None = None) -> None:
        """Replaces a contiguous tensor by its sum over the ranks, or over a group's; the same bits on all."""
        if self._connect is None or (group is not None and len(group.members) == 1):
            return
        self._collect("a sum", lambda handle: dist.all_reduce(tensor, group=handle, async_op=True), group)

    def group(self, members: Sequence[int]) -> Group:
        """Makes a group. All ranks call this for every group, in the same order, members or not."""
        if self._connect is None:
            return Group(tuple(members), None)
        # after this nobody is far behind, and what follows blocks only as long as connecting takes
        self.share(f"a group of ranks {tuple(members)}", None)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            store = PrefixStore("groups", self._connect())
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.world, timeout=_FOREVER
            )
        return Group(tuple(members), dist.new_group(list(members), timeout=_FOREVER))

    def beat(self) -> None:
        """Says that the main thread is getting on; cheap enough for every step."""
        if self._watch is not None:
            self._watch.moved() if self._lane == "main" else self._watch.check()

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Work without beats, of any length: within it only the death of a rank counts, not its slowness.

        A main thread that waits for a thread that uses a lane is busy too.
        """
        if self._watch is None or self._lane != "main":
            yield
            return
        with self._watch.still(what):
            yield
        self._watch.check()

    def lane(self) -> "Ranks":
        """A second channel, for one background thread. The main thread makes it, on every rank."""
        if self._watch is None:
            return self
        lane = Ranks(self._place, self._connect, self._watch, f"{self._lane}.{next(self._lanes)}")
        lane._everyone = self.group(range(self.world))
        return lane

    def _versions(self, key: str, answers: list[dict[str, Any]]) -> str:
        ranks: dict[str, list[int]] = {}
        for rank, answer in enumerate(answers):
            ranks.setdefault(json.dumps(answer[key]) if key in answer else "missing", []).append(rank)
        hosts = self._watch.hosts if self._watch is not None else []
        told = (f"{text} on {_named(members, hosts)}" for text, members in ranks.items())
        return f"{key} is {', '.join(told)}"

    def _collect(self, what: str, begin: Callable[[Any], Any], group: Group | None = None) -> None:
        # begins a collective call and waits for its end
        if group is None:
            if self._everyone is None:
                self._everyone = self.group(range(self.world))
            group = self._everyone
        try:
            work = begin(group.handle)
            self._wait(work.is_completed, f"waiting for {what}")
            work.wait()
        except RuntimeError as error:
            self._blame(error)

    def _wait(self, done: Callable[[], bool], doing: str) -> None:
        assert self._watch is not None
        pause = 1e-4
        with self._watch.still(doing) if self._lane == "main" else contextlib.nullcontext():
            while not done():
                self._watch.check()
                time.sleep(pause)
                pause = min(1.3 * pause, 0.02)

    def _blame(self, error: RuntimeError) -> None:
        """A connection breaks when a rank dies, which the watch will find out; else the error stands."""
        until = time.monotonic() + 2 * hang_seconds()
        self._wait(lambda: time.monotonic() > until, "waiting for the reason of a broken connection")
        raise error

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        assert self._watch is not None
        try:
            yield
        except dist.DistError:
            self._watch.store_is_gone()
            self._watch.check()


def alone() -> Ranks:
    """A world of one: every call returns at once."""
    return Ranks((0, 1, 0))


@contextlib.contextmanager
def open_ranks() -> Iterator[Ranks]:
    """The ranks of this process, from torchrun's environment; `alone` where there is none.

    Within another `open_ranks` it gives the same ones. At the end every rank waits for the others; an error
    on one is told to all. Raises UserError when ranks cannot meet, and RankLost when one is lost.
    """
    if _open:
        yield _open[0]
        return
    if not under_torchrun():
        yield alone()
        return
    ranks, watch = _join()
    _open.append(ranks)
    try:
        yield ranks
        ranks.share("the end", None)
    except BaseException as error:
        watch.tell(error)
        raise
    finally:
        _open.clear()
        watch.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join() -> tuple[Ranks, Watch]:
    """Meets the other ranks at the store, which rank 0 hosts where torchrun's agent does not."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    try:
        rank, world, local_rank, port = (int(os.environ[name]) for name in names)
        host = os.environ["MASTER_ADDR"]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE means several ranks, and {', '.join(names)} and MASTER_ADDR must tell them apart",
            f"{error} is not there, or is no number",
            "start the command with torchrun, or unset WORLD_SIZE",
        ) from error
    hang, of_agent = hang_seconds(), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosting = rank == 0 and not of_agent
    try:
        if not of_agent and not hosting and who_answers(host, port) == OTHER:
            raise dist.DistError("another program answers there")
        timeout = timedelta(seconds=hang)
        attempt = (os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"))
        prefix = "/".join(("jumpscope", *attempt, str(next(_opened))))
        server = TCPStore(host, port, is_master=hosting, timeout=timeout, wait_for_workers=False)

        def connect() -> Store:
            client = TCPStore(host, server.port, is_master=False, timeout=timeout, wait_for_workers=False)
            return PrefixStore(prefix, client)

        _meet(store := connect(), rank, world, 4 * hang)
        watch = Watch(store, rank, world, hang, hosting)
        ranks = Ranks((rank, world, local_rank), connect, watch)
        watch.start(ranks.share("the others", watch.me()))
    except dist.DistError as error:
        what = "open a store for the ranks at" if hosting else "reach the ranks' store at"
        must, found = f"rank {rank} must be able to {what} {host}:{port}", str(error).partition("\n")[0]
        do = "choose a free port (torchrun --master-port) that all machines can reach"
        # the others cannot be told, so this rank says it itself
        raise RankLost(loss_record(rank, socket.gethostname(), rank, must, found, do, USAGE)) from error
    return ranks, watch


def _meet(store: Store, rank: int, world: int, patience: float) -> None:
    # nobody watches yet, so that who does not come is named here
    store.set(f"here/{rank}", "1")
    until = time.monotonic() + patience
    here = [f"here/{other}" for other in range(world)]
    while not store.check(here):
        if time.monotonic() > until:
            missing = [str(other) for other, key in enumerate(here) if not store.check([key])]
            raise UserError(
                f"all {world} ranks must start within {patience:g} s",
                f"no sign of rank {', '.join(missing)}",
                f"look why they did not start; {HANG_SECONDS} gives them longer",
            )
        time.sleep(0.02)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED


def _named(ranks: list[int], hosts: list[str]) -> str:
    plural = "rank" if len(ranks) == 1 else "ranks"
    where = sorted({hosts[rank] for rank in ranks if rank < len(hosts)})
    return f"{plural} {', '.join(map(str, ranks))} ({', '.join(where)})"
