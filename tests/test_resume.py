"""Runs that are killed, stopped and broken, and go on: the end is that of a run that nothing happened to."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from resume_fakes import RING, assert_same, harvest, make_sizes

from sae.errors import UserError
from train.config import TrainConfig
from train.run_folder import RunFolder
from train.trainer import train_run

HERE = Path(__file__).resolve().parent
SEED = random.randrange(10**6)


@pytest.fixture(scope="module")
def sizes(tiny_folder, tmp_path_factory):
    """A short run's config, with a checkpoint at each step."""
    return {**make_sizes(tiny_folder, tmp_path_factory.mktemp("text")), "checkpoint_minutes": 1e-9}


class Server:
    """Trains in a process of its own, one after another."""

    def __init__(self, sizes, folder):
        self.sizes, self.folder, self.runs = sizes, folder, 0
        arguments = [sys.executable, str(HERE / "resume_server.py"), json.dumps(sizes)]
        paths = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            arguments, env={**os.environ, **paths, "OMP_NUM_THREADS": "1"}, **pipes
        )

    def start(self, out, at=None, sent="SIGKILL", **fields):
        """Begins a run, or goes on with the one in `out`; returns the id of its process."""
        config = {**self.sizes, **fields, "out": str(out)}
        order = {"config": config, "resume": (out / "run.json").is_file(), "at": at, "signal": sent}
        order["errors"] = str(self.folder / "errors")
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer("child")

    def end(self):
        """Waits for the run's process; returns its exit code."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer("code")

    def _answer(self, what):
        # a number taken for another would signal the wrong process
        kind, number = self.process.stdout.readline().split()
        assert kind == what
        return int(number)

    def train(self, out, **options):
        self.start(out, **options)
        return self.end()

    @property
    def errors(self):
        return (self.folder / "errors").read_text()


@pytest.fixture(scope="module")
def server(sizes, tmp_path_factory):
    made = Server(sizes, tmp_path_factory.mktemp("server"))
    yield made
    made.process.stdin.close()
    assert made.process.wait(60) == 0


@pytest.fixture(scope="module")
def store(sizes, tmp_path_factory):
    """The rows of all layers, as the live runs see them."""
    return harvest(sizes, tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="module")
def undisturbed(server, store, tmp_path_factory):
    """Runs that nothing happened to, live and from the store."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = {"": folder / "live", store: folder / "stored"}
    for source, out in found.items():
        assert server.train(out, store=source) == 0, server.errors
    return found


def test_the_runs_are_long_enough_to_be_worth_breaking(undisturbed):
    for run in undisturbed.values():
        record = RunFolder.open(run).record()
        assert record["rows_harvested"] > 3 * RING
        assert record["rows_served"] > 30 * 64


KILLS = {
    "step": (1, 60),
    "forward": (1, 20),
    "fsync": (1, 250),
    "rename": (1, 60),
    "replace": (1, 100),
    "unlink": (2, 200),
    "save": (1, 60),
    "log": (1, 10),
}


@pytest.mark.parametrize("turn", range(14))
def test_a_killed_run_ends_as_if_nothing_had_happened(turn, server, store, undisturbed, tmp_path):
    """kill -9 in the nth call of something, up to three times."""
    draw = random.Random(SEED + turn)
    source = store if turn % 3 == 2 else ""
    kinds = [name for name in KILLS if not (source and name == "forward")]
    places = []
    for kill in range(draw.choice([1, 1, 2, 3])):
        name = kinds[turn % len(kinds)] if kill == 0 else draw.choice(kinds)
        places.append([name, draw.randint(*KILLS[name])])
        code = server.train(tmp_path / "run", at=places[-1], store=source)
        assert code in (0, -signal.SIGKILL), (SEED, places, server.errors)
    assert server.train(tmp_path / "run", store=source) == 0, (SEED, places, server.errors)
    assert_same(tmp_path / "run", undisturbed[source])


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_run_killed_before_it_has_its_first_file_begins_again(place, server, undisturbed, tmp_path):
    run = tmp_path / "run"
    assert server.train(run, at=[place, 1]) == -signal.SIGKILL, server.errors
    assert list(run.glob(".run.json.*.tmp")) and not (run / "run.json").exists()
    assert server.train(run) == 0, server.errors
    assert_same(run, undisturbed[""])


@pytest.mark.parametrize("turn", range(4))
def test_a_run_killed_at_any_moment_goes_on(turn, server, undisturbed, tmp_path):
    draw = random.Random(SEED + turn)
    waits = [draw.uniform(0, 0.8) for _ in range(2)]
    for wait in waits:
        pid = server.start(tmp_path / "run")
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)  # a child that has ended waits for its parent: the id is still its own
        server.end()
    assert server.train(tmp_path / "run") == 0, (SEED, waits, server.errors)
    assert_same(tmp_path / "run", undisturbed[""])


def test_a_run_that_is_frozen_for_a_while_goes_on(server, undisturbed, tmp_path):
    pid = server.start(tmp_path / "run")
    for _ in range(3):
        time.sleep(0.1)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(pid, signal.SIGCONT)
    assert server.end() == 0, server.errors
    assert_same(tmp_path / "run", undisturbed[""])


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("place", [["step", 31], ["forward", 7], ["log", 2], ["save", 9], ["fsync", 60]])
def test_a_signal_at_any_place_leaves_a_checkpoint_to_go_on_from(sent, place, server, undisturbed, tmp_path):
    run = tmp_path / "run"
    assert server.train(run, at=place, sent=sent) == 130, server.errors
    assert RunFolder.open(run).state().startswith("stopped: " + {"SIGINT": "Ctrl-C"}.get(sent, sent))
    assert list(run.glob("checkpoints/step_*"))
    assert len(list(run.glob("sites/*/cfg.json"))) == 2
    assert server.train(run) == 0, server.errors
    assert_same(run, undisturbed[""])


def test_a_second_job_is_refused_while_the_first_one_writes(server, undisturbed, sizes, tmp_path):
    run = tmp_path / "run"
    pid = server.start(run)
    while not list(run.glob("checkpoints/step_*")):
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(UserError, match=f"another one is training into {run}"):
        train_run(TrainConfig(**sizes, out=str(run)), resume=True)
    os.kill(pid, signal.SIGCONT)
    assert server.end() == 0, server.errors
    assert_same(run, undisturbed[""])
