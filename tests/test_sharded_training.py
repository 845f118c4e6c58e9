"""A site's trainer divided over shards against the whole one: how it begins, what it tells, its checkpoint's
files in any number of ranges, the dictionary put together; by threads, and once by processes.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from ranks_processes import Processes
from shard_fakes import Meeting
from test_trainer import SITE, config, moments, rows, trained, untrained

import sae
from sae.errors import UserError
from sae.kernels.cpu import CpuKernel
from sae.kernels.step import PER_LATENT
from sae.tensor_files import save_tensors
from train.first_weights import _random_rows
from train.site_files import file_stem, read_site
from train.site_trainer import NonFiniteError, SiteTrainer
from train.training import Training

DEVICE = torch.device("cpu")


def begun(meeting, x, cfg) -> list[SiteTrainer]:
    """The trainers of all shards before their first step."""

    def begin(index):
        return SiteTrainer.begin(cfg, SITE, moments(x), x, CpuKernel(), meeting.shard(index, cfg.width))

    return meeting.run(begin)


def taken_up(meeting, folder, cfg, numbers) -> list[SiteTrainer]:
    """The trainers that a checkpoint's files make, in as many ranges as there are shards."""
    trainers = []
    for index in range(meeting.count):
        shard = meeting.shard(index, cfg.width)
        tensors = read_site(folder, SITE, shard.latents)
        trainers.append(SiteTrainer.resume(cfg, SITE, tensors, numbers, CpuKernel(), DEVICE, shard))
    return trainers


def keep(folder, trainers) -> None:
    for trainer in trainers:
        name = file_stem(SITE, trainer.state.shard)
        save_tensors(folder / f"{name}.safetensors", trainer.tensors())


def train(meeting, trainers, x, cfg, steps, first=0) -> None:
    def work(index):
        for step in range(first, first + steps):
            pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[: cfg.batch]
            trainers[index].step(x[pick], step / 50)

    meeting.run(work)


def assert_equal(found, expected) -> None:
    """Equal names and bits."""
    assert list(found) == list(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("architecture", ["jumprelu", "batchtopk"])
def test_shards_begin_as_the_whole_dictionary_does(architecture, count):
    x, cfg = rows(), config(width=130, architecture=architecture)
    whole, parts = untrained(x, cfg), begun(Meeting(count), x, cfg)
    assert parts[0].scale == parts[-1].scale == pytest.approx(whole.scale, rel=1e-6)
    assert parts[0].bandwidth == parts[-1].bandwidth == pytest.approx(whole.bandwidth, rel=1e-6)
    for name in PER_LATENT:
        joined = torch.cat([getattr(part.weights, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole.weights, name), rtol=1e-5, atol=1e-6)
    assert all(part.weights.tied for part in parts)
    assert torch.equal(parts[0].weights.b_dec, parts[-1].weights.b_dec)


@pytest.mark.parametrize(("width", "d_in"), [(20, 3), (37, 5), (64, 16), (129, 1)])
def test_the_random_numbers_of_a_range_are_the_wholes(width, d_in, monkeypatch):
    monkeypatch.setattr("train.first_weights._DRAWN", 16)
    expected = torch.randn(width, d_in, generator=torch.Generator().manual_seed(5))
    for first, last in ((0, width), (0, 17), (17, width), (16, 20)):
        drawn = _random_rows(width, d_in, slice(first, last), torch.Generator().manual_seed(5))
        assert torch.equal(drawn, expected[first:last])


@pytest.mark.parametrize("architecture", ["jumprelu", "batchtopk"])
def test_shards_train_the_same_dictionary(architecture):
    """Their rounding grows to a share of the weights with the steps, but not in the figures."""
    x, cfg = rows(), config(architecture=architecture, lr=3e-3)
    whole, meeting = trained(x, cfg, steps=50), Meeting(2)
    parts = begun(meeting, x, cfg)
    train(meeting, parts, x, cfg, 50)
    told = meeting.run(lambda index: parts[index].metrics())
    expected = whole.metrics()
    assert told[0] == told[1] and list(told[0]) == list(expected)
    assert told[0]["fvu"] == pytest.approx(expected["fvu"], rel=0.1)
    assert told[0]["l0"] == pytest.approx(expected["l0"], rel=0.02)
    silent = torch.cat([part.state.silent_for for part in parts])
    assert told[0]["dead"] == float((silent >= cfg.dead_after).double().mean())
    threshold = torch.cat([part.weights.threshold for part in parts])
    assert told[0]["threshold"] == pytest.approx(float(threshold.mean()) * parts[0].scale, rel=1e-6)


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_a_checkpoint_is_of_latents_and_not_of_shards(beta1, tmp_path):
    """Whole, then in two files, three, four, and whole again: every bit stays."""
    x, cfg = rows(), config(width=130, beta1=beta1)
    whole = trained(x, cfg, steps=5)
    expected, numbers, before = whole.tensors(), whole.numbers(), tmp_path / "1"
    keep(before, [whole])
    for count in (2, 3, 4):
        parts, folder = taken_up(Meeting(count), before, cfg, numbers), tmp_path / str(count)
        assert sum(len(part.weights.b_enc) for part in parts) == 130
        assert all(part.numbers() == numbers for part in parts)
        keep(folder, parts)
        assert len(list(folder.iterdir())) == count
        assert_equal(read_site(folder, SITE, slice(0, 130)), dict(sorted(expected.items())))
        before = folder
    back = SiteTrainer.resume(cfg, SITE, read_site(before, SITE, slice(0, 130)), numbers, CpuKernel(), DEVICE)
    assert_equal(back.tensors(), expected)
    back.step(x[:256], 0.5)
    whole.step(x[:256], 0.5)
    assert_equal(back.tensors(), whole.tensors())


def test_shards_go_on_exactly(tmp_path):
    x, cfg, meeting = rows(), config(width=129), Meeting(2)
    without, parts = begun(meeting, x, cfg), begun(meeting, x, cfg)
    train(meeting, without, x, cfg, 6)
    train(meeting, parts, x, cfg, 3)
    keep(tmp_path, parts)
    resumed = taken_up(meeting, tmp_path, cfg, parts[0].numbers())
    train(meeting, resumed, x, cfg, 3, first=3)
    for one, other in zip(resumed, without, strict=True):
        assert_equal(one.tensors(), other.tensors())
        assert one.numbers() == other.numbers()


def test_files_that_miss_latents_or_are_torn_are_named(tmp_path):
    x, cfg, meeting = rows(), config(), Meeting(4)
    parts = begun(meeting, x, cfg)
    keep(tmp_path, parts)
    # a site whose name begins alike is another one
    save_tensors(tmp_path / f"{SITE}.more.0-128.safetensors", parts[0].tensors())
    assert_equal(read_site(tmp_path, SITE, slice(32, 64)), dict(sorted(parts[1].tensors().items())))
    torn = tmp_path / f"{SITE}.32-64.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"32-64\.safetensors must be a whole safetensors file"):
        read_site(tmp_path, SITE, slice(0, 128))
    torn.unlink()
    with pytest.raises(UserError, match=r"latents 0 to 128 of .*those up to 32"):
        read_site(tmp_path, SITE, slice(0, 128))
    with pytest.raises(UserError, match="no file of them"):
        read_site(tmp_path, SITE, slice(40, 50))


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_the_first_shard_puts_the_dictionary_together(architecture, tmp_path, monkeypatch):
    """In parts of a few rows, which end within shards; what is saved and opened is the whole one's."""
    monkeypatch.setattr("sae.kernels.shards._AT_ONCE", 24 * 4 * 7)
    x, cfg = rows(), config(width=130, architecture=architecture)
    whole, meeting = trained(x, cfg, steps=20), Meeting(3)
    keep(tmp_path, [whole])
    parts = taken_up(meeting, tmp_path, cfg, whole.numbers())
    about = sae.DictionaryConfig(d_in=24, d_sae=130, architecture=architecture, k=cfg.k)
    found = meeting.run(lambda index: parts[index].dictionary(about))
    assert found[1:] == [None, None]
    expected = whole.dictionary(about).state_dict()
    for name, tensor in found[0].state_dict().items():
        assert tensor.is_contiguous()
        if name == "b_enc":  # made of a product, of so many rows at once
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-3)
        else:
            assert torch.equal(tensor, expected[name]), name
    sae.save(found[0], tmp_path / "saved", probe=x[:8])
    assert torch.equal(sae.load(tmp_path / "saved").W_enc, expected["W_enc"])


def test_rows_that_are_not_finite_stop_all_shards(tmp_path):
    x, cfg, meeting = rows(), config(), Meeting(2)
    parts, bad = begun(meeting, x, cfg), x[:256].clone()
    bad[7, 3] = math.nan
    before = [part.weights.W_dec.clone() for part in parts]

    def work(index):
        with pytest.raises(NonFiniteError, match="not finite in 1 steps"):
            parts[index].step(bad, 0.1)

    meeting.run(work)
    assert all(torch.equal(part.weights.W_dec, old) for part, old in zip(parts, before, strict=True))


PROCESS = """
import json, sys, torch
from pathlib import Path
from activations.ranks import open_ranks
from sae.tensor_files import save_tensors
from sae.kernels.cpu import CpuKernel
from sae.kernels.shards import Shard
from test_trainer import SITE, config, moments, rows
from train.site_files import file_stem
from train.site_trainer import SiteTrainer
import sae

torch.set_num_threads(1)
folder = Path(sys.argv[1])
with open_ranks() as ranks:
    group = ranks.group(range(ranks.world))
    for architecture in ("jumprelu", "batchtopk"):
        x, cfg = rows(), config(architecture=architecture, width=129)
        shard = Shard(ranks.rank, ranks.world, cfg.width, lambda tensor: ranks.add(tensor, group))
        trainer = SiteTrainer.begin(cfg, SITE, moments(x), x, CpuKernel(), shard)
        for step in range(20):
            pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[: cfg.batch]
            trainer.step(x[pick], step / 50)
        save_tensors(folder / architecture / f"{file_stem(SITE, shard)}.safetensors", trainer.tensors())
        about = sae.DictionaryConfig(d_in=24, d_sae=129, architecture=architecture, k=cfg.k)
        dictionary = trainer.dictionary(about)
        if dictionary is not None:
            sae.save(dictionary, folder / f"{architecture}-saved", probe=x[:8])
        print(json.dumps(trainer.metrics()))
"""


def test_processes_make_what_threads_make(tmp_path):
    """Two ranks add up as two threads do, so every bit is the same."""
    ends = Processes(2, PROCESS, str(tmp_path)).finish(600)
    assert [(code, err) for code, _, err in ends] == [(0, "")] * 2
    assert ends[0][1] == ends[1][1]
    told = [json.loads(line) for line in ends[0][1].splitlines()]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for architecture, metrics in zip(("jumprelu", "batchtopk"), told, strict=True):
            x, cfg, meeting = rows(), config(architecture=architecture, width=129), Meeting(2)
            parts = begun(meeting, x, cfg)
            train(meeting, parts, x, cfg, 20)
            for part in parts:
                found = read_site(tmp_path / architecture, SITE, part.state.shard.latents)
                assert_equal(found, dict(sorted(part.tensors().items())))
            assert meeting.run(lambda index, parts=parts: parts[index].metrics())[0] == metrics
            saved = sae.load(tmp_path / f"{architecture}-saved")
            W_dec = torch.cat([part.weights.W_dec for part in parts])
            assert torch.equal(saved.W_dec, W_dec)
    finally:
        torch.set_num_threads(threads)


def test_a_disk_that_refuses_a_dictionary_leaves_no_shard_waiting(tmp_path):
    """The first shard fails at one site; the next is put together and written before it says so."""
    x, cfg, meeting = rows(), config(), Meeting(2)
    parts = begun(meeting, x, cfg)
    (tmp_path / "first").write_text("in the way")

    def work(index):
        training = SimpleNamespace(
            config=cfg,
            shard=parts[index].state.shard,
            trainers=dict.fromkeys(("first", "second"), parts[index]),
            probe_rows={"first": {}, "second": {}},
            rows=SimpleNamespace(ring=SimpleNamespace(widths={"first": 24, "second": 24}), model="m"),
            run=SimpleNamespace(site_dir=lambda site: tmp_path / site),
        )
        try:
            Training._save_own(training)
        except UserError as error:
            return str(error)

    said = meeting.run(work)
    assert "folder must stand at that path" in said[0] and said[1] is None
    assert sae.load(tmp_path / "second").cfg.d_sae == 128
