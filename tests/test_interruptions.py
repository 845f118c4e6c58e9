"""Runs that meet a full disk, a torn checkpoint, a changed flag or text, and what they say and lose."""

import errno
import json
import logging
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_fakes import refused
from conftest import wrapped_model
from resume_fakes import assert_same, harvest, make_sizes, weights

import train.checkpoints
import train.rows
from activations.store import Store
from sae.errors import UserError
from train.cli.main import main
from train.config import TrainConfig
from train.run_folder import RunFolder, hold
from train.trainer import train_run


@pytest.fixture(scope="module")
def sizes(tiny_folder, tmp_path_factory):
    return make_sizes(tiny_folder, tmp_path_factory.mktemp("text"))


@pytest.fixture
def make(sizes, tmp_path, tiny_model):
    """Trains, or goes on with, the run in tmp_path / "run"."""

    def trained(resume=False, on_progress=None, model=tiny_model, **fields):
        config = TrainConfig(**{**sizes, "out": str(tmp_path / "run"), **fields})
        return train_run(config, model=model, on_progress=on_progress, resume=resume)

    return trained


@pytest.fixture(scope="module")
def undisturbed(sizes, tmp_path_factory, tiny_model):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train_run(TrainConfig(**sizes, out=str(out)), model=tiny_model)
    return out


def stop_at(step):
    """A report that stops the run behind that step."""

    def report(what, done, total, detail):
        if what == "train" and done == step * 64:
            raise KeyboardInterrupt("test")

    return report


@pytest.fixture
def stopped(make, tmp_path):
    """A run stopped behind step 20, with the checkpoints of steps 19 and 20."""
    with pytest.raises(KeyboardInterrupt):
        make(checkpoint_minutes=1e-9, on_progress=stop_at(20))
    assert steps(tmp_path / "run") == {19, 20}
    return tmp_path / "run"


def steps(run):
    return {int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*")}


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def newest_tensors(run):
    return sorted((run / "checkpoints" / "step_20").glob("*.safetensors"))[0]


DAMAGE = {
    "a flipped bit": lambda run: flip(newest_tensors(run), -100),
    "cut short": lambda run: newest_tensors(run).write_bytes(newest_tensors(run).read_bytes()[:-1]),
    "a file gone": lambda run: newest_tensors(run).unlink(),
    "another step": lambda run: (run / "checkpoints/step_20/state.json").write_text(
        (run / "checkpoints/step_20/state.json").read_text().replace('"step": 20', '"step": 21')
    ),
    "no state": lambda run: (run / "checkpoints/step_20/state.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(damage, stopped, make, undisturbed, caplog):
    DAMAGE[damage](stopped)
    make(resume=True)
    assert "step_20 is torn" in caplog.text
    assert "goes on from step_19" in caplog.text
    assert_same(stopped, undisturbed)


def test_when_no_checkpoint_is_whole_all_are_named_and_none_is_touched(stopped, make):
    for name in ("step_19", "step_20"):
        flip(stopped / "checkpoints" / name / "state.json", 50)
    with pytest.raises(UserError, match=r"step_20: state\.json.*step_19: state\.json"):
        make(resume=True)
    assert steps(stopped) == {19, 20}


def test_changed_flags_are_refused_with_the_difference(stopped, capfd, make):
    before = (stopped / "run.json").read_bytes()
    line = refused(
        capfd, "train", "--resume", stopped, "--lr", "0.01", "--tokens", "1300", "--wandb", "offline"
    )
    assert "--tokens: run has 1200, asked 1300; --lr: run has 0.002, asked 0.01." in line
    assert "wandb" not in line
    with pytest.raises(UserError, match="--seed: run has 0, asked 1"):
        make(resume=True, seed=1)
    assert "--out" in refused(capfd, "train", "--resume", stopped, "--out", stopped / "other")
    assert "--config" in refused(capfd, "train", "--resume", stopped, "--config", stopped / "run.json")
    assert "run.json" in refused(capfd, "train", "--resume", stopped / "nowhere")
    assert (stopped / "run.json").read_bytes() == before


def test_the_command_line_goes_on_and_says_when_there_is_nothing_left(make, undisturbed, capfd, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(model=None, on_progress=stop_at(20))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    flags = ["--checkpoint-minutes", "5", "--lr", "0.002", "--memory", "5G"]
    assert main(["train", "--resume", str(moved), *flags]) == 0
    assert RunFolder.open(moved).config()["checkpoint_minutes"] == 5
    assert_same(moved, undisturbed)
    before = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    capfd.readouterr()
    assert main(["train", "--resume", str(moved)]) == 0
    assert "is finished" in capfd.readouterr().out
    assert {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()} == before


def test_a_run_without_a_checkpoint_begins_again(make, undisturbed, tmp_path):
    def refuse(what, done, total, detail):
        raise OSError("before the first step")

    with pytest.raises(OSError, match="first step"):
        make(on_progress=refuse)
    assert not (tmp_path / "run" / "checkpoints").exists()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 3')
    make(resume=True)
    assert_same(tmp_path / "run", undisturbed)


def test_another_model_or_text_is_refused(stopped, make, sizes):
    with pytest.raises(UserError, match=r"model: run has tiny-gemma3, now tiny-llama"):
        make(resume=True, model=wrapped_model("llama"))
    corpus = Path(sizes["corpus"])
    text = corpus.read_text()
    corpus.write_text(text.replace("cat", "dog"))
    try:
        with pytest.raises(UserError, match=r"rows \d+ to \d+ again, the same tokens\. Found: other tokens"):
            make(resume=True)
    finally:
        corpus.write_text(text)
    # nothing was lost by the attempts
    assert steps(stopped) == {19, 20}


def test_other_weights_of_the_model_are_a_warning(stopped, make, caplog):
    model = wrapped_model("gemma3")
    with torch.no_grad():
        next(model.bridge.parameters()).mul_(1.001)
    make(resume=True, model=model)
    assert "not bit for bit" in caplog.text


def test_a_store_that_vanishes_stops_the_run_where_it_can_go_on(sizes, make, tmp_path, monkeypatch):
    store = harvest(sizes, tmp_path / "store")
    whole = make(store=store, out=str(tmp_path / "whole"))
    inner, given = Store.iter_rows, []

    def vanishing(self, *args, **options):
        for batch in inner(self, *args, **options):
            part = slice(0, 700)
            cut = type(batch.map)(batch.map.document[part], batch.map.position[part], batch.map.token[part])
            yield type(batch)({site: x[part] for site, x in batch.rows.items()}, cut, batch.begin)
            given.append(1)
            raise UserError("shard-00001 must be whole", "no such file", "restore it")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "iter_rows", vanishing)
        with pytest.raises(UserError, match=r"Restore it; then `jumpscope train --resume .*from step \d+"):
            make(store=store)
    assert given
    run = RunFolder.open(tmp_path / "run")
    assert run.state().startswith("failed: shard-00001 must be whole")
    assert len(steps(run.path)) == 1
    make(store=store, resume=True)
    assert_same(run.path, whole.path)


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_checkpoint_that_finds_the_disk_full_is_a_warning(make, monkeypatch, undisturbed, tmp_path, caplog):
    inner, calls = train.checkpoints.save_tensors, []

    def sometimes(path, tensors):
        calls.append(path)
        return full_disk() if 20 < len(calls) < 40 else inner(path, tensors)

    seen = []

    def report(what, done, total, detail):
        if what == "train":
            seen.append(steps(tmp_path / "run"))

    monkeypatch.setattr(train.checkpoints, "save_tensors", sometimes)
    make(checkpoint_minutes=1e-9, on_progress=report)
    # 10 checkpoints of two sites were written, and the last two stay while the disk is full
    assert seen[9:15] == [{9, 10}] * 6
    assert "older ones stay" in caplog.text
    assert_same(tmp_path / "run", undisturbed)


def test_a_log_that_finds_the_disk_full_is_written_when_the_run_goes_on(
    make, monkeypatch, undisturbed, tmp_path
):
    inner, calls = RunFolder.log, []

    def refusing(self, lines):
        calls.append(lines)
        if len(calls) == 5:
            raise UserError("the disk must have room", "none", "free some space")
        inner(self, lines)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", refusing)
        with pytest.raises(
            UserError, match=r"Free some space; then `jumpscope train --resume .*from step 15"
        ):
            make()
    make(resume=True)
    assert_same(tmp_path / "run", undisturbed)


def test_lines_that_do_not_fit_are_taken_back(tmp_path):
    run = RunFolder.create(tmp_path / "run", {}, sites=[], device="cpu")
    run.log([{"step": 1}])
    path, limits = run.path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(UserError, match="too large"):
            run.log([{"step": step} for step in range(100)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_lost_lines_of_the_log_are_a_warning(stopped, make, undisturbed, caplog):
    (stopped / "metrics.jsonl").write_bytes((stopped / "metrics.jsonl").read_bytes()[:100])
    make(resume=True)
    assert "has lost lines: 100 bytes" in caplog.text
    assert weights(stopped).keys() == weights(undisturbed).keys()


def test_two_jobs_do_not_write_one_folder(stopped, make, tmp_path):
    with hold(stopped), pytest.raises(UserError, match="one process at a time"):
        make(resume=True)
    with (
        hold(tmp_path / "new"),
        pytest.raises(UserError, match=f"another one is training into {tmp_path}/new"),
    ):
        make(out=str(tmp_path / "new"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    make(out=str(tmp_path / "new"))  # a lock that nobody holds is in nobody's way


def test_a_clock_that_jumps_changes_nothing(make, monkeypatch, undisturbed, tmp_path):
    jumps = iter(range(10**9, 0, -(10**6)))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    with pytest.raises(KeyboardInterrupt):
        make(on_progress=stop_at(7))
    make(resume=True)
    assert_same(tmp_path / "run", undisturbed)
    assert 0 < RunFolder.open(tmp_path / "run").record()["seconds"] < 600


def test_checkpoints_come_by_the_clock_that_does_not_jump(make, monkeypatch, tmp_path):
    ticks, seen = [0.0], []

    def report(what, done, total, detail):
        if what == "train":
            ticks[0] += 20
            seen.append(max(steps(tmp_path / "run"), default=0))

    monkeypatch.setattr(time, "monotonic", lambda: ticks[0])
    make(checkpoint_minutes=1.0, on_progress=report)
    # 20 seconds a step: after the fourth step, then every third
    assert seen[:9] == [0, 0, 0, 4, 4, 4, 7, 7, 7]


def test_no_global_generator_is_used(make):
    """Which is why checkpoints keep no generator's state. (Python's own serves the tests' type checks.)"""
    torch.manual_seed(5)
    states = (torch.get_rng_state(), np.random.get_state()[1].copy())
    make()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()


def test_the_mirror_goes_on_under_its_id(make, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        make(wandb="offline", on_progress=stop_at(5))
    first = RunFolder.open(tmp_path / "run").record()["wandb_id"]
    state = json.loads((tmp_path / "run/checkpoints/step_5/state.json").read_text())
    assert state["wandb_id"] == first
    assert make(resume=True, wandb="offline").record()["wandb_id"] == first


def test_a_short_corpus_is_read_again_and_that_is_said_once(make, caplog):
    with caplog.at_level(logging.WARNING):
        make(tokens=3000)
    said = [record.message for record in caplog.records if "it is read again" in record.message]
    assert len(said) == 1
    assert "fewer than the 3k asked for" in said[0]


def test_all_sites_equal_separate_runs_live_and_from_a_store(sizes, make, tmp_path):
    store = harvest({**sizes, "tokens": 800}, tmp_path / "store")
    shared = {"tokens": 800, "layers": "all"}
    together = {
        name: make(**shared, store=name, out=str(tmp_path / f"all-{bool(name)}")) for name in ("", store)
    }
    live = weights(together[""].path)
    assert len({site for site, _ in live}) == 4
    stored = weights(together[store].path)
    assert all(torch.equal(stored[key], tensor) for key, tensor in live.items())
    for source in together:
        for layer in range(4):
            out = tmp_path / f"{layer}-{bool(source)}"
            alone = weights(make(tokens=800, layers=str(layer), store=source, out=str(out)).path)
            assert len(alone) == len(live) / 4
            assert all(torch.equal(live[key], tensor) for key, tensor in alone.items())


@pytest.mark.parametrize(
    "fields",
    [{"dtype": "bfloat16"}, {"kernel": "reference"}, {"beta1": 0.0}, {"passes": 1}, {"log_every": 7}],
)
def test_whatever_the_config_a_resume_is_exact(fields, make, tmp_path):
    model = None if "dtype" in fields else wrapped_model("gemma3")
    whole = make(**fields, model=model, out=str(tmp_path / "whole"))
    for step in (1, 6, 17):
        with pytest.raises(KeyboardInterrupt):
            make(**fields, model=model, resume=step > 1, on_progress=stop_at(step))
    make(**fields, model=model, resume=True)
    assert_same(tmp_path / "run", whole.path)
