"""Balanced coordinates: products stay, both sides become equally large, the largest first."""

import pytest
import torch

from sae.kernels import balance
from sae.kernels.balance import balancing, evened

D = 40


def moments(seed):
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(D, D, generator=g, dtype=torch.float64) * torch.logspace(1, -1, D)[:, None]
    turn = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0]
    return turn @ mixed @ mixed.T @ turn.T


def test_products_stay_and_both_sides_become_equally_large_and_fall():
    left, right = moments(0), 100 * moments(1)
    turn = balancing(left, right)
    back = torch.linalg.inv(turn)
    g = torch.Generator().manual_seed(2)
    x, w = torch.randn(2, 9, D, generator=g, dtype=torch.float64)
    torch.testing.assert_close((x @ turn.T) @ (w @ back).T, x @ w.T)
    # as if each mean second moment were one, and a little more
    least = balance._LEAST * torch.eye(D, dtype=torch.float64)
    one, other = (part / part.diagonal().mean() + least for part in (left, right))
    one, other = turn @ one @ turn.T, back.T @ other @ back
    sizes = one.diagonal()
    torch.testing.assert_close(one, sizes.diag(), atol=1e-9, rtol=0)
    torch.testing.assert_close(other, sizes.diag(), atol=1e-9, rtol=0)
    assert (sizes.diff() < 0).all() and sizes[-1] > 0
    # few hold nearly all, where neither side's own coordinates do
    assert sizes[:20].square().sum() > 0.99 * sizes.square().sum()


def test_evened_coordinates_span_what_each_part_did_the_same_way_every_time():
    turn = balancing(moments(0), moments(1))
    sizes = [24, 8, 8]
    found = evened(turn, sizes)
    assert torch.equal(found, evened(turn, sizes))
    for part, before in zip(found.split(sizes), turn.split(sizes), strict=True):
        torch.testing.assert_close(part.T @ part, before.T @ before)
        assert not torch.allclose(part, before)


def test_evened_coordinates_of_a_part_are_about_equally_large():
    turn = torch.logspace(0, -4, D, dtype=torch.float64).diag()
    for part, before in zip(evened(turn, [24, 16]).split([24, 16]), turn.split([24, 16]), strict=True):
        ratios = [float(rows.norm(dim=1).max() / rows.norm(dim=1).min()) for rows in (part, before)]
        assert ratios[0] < 8 and ratios[0] < ratios[1]


@pytest.mark.parametrize("fill", [0.0, torch.inf, torch.nan])
def test_moments_of_nothing_are_not_balanced(fill):
    nothing = torch.full((D, D), fill, dtype=torch.float64)
    assert balancing(nothing, moments(0)) is None
    assert balancing(moments(0), nothing) is None


def test_moments_without_an_inverse_are_balanced():
    flat = torch.zeros(D, D, dtype=torch.float64)
    flat[0, 0] = 5
    turn = balancing(flat, moments(0))
    assert turn.isfinite().all() and torch.linalg.inv(turn).isfinite().all()
