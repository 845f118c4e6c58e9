import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activations.blocks import TokenBlocks
from sae import DictionaryConfig, JumpReLU, UserError
from train.evals import DENSITY_EDGES, _RatioSums, evaluate

SITE = "blocks.1.hook_resid_post"
EARLY = "blocks.0.hook_mlp_out"
ALL = 10**9
CONTEXT = 16


def make_blocks(n=6, per_batch=3, seed=0, hole=True):
    """Random tokens behind BOS; a second BOS stands in the middle of each block when `hole`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 300, (n, CONTEXT), generator=generator, dtype=torch.int32)
    keep = torch.ones(n, CONTEXT, dtype=torch.bool)
    for column in (0, 7) if hole else (0,):
        tokens[:, column], keep[:, column] = 2, False
    position = torch.arange(CONTEXT, dtype=torch.int32).expand(n, -1).clone()
    document = torch.arange(n, dtype=torch.int32)[:, None].expand(-1, CONTEXT).clone()
    fields = {"tokens": tokens, "document": document, "position": position, "keep": keep}
    return [
        TokenBlocks(**{k: v[i : i + per_batch] for k, v in fields.items()}) for i in range(0, n, per_batch)
    ]


def rows_at(model, site, blocks):
    return torch.cat([model.activations(b.tokens, [site])[site][b.keep] for b in blocks]).double()


def blank(site=SITE, width=8, site_out=""):
    """A dictionary whose weights are all zero."""
    return JumpReLU(DictionaryConfig(d_in=32, d_sae=width, site_in=site, site_out=site_out, l0_target=4.0))


def identity(site=SITE):
    dictionary = blank(site, width=64)
    eye = torch.eye(32)
    dictionary.W_enc.data = torch.cat([eye, -eye], dim=1)
    dictionary.W_dec.data = torch.cat([eye, -eye])
    return dictionary


def constant(value, site=SITE, site_out=""):
    dictionary = blank(site, site_out=site_out)
    dictionary.b_dec.data = value.float()
    return dictionary


def random_dictionary(site=SITE, width=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dictionary = blank(site, width)
    dictionary.W_enc.data = torch.randn(32, width, generator=generator) / 6
    dictionary.W_dec.data = torch.randn(width, 32, generator=generator) / 6
    dictionary.threshold.data = torch.full((width,), 0.3)
    # one latent that no token can fire
    dictionary.threshold.data[0] = 1e9
    return dictionary


def measure(model, dictionary, blocks, **tokens):
    site = dictionary.cfg.site_out
    return evaluate(
        model, {site: dictionary}, blocks, **{"loss_tokens": ALL, "baseline_tokens": ALL} | tokens
    )[site]


def test_the_identity_loses_nothing(tiny_model):
    found = measure(tiny_model, identity(), make_blocks())
    assert found["fvu"] == 0
    assert found["fvu_se"] == 0
    assert found["l0"] == 32
    assert found["dead"] == 0
    assert found["delta_ce"] == pytest.approx(0, abs=1e-6)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["ce_spliced"] == pytest.approx(found["ce_clean"], abs=1e-6)
    assert found["ce_recovered_mean"] == pytest.approx(1, abs=1e-5)
    assert found["ce_recovered_zero"] == pytest.approx(1, abs=1e-5)


def test_predicting_the_mean_explains_nothing_and_recovers_nothing(tiny_model):
    blocks = make_blocks()
    found = measure(tiny_model, constant(rows_at(tiny_model, SITE, blocks).mean(0)), blocks)
    assert found["fvu"] == pytest.approx(1, abs=1e-6)
    assert (found["l0"], found["dead"]) == (0, 1)
    assert found["ce_spliced"] == pytest.approx(found["ce_mean"], abs=1e-5)
    assert found["ce_recovered_mean"] == pytest.approx(0, abs=1e-3)


def test_a_dictionary_of_zeros_is_zero_ablation(tiny_model):
    blocks = make_blocks()
    rows = rows_at(tiny_model, SITE, blocks)
    found = measure(tiny_model, blank(), blocks)
    assert found["ce_spliced"] == pytest.approx(found["ce_zero"], abs=1e-6)
    assert found["ce_recovered_zero"] == pytest.approx(0, abs=1e-3)
    about_the_mean = (rows - rows.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(float(rows.square().sum() / about_the_mean), rel=1e-6)


def test_fvu_l0_and_densities_are_those_of_the_plain_formulas(tiny_model):
    blocks, dictionary = make_blocks(), random_dictionary()
    rows = rows_at(tiny_model, SITE, blocks)
    found = measure(tiny_model, dictionary, blocks)
    dictionary.requires_grad_(False)
    acts = dictionary.encode(rows.float())
    error = (rows - dictionary.decode(acts).double()).square().sum(1)
    spread = (rows - rows.mean(0)).square().sum(1)
    assert found["fvu"] == pytest.approx(float(error.sum() / spread.sum()), rel=1e-5)
    assert found["l0"] == pytest.approx(float((acts > 0).sum(1).double().mean()), rel=1e-9)
    rate = (acts > 0).double().mean(0)
    assert found["dead"] == pytest.approx(float((rate == 0).double().mean()))
    assert found["dead"] >= 1 / 48
    counts, _ = np.histogram(np.log10(rate[rate > 0].numpy()), DENSITY_EDGES)
    assert found["density"]["latents"] == counts.tolist()
    assert sum(found["density"]["latents"]) == int((rate > 0).sum())
    assert found["n_tokens"] == len(rows)
    assert found["l0_target"] == 4.0


@pytest.mark.parametrize("site", [SITE, EARLY])
def test_losses_are_those_of_the_models_own_forward_with_the_reconstruction_in_it(tiny_model, site):
    blocks, dictionary = make_blocks(), random_dictionary(site)
    found = measure(tiny_model, dictionary, blocks)
    clean, spliced = [], []
    for batch in blocks:
        keep = batch.keep[..., None]

        def replace(x, keep=keep):
            return torch.where(keep, dictionary(x), x)

        losses = []
        for watchers in ({}, {site: replace}):
            with tiny_model.watching(watchers), torch.no_grad():
                logits = tiny_model.unembed(tiny_model.run_body(batch.tokens)).double()
            nats = -logits.log_softmax(-1)[:, :-1].gather(-1, batch.tokens[:, 1:, None].long())[..., 0]
            losses.append(nats[batch.keep[:, :-1] & batch.keep[:, 1:]].reshape(len(batch.tokens), -1))
        clean.append(losses[0])
        spliced.append(losses[1])
    clean, spliced = torch.cat(clean), torch.cat(spliced)
    assert found["ce_clean"] == pytest.approx(float(clean.mean()), abs=1e-5)
    assert found["ce_spliced"] == pytest.approx(float(spliced.mean()), abs=1e-5)
    difference = (spliced - clean).mean(1)
    assert found["delta_ce"] == pytest.approx(float(difference.mean()), abs=1e-5)
    # equal numbers of scored tokens in every block: the plain standard error of block means
    assert found["delta_ce_se"] == pytest.approx(
        float(difference.std() / math.sqrt(len(difference))), rel=1e-3
    )
    assert found["n_loss_tokens"] == clean.numel()
    assert found["kl"] > 0


def test_what_is_not_kept_stays_as_the_model_made_it(tiny_model):
    blocks = make_blocks(per_batch=6)
    for batch in blocks:
        # only the second half is text here: what goes wrong there cannot reach the first
        batch.keep[:, :8] = False
    wrong = constant(torch.full((32,), 50.0))
    found = measure(tiny_model, wrong, blocks)
    assert found["n_tokens"] == 6 * 8
    assert found["n_loss_tokens"] == 6 * 7
    # a dictionary on the special tokens alone would change nothing at all
    for batch in blocks:
        batch.keep[:] = False
        batch.keep[:, 14:] = True
    first_kept = measure(tiny_model, identity(), blocks)
    assert first_kept["n_loss_tokens"] == 6
    assert first_kept["delta_ce"] == pytest.approx(0, abs=1e-6)


def test_a_transcoder_reads_one_site_and_is_measured_at_the_other(tiny_model):
    read, written = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
    blocks = make_blocks()
    mean = rows_at(tiny_model, written, blocks).mean(0)
    found = measure(tiny_model, constant(mean, read, site_out=written), blocks)
    assert found["fvu"] == pytest.approx(1, abs=1e-6)
    assert found["ce_recovered_mean"] == pytest.approx(0, abs=1e-3)


def test_several_sites_together_give_what_each_gives_alone(tiny_model):
    blocks = make_blocks()
    both = {SITE: random_dictionary(SITE), EARLY: random_dictionary(EARLY, seed=1)}
    together = evaluate(tiny_model, both, blocks, loss_tokens=40, baseline_tokens=20)
    for site, dictionary in both.items():
        alone = evaluate(tiny_model, {site: dictionary}, blocks, loss_tokens=40, baseline_tokens=20)[site]
        assert numbers(together[site]) == pytest.approx(numbers(alone), abs=1e-5)


@pytest.mark.parametrize("per_batch", [2, 6])
def test_how_blocks_are_batched_changes_nothing(tiny_model, per_batch):
    dictionary = random_dictionary()
    sizes = {"tokens": 60, "loss_tokens": 40, "baseline_tokens": 20}
    one = measure(tiny_model, dictionary, make_blocks(per_batch=3), **sizes)
    other = measure(tiny_model, dictionary, make_blocks(per_batch=per_batch), **sizes)
    # the standard error's blocks scatter about the mean of the first batch
    assert one.pop("fvu_se") == pytest.approx(other.pop("fvu_se"), rel=0.1)
    assert numbers(one) == pytest.approx(numbers(other), abs=1e-5)


def numbers(row):
    return {key: value for key, value in row.items() if isinstance(value, float | int)}


def test_each_number_of_tokens_is_kept_to_in_whole_blocks(tiny_model):
    # 14 kept tokens a block, 12 of them scored (the hole and the end cost one each)
    found = measure(tiny_model, identity(), make_blocks(), tokens=50, loss_tokens=29, baseline_tokens=14)
    assert found["n_tokens"] == 56
    assert found["n_loss_tokens"] == 3 * 12
    assert found["n_baseline_tokens"] == 12
    assert found["ce_mean"] > found["ce_clean"] or found["ce_mean"] != found["ce_zero"]


def test_blocks_are_read_only_as_far_as_they_are_needed(tiny_model):
    read = []

    def stream():
        for batch in make_blocks(per_batch=1):
            read.append(batch)
            yield batch

    measure(tiny_model, identity(), stream(), tokens=20, loss_tokens=10, baseline_tokens=10)
    assert len(read) == 2


def test_what_cannot_be_had_is_null_and_the_result_is_plain_json(tiny_model):
    (one_block,) = make_blocks(n=1, per_batch=1)
    found = measure(tiny_model, identity(), [one_block])
    assert found["delta_ce_se"] is None
    assert found["fvu_se"] is None
    json.dumps(found, allow_nan=False)
    one_block.keep[:] = False
    one_block.keep[:, 3:5] = True
    json.dumps(measure(tiny_model, blank(), [one_block]), allow_nan=False)


def test_no_text_to_measure_on_is_said(tiny_model):
    blocks = make_blocks()
    for batch in blocks:
        batch.keep[:] = False
    for nothing in ([], blocks):
        with pytest.raises(UserError, match="held-out"):
            measure(tiny_model, identity(), nothing)
    # tokens, but no two in a row
    for batch in blocks:
        batch.keep[:, 2::3] = True
    with pytest.raises(UserError, match="held-out"):
        measure(tiny_model, identity(), blocks)


def test_progress_ends_where_it_said_it_would(tiny_model):
    seen = []
    measure(
        tiny_model,
        identity(),
        make_blocks(),
        tokens=30,
        loss_tokens=20,
        baseline_tokens=10,
        progress=lambda *x: seen.append(x),
    )
    last = {what: (done, total) for what, done, total in seen}
    assert len(last) == 2
    assert all(done == total for done, total in last.values())


@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 50)), min_size=2, max_size=30))
def test_the_standard_error_of_a_ratio_is_the_textbooks(pairs):
    a, b = np.array([x for x, _ in pairs]), np.array([float(n) for _, n in pairs])
    sums = _RatioSums()
    for x, n in pairs:
        sums.add(torch.tensor([x], dtype=torch.float64), torch.tensor([float(n)], dtype=torch.float64))
    ratio = a.sum() / b.sum()
    expected = math.sqrt(len(a) / (len(a) - 1) * ((a - ratio * b) ** 2).sum()) / b.sum()
    assert sums.value == pytest.approx(ratio, abs=1e-9)
    assert sums.standard_error() == pytest.approx(expected, abs=1e-6)
