"""`jumpscope harvest` when the disk fills, and when it is stopped: what is said then."""

import errno
import os

import pytest
from cli_fakes import make_inputs, refused

from activations.models import LanguageModel
from activations.store import open_store
from train.cli.main import main

FLAGS = "--layers 1-2 --context 16 --model-batch 2 --device cpu".split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("harvest"))


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(inputs, tmp_path, capfd, monkeypatch):
    store = tmp_path / "store"
    words = ["harvest", *inputs, *FLAGS, "--tokens", "300", "--out", store]

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "room for the file" in refused(capfd, *words)
    assert main([str(word) for word in words]) == 0
    assert open_store(store).rows == 300


def test_an_interrupt_says_how_to_go_on(inputs, tmp_path, capfd, monkeypatch):
    words = [
        str(word) for word in ["harvest", *inputs, *FLAGS, "--tokens", "300", "--out", tmp_path / "store"]
    ]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "activations", interrupted)
        assert main(words) == 130
    assert "the same command goes on" in capfd.readouterr().err
    assert main(words) == 0
    assert open_store(tmp_path / "store").rows == 300
