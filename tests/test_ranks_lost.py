"""What the ranks of a run do when one is killed, frozen, stuck, stopped, or fails: processes, real ones."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from ranks_processes import Processes, verb_in_place
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from activations.watch import Watch
from sae.errors import UserError
from train.cli.main import main

WAYS = """
import os, sys, threading, time, types
import numpy
import torch
from activations.ranks import open_ranks
from sae.errors import UserError
import train.cli.main as command

def loop(ranks, way):
    for step in range(10**6):
        if step == 3:
            # a line of its own: the first tells the test that all are at work
            os.write(2, f"<{ranks.rank} {os.getpid()}>".encode())
        if step == 5 and ranks.rank == 1:
            fail(ranks, way)
        ranks.beat()
        ranks.share(f"step {step}", step)
        ranks.swap([torch.ones(9)] * ranks.world)
        time.sleep(0.01)

def fail(ranks, way):
    if way == "user":
        raise UserError("the file must be there", "no file", "write it")
    if way == "bug":
        raise ZeroDivisionError("a mistake")
    if way == "memory":
        numpy.empty(2**60, numpy.uint8)
    if way == "torch's memory":
        torch.empty(2**60, dtype=torch.uint8)
    if way == "killed":
        os.kill(os.getpid(), 9)
    if way == "stuck":
        # as a call into a library that does not come back
        threading.Event().wait(1000)

def run(words):
    with open_ranks() as ranks:
        print("a table")
        if words == ["differ"]:
            ranks.agree("command", {"width": 16 + ranks.rank})
        elif words == ["end"]:
            return 0
        loop(ranks, words[0])

verb = types.ModuleType("train.cli.train")
verb.run = run
sys.modules["train.cli.train"] = verb
sys.exit(command.main(["train", *sys.argv[1:]]))
"""
# a machine that is busy with other things is no sign of a rank that hangs
HANG = 6.0


def started(processes):
    """Waits until every rank has said that it is at work."""
    for rank in processes.ranks:
        text = b""
        while not text.endswith(b">"):
            text += (byte := os.read(rank.stderr.fileno(), 1))
            assert byte, text
    return time.monotonic()


def ends(processes):
    said = processes.finish()
    codes, lines = [code for code, _, _ in said], [re.sub(r"<\d+ \d+>", "", err) for _, _, err in said]
    assert [out for _, out, _ in said[1:]] == [""] * (len(said) - 1)
    return codes, lines


def test_a_rank_that_is_killed_stops_the_others_by_name():
    processes = Processes(3, WAYS, "go on", hang=HANG)
    since = started(processes)
    processes.ranks[2].kill()
    codes, lines = ends(processes)
    assert codes == [75, 75, -9]
    assert lines[1:] == ["", ""]
    assert re.fullmatch(
        r"jumpscope: every rank of a run must live to its end\. Found: rank 2 on \S+ ended without a word:"
        r" killed, or out of memory\. It was last seen .*(step|rows|starting).*newest checkpoint.*\n",
        lines[0],
    )
    assert time.monotonic() - since < 60


def test_when_rank_0_freezes_another_speaks_and_it_ends_when_it_wakes():
    processes = Processes(2, WAYS, "go on", hang=HANG)
    started(processes)
    processes.ranks[0].send_signal(signal.SIGSTOP)
    assert processes.ranks[1].wait(60) == 75
    processes.ranks[0].send_signal(signal.SIGCONT)
    codes, lines = ends(processes)
    assert codes == [75, 75]
    assert lines[0] == ""
    assert re.fullmatch(
        r"jumpscope: .*rank 0 on \S+ gave no sign of life for 6 s: frozen, or cut off\..*\n", lines[1]
    )


@pytest.mark.parametrize(
    ("way", "codes", "line"),
    [
        ("user", [2, 2], r"Rank 1 on \S+: the file must be there\. Found: no file\. Write it\."),
        ("bug", [75, 1], r".* rank 1 on \S+ failed: ZeroDivisionError: a mistake\..*"),
        ("memory", [2, 2], r"Rank 1 on \S+: the work of a rank must have .* 1\.00 EiB.* --memory, or .*"),
        (
            "torch's memory",
            [2, 2],
            r"Rank 1 on \S+: the work of a rank must have .*1152921504606846976 bytes.* --memory, or .*",
        ),
        ("stuck", [75, 75], r".* rank 1 on \S+ made no step for 6 s\. It was last seen working, after .*"),
        ("differ", [2, 2], r".*width is 16 on rank 0 \(\S+\), 17 on rank 1 \(\S+\)\. Start all ranks.*"),
    ],
)
def test_a_rank_that_fails_is_told_of_in_one_line_by_rank_0(way, codes, line):
    found, lines = ends(Processes(2, WAYS, way, hang=HANG))
    assert found == codes
    assert re.fullmatch(f"jumpscope: {line}\n", lines[0], re.IGNORECASE)
    if way == "bug":
        assert lines[1].rstrip().endswith("ZeroDivisionError: a mistake")
    else:
        assert lines[1] == ""


def test_a_signal_to_one_stops_all():
    processes = Processes(2, WAYS, "go on", hang=HANG)
    started(processes)
    processes.ranks[1].send_signal(signal.SIGTERM)
    assert ends(processes) == ([143, 143], ["jumpscope: stopped by SIGTERM\n", ""])


def test_the_launcher_starts_again_and_gives_the_code_of_the_rank_that_was_lost(tmp_path):
    verb = WAYS[WAYS.index("def loop") : WAYS.index("sys.modules[")]
    path = verb_in_place(tmp_path, WAYS[: WAYS.index("import train.cli.main")] + verb)
    code = "import sys; from train.cli.main import main; sys.exit(main())"
    flags = ["--distributed", "--nproc-per-node", "2", "--max-restarts", "1", "train", "killed"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *flags],
        env={**os.environ, "PYTHONPATH": path, "JUMPSCOPE_HANG_SECONDS": str(HANG)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = re.sub(r"<\d+ \d+>", "", ended.stderr).splitlines()
    assert (ended.returncode, ended.stdout) == (75, "a table\n" * 2), ended.stderr
    assert len(lines) == 2
    assert all(re.match(r"jumpscope: .* rank 1 on \S+ ended without a word", line) for line in lines)


def test_verbs_of_one_process_are_refused(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in enumerate(["jumpscope: view is the work of one process", ""]):
        monkeypatch.setenv("RANK", str(rank))
        assert main(["view", "runs/none"]) == 2
        assert capfd.readouterr().err.partition(",")[0] == said


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), RuntimeError("DefaultCPUAllocator: can't allocate memory: no room")]
)
def test_a_rank_without_memory_says_what_to_do(error, monkeypatch):
    # what would end this process
    monkeypatch.setattr("atexit.register", lambda *call: None)
    store = HashStore()
    watch = Watch(store, 1, 2, 45.0, False)
    with pytest.raises(UserError, match=r"memory .* no room\. Allow less with --memory"):
        watch.tell(error)
    other = Watch(store, 0, 2, 45.0, False)
    assert (other.look()["rank"], other.look()["code"]) == (1, 2)
