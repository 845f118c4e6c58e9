import dataclasses

import pytest
import torch
from conftest import plain_model, tiny_tokenizer

from activations.ring import ring_bytes
from sae import UserError
from train import plan as planning
from train.config import TrainConfig
from train.plan import make_plan, missing_memory


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "model"
    plain_model("gemma3").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return TrainConfig(
        model=str(folder),
        width=64,
        l0=4.0,
        tokens=100_000,
        passes=2,
        batch=64,
        context=16,
        device="cpu",
        dtype="float32",
    )


def changed(config, **changes):
    return dataclasses.replace(config, **changes)


def test_the_items_are_what_they_say(config):
    plan = make_plan(changed(config, layers="1-2", sites="resid_post,attn_z"))
    # heads are concatenated at attn_z: 4 heads of 16
    assert plan.sites == {
        "blocks.1.attn.hook_z": 64,
        "blocks.1.hook_resid_post": 32,
        "blocks.2.attn.hook_z": 64,
        "blocks.2.hook_resid_post": 32,
    }
    weights = sum(2 * d_in * 64 + 2 * 64 + d_in for d_in in plan.sites.values())
    # fp32 weights and two moments, and the encoders in bf16
    encoders = sum(d_in * 64 for d_in in plan.sites.values())
    assert plan.memory["4 dictionaries, Adam"] == 3 * 4 * weights + 2 * encoders
    assert plan.disk["dictionaries"] == 4 * weights
    ring = ring_bytes(plan.sites, dtype=torch.float32, rows=plan.ring_rows, batch=64, passes=2)
    assert plan.memory[f"ring, {plan.ring_rows:,} rows"] == ring
    assert plan.memory_total == sum(plan.memory.values())
    assert plan.steps == 100_000 * 2 // 64


def test_the_models_weights_are_counted_as_they_will_be_loaded(config):
    plan = make_plan(config)
    bytes_loaded = sum(p.numel() * p.element_size() for p in plain_model("gemma3").parameters())
    assert plan.memory["language model"] == bytes_loaded
    assert make_plan(changed(config, dtype="bfloat16")).memory["language model"] == bytes_loaded // 2


@pytest.mark.parametrize("memory", [2**30, 2 * 2**30, 5 * 2**30])
def test_the_plan_stays_within_the_memory_given(config, memory):
    plan = make_plan(changed(config, memory=memory, tokens=10**9))
    assert plan.memory_total <= memory
    # and uses it: one generation more would not fit
    assert plan.memory_total + sum(plan.sites.values()) * 4 * 2 * 64 > memory


def test_the_ring_is_no_larger_than_the_text(config):
    plan = make_plan(changed(config, tokens=1000))
    assert 1000 <= plan.ring_rows < 1000 + 2 * 64


def test_what_does_not_fit_is_refused_with_a_size_that_does(config):
    with pytest.raises(UserError, match="--memory") as caught:
        make_plan(changed(config, memory=2**20))
    assert "--memory 1.0 MiB" in str(caught.value)
    (given,) = [word for word in str(caught.value).split() if word.rstrip(",").endswith("G")]
    assert make_plan(changed(config, memory=int(given.rstrip(",G")) * 2**30)).ring_rows > 0


def test_a_disk_without_room_is_refused(config, monkeypatch, tmp_path):
    full = planning.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda place: full)
    with pytest.raises(UserError, match="disk"):
        make_plan(changed(config, out=str(tmp_path / "not" / "there")))


def test_memory_that_is_not_free_is_a_warning(config, monkeypatch):
    plan = make_plan(config)
    assert missing_memory(plan) is None
    little = planning.psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: little)
    assert "smaller --memory" in str(missing_memory(plan))


def test_time_grows_with_the_work_and_a_store_needs_no_harvest(config, monkeypatch):
    monkeypatch.setattr(planning, "_measured_flops", lambda device, dtype: 1e9)
    one, two = make_plan(config), make_plan(changed(config, tokens=200_000))
    assert two.seconds["harvest"] == pytest.approx(2 * one.seconds["harvest"])
    assert two.seconds["train"] == pytest.approx(2 * one.seconds["train"], rel=1e-3)
    assert make_plan(changed(config, store="somewhere")).seconds["harvest"] == 0
    assert set(one.seconds) == {"harvest", "train"}
    assert set(make_plan(config, eval_tokens=10, loss_tokens=10, index_tokens=10).seconds) == {
        "harvest",
        "train",
        "evaluate",
        "index",
    }


@pytest.mark.parametrize(
    "flag", [{"layers": "9"}, {"sites": "resid"}, {"model": "nope"}, {"device": "abacus"}]
)
def test_what_the_model_does_not_have_is_refused(config, flag):
    with pytest.raises(UserError):
        make_plan(changed(config, **flag))
