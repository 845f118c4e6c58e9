"""`jumpscope index`: of a run, of dictionaries, and what it refuses."""

import json
import shutil

import pytest
from cli_fakes import SMALL, make_inputs, refused

import sae
from train.cli.main import main
from viewer.index.storage import read_firings, read_manifest, read_texts

SITES = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Flags that name the tiny model and corpus."""
    return make_inputs(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """A tiny run of two layers, indexed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *inputs, *SMALL, "--layers", "1-2", "--out", str(out)]) == 0
    assert main(["index", str(out), "--tokens", "200"]) == 0
    return out


def files_of(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("[!.]*") if p.is_file()}


def test_a_run_is_indexed_in_its_own_folder_and_an_evaluation_brings_the_same(trained, capfd):
    for site in SITES:
        manifest = read_manifest(trained / "index" / site)
        assert manifest["tokens"] == 200 and manifest["d_sae"] == 64
    assert len(read_texts(trained / "index")) == 200
    assert (
        json.loads((trained / "index" / "texts" / "manifest.json").read_text())["text"]["split"] == "held_out"
    )
    assert not (trained / "index" / "parts").exists()
    assert main(["info", str(trained)]) == 0
    assert "2 of 2 sites" in capfd.readouterr().out


def test_dictionaries_are_indexed_as_their_run_was(trained, inputs, tmp_path, capfd):
    dictionaries = []
    for site in SITES:
        dictionaries.append(str(tmp_path / site))
        shutil.copytree(trained / "sites" / site, tmp_path / site)
    words = ["index", *dictionaries, *inputs[2:], "--tokens", "200", "--context", "16"]
    assert "--out" in refused(capfd, *words)
    out = tmp_path / "both"
    assert main([*words, "--out", str(out)]) == 0
    said = capfd.readouterr().out
    assert f'viewer.open("{out}")' in said
    for site in SITES:
        ours, theirs = (read_firings(root / site) for root in (out, trained / "index"))
        assert len(ours.row) > 0 and len(ours.row) == pytest.approx(len(theirs.row), rel=0.2)
    assert main(["index", dictionaries[0], *inputs[2:], "--tokens", "100"]) == 0
    assert read_manifest(tmp_path / SITES[0] / "index" / SITES[0])["tokens"] == 100


def test_one_site_is_added_and_another_text_refused(trained, inputs, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "index")
    for layer in ("1", "2"):
        assert main(["index", str(run), "--tokens", "200", "--layers", layer]) == 0
    one, other = files_of(run / "index"), files_of(trained / "index")
    same = [name for name in one if name.name not in ("related.parquet", "manifest.json")]
    assert len(same) == 10 and all(one[name] == other[name] for name in same)
    assert "one text" in refused(capfd, "index", run, "--tokens", "100", "--layers", "1")
    assert (
        main(["index", str(run), "--tokens", "100", "--layers", "1", "--out", str(tmp_path / "apart")]) == 0
    )
    assert read_manifest(run / "index" / SITES[0])["tokens"] == 200


def test_what_makes_no_index_is_one_clear_line(trained, inputs, tmp_path, capfd):
    one = trained / "sites" / SITES[0]
    assert "one run or of dictionaries" in refused(capfd, "index", trained, one, "--out", tmp_path / "o")
    assert "left out for a run" in refused(capfd, "index", trained, "--model", "gpt2")
    assert "site of its own" in refused(capfd, "index", one, one, "--out", tmp_path / "o")
    assert "--layers" in refused(capfd, "index", one, "--layers", "0", "--out", tmp_path / "o")
    assert "tokens" in refused(capfd, "index", trained, "--tokens", "0")
    nowhere = sae.load(one)
    config = {**nowhere.cfg.to_dict(), "site_in": "", "site_out": "", "model": ""}
    tensors = dict(nowhere.state_dict())
    made = sae.build(sae.DictionaryConfig(**config), tensors)
    sae.save(made, tmp_path / "nowhere")
    assert "names no site" in refused(capfd, "index", tmp_path / "nowhere", "--out", tmp_path / "o")
    made = sae.build(sae.DictionaryConfig(**{**config, "site_in": SITES[0], "site_out": SITES[0]}), tensors)
    sae.save(made, tmp_path / "nameless")
    assert "--model" in refused(capfd, "index", tmp_path / "nameless", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_two_processes_do_not_write_one_index(trained, capfd):
    from train.run_folder import hold

    with hold(trained / "index"):
        assert "one process at a time" in refused(capfd, "index", trained, "--tokens", "200")
