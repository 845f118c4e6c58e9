"""TopK and BatchTopK dictionaries in training: what they learn, how many latents fire, and going on."""

import pytest
import torch
from resume_fakes import assert_same, make_sizes
from test_trainer import config, rows, trained

import sae
from sae.errors import UserError
from train.checkpoints import newest_whole
from train.config import TrainConfig
from train.run_folder import RunFolder
from train.trainer import train_run


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_training_learns_and_has_its_l0(architecture, kernel, tmp_path):
    x, steps = rows(), 300 if kernel == "auto" else 100
    trainer = trained(x, config(architecture=architecture, lr=3e-3), steps=steps, kernel=kernel)
    # at the start a row may have fewer latents above zero
    assert 5.95 < trainer.metrics()["l0"] <= 6
    cfg = sae.DictionaryConfig(d_in=24, d_sae=128, architecture=architecture, k=6)
    sae.save(trainer.dictionary(cfg), tmp_path)
    dictionary = sae.load(tmp_path)
    assert type(dictionary) is {"topk": sae.TopK, "batchtopk": sae.BatchTopK}[architecture]
    held_out = rows(seed=1)
    l0 = (dictionary.encode(held_out) > 0).sum(1).double()
    if architecture == "topk":
        positive = (dictionary.pre_activations(held_out) > 0).sum(1)
        assert torch.equal(l0, positive.clamp(max=6).double()) and float((l0 == 6).double().mean()) > 0.95
    else:
        assert float(l0.mean()) == pytest.approx(6, rel=0.05) and l0.unique().numel() > 3
    variance = ((held_out - held_out.mean(0)) ** 2).sum()
    fvu = float(((dictionary(held_out) - held_out) ** 2).sum() / variance)
    assert fvu < (0.05 if kernel == "auto" else 0.3)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_the_folded_dictionary_has_the_latents_of_the_step(architecture):
    x, cfg = rows(), config(architecture=architecture)
    trainer = trained(x, cfg, steps=20)
    w = trainer.weights
    pre = (x / trainer.scale - w.b_in).double() @ w.W_enc_t.double().T + w.b_enc.double()
    about = sae.DictionaryConfig(d_in=24, d_sae=128, architecture=architecture, k=6)
    acts = trainer.dictionary(about).double().encode(x.double())
    gate = w.threshold.double() if architecture == "batchtopk" else pre.topk(7).values[:, -1:]
    clear = (pre - gate).abs() > 1e-4  # elsewhere rounding may decide the gate
    expected = torch.where(pre > gate, pre, 0).relu() * trainer.scale
    torch.testing.assert_close(acts[clear], expected[clear], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_silent_latents_come_back(architecture):
    x, cfg = rows(), config(architecture=architecture, dead_after=2000, warmup=0.0, decay=0.0)
    woken = {}
    for pull_after in (1000, 10**9):
        fields = {**cfg.to_dict(), "pull_after": pull_after}
        trainer = trained(x, TrainConfig.from_dict(fields), steps=30)
        trainer.weights.b_enc[100:] -= 0.3
        trainer.kernel.refresh(trainer.state)
        for step in range(120):
            pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[: cfg.batch]
            trainer.step(x[pick], 0.5)
        woken[pull_after] = int((trainer.state.silent_for[100:] < 2000).sum())
    assert woken[1000] > woken[10**9] + 5


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_run_goes_on_exactly(architecture, tiny_folder, tmp_path):
    sizes = {**make_sizes(tiny_folder, tmp_path), "architecture": architecture, "checkpoint_minutes": 1e-9}
    whole = train_run(TrainConfig(**sizes, out=str(tmp_path / "whole")))

    def stop(what, done, total, detail):
        if what == "train" and done > total / 2:
            raise KeyboardInterrupt("enough")

    broken = TrainConfig(**sizes, out=str(tmp_path / "broken"))
    with pytest.raises(KeyboardInterrupt):
        train_run(broken, on_progress=stop)
    kept = newest_whole(tmp_path / "broken")
    assert kept is not None and kept.step > 10
    train_run(broken, resume=True)
    assert_same(tmp_path / "broken", tmp_path / "whole")
    for site in RunFolder.open(whole.path).sites():
        dictionary = sae.load(whole.site_dir(site))
        assert dictionary.cfg.architecture == architecture and dictionary.cfg.k == 5


def test_k_is_a_whole_number():
    assert config(architecture="topk").k == 6 and config().k == 0
    with pytest.raises(UserError, match="--l0 4, or"):
        config(architecture="batchtopk", l0=4.5)
    with pytest.raises(UserError, match="whole number"):
        config(architecture="topk", l0=0.5)
    assert config(l0=4.5).l0 == 4.5
