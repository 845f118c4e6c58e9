"""Training on several ranks: the weights, metrics and probes of one rank, whatever happens on the way."""

import json
import os
import random
import signal

import pytest
import torch
from ranks_processes import Processes
from resume_fakes import harvest, make_sizes, weights

from train.config import TrainConfig
from train.run_folder import RunFolder
from train.trainer import train_run

WORLD = int(os.environ.get("JUMPSCOPE_TEST_RANKS", "2"))
"""Four take a minute on two cores: they are for who changes the exchange."""
SEED = random.randrange(10**6)
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


def test_several_ranks_make_what_one_makes_and_stop_and_refuse_together(
    sizes, store, alone, tiny_model, tmp_path
):
    last = WORLD - 1
    run = {name: str(tmp_path / name) for name in ("live", "stored", "one", "stopped", "bad", "other")}
    every_step = {**sizes, "checkpoint_minutes": 1e-9}
    orders = [
        {"config": {**sizes, "out": run["live"]}},
        {"config": {**sizes, "out": run["stored"], "store": store}},
        # fewer sites than ranks
        {"config": {**sizes, "out": run["one"], "layers": "1"}},
        # a signal to one rank stops all at the next step that is logged
        {
            "config": {**every_step, "out": run["stopped"]},
            "rank": last,
            "at": ["step", 13],
            "signal": signal.SIGTERM,
        },
        {"config": {**sizes, "out": run["bad"]}, "rank": last, "poison": 6},
        {"config": {**sizes, "out": run["other"]}, "rank": last, "other": {"lr": 0.5}},
        {"config": {**sizes, "out": run["live"]}},
    ]
    ends = on_ranks(orders, tmp_path)
    assert [code for code, _, _ in ends] == [0] * WORLD, ends
    said = ends[0][1]
    assert [other for _, other, _ in ends] == [said] * WORLD
    assert said[:4] == ["done", "done", "done", "stopped: SIGTERM"]
    assert_same(tmp_path / "live", alone / "live")
    assert_same(tmp_path / "stored", alone / "stored")
    three = weights(alone / "live")
    assert all(torch.equal(three[key], tensor) for key, tensor in weights(tmp_path / "one").items())

    assert "must be finite" in said[4] and f"on rank {last}" in said[4]
    assert "blocks.2.hook_resid_post" in said[4]
    assert RunFolder.open(run["bad"]).state().startswith("failed: the activations at blocks.2")
    assert f"lr is 0.002 on rank{'s' if WORLD > 2 else ''} 0" in said[5] and f"0.5 on rank {last}" in said[5]
    assert not (tmp_path / "other").exists()
    assert "holds another run" in said[6]

    times = [json.loads(line) for line in (tmp_path / "live" / "ranks.jsonl").read_text().splitlines()]
    assert [row["step"] for row in times] == list(range(3, 38, 3))
    assert {len(row["seconds"]) for row in times} == {WORLD}
    spent = {kind: sum(row["seconds"][0].get(kind, 0) for row in times) for kind in ("model", "exchange")}
    assert min(spent.values()) > 0
    assert all({"step", "wait"} >= set(row["seconds"][0]) - set(spent) for row in times)

    # stopped by several, gone on with by one alone, which is stopped too, and by several again
    first = tmp_path / "stopped"
    assert RunFolder.open(first).state() == "stopped: SIGTERM"
    assert len(list(first.glob("sites/*/cfg.json"))) == 3
    at = steps(first)[-1]
    assert at % 3 == 0 and at < 37

    def stop(what, done, total, detail):
        if what == "train" and done == (at + 4) * 64:
            raise KeyboardInterrupt("test")

    with pytest.raises(KeyboardInterrupt):
        train_run(TrainConfig(**every_step, out=str(first)), model=tiny_model, resume=True, on_progress=stop)
    assert steps(first)[-1] == at + 4
    # and what several kept when they refused together
    orders = [
        {"config": {**sizes, "out": str(first)}, "resume": True},
        {"config": {**sizes, "out": run["bad"]}, "resume": True},
        {"config": {**sizes, "out": run["bad"]}, "resume": True},
    ]
    ends = on_ranks(orders, tmp_path)
    assert [(code, said) for code, said, _ in ends] == [(0, ["done"] * 3)] * WORLD, ends
    assert_same(first, alone / "live")
    assert_same(tmp_path / "bad", alone / "live")


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
