"""The command line from outside: what each verb prints and leaves on disk."""

import json
import subprocess
import sys
import threading

import pytest
from cli_fakes import SMALL, command, make_inputs, refused

from train.cli.main import VERBS, main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Flags that name the tiny model and corpus."""
    return make_inputs(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """A tiny run through the real command line: two layers, trained, evaluated and indexed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *inputs, *SMALL, "--layers", "1-2", "--out", str(out)]) == 0
    assert main(["eval", str(out), "--tokens", "200", "--loss-tokens", "100", "--baseline-tokens", "50"]) == 0
    assert main(["index", str(out), "--tokens", "200", "--examples", "3"]) == 0
    return out


def test_help_names_every_verb_with_an_example(capfd):
    assert main([]) == main(["--help"]) == 0
    out = capfd.readouterr().out
    for verb in VERBS:
        assert f"  {verb}" in out
        assert f"$ jumpscope {verb}" in out


def test_help_waits_for_nothing_heavy():
    code = (
        "import sys; from train.cli.main import main; main(['--help']); "
        "sys.exit(' '.join({'torch', 'numpy', 'pandas', 'tyro', 'rich', 'sae'} & {*sys.modules}) or 0)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "") and "usage: jumpscope" in process.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_teaches_itself_by_examples_that_parse(verb, capfd):
    assert main([verb, "--help"]) == 0
    out = capfd.readouterr().out
    assert f"usage: jumpscope {verb}" in out
    assert f"  jumpscope {verb}" in out.split("examples:")[1]


def test_a_reader_that_goes_away_is_no_error():
    process = command("models")
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) in (0, 141)
    assert "Traceback" not in err
    assert "Exception ignored" not in err


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


def test_a_store_is_harvested_described_and_trained_from(inputs, tmp_path, capfd):
    store, run = str(tmp_path / "store"), str(tmp_path / "run")
    flags = "--layers 1 --context 16 --dtype float32".split()
    harvest = ["harvest", *inputs, *flags, "--out", store, "--tokens"]
    assert main([*harvest, "400"]) == 0
    assert main([*harvest, "500"]) == 0
    assert "500 rows of 1 sites" in capfd.readouterr().out
    assert main([*harvest, "500"]) == 0
    assert "Nothing to do" in capfd.readouterr().out
    assert main(["info", store, "--verify"]) == 0
    out = capfd.readouterr().out
    assert all(text in out for text in ("500", "float32", "Every shard is whole", "yes"))
    assert "seed 0 there, 1 asked" in refused(capfd, *harvest, "600", "--seed", "1")
    train = ["train", *inputs, *SMALL, "--tokens", "500", "--layers", "1", "--dtype", "float32"]
    assert main([*train, "--store", store, "--out", run]) == 0
    assert (tmp_path / "run" / "sites" / "blocks.1.hook_resid_post" / "cfg.json").is_file()
    for shard in (tmp_path / "store").glob("shard-*"):
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    line = refused(capfd, "info", store, "--verify")
    assert "2 of 2" in line
    assert "shard-00000" in line and "shard-00001" in line
    assert "--verify is for a store" in refused(capfd, "info", run, "--verify")


def test_training_from_a_store_gives_the_weights_of_training_live(inputs, tmp_path):
    store = str(tmp_path / "store")
    flags = "--layers 1-2 --tokens 500 --context 16 --model-batch 4 --device cpu".split()
    assert main(["harvest", *inputs, *flags, "--out", store]) == 0
    train = ["train", *inputs, *SMALL, "--tokens", "500", "--layers", "1-2"]
    assert main([*train, "--out", str(tmp_path / "live")]) == 0
    assert main([*train, "--store", store, "--out", str(tmp_path / "disk")]) == 0
    for layer in (1, 2):
        live, disk = (
            (tmp_path / run / "sites" / f"blocks.{layer}.hook_resid_post" / "sae_weights.safetensors")
            for run in ("live", "disk")
        )
        assert live.read_bytes() == disk.read_bytes()


def test_a_store_behind_a_url_goes_through_the_command_line(inputs, tmp_path, capfd):
    store = "memory://cli/store"
    flags = "--layers 1-2 --tokens 500 --context 16 --store-dtype int8".split()
    assert main(["harvest", *inputs, *flags, "--out", store]) == 0
    assert main(["info", store, "--verify"]) == 0
    assert "int8, read as" in capfd.readouterr().out
    words = [*inputs, *SMALL, "--tokens", "500", "--layers", "1", "--store", store]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    assert "manifest.json" in refused(capfd, "info", "memory://cli/nothing")


def test_the_demo_does_it_all_and_opens_a_finished_one_again(inputs, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--width 64 --l0 4 --tokens 600 --passes 2 --batch 64 --context 16 --layers 1-2".split()
    sizes = "--held-out-tokens 200 --loss-tokens 100 --no-view --device cpu".split()
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
