"""The command line from outside: what it prints, its exit codes, and what it leaves on disk."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import plain_model, tiny_tokenizer

from train.cli.main import VERBS, main

ROOT = Path(__file__).resolve().parents[1]
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
SMALL = (
    "--width 64 --l0 4 --tokens 600 --passes 2 --batch 64 --context 16 --model-batch 4 --device cpu".split()
)
WORDS = "the capital of France is Paris and it was the best of times a dictionary per layer".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and a small corpus."""
    folder = tmp_path_factory.mktemp("cli")
    model = plain_model("gemma3")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    texts = [
        " ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(12)) + f" {i}."
        for i in range(200)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture
def inputs(place):
    """Flags that name the tiny model and corpus."""
    return ["--model", str(place / "model"), "--corpus", str(place / "text.jsonl")]


@pytest.fixture(scope="module")
def trained(place):
    """A tiny run through the real command line: two layers, trained, evaluated and indexed."""
    out = place / "run"
    flags = ["--model", str(place / "model"), "--corpus", str(place / "text.jsonl"), *SMALL]
    assert main(["train", *flags, "--layers", "1-2", "--out", str(out)]) == 0
    assert main(["eval", str(out), "--tokens", "200", "--loss-tokens", "100", "--baseline-tokens", "50"]) == 0
    assert main(["index", str(out), "--tokens", "200", "--examples", "3"]) == 0
    return out


def refused(capfd, *words):
    """Runs a command line that must fail as users' mistakes do; returns its one line."""
    capfd.readouterr()
    code = main([str(word) for word in words])
    err = capfd.readouterr().err
    assert code == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("jumpscope:")]
    assert len(lines) == 1, err
    assert "jumpscope: this is a bug" not in err
    return lines[0]


def command(*words, **options):
    """A command line in a process of its own."""
    code = "import sys; from train.cli.main import main; sys.exit(main())"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], **pipes | options)


def test_help_names_every_verb_with_an_example(capfd):
    assert main([]) == main(["--help"]) == 0
    out = capfd.readouterr().out
    for verb in VERBS:
        assert f"  {verb}" in out
        assert f"$ jumpscope {verb}" in out


def test_help_answers_in_half_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        process = command("--help")
        process.communicate()
        seconds.append(time.perf_counter() - start)
    assert process.returncode == 0
    assert sorted(seconds)[0] < 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_teaches_itself_by_examples_that_parse(verb, capfd):
    assert main([verb, "--help"]) == 0
    out = capfd.readouterr().out
    assert f"usage: jumpscope {verb}" in out
    assert f"  jumpscope {verb}" in out.split("examples:")[1]


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


def test_a_folder_that_holds_another_run_is_left_alone(trained, inputs, capfd):
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
    monkeypatch.setattr("train.plan._refuse_full_disk", lambda plan, out: None)
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
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert sum(line.startswith("jumpscope:") for line in err.splitlines()) == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"].startswith("stopped")
    assert main(["info", str(tmp_path / "out")]) == 0


def test_a_reader_that_goes_away_is_no_error():
    process = command("models")
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) in (0, 141)
    assert "Traceback" not in err
    assert "Exception ignored" not in err


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


def test_it_runs_outside_the_main_thread_too():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("verb", ["models", "corpora"])
def test_what_can_be_loaded_is_listed(verb, capfd):
    assert main([verb]) == 0
    out = capfd.readouterr().out
    assert {"models": "gemma-3-270m", "corpora": "wiki-leads"}[verb] in out


def test_plan_adds_up_its_items(inputs, capfd):
    assert main(["plan", *inputs, *SMALL]) == 0
    out = capfd.readouterr().out
    assert "language model" in out
    assert "total" in out


def test_a_run_is_described_and_its_metrics_shown(trained, capfd):
    assert main(["info", str(trained)]) == 0
    out = capfd.readouterr().out
    assert "done" in out
    assert "FVU" in out
    assert "2 of 2 sites" in out
    assert main(["info", str(trained / "sites" / "blocks.1.hook_resid_post")]) == 0
    assert "d_sae" in capfd.readouterr().out.replace(" ", "_")
    assert main(["info"]) == 0
    assert "memory" in capfd.readouterr().out


def test_eval_writes_a_row_a_site(trained):
    table = json.loads((trained / "eval.json").read_text())
    assert list(table) == ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    wanted = {
        "l0",
        "l0_target",
        "fvu",
        "delta_ce",
        "delta_ce_se",
        "ce_recovered_mean",
        "ce_recovered_zero",
        "dead",
    }
    for row in table.values():
        assert wanted <= set(row)


def test_eval_of_one_layer_keeps_the_others(trained, capfd):
    before = json.loads((trained / "eval.json").read_text())
    words = [
        "eval",
        trained,
        "--layers",
        "2",
        "--tokens",
        "100",
        "--loss-tokens",
        "50",
        "--baseline-tokens",
        "20",
    ]
    assert main(list(map(str, words))) == 0
    after = json.loads((trained / "eval.json").read_text())
    assert after["blocks.1.hook_resid_post"] == before["blocks.1.hook_resid_post"]
    assert after["blocks.2.hook_resid_post"] != before["blocks.2.hook_resid_post"]
    assert "layer" in refused(capfd, "eval", trained, "--layers", "0")


def test_a_runs_config_repeats_it_and_flags_change_it(trained, tmp_path):
    config = ["train", "--config", str(trained / "run.json"), "--out", str(tmp_path / "again")]
    assert main([*config, "--seed", "7"]) == 0
    first, again = (
        json.loads((run / "run.json").read_text())["config"] for run in (trained, tmp_path / "again")
    )
    assert {key for key in first if first[key] != again[key]} == {"out", "seed"}


@pytest.mark.parametrize("content", ["{", "[]", '{"widht": 3}', '{"width": "many"}', '{"width": null}'])
def test_a_config_file_that_does_not_fit_is_refused(content, tmp_path, capfd):
    (tmp_path / "config.json").write_text(content)
    refused(capfd, "plan", "--config", tmp_path / "config.json")


def test_a_store_is_harvested_described_and_trained_from(inputs, tmp_path, capfd):
    store, run = str(tmp_path / "store"), str(tmp_path / "run")
    flags = "--layers 1 --tokens 500 --context 16 --dtype float32".split()
    assert main(["harvest", *inputs, *flags, "--out", store]) == 0
    assert main(["info", store]) == 0
    assert "500" in capfd.readouterr().out
    assert (
        main(["train", *inputs, *SMALL, "--tokens", "500", "--layers", "1", "--store", store, "--out", run])
        == 0
    )
    assert (tmp_path / "run" / "sites" / "blocks.1.hook_resid_post" / "cfg.json").is_file()


def test_the_demo_does_it_all_and_opens_a_finished_one_again(place, inputs, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--width 64 --l0 4 --tokens 600 --passes 2 --batch 64 --context 16 --layers 1-2".split()
    sizes = "--eval-tokens 200 --loss-tokens 100 --index-tokens 200 --no-view --device cpu".split()
    assert main(["demo", *inputs, *flags, *sizes]) == 0
    out = capfd.readouterr().out
    assert "delta CE" in out
    assert "What to do next" in out
    run = tmp_path / "runs" / "demo"
    assert (run / "eval.json").is_file()
    before = (run / "run.json").stat().st_mtime_ns
    assert main(["demo", *inputs, *flags, *sizes]) == 0
    assert "delta CE" in capfd.readouterr().out
    assert (run / "run.json").stat().st_mtime_ns == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo"]
