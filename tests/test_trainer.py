"""The trainer: folding, schedules, what a run leaves behind, and runs that are stopped or fail."""

import json
import math
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sae
from activations.ranks import alone
from activations.ring import RowStatistics
from sae.errors import UserError
from sae.kernels.dispatch import choose_kernel, make_kernel
from train.config import TrainConfig
from train.first_weights import _searched, _selected
from train.run_folder import RunFolder
from train.schedule import l0_aim, lr_factor
from train.site_trainer import NonFiniteError, SiteTrainer
from train.trainer import train_run
from train.training import Training

SITE = "blocks.1.hook_resid_post"


def rows(n=4096, d_in=24, seed=0) -> torch.Tensor:
    """Sparse mixtures of 40 directions, far from zero, with one massive direction on a few rows."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, d_in, generator=torch.Generator().manual_seed(99))
    on = (torch.rand(n, 40, generator=g) < 0.08).float()
    x = (on * torch.rand(n, 40, generator=g)) @ directions * 30 + 100
    x[torch.rand(n, generator=g) < 0.01, 3] += 3000
    return x


def moments(x: torch.Tensor) -> RowStatistics:
    mean = x.mean(0)
    return RowStatistics(mean=mean, scale=math.sqrt(float(((x - mean) ** 2).sum(1).mean())), n=len(x))


def config(**fields) -> TrainConfig:
    sizes = {"width": 128, "l0": 6.0, "tokens": 4096, "batch": 256}
    return TrainConfig(**{**sizes, "dead_after": 2000, "pull_after": 1000, **fields})


def untrained(x: torch.Tensor, cfg: TrainConfig, site=SITE, kernel="auto") -> SiteTrainer:
    return SiteTrainer.begin(cfg, site, moments(x), x, make_kernel(choose_kernel(x.device, kernel)))


def trained(x: torch.Tensor, cfg: TrainConfig, steps=400, kernel="auto") -> SiteTrainer:
    trainer = untrained(x, cfg, kernel=kernel)
    for step in range(steps):
        pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[: cfg.batch]
        trainer.step(x[pick], step / steps)
    return trainer


def test_training_learns_and_hits_its_l0():
    x = rows()
    trainer = trained(x, config(lr=3e-3))
    dictionary = trainer.dictionary(sae.DictionaryConfig(d_in=24, d_sae=128))
    held_out = rows(seed=1)
    acts = dictionary.encode(held_out)
    variance = ((held_out - held_out.mean(0)) ** 2).sum()
    fvu = float(((dictionary(held_out) - held_out) ** 2).sum() / variance)
    assert fvu < 0.05
    assert abs(float((acts > 0).sum(1).float().mean()) - 6) < 0.3


def test_principal_latents_carry_a_massive_direction_from_the_start():
    """Random latents all feel a massive direction and overshoot together; two of its own settle it."""
    x = rows()
    without, with_own = (trained(x, config(principal=n), steps=80).metrics()["fvu"] for n in (0, 8))
    assert with_own < without / 3


@pytest.mark.parametrize("find", [_selected, _searched])
@pytest.mark.parametrize("n", [1, 5, 39, 40])
def test_the_largest_values_are_found_part_by_part(find, n, monkeypatch):
    monkeypatch.setattr("train.first_weights._SEARCHED", 16)
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    expected = values.sort(descending=True).values[:n]
    assert torch.equal(find(values, n).sort(descending=True).values, expected)


def many_values(kind: str) -> torch.Tensor:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        values = values.clamp(max=0.5).round(decimals=1)
    elif kind == "one":
        values.fill_(-2.0)
    elif kind == "misleading":  # those that are looked at first are larger than all others
        values[::61] += 100
    elif kind == "infinite":
        values[7::50], values[8::50] = math.inf, -math.inf
    elif kind == "no numbers":
        values[7::1000] = math.nan
    return values


@pytest.mark.parametrize("kind", ["normal", "ties", "one", "misleading", "infinite", "no numbers"])
@pytest.mark.parametrize("n", [1, 15, 500, 3000, 4900, 10_000, 19_999, 20_000, 30_000])
def test_the_largest_of_many_values_are_those_of_a_sort(kind, n):
    values = many_values(kind)
    expected = values.sort(descending=True).values[:n]
    found = _selected(values, n).sort(descending=True).values
    assert torch.equal(found.nan_to_num(9e9), expected.nan_to_num(9e9))
    assert found.isnan().sum() == expected.isnan().sum()
    # what the level is: not a number where one of the largest is none
    assert torch.equal(found.min().isnan(), expected.min().isnan())


def test_most_values_stay_where_they_are():
    """Only those above a bound are put into another order, which is much less to do."""
    values = many_values("normal")
    before = values.clone()
    _selected(values, 600)
    assert torch.equal(values, before)


@pytest.fixture
def threads():
    """Sets torch's number of threads, until the test's end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def begun(sites: dict[str, torch.Tensor], cfg: TrainConfig) -> Training:
    """A training of some sites that stands before its first step."""
    ring = SimpleNamespace(
        statistics={site: moments(x) for site, x in sites.items()},
        first_rows=lambda site, count: sites[site][:count].clone(),
    )
    training = object.__new__(Training)
    training.config, training.shard, training.position, training.ranks = cfg, None, None, alone()
    training.rows = SimpleNamespace(ring=ring, device=torch.device("cpu"))
    training.kernel = make_kernel(choose_kernel(torch.device("cpu"), "auto"))
    training.trainers, training.probe_rows = {}, {}
    training.begin()
    return training


def test_first_weights_depend_on_neither_threads_nor_neighbours(threads):
    """To the bit: so wide that eigenvectors found by several threads together would differ."""
    x = torch.randn(1000, 256, generator=torch.Generator().manual_seed(3)).cumsum(1)
    sites = {f"blocks.{layer}.hook_resid_post": x + layer for layer in range(5)}
    trainings = []
    for count in (1, 2, 3):
        threads(count)
        trainings.append(begun(sites, config(width=256)))
    alone_there = begun({name: sites[name] for name in list(sites)[3:4]}, config(width=256))
    first = trainings[0]
    assert list(first.trainers) == list(first.probe_rows) == list(sites)
    for other in (*trainings[1:], alone_there):
        for site, trainer in other.trainers.items():
            expected = first.trainers[site]
            assert trainer.numbers() == expected.numbers()
            for name, tensor in trainer.tensors().items():
                assert torch.equal(tensor, expected.tensors()[name]), name
            assert torch.equal(other.probe_rows[site]["probe.rows"], first.probe_rows[site]["probe.rows"])


def test_silent_latents_come_back():
    """Latents whose thresholds nothing reaches fire again once they have been silent for long."""
    x, cfg = rows(), config(dead_after=2000, warmup=0.0, decay=0.0)
    trainer = trained(x, cfg, steps=30)
    trainer.weights.threshold[100:] += 0.2
    trainer.kernel.refresh(trainer.state)
    for step in range(200):
        trainer.step(
            x[torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[: cfg.batch]], 0.5
        )
    assert int((trainer.state.silent_for[100:] < 2000).sum()) > 14


def test_l0_is_steered_where_the_penalty_alone_would_miss():
    x = rows()
    missed = []
    for gain in (0.0, 0.02):
        trainer = trained(x, config(l0_gain=gain))
        trainer.forget()  # the way there
        for step in range(100):
            trainer.step(x[step % 16 * 256 :][:256], 0.8)
        missed.append(abs(trainer.metrics()["l0"] - 6))
    assert missed[1] < missed[0] / 2


def test_dictionary_folds_scale_and_bias():
    """Raw rows through the folded dictionary equal scaled rows through the parameters in training."""
    x = rows()
    trainer = trained(x, config(), steps=20)
    w, dictionary = trainer.weights, trainer.dictionary(sae.DictionaryConfig(d_in=24, d_sae=128))
    scaled = (x / trainer.scale).double()
    pre = (scaled - w.b_in.double()) @ w.W_enc_t.double().T + w.b_enc.double()
    acts = pre * (pre > w.threshold.double())
    clear = (pre - w.threshold).abs() > 1e-4  # elsewhere rounding may decide the gate
    torch.testing.assert_close(
        dictionary.double().encode(x.double())[clear],
        trainer.scale * acts[clear].relu(),
        rtol=1e-4,
        atol=1e-2,
    )


def test_decoder_rows_keep_unit_norm_and_thresholds_stay_above_zero():
    trainer = trained(rows(), config(lr=1e-2, threshold_lr=0.5), steps=30)
    torch.testing.assert_close(trainer.weights.W_dec.norm(dim=1), torch.ones(128))
    assert float(trainer.weights.threshold.min()) >= 0


def test_a_site_does_not_depend_on_its_neighbours():
    x, cfg = rows(), config()
    alone = trained(x, cfg, steps=5)
    other = untrained(x, cfg, "blocks.2.hook_resid_post")
    again = trained(x, cfg, steps=5)
    for name in ("W_enc_t", "W_dec", "threshold", "b_dec"):
        assert torch.equal(getattr(alone.weights, name), getattr(again.weights, name))
    assert not torch.equal(other.weights.W_dec, untrained(x, cfg).weights.W_dec)


def test_thresholds_start_where_l0_is_wanted():
    x = rows()
    trainer = untrained(x, config(l0_start=1.5))
    acts = trainer.dictionary(sae.DictionaryConfig(d_in=24, d_sae=128)).encode(x)
    assert float((acts > 0).sum(1).float().mean()) == pytest.approx(9, rel=0.03)


def test_non_finite_rows_stop_the_run_before_the_update():
    x = rows()
    trainer = trained(x, config(), steps=3)
    before = trainer.weights.W_enc_t.clone()
    for poison in (math.nan, math.inf):
        bad = x[:256].clone()
        bad[7, 3] = poison
        with pytest.raises(NonFiniteError, match=f"{SITE}: rows or loss are not finite in"):
            trainer.step(bad, 0.1)
    assert torch.equal(trainer.weights.W_enc_t, before)
    assert trainer.state.steps == 3
    # on a GPU nothing waits for the step: the next metrics tell
    with pytest.raises(NonFiniteError, match="in 2 steps"):
        trainer.metrics()


def test_the_kernels_train_the_same_dictionary():
    """Superposed sparse directions, 500 steps. Rounding grows to a share of the weights by then, but not in
    the figures: with an L0 above the 6 directions a row has, they hardly depend on which latents fire.
    """
    g = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(300, 64, generator=g), dim=1)
    on = (torch.rand(20_000, 300, generator=g) < 0.02).float()
    x = (on * (1 + torch.rand(20_000, 300, generator=g))) @ directions * 10 + 5
    x, held_out = x[:16_000], x[16_000:]
    variance, found = ((held_out - held_out.mean(0)) ** 2).sum(), {}
    for kernel in ("cpu", "reference"):
        trainer = trained(x, config(width=512, l0=16.0, lr=3e-3), steps=500, kernel=kernel)
        assert trainer.kernel.name == kernel
        dictionary = trainer.dictionary(sae.DictionaryConfig(d_in=64, d_sae=512))
        fvu = ((dictionary(held_out) - held_out) ** 2).sum() / variance
        found[kernel] = float(fvu), float((dictionary.encode(held_out) > 0).sum(1).float().mean())
    assert found["cpu"] == pytest.approx(found["reference"], rel=0.01)
    assert found["cpu"][0] < 0.4


def test_schedules():
    cfg = config(warmup=0.1, decay=0.2, l0_start=2.0, l0_anneal=0.5)
    assert [lr_factor(cfg, share) for share in (0.0, 0.05, 0.5)] == pytest.approx([0, 0.5, 1])
    assert [lr_factor(cfg, share) for share in (0.9, 1.0)] == pytest.approx([0.5, 0])
    assert [l0_aim(cfg, share) for share in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([12, 9, 6, 6])
    flat = config(warmup=0.0, decay=0.0, l0_anneal=0.0)
    assert lr_factor(flat, 0.0) == lr_factor(flat, 1.0) == 1
    assert l0_aim(flat, 0.0) == 6


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "text.jsonl"
    words = "the cat sat on a mat while capital of France is Paris and Rome".split()
    lines = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(40)) + f" {i}" for i in range(60)]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path


@pytest.fixture
def tiny_run(tiny_folder, corpus, tmp_path):
    def make(**fields) -> TrainConfig:
        options = {"model": str(tiny_folder), "corpus": str(corpus), "context": 32, "width": 64, "l0": 5.0}
        sizes = {"tokens": 2000, "batch": 128, "passes": 2, "log_every": 2, "out": str(tmp_path / "run")}
        return TrainConfig(**{**options, **sizes, "dtype": "float32", **fields})

    return make


def test_a_run_leaves_what_it_promises(tiny_run):
    seen: list[tuple[str, int, int]] = []
    run = train_run(
        tiny_run(), on_progress=lambda what, done, total, detail: seen.append((what, done, total))
    )
    again = RunFolder.open(run.path)
    assert again.state() == "done"
    assert TrainConfig.from_dict(again.config()) == tiny_run()
    assert again.record()["rows_harvested"] == 2000
    metrics = again.metrics()
    assert set(metrics.site) == set(again.sites()) and len(again.sites()) == 4
    assert {"step", "rows", "l0", "fvu", "loss", "dead"} <= set(metrics.columns)
    for site in again.sites():
        dictionary = sae.load(again.site_dir(site))
        assert dictionary.cfg.site_in == site and dictionary.cfg.l0_target == 5.0
    assert ("harvest", 2000, 2000) in seen
    assert max(done for what, done, _ in seen if what == "train") == 2000 * 2 // 128 * 128


def test_all_sites_equal_separate_runs(tiny_run, tmp_path):
    together = train_run(tiny_run())
    for layer, site in enumerate(together.sites()):
        alone = train_run(tiny_run(layers=str(layer), out=str(tmp_path / f"alone{layer}")))
        for name, tensor in sae.load(alone.site_dir(site)).state_dict().items():
            assert torch.equal(tensor, sae.load(together.site_dir(site)).state_dict()[name])


def test_an_occupied_folder_is_refused_and_untouched(tiny_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="other files"):
        train_run(tiny_run())
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_usable_dictionaries(tiny_run, tmp_path, number):
    def stop_at_half(what, done, total, detail):
        if what == "train" and done > total / 2:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        train_run(tiny_run(), on_progress=stop_at_half)
    run = RunFolder.open(tmp_path / "run")
    assert run.state().startswith("stopped: " + ("Ctrl-C" if number == signal.SIGINT else "SIGTERM"))
    for site in run.sites():
        assert torch.isfinite(sae.load(run.site_dir(site)).W_enc).all()


def test_training_works_off_the_main_thread(tiny_run, tmp_path):
    thread = threading.Thread(target=train_run, args=(tiny_run(),))
    thread.start()
    thread.join()
    assert RunFolder.open(tmp_path / "run").state() == "done"


def test_too_little_text_is_refused(tiny_run, tmp_path):
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "one two three"}) + "\n")
    with pytest.raises(UserError, match="batch"):
        train_run(tiny_run(corpus=str(short)))


def test_wandb_offline_mirrors(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = train_run(tiny_run(wandb="offline"))
    assert run.record()["wandb_id"]
    assert list(run.path.glob("wandb/offline-run-*/*.wandb"))


def test_wandb_online_without_a_key_is_refused(tiny_run, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="wandb login"):
        train_run(tiny_run(wandb="online"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"width": 0}, "width"),
        ({"l0": -1.0}, "l0"),
        ({"batch": 0}, "batch"),
        ({"l0": 200.0, "width": 100}, "--l0 must not exceed --width"),
        ({"tokens": 10}, "batch"),
        ({"context": 1}, "context"),
        ({"decay": 1.5}, "decay"),
        ({"beta2": 1.0}, "beta2"),
    ],
)
def test_bad_configs_are_refused(fields, word):
    with pytest.raises(UserError, match=word):
        TrainConfig(**fields)


def test_config_refuses_unknown_keys():
    with pytest.raises(UserError, match="widht"):
        TrainConfig.from_dict({"widht": 3})
