"""Looks after the ranks of a run: one that dies, freezes or fails stops the others within a minute, by name.

Each rank has a thread that posts a beat to the store of torchrun's agent, which outlives any rank, and looks
at others': at the processes of its own machine, where a death shows at once, and at the beat of the next
rank. Looking at one other, not at all, keeps the store's load in proportion to the world. Whoever finds a
rank lost writes it down once for all. Time is counted in looks that this thread made itself: a machine that
was suspended finds nobody late when it wakes.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from sae.errors import UserError

LOST = 75
"""EX_TEMPFAIL: schedulers that know it start the job again."""
USAGE = 2
HANG_SECONDS = "JUMPSCOPE_HANG_SECONDS"
_HANG = 45.0
_GRACE = 0.25
"""Part of that time that a rank has to leave by itself, once another is lost; it may hang in a library."""
_REASON = 3.0
"""Seconds that a stopped rank looks for the death behind it, and that a store's host waits for others."""
_RECORD = "lost"
_MUST = "every rank of a run must live to its end"
AGAIN = "start it again (train with --resume): it goes on from its newest checkpoint, or what else is whole"


def loss_record(
    rank: int, host: str, speaker: int, must: str, found: str, do: str, code: int
) -> dict[str, Any]:
    """What is written down of a lost rank; rank `speaker` tells the user. Code 0: a stop was asked for."""
    parts = {"must": must, "found": found, "do": do}
    return {"rank": rank, "host": host, "speaker": speaker, **parts, "code": code}


class RankLost(UserError):
    """A rank of the run is lost: it died, froze, or failed by itself. `code` is the exit code that fits."""

    def __init__(self, loss: dict[str, Any]) -> None:
        super().__init__(loss["must"], loss["found"], loss["do"])
        self.rank, self.host, self.code = int(loss["rank"]), str(loss["host"]), int(loss["code"])
        self.speaker = int(loss["speaker"])


def hang_seconds() -> float:
    """Seconds without a sign of life after which a rank is lost. Raises UserError for what is no time."""
    text = os.environ.get(HANG_SECONDS, str(_HANG))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < float("inf"):
        raise UserError(f"{HANG_SECONDS} must be a number of seconds, 1 or more", repr(text), "put it right")
    return seconds


class Watch:
    """The beats of one rank, and its eye on the others.

    `moved`, `still` and `check` are the main thread's; everything else may be called from any thread.
    """

    def __init__(self, store: Store, rank: int, world: int, hang: float, hosting: bool) -> None:
        self.rank, self.world = rank, world
        self._hosting, self._told = hosting, False
        self.host = socket.gethostname()
        self.hosts = [self.host] * world
        self._store, self._tick = store, min(1.0, hang / 10)
        self._patience = round(hang / self._tick)
        self._doing, self._moves, self._still = "starting", 0, 0
        self._moving = False
        self._lost: dict[str, Any] | None = None
        self._neighbours: dict[int, psutil.Process] = {}
        # whose end it is to see to; a shell that starts ranks by hand may end before them
        self._launcher = os.getppid() if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def me(self) -> dict[str, Any]:
        """Who this rank is, for `start` of the others."""
        return {"host": self.host, "pid": os.getpid(), "machine": _machine()}

    def start(self, everyone: list[dict[str, Any]]) -> None:
        """Begins to look at the ranks: what `me` said on each, by rank."""
        self.hosts = [one["host"] for one in everyone]
        for rank, one in enumerate(everyone):
            if rank != self.rank and one["machine"] == _machine():
                with contextlib.suppress(psutil.Error):
                    self._neighbours[rank] = psutil.Process(one["pid"])
        self._thread.start()

    def moved(self) -> None:
        """The main thread is getting on, and from now on is expected to. Raises as `check` does."""
        self._moves, self._moving = self._moves + 1, True
        self.check()

    @contextlib.contextmanager
    def still(self, doing: str) -> Iterator[None]:
        """Within it the main thread need not move."""
        before, self._doing = self._doing, doing
        self._still += 1
        try:
            yield
        finally:
            self._still -= 1
            self._moves += 1
            self._doing = before if self._still else f"working, after {doing}"

    def check(self) -> None:
        """Raises RankLost when a rank is lost, and KeyboardInterrupt when one was told to stop."""
        if self._lost is not None:
            if self._lost["code"] == 0:
                raise KeyboardInterrupt(self._lost["found"])
            raise RankLost(self._lost)

    def look(self) -> dict[str, Any] | None:
        """Looks now for a record of a lost rank and for processes of this machine that are gone."""
        return self._record() or self._dead()

    def report(self, rank: int, must: str, found: str, do: str, code: int) -> dict[str, Any]:
        """Writes down, for all, that a rank is lost. The first report counts, and is returned."""
        # rank 0 speaks for all; where it is what was lost, whoever found that out
        speaker = 0 if rank else self.rank
        found_out = loss_record(rank, self.hosts[rank], speaker, must, found, do, code)
        with contextlib.suppress(dist.DistError):
            found_out = json.loads(self._store.compare_set(_RECORD, "", json.dumps(found_out)))
        self._lost = found_out
        return found_out

    def store_is_gone(self) -> None:
        """Takes down that the store does not answer."""
        # nobody can be told, so each machine says it once
        speaker = self.rank if os.environ.get("LOCAL_RANK", "0") == "0" else 0
        host = os.environ.get("MASTER_ADDR", self.hosts[0])
        found = f"the store at {host}, the first machine, does not answer any more"
        self._lost = self._lost or loss_record(0, host, speaker, _MUST, found, AGAIN, LOST)

    def tell(self, error: BaseException) -> None:
        """Tells the others why this rank ends. Raises the error that stands behind this one."""
        # a library's threads may wait for a lost rank for ever, and the process, at its end, for them
        atexit.register(_exit, _code(error))
        self._told = isinstance(error, RankLost)
        where = f"rank {self.rank} on {self.host}"
        if self._told or (isinstance(error, SystemExit) and not error.code):
            return
        if isinstance(error, KeyboardInterrupt):
            self._stopped(error, where)
        elif isinstance(error, UserError):
            self.report(self.rank, f"{where}: {error.must}", error.found, error.do, USAGE)
        elif _is_memory(error):
            short = UserError(
                "the work of a rank must have the memory that it takes",
                str(error).partition("\n")[0] or "it ran out",
                "allow less with --memory, or start fewer ranks on a machine",
            )
            self.tell(short)
            raise short from error
        else:
            code = USAGE if _code(error) == USAGE else LOST
            text = f"{where} failed: {type(error).__name__}: {error}"
            self.report(self.rank, _MUST, text, "see what it wrote", code)

    def _stopped(self, error: KeyboardInterrupt, where: str) -> None:
        # torchrun stops all its ranks when one has died, and that is then the reason
        until = time.monotonic() + _REASON
        loss = None
        try:
            while (loss := self.look()) is None and time.monotonic() < until:
                time.sleep(0.1)
        except dist.DistError:
            self.store_is_gone()
            loss = self._lost
        if loss is not None and loss["code"]:
            self.tell(lost := RankLost(loss))
            raise lost from error
        self.report(self.rank, where, " ".join(map(str, error.args)), "", 0)

    def close(self) -> None:
        """Stops looking; the others are told that this rank is gone on purpose."""
        with contextlib.suppress(dist.DistError):
            self._store.set(f"left/{self.rank}", "1")
            everyone, until = [f"left/{rank}" for rank in range(self.world)], time.monotonic() + _REASON
            while self._hosting and not self._store.check(everyone) and time.monotonic() < until:
                time.sleep(0.02)
        # where a rank was lost, the thread stays, to see that this process really ends
        if not self._told:
            self._closed.set()
            self._thread.join()

    def _run(self) -> None:
        beats, heard, silence, moves, idle = 0, "", 0, -1, 0
        while self._lost is None and not self._closed.wait(self._tick):
            beats += 1
            try:
                self._store.set(f"beat/{self.rank}", f"{beats} {self._doing}")
                self._lost = self.look()
                beat = self._beat((self.rank + 1) % self.world)
            except dist.DistError:
                self.store_is_gone()
                break
            silence = silence + 1 if beat == heard else 0
            idle = idle + 1 if self._moving and moves == self._moves and not self._still else 0
            heard, moves = beat, self._moves
            if self._lost is None and silence > self._patience:
                self._silent((self.rank + 1) % self.world, heard)
            elif self._lost is None and idle > self._patience:
                self._stuck()
        if self._lost is not None and not self._closed.wait(_GRACE * self._patience * self._tick):
            self._leave(self._lost)

    def _record(self) -> dict[str, Any] | None:
        return json.loads(self._store.get(_RECORD)) if self._store.check([_RECORD]) else None

    def _beat(self, rank: int) -> str:
        key = f"beat/{rank}"
        if self._store.check([f"left/{rank}"]):
            return f"left at {time.monotonic()}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _dead(self) -> dict[str, Any] | None:
        for rank, process in self._neighbours.items():
            if not _alive(process) and not self._store.check([f"left/{rank}"]):
                # it may have written why, in the moment between the two looks
                return self._record() or self._end_of(rank, "ended without a word: killed, or out of memory")
        if self._launcher and os.getppid() != self._launcher:
            return self._record() or self._end_of(self.rank, "has lost its launcher")
        return None

    def _silent(self, rank: int, heard: str) -> None:
        doing = heard.partition(" ")[2] or "starting"
        self._end_of(rank, f"gave no sign of life for {self._seconds} s: frozen, or cut off", doing)

    def _stuck(self) -> None:
        self._end_of(self.rank, f"made no step for {self._seconds} s", self._doing)

    def _end_of(self, rank: int, what: str, doing: str = "") -> dict[str, Any]:
        doing = doing or self._beat(rank).partition(" ")[2] or "starting"
        found = f"rank {rank} on {self.hosts[rank]} {what}. It was last seen {doing}"
        return self.report(rank, _MUST, found, AGAIN, LOST)

    @property
    def _seconds(self) -> str:
        return f"{self._patience * self._tick:g}"

    def _leave(self, loss: dict[str, Any]) -> None:
        # the main thread is caught in a call that never ends, so its own way out is closed
        error = RankLost(loss)
        if not self._told and error.code and error.speaker == self.rank:
            sys.stderr.write(f"jumpscope: {' '.join(str(error).split())}\n")
            sys.stderr.flush()
        os._exit(error.code or LOST)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _machine() -> str:
    """Names what process numbers belong to: in another container they mean other processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _code(error: BaseException) -> int:
    """The exit code that the command line gives an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 143 if "SIGTERM" in error.args else 130
    if isinstance(error, RankLost):
        return error.code
    refused = isinstance(error, OSError) and error.errno is not None
    return USAGE if isinstance(error, UserError) or refused or _is_memory(error) else 1


def _is_memory(error: BaseException) -> bool:
    # torch has no type of its own for a CPU's memory
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _exit(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
