"""Runs under torchrun whose dictionaries are divided: what they leave, and going on with other numbers of
ranks.

"""

import signal

import pytest
import torch
from resume_fakes import make_sizes, weights
from test_distributed_train import on_ranks, one_thread, steps  # noqa: F401

from sae.errors import UserError
from train.config import TrainConfig
from train.run_folder import RunFolder
from train.trainer import train_run


@pytest.fixture(scope="module")
def sizes(tiny_folder, tmp_path_factory):
    """Two sites, 65 latents: two ranks cannot divide them evenly."""
    return {**make_sizes(tiny_folder, tmp_path_factory.mktemp("text")), "width": 65}


def assert_close(run, other):
    """Names, shapes and figures; and directions, but of a latent or two that rounding led elsewhere."""
    mine, theirs = weights(run), weights(other)
    assert {key: tensor.shape for key, tensor in mine.items() if "probe" not in key[1]} == {
        key: tensor.shape for key, tensor in theirs.items() if "probe" not in key[1]
    }
    for (site, name), tensor in theirs.items():
        if name == "W_dec":
            alike = torch.cosine_similarity(mine[site, name], tensor)
            assert float((alike > 0.999).float().mean()) > 0.95, site
    found, expected = (RunFolder.open(path).metrics() for path in (run, other))
    assert found[["step", "site"]].equals(expected[["step", "site"]])
    for name in ("l0", "fvu", "dead", "threshold"):
        assert found[name].tolist() == pytest.approx(expected[name].tolist(), rel=0.02, abs=0.02), name
    assert RunFolder.open(run).state() == "done"


def test_divided_dictionaries_are_trained_kept_and_gone_on_with(sizes, tiny_model, tmp_path):
    names = ("alone", "divided", "stopped", "other")
    run = {name: str(tmp_path / name) for name in names}
    divided = {**sizes, "shard_latents": 2, "checkpoint_minutes": 1e-9}
    stop = {"rank": 1, "at": ["step", 13], "signal": signal.SIGTERM}
    orders = [
        {"config": {**divided, "out": run["divided"]}},
        {"config": {**divided, "out": run["stopped"]}, **stop},
        {"config": {**divided, "out": run["stopped"]}, "resume": True},
        {"config": {**divided, "out": run["other"]}, **stop},
    ]
    ends = on_ranks(orders, tmp_path, world=2)
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert ends[0][1] == ends[1][1] == ["done", "stopped: SIGTERM", "done", "stopped: SIGTERM"]
    # gone on with as many: every bit
    assert (tmp_path / "stopped/metrics.jsonl").read_bytes() == (
        tmp_path / "divided/metrics.jsonl"
    ).read_bytes()
    one, other = weights(tmp_path / "divided"), weights(tmp_path / "stopped")
    assert [key for key, tensor in one.items() if not torch.equal(other[key], tensor)] == []

    # a file for each range of latents, taken up by one rank alone
    kept = tmp_path / "other/checkpoints" / f"step_{steps(tmp_path / 'other')[-1]}"
    sites = RunFolder.open(run["other"]).sites()
    files = {path.name for path in kept.glob("*.safetensors")}
    assert files == {f"{site}.{part}.safetensors" for site in sites for part in ("0-32", "32-65")}
    whole = {**sizes, "checkpoint_minutes": 1e-9}
    train_run(TrainConfig(**whole, out=run["other"]), model=tiny_model, resume=True)
    train_run(TrainConfig(**whole, out=run["alone"]), model=tiny_model)
    for name in ("divided", "other"):
        assert_close(tmp_path / name, tmp_path / "alone")


def test_ranks_that_latents_cannot_be_divided_over_are_refused(sizes, tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"--shard-latents 2 with 1 rank\b"):
        train_run(TrainConfig(**sizes, shard_latents=2, out=str(tmp_path / "run")), model=tiny_model)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="must not exceed --width"):
        TrainConfig(**sizes, shard_latents=66)
