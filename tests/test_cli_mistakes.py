"""Mistakes that a user can make: each gets one line and exit code 2, and leaves nothing half-written."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from cli_fakes import SMALL, command, make_inputs, refused

from train.cli.main import main

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Flags that name the tiny model and corpus."""
    return make_inputs(tmp_path_factory.mktemp("cli"))


def test_an_unknown_verb_is_met_with_the_nearest(capfd):
    assert "Did you mean train?" in refused(capfd, "trian")


def test_an_unknown_flag_exits_with_code_2(capfd):
    assert main(["train", "--widht", "8"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "--width" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--width 0", "--width"),
        ("--width -5", "count"),
        ("--width many", "count"),
        ("--l0 0", "--l0"),
        ("--l0 -1", "--l0"),
        ("--l0 nan", "--l0"),
        ("--batch 0", "--batch"),
        ("--l0 65 --width 64", "--width"),
        ("--tokens 100 --batch 101", "--batch"),
        ("--memory 0", "--memory"),
        ("--memory lots", "size"),
        ("--context 1", "--context"),
        ("--layers 4", "layer"),
        ("--layers 9-2", "layer"),
        ("--layers none", "layers"),
        ("--sites resid_pots", "resid_post"),
        ("--sites blocks.77.hook_resid_post", "layer"),
        ("--device abacus", "abacus"),
        ("--memory 1M", "--memory"),
        ("--config nowhere.json", "nowhere.json"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_flags_that_cannot_be_are_refused_before_anything_is_written(
    verb, flags, word, inputs, tmp_path, capfd
):
    line = refused(capfd, verb, *inputs, *SMALL, "--out", tmp_path / "out", *flags.split())
    assert word in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["train", "harvest", "demo"])
def test_what_is_not_there_is_named_and_nothing_is_written(verb, inputs, tmp_path, capfd):
    out = ("--out", tmp_path / "out")
    assert "no-such-model" in refused(capfd, verb, *inputs, "--model", "no-such-model", *out)
    assert "no-such-text" in refused(capfd, verb, *inputs, "--corpus", "no-such-text", *out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 40, b"not one at all"])
def test_a_truncated_gguf_file_is_named(content, inputs, tmp_path, capfd):
    (tmp_path / "torn.gguf").write_bytes(content)
    line = refused(capfd, "train", *inputs, "--model", tmp_path / "torn.gguf", "--out", tmp_path / "out")
    assert "torn.gguf" in line
    assert [path.name for path in tmp_path.iterdir()] == ["torn.gguf"]


@pytest.mark.parametrize("content", [b"", b"\0\1\2\3" * 100, "caf\xe9 au lait ".encode("latin-1") * 20])
@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_text_that_is_empty_binary_or_not_utf8_is_named(content, name, inputs, tmp_path, capfd):
    (tmp_path / name).write_bytes(content)
    line = refused(capfd, "train", *inputs, *SMALL, "--corpus", tmp_path / name, "--out", tmp_path / "out")
    assert name in line
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_fewer_tokens_than_a_batch_are_refused_and_nothing_is_left(inputs, tmp_path, capfd):
    store, out = tmp_path / "store", tmp_path / "out"
    assert (
        main(["harvest", *inputs, "--tokens", "40", "--context", "16", "--layers", "1", "--out", str(store)])
        == 0
    )
    assert "batch" in refused(
        capfd, "train", *inputs, *SMALL, "--store", store, "--layers", "1", "--out", out
    )
    # a run that has begun says that it failed
    assert not out.exists() or json.loads((out / "run.json").read_text())["state"].startswith("failed")


def test_a_hub_id_without_a_network_is_one_clear_line(inputs, tmp_path, capfd, monkeypatch):
    def unreachable(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    line = refused(capfd, "train", *inputs, "--model", "some-org/some-model", "--out", tmp_path / "out")
    assert "some-org/some-model" in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_another_run_is_left_alone(inputs, tmp_path, capfd):
    trained = tmp_path / "run"
    assert main(["train", *inputs, *SMALL, "--layers", "1", "--out", str(trained)]) == 0
    before = (trained / "run.json").read_bytes()
    for verb in ("train", "demo"):
        assert "another run" in refused(capfd, verb, *inputs, "--out", trained)
    assert "other files" in refused(capfd, "harvest", *inputs, "--out", trained)
    assert (trained / "run.json").read_bytes() == before


@pytest.mark.parametrize("verb", ["eval", "index", "view", "info"])
def test_a_folder_that_is_no_run_is_refused(verb, tmp_path, capfd):
    assert "run.json" in refused(capfd, verb, tmp_path)


def test_a_place_that_cannot_be_written_is_one_clear_line(inputs, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    for verb, flags in (("train", SMALL), ("harvest", ["--context", "16"])):
        assert "file" in refused(capfd, verb, *inputs, *flags, "--out", tmp_path / "file" / "out")


@pytest.mark.skipif(AS_ROOT, reason="root may write anywhere")
def test_no_permission_is_one_clear_line(inputs, tmp_path, capfd):
    tmp_path.chmod(0o500)
    assert "writable" in refused(capfd, "train", *inputs, *SMALL, "--out", tmp_path / "out")


@pytest.mark.skipif(
    not AS_ROOT or sys.platform != "linux", reason="mounting a small disk needs root on Linux"
)
def test_a_disk_that_fills_during_a_save_is_one_clear_line(inputs, tmp_path, capfd, monkeypatch):
    # the plan would refuse at once; another program may take the space later
    monkeypatch.setattr("train.plan.refuse_full_disk", lambda plan, out: None)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        # room for the run's json, none for two dictionaries of 600 kB
        flags = [*inputs, *SMALL, "--width", "2k", "--l0", "8", "--layers", "1-2", "--out", disk / "run"]
        assert "No space left" in refused(capfd, "train", *flags)
        left = [path.name for path in disk.rglob("*") if path.is_file()]
        assert [name for name in left if name.endswith((".tmp", ".safetensors"))] == []
        assert "cfg.json" not in left
        assert json.loads((disk / "run" / "run.json").read_text())["state"] != "done"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_wandb_without_a_key_is_one_clear_line(inputs, tmp_path, capfd, monkeypatch):
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    line = refused(capfd, "train", *inputs, *SMALL, "--wandb", "online", "--out", tmp_path / "out")
    assert "wandb" in line.lower()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_stops_with_one_line_and_a_readable_run(number, inputs, tmp_path):
    flags = [*SMALL, "--tokens", "2M", "--passes", "500", "--layers", "1"]
    with command("train", *inputs, *flags, "--out", tmp_path / "out", start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "metrics.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
            assert process.poll() is None, process.communicate()
        process.send_signal(number)
        _, err = process.communicate(timeout=180)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert sum(line.startswith("jumpscope:") for line in err.splitlines()) == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"].startswith("stopped")
    assert main(["info", str(tmp_path / "out")]) == 0


def test_what_is_unforeseen_keeps_its_traceback(monkeypatch, capfd):
    def break_(argv):
        raise KeyError("ours")

    monkeypatch.setattr("train.cli.models.run", break_)
    with pytest.raises(KeyError, match="ours"):
        main(["models"])
    assert "bug" in capfd.readouterr().err


def test_an_error_of_the_system_is_one_line(monkeypatch, capfd):
    def refuse(argv):
        raise PermissionError(13, "Permission denied", "/there")

    monkeypatch.setattr("train.cli.models.run", refuse)
    line = refused(capfd, "models")
    assert "Permission denied" in line
    assert "/there" in line


@pytest.mark.parametrize("content", ["{", "[]", '{"widht": 3}', '{"width": "many"}', '{"width": null}'])
def test_a_config_file_that_does_not_fit_is_refused(content, tmp_path, capfd):
    (tmp_path / "config.json").write_text(content)
    refused(capfd, "plan", "--config", tmp_path / "config.json")
