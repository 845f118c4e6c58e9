"""Checkpoints on disk: exact, whole or absent, the newest two."""

import json
import math

import pytest
import torch

from sae.errors import UserError
from train.checkpoints import newest_step, newest_whole, remove_checkpoints, sweep, write_checkpoint

SITE = "blocks.1.hook_resid_post"


def write(run, step, value=0.0, **state):
    tensors = {"W": torch.full((2, 3), value), "count": torch.tensor(3), "sums": torch.ones(2).double() / 3}
    write_checkpoint(run, step, iter([(SITE, tensors)]), state)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_read_is_what_was_written_to_the_last_bit(tmp_path):
    numbers = {"scale": math.pi / 7e5, "tiny": 5e-324, "third": 1 / 3, "big": 2**60 + 1}
    write(tmp_path, 7, math.pi, sites={SITE: numbers})
    found = newest_whole(tmp_path)
    assert found.step == 7
    assert found.state["sites"][SITE] == numbers
    tensors = found.tensors(SITE, slice(0, 2))
    assert torch.equal(tensors["W"], torch.full((2, 3), math.pi))
    assert tensors["sums"].dtype == torch.float64
    assert torch.equal(tensors["sums"], torch.ones(2).double() / 3)
    assert tensors["count"].shape == ()


def test_the_newest_two_stay_by_their_step(tmp_path):
    assert newest_whole(tmp_path) is newest_step(tmp_path) is None
    for step in (8, 9, 10, 100):
        write(tmp_path, step)
    assert names(tmp_path) == ["step_10", "step_100"]
    assert newest_whole(tmp_path).step == newest_step(tmp_path) == 100
    remove_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path):
    write(tmp_path, 5, 1.0)
    write(tmp_path, 5, 2.0)
    assert float(newest_whole(tmp_path).tensors(SITE, slice(0, 2))["W"][0, 0]) == 1.0


def test_what_a_kill_left_is_swept_and_never_read(tmp_path):
    write(tmp_path, 5)
    folder = tmp_path / "checkpoints"
    (folder / "step_5").rename(folder / ".step_6.partial")
    (folder / ".step_4.old").mkdir()
    (tmp_path / ".checkpoints.old").mkdir()
    assert newest_whole(tmp_path) is None
    sweep(tmp_path)
    assert names(tmp_path) == []
    assert not (tmp_path / ".checkpoints.old").exists()


def test_a_failed_write_leaves_the_others_alone(tmp_path):
    write(tmp_path, 5)
    with pytest.raises(ValueError, match="JSON"):
        write(tmp_path, 6, scale=math.nan)
    assert names(tmp_path) == ["step_5"]


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    """At a dozen places of each file; a flip of the last digit of a number is one of them."""
    write(tmp_path, 4)
    write(tmp_path, 5, sites={SITE: {"scale": 1.5}})
    for name in ("state.json", f"{SITE}.safetensors"):
        path = tmp_path / "checkpoints" / "step_5" / name
        content = path.read_bytes()
        places = [*range(0, len(content) - 1, len(content) // 12), max(content.rfind(b"1.5") + 2, 0)]
        for place in places:
            for torn in (
                content[:place],
                content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
            ):
                path.write_bytes(torn)
                # all of them are torn then, so that none is removed
                other = tmp_path / "checkpoints" / "step_4" / "state.json"
                kept = other.read_bytes()
                other.write_bytes(b"{}")
                with pytest.raises(UserError, match=r"step_5.*step_4"):
                    newest_whole(tmp_path)
                other.write_bytes(kept)
        path.write_bytes(content)
    assert newest_whole(tmp_path).step == 5


def test_a_newer_format_is_refused_and_not_taken_for_torn(tmp_path, monkeypatch):
    write(tmp_path, 4)
    monkeypatch.setattr("train.checkpoints.FORMAT", 2)
    write(tmp_path, 5)
    monkeypatch.setattr("train.checkpoints.FORMAT", 1)
    with pytest.raises(UserError, match=r"format 2 in .*step_5\. Update"):
        newest_whole(tmp_path)


def test_the_state_says_what_it_is(tmp_path):
    write(tmp_path, 5, logged=3)
    state = json.loads((tmp_path / "checkpoints/step_5/state.json").read_text())
    assert state["format"] == 1
    assert state["step"] == 5
    assert list(state["files"]) == [f"{SITE}.safetensors"]
    assert len(state["sha256"]) == 64
