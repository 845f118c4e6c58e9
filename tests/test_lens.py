"""What directions do to the logits: against the whole product in fp32 or fp64, by both searches."""

import numpy as np
import pytest
import torch
from viewer_fakes import D_MODEL, FakeModel

from viewer.index import lens
from viewer.index.lens import Vocabulary, linear_part, logit_histogram_edges, top_logits

COUNT, D = 10, 32
# more than one chunk of the vocabulary, and a last one that is no multiple of the groups
SIZES = (32768 + 16384 + 77, 2 * 65536 + 300)


class Model:
    """An unembedding with a mean and heavy tails behind a norm of random weight."""

    def __init__(self, norm="rms", dtype=torch.float32, d_vocab=SIZES[0]):
        generator = torch.Generator().manual_seed(1)
        self.final = torch.nn.RMSNorm(D, eps=1e-6) if norm == "rms" else torch.nn.LayerNorm(D)
        self.final.weight.data.copy_(0.5 + torch.rand(D, generator=generator))
        if norm == "layer":
            self.final.bias.data.copy_(torch.randn(D, generator=generator))
        sizes = 0.5 + torch.rand(d_vocab, generator=generator) ** 4 * 3
        columns = torch.randn(D, d_vocab, generator=generator) * sizes + torch.randn(
            D, 1, generator=generator
        )
        self.W_U = columns.to(dtype)

    def final_norm(self, resid):
        return self.final.to(resid.dtype)(resid)


def directions(n=7):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(2))


def whole(model, rows, norm="rms"):
    """All logits, centred, and the mean taken out."""
    read = (rows - rows.mean(1, keepdim=True) if norm == "layer" else rows) * model.final.weight.data.float()
    logits = read.double() @ model.W_U.double()
    mean = logits.mean(1)
    return logits - mean[:, None], mean


def spread(logits, stride):
    """Standard deviation, skewness and histogram by their definitions."""
    std = logits.pow(2).mean(1).sqrt()
    z = logits / std[:, None]
    counted = z[:, torch.arange(z.shape[1]) // 128 % stride == 0].numpy()
    edges = logit_histogram_edges()
    # the end bins are open
    inner = [np.histogram(row.clip(edges[0], np.nextafter(edges[-1], 0)), edges)[0] for row in counted]
    return std.numpy(), (z**3).mean(1).numpy(), np.stack(inner)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_the_whole_product(norm, dtype):
    model = Model(norm, dtype)
    found = top_logits(model, directions(), count=COUNT)
    expected, mean = whole(model, directions(), norm)
    # a norm in bf16 answers in bf16: its weight is known to 8 bits
    precision = 1e-5 if dtype == torch.float32 else 5e-3
    np.testing.assert_allclose(found.mean, mean, rtol=precision, atol=10 * precision)
    for side, largest in ((slice(0, COUNT), True), (slice(COUNT, None), False)):
        values, tokens = expected.topk(COUNT, dim=1, largest=largest)
        np.testing.assert_allclose(found.logits[:, side], values, rtol=precision, atol=precision)
        if dtype == torch.float32:
            assert found.ids[:, side].tolist() == tokens.tolist()


@pytest.mark.parametrize("d_vocab", SIZES)
def test_the_spread_equals_its_definition(d_vocab):
    model = Model(d_vocab=d_vocab)
    rows = directions()
    found = top_logits(model, rows, count=COUNT)
    stride = max(1, d_vocab // 65536)
    std, skew, histogram = spread(whole(model, rows)[0], stride)
    np.testing.assert_allclose(found.std, std, rtol=1e-5)
    np.testing.assert_allclose(found.skew, skew, atol=1e-4)
    # a logit at an edge may round to either side
    assert np.abs(found.histogram - histogram).sum(1).max() <= 4
    assert found.histogram.sum(1).tolist() == histogram.sum(1).tolist()
    assert stride > 1 or found.histogram[0].sum() == d_vocab
    # the case is worth its name: the tails reach the open bins
    assert histogram[:, [0, -1]].sum() > 0


@pytest.mark.parametrize("d_vocab", SIZES)
def test_the_search_in_integers_finds_the_same(d_vocab, monkeypatch):
    monkeypatch.setattr(lens, "_MIN_DIRECTIONS", 1)
    monkeypatch.setattr(lens, "int8_is_fast", lambda device: True)
    model, rows = Model(d_vocab=d_vocab), directions(150)
    vocabulary = Vocabulary.of(model, 150)
    assert vocabulary.int8 is not None
    fast = top_logits(model, rows, count=COUNT, vocabulary=vocabulary)
    plain = Vocabulary(mean=vocabulary.mean, covariance=vocabulary.covariance, int8=None)
    slow = top_logits(model, rows, count=COUNT, vocabulary=plain)
    assert np.array_equal(fast.ids, slow.ids)
    np.testing.assert_allclose(fast.logits, slow.logits, rtol=1e-5, atol=1e-5)
    assert np.array_equal(fast.std, slow.std) and np.array_equal(fast.mean, slow.mean)
    # whole numbers from -127 to 127 round these rows by a hundredth of their size
    np.testing.assert_allclose(fast.skew, slow.skew, atol=0.01)
    moved = np.abs(np.cumsum(fast.histogram - slow.histogram, axis=1)).max(1)
    assert (moved <= 0.01 * slow.histogram.sum(1)).all()
    assert np.array_equal(fast.histogram.sum(1), slow.histogram.sum(1))


@pytest.mark.parametrize("integers", [False, True])
def test_a_direction_of_zeros_raises_nothing(integers, monkeypatch):
    monkeypatch.setattr(lens, "_MIN_DIRECTIONS", 1)
    monkeypatch.setattr(lens, "int8_is_fast", lambda device: integers)
    rows = directions(3)
    rows[1] = 0
    model = Model()
    found = top_logits(model, rows, count=COUNT, vocabulary=Vocabulary.of(model, 3))
    assert found.std[1] == found.skew[1] == found.mean[1] == 0 and not found.logits[1].any()
    assert found.histogram[1, 20] == found.histogram[1].sum() > 0
    assert (found.std[[0, 2]] > 0).all()


def test_edges_are_symmetric_and_half_a_standard_deviation_apart():
    edges = logit_histogram_edges()
    assert len(edges) == 42 and np.array_equal(edges, -edges[::-1]) and set(np.diff(edges)) == {0.5}


def test_the_linear_part_of_a_norm_is_its_derivative_along_directions_that_keep_the_scale():
    model, generator = FakeModel(), torch.Generator().manual_seed(3)
    direction = torch.randn(1, D_MODEL, generator=generator)
    base = torch.randn(D_MODEL, generator=generator, dtype=torch.float64)
    base -= direction[0] * (base @ direction[0].double()) / direction.pow(2).sum()
    base /= base.pow(2).mean().sqrt()
    moved = model.final_norm(base + 1e-5 * direction[0]) - model.final_norm(base)
    torch.testing.assert_close(
        linear_part(model.final_norm, direction, torch.float32)[0].double(),
        moved / 1e-5,
        rtol=1e-3,
        atol=1e-3,
    )
