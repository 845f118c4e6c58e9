"""Training on several ranks: the weights, metrics and probes of one rank, whatever happens on the way."""

import json
import os
import random
import re
import signal

import pytest
import torch
from cli_fakes import refused
from ranks_processes import Processes
from resume_fakes import harvest, make_sizes, weights

from train.cli.main import main
from train.config import TrainConfig
from train.run_folder import RunFolder
from train.trainer import train_run

WORLD = int(os.environ.get("JUMPSCOPE_TEST_RANKS", "2"))
"""Four take a minute on two cores: they are for who changes the exchange."""
SEED = random.randrange(10**6)
KINDS = ("model", "exchange", "step", "wait")
CODE = "from train_ranks import main; main()"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the ranks have: a forward pass on more threads may have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sizes(tiny_folder, tmp_path_factory):
    """Three sites, which two ranks cannot divide evenly."""
    return {**make_sizes(tiny_folder, tmp_path_factory.mktemp("text")), "layers": "0-2"}


@pytest.fixture(scope="module")
def store(sizes, tmp_path_factory):
    return harvest(sizes, tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="module")
def alone(sizes, store, tiny_model, tmp_path_factory):
    """Runs of one rank, live and from the store."""
    folder = tmp_path_factory.mktemp("alone")
    for name, source in (("live", ""), ("stored", store)):
        train_run(TrainConfig(**sizes, store=source, out=str(folder / name)), model=tiny_model)
    return folder


def on_ranks(orders, folder, world=WORLD, hang=20.0):
    """Exit codes, what was said of each order, and stderr: by rank."""
    (folder / "orders.json").write_text(json.dumps(orders))
    words = [str(folder / "orders.json")]
    ends = Processes(world, CODE, *words, hang=hang, OMP_NUM_THREADS="1").finish(400)
    return [(code, [json.loads(line) for line in out.splitlines()], err) for code, out, err in ends]


def assert_same(run, other):
    """The same weights, probes and metrics to the last bit; beside them only how ranks spent their time."""
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    assert [key for key, tensor in theirs.items() if not torch.equal(mine[key], tensor)] == []
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert RunFolder.open(run).state() == "done"
    found = {path.name for path in run.iterdir()}
    assert found - {"ranks.jsonl"} == {".lock", "metrics.jsonl", "run.json", "sites"}
    assert not list(run.rglob("*.tmp"))


def steps(run):
    return sorted(int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*"))


@pytest.fixture(scope="module")
def several(sizes, store, alone, tmp_path_factory):
    """The folder of runs that several ranks have made one after another, and what they said of each."""
    folder = tmp_path_factory.mktemp("several")
    last = WORLD - 1
    orders = {
        "live": {},
        "stored": {"config": {"store": store}},
        # fewer sites than ranks
        "one": {"config": {"layers": "1"}},
        # a signal to rank 0, which has a site in any case
        "stopped": {"config": {"checkpoint_minutes": 1e-9}, "at": ["step", 13], "signal": signal.SIGTERM},
        "one stopped": {"config": {"layers": "1"}, "at": ["step", 8], "signal": signal.SIGTERM},
        "bad": {"rank": last, "poison": 3},
        "other": {"rank": last, "other": {"lr": 0.5}},
        "live again": {"config": {"out": str(folder / "live")}},
    }
    filled = [
        {**order, "config": {**sizes, "out": str(folder / name), **order.get("config", {})}}
        for name, order in orders.items()
    ]
    ends = on_ranks(filled, folder)
    assert [code for code, _, _ in ends] == [0] * WORLD, ends
    assert [said for _, said, _ in ends] == [ends[0][1]] * WORLD
    return folder, dict(zip(orders, ends[0][1], strict=True))


def test_several_ranks_make_what_one_makes(several, alone):
    folder, said = several
    for name in ("live", "stored"):
        assert said[name] == "done"
        assert_same(folder / name, alone / name)
    three = weights(alone / "live")
    assert all(torch.equal(three[key], tensor) for key, tensor in weights(folder / "one").items())


def test_what_one_rank_refuses_is_refused_by_all(several):
    folder, said = several
    last = WORLD - 1
    assert "must be finite" in said["bad"] and f"on rank {last}" in said["bad"]
    assert RunFolder.open(folder / "bad").state().startswith("failed: the activations at blocks.2")
    assert re.search(f"lr is 0.002 on ranks? 0.*0.5 on rank {last}", said["other"])
    assert not (folder / "other").exists()
    assert "holds another run" in said["live again"]


def test_the_time_of_each_rank_is_in_the_run_folder(several):
    lines = (several[0] / "live" / "ranks.jsonl").read_text().splitlines()
    times = [json.loads(line) for line in lines]
    assert [row["step"] for row in times] == list(range(3, 38, 3))
    for rank in range(WORLD):
        total = {kind: sum(row["seconds"][rank].get(kind, 0) for row in times) for kind in KINDS}
        # a rank without a site steps in no time
        assert min(total["model"], total["exchange"], total["wait"]) > 0, rank
        assert {kind for row in times for kind in row["seconds"][rank]} == set(KINDS)


def test_a_run_goes_on_with_another_number_of_ranks(several, sizes, alone, tiny_model):
    """Stopped by several, gone on with by one alone, which is stopped too, and by several again."""
    folder, said = several
    run, config = folder / "stopped", {**sizes, "checkpoint_minutes": 1e-9}
    assert said["stopped"] == RunFolder.open(run).state() == "stopped: SIGTERM"
    assert len(list(run.glob("sites/*/cfg.json"))) == 3
    at = steps(run)[-1]
    assert at % 3 == 0 and at < 33

    def stop(what, done, total, detail):
        if what == "train" and done == (at + 4) * 64:
            raise KeyboardInterrupt("test")

    with pytest.raises(KeyboardInterrupt):
        train_run(TrainConfig(**config, out=str(run)), model=tiny_model, resume=True, on_progress=stop)
    assert steps(run)[-1] == at + 4
    # the other was kept when all refused what one found
    assert steps(folder / "bad") or WORLD > 2
    names = {"stopped": {}, "bad": {}, "one stopped": {"layers": "1"}, "one": {"layers": "1"}}
    orders = [
        {"config": {**sizes, **fields, "out": str(folder / name)}, "resume": True}
        for name, fields in names.items()
    ]
    ends = on_ranks(orders, folder)
    assert [(code, told) for code, told, _ in ends] == [(0, ["done"] * 4)] * WORLD, ends
    assert_same(folder / "one stopped", folder / "one")
    assert_same(run, alone / "live")
    assert_same(folder / "bad", alone / "live")


def test_a_command_that_torchrun_starts_again_goes_on(sizes, alone, tmp_path, monkeypatch, capfd):
    run = tmp_path / "run"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]

    def stop(what, done, total, detail):
        if what == "train" and done > 20 * 64:
            raise KeyboardInterrupt("test")

    with pytest.raises(KeyboardInterrupt):
        train_run(TrainConfig(**sizes, out=str(run)), on_progress=stop)
    assert "holds another run" in refused(capfd, "train", *flags, "--out", run)
    monkeypatch.setattr("train.cli.train.restarts", lambda: 1)
    assert "--lr: run has 0.002, asked 0.1" in refused(capfd, "train", *flags, "--lr=0.1", "--out", run)
    assert main(["train", *flags, "--out", str(run)]) == 0
    assert (run / "metrics.jsonl").read_bytes() == (alone / "live" / "metrics.jsonl").read_bytes()


KILLS = {
    "step": (1, 50),
    "forward": (1, 9),
    "fsync": (1, 60),
    "replace": (1, 30),
    "save": (1, 30),
    "log": (1, 10),
}


@pytest.mark.parametrize("turn", range(3))
def test_a_rank_killed_at_any_moment_stops_all_and_the_run_goes_on(turn, sizes, alone, tiny_model, tmp_path):
    draw = random.Random(SEED + turn)
    place = draw.choice([name for name in KILLS if name != "log"])
    killed = draw.randrange(WORLD)
    nth = draw.randint(*KILLS[place])
    config = {**sizes, "checkpoint_minutes": 1e-9, "out": str(tmp_path / "run")}
    order = {"config": config, "rank": killed, "at": [place, nth], "signal": signal.SIGKILL}
    ends = on_ranks([order], tmp_path)
    story = (SEED, place, nth, killed, ends)
    if ends[killed][0] == 0:  # there were fewer calls than that
        assert_same(tmp_path / "run", alone / "live")
        return
    assert ends[killed][0] == -signal.SIGKILL, story
    for rank in set(range(WORLD)) - {killed}:
        code, said, errors = ends[rank]
        assert code == 75 and said == [] and f"rank {killed} on " in errors, story
    begun = (tmp_path / "run" / "run.json").is_file()
    if turn % 2:
        ends = on_ranks([{"config": config, "resume": begun}], tmp_path)
        assert [code for code, _, _ in ends] == [0] * WORLD, (story, ends)
    else:
        train_run(TrainConfig(**config), model=tiny_model, resume=begun)
    assert_same(tmp_path / "run", alone / "live")
