"""`jumpscope check` from outside: its words, exit codes and files."""

import dataclasses

import pytest
from cli_fakes import refused
from dictionary_maker import fitting, telling_model, token_blocks

import activations.blocks
import activations.corpora
import activations.models
import sae
from sae import dialects
from train.cli.main import main
from train.run_folder import RunFolder

SITE = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return telling_model()


@pytest.fixture(scope="module")
def healthy(model):
    return fitting(model, SITE)


@pytest.fixture(autouse=True)
def loaded(monkeypatch, model):
    """The tiny model and its text in place of those that are named; the names that were asked for."""
    asked = []
    monkeypatch.setattr(activations.models, "load_model", lambda name, **_: (asked.append(name), model)[1])
    monkeypatch.setattr(activations.corpora, "load_corpus", lambda name: asked.append(name))
    monkeypatch.setattr(activations.blocks, "iter_blocks", lambda *_args, **_flags: token_blocks(model))
    return asked


def mislabelled(dictionary):
    cfg = dataclasses.replace(
        dictionary.cfg, site_in="blocks.1.hook_mlp_out", site_out="blocks.1.hook_mlp_out"
    )
    return sae.build(cfg, {name: tensor.detach() for name, tensor in dictionary.named_parameters()})


def check(*words):
    return main(["check", *map(str, words), "--tokens", "500", "--loss-tokens", "100"])


def test_a_dictionary_that_fits_is_code_0(healthy, loaded, tmp_path, capfd):
    sae.save(healthy, tmp_path / "it")
    assert check(tmp_path / "it") == 0
    out, err = capfd.readouterr()
    assert "fits" in out
    assert "does not" not in out
    assert loaded == ["tiny", "wiki-leads"]
    assert "causes tried" in err
    assert check(tmp_path / "it", "--out", tmp_path / "probed") == 0
    assert sae.load(tmp_path / "it").probe is None
    assert sae.load(tmp_path / "probed").probe is not None


def test_one_that_does_not_is_code_1_and_can_be_written_put_right(healthy, tmp_path, capfd):
    sae.save(mislabelled(healthy), tmp_path / "it")
    assert check(tmp_path / "it") == 1
    out = " ".join(capfd.readouterr().out.split())
    assert "does not fit, explained by hook" in out
    assert f"what to do: jumpscope import with --site {SITE}" in out
    assert "--out DIR writes it put right" in out
    assert check(tmp_path / "it", "--out", tmp_path / "right") == 1
    assert check(tmp_path / "right") == 0
    assert sae.load(tmp_path / "right").cfg.site_in == SITE


def test_a_run_is_checked_whole(model, healthy, loaded, tmp_path, capfd):
    sites = [SITE, "blocks.1.hook_mlp_out"]
    run = RunFolder.create(tmp_path / "run", {"model": "m", "corpus": "c"}, sites=sites, device="cpu")
    assert "trained" in refused(capfd, "check", run.path)
    for site, dictionary in zip(sites, (healthy, fitting(model, sites[1])), strict=True):
        sae.save(dictionary, run.site_dir(site))
    assert check(run.path) == 0
    assert loaded == ["m", "c"]
    sae.save(mislabelled(healthy), run.site_dir(sites[1]))
    capfd.readouterr()
    assert check(run.path, "--out", tmp_path / "right") == 1
    out = capfd.readouterr().out
    assert "2 resid_post" in out and "1 mlp_out" in out and "fits" in out
    assert [path.name for path in (tmp_path / "right").iterdir()] == [sites[1]]
    assert "--site" in refused(capfd, "check", run.path, "--site", SITE)


def test_other_libraries_files_are_checked_and_told_their_site(healthy, tmp_path, capfd):
    folder = tmp_path / "theirs"
    sae.save(healthy, tmp_path / "ours")
    dialects.write(dialects.read(tmp_path / "ours"), folder, "gemma-scope")
    assert "--model" in refused(capfd, "check", folder / "params.npz")
    assert check(folder / "params.npz", "--model", "tiny") == 1
    out = " ".join(capfd.readouterr().out.split())
    assert "no site (none is said)" in out
    assert f"--site {SITE}" in out
    assert check(folder / "params.npz", "--model", "tiny", "--site", SITE) == 0


def test_a_dictionary_of_another_width_is_refused_with_the_widths_there_are(tmp_path, capfd):
    import torch

    cfg = sae.DictionaryConfig(d_in=33, d_sae=4, architecture="relu", site_in=SITE, model="tiny")
    shapes = {"W_enc": (33, 4), "b_enc": (4,), "W_dec": (4, 33), "b_dec": (33,)}
    sae.save(sae.build(cfg, {name: torch.ones(shape) for name, shape in shapes.items()}), tmp_path / "it")
    line = refused(capfd, "check", tmp_path / "it")
    assert "64: attn.hook_z" in line
    assert "--model" in line


def test_a_model_is_known_by_its_name_at_the_hub(monkeypatch):
    import activations.sources
    from train.cli.check import _known_name

    rows = [{"name": "gemma-3-270m", "available": True}, {"name": "gemma-2-2b", "available": False}]
    monkeypatch.setattr(activations.sources, "known_models", lambda: rows)
    assert _known_name("google/gemma-3-270m") == "gemma-3-270m"
    assert _known_name("google/gemma-2-2b") == "google/gemma-2-2b"
    assert _known_name("gpt2-small") == "gpt2"
    assert _known_name("") == ""
