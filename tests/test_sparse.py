"""Lists of the latents that fire against the dense encoder."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import DictionaryConfig, JumpReLU
from sae.kernels.cpu_forward import Forward
from sae.sparse import SparseEncoder


def dictionary_of(d_in, d_sae, *, threshold, dtype=torch.float32, site_out=""):
    cfg = DictionaryConfig(d_in=d_in, d_sae=d_sae, site_in="a", site_out=site_out)
    dictionary = JumpReLU(cfg, dtype=dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(d_in)
    for tensor in dictionary.parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    dictionary.threshold.copy_(threshold + torch.rand(d_sae, generator=generator))
    return dictionary


def rows_of(n, d_in, dtype=torch.float32, mean=0.0):
    rows = torch.randn(n, d_in, generator=torch.Generator().manual_seed(n)) + mean
    rows[n // 3 : n // 3 + 2] = 0
    return rows.to(dtype)


def dense(latents, d_sae):
    found = torch.zeros(len(latents), d_sae, dtype=latents.activation.dtype)
    found[latents.row, latents.latent.long()] = latents.activation
    return found


@settings(max_examples=60, deadline=None)
@given(
    d_in=st.sampled_from([1, 7, 64]),
    d_sae=st.sampled_from([1, 30, 513, 1100]),
    n=st.sampled_from([0, 1, 50, 2100]),
    threshold=st.sampled_from([-2.0, 0.0, 1.0, 20.0, 1e9]),
    mean=st.sampled_from([0.0, 30.0]),
    site_out=st.sampled_from(["", "b"]),
)
def test_firing_latents_are_those_of_the_dense_encoder_in_float64(d_in, d_sae, n, threshold, mean, site_out):
    dictionary = dictionary_of(d_in, d_sae, threshold=threshold, site_out=site_out)
    x = rows_of(n, d_in, mean=mean)
    latents = SparseEncoder(dictionary).encode(x)
    found, exact = dense(latents, d_sae), dictionary.double().encode(x.double())
    pre = dictionary.pre_activations(x.double())
    # what fp32 sums may be off by, the one about b_dec too
    size = x.double().abs() + (0 if site_out else dictionary.b_dec.abs())
    error = 1e-6 * (size @ dictionary.W_enc.abs() + dictionary.b_enc.abs())
    doubtful = (pre - dictionary.threshold.clamp(min=0)).abs() < error
    assert ((found > 0) == (exact > 0))[~doubtful].all()
    both = (found > 0) & (exact > 0)
    assert ((found - exact).abs() <= error)[both].all()
    assert len(latents) == n and latents.starts[-1] == len(latents.latent)
    for r in range(min(n, 60)):
        own = latents.latent[latents.starts[r] : latents.starts[r + 1]]
        assert (own.diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_go_the_dense_way(dtype):
    dictionary = dictionary_of(12, 40, threshold=0.5, dtype=dtype)
    x = rows_of(33, 12)
    found = SparseEncoder(dictionary).encode(x)
    assert torch.equal(dense(found, 40), dictionary.encode(x))


@pytest.mark.parametrize("threshold", [0.3, 8.0, 1e9])
def test_decoding_lists_gives_the_dense_reconstruction(threshold):
    dictionary = dictionary_of(32, 300, threshold=threshold)
    encoder, x = SparseEncoder(dictionary), rows_of(50, 32, torch.bfloat16)
    latents = encoder.encode(x)
    torch.testing.assert_close(
        encoder.decode(latents, x), dictionary.decode(dense(latents, 300)), rtol=1e-5, atol=1e-4
    )


def test_a_row_that_is_not_finite_leaves_the_others_alone():
    dictionary, x = dictionary_of(12, 40, threshold=0.5), rows_of(30, 12)
    expected = dense(SparseEncoder(dictionary).encode(x), 40)
    x[4, 3], x[9, 0] = torch.nan, torch.inf
    found = dense(SparseEncoder(dictionary).encode(x), 40)
    others = [r for r in range(30) if r not in (4, 9)]
    assert torch.equal(found[others], expected[others])


def test_no_target_is_read_where_there_is_none(monkeypatch):
    """A loop over targets that are not there would read whatever memory follows them."""
    seen = []
    begin = Forward.begin

    def watched(step: Forward, rows_in: torch.Tensor, rows_out: torch.Tensor) -> None:
        begin(step, rows_in, rows_out)
        seen.append((step.y.shape, step.y_sum.shape, float(step.y_square)))

    monkeypatch.setattr(Forward, "begin", watched)
    dictionary = JumpReLU(DictionaryConfig(d_in=8, d_sae=16, site_in="blocks.0.hook_resid_post"))
    SparseEncoder(dictionary).encode(torch.ones(5, 8, dtype=torch.float16))
    assert seen == [((5, 0), (0,), 0.0)]
