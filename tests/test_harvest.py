"""Harvesting rows from a model: what is kept, in which order, and what is refused."""

import pytest
import torch

from activations.blocks import TokenBlocks
from activations.harvest import harvest_rows
from sae.errors import UserError

SITES = ("narrow", "wide")


class Echo:
    """Activations that spell out token and place: narrow is [token, pos], wide [token, pos, block, 0]."""

    device = torch.device("cpu")

    def __init__(self, poison=None):
        self.calls, self.poison = [], poison

    @torch.inference_mode()
    def activations(self, tokens, sites):
        self.calls.append((tuple(tokens.shape), tuple(sites)))
        block, pos = torch.meshgrid(*(torch.arange(n) for n in tokens.shape), indexing="ij")
        wide = torch.stack([tokens, pos, block, torch.zeros_like(tokens)], -1).bfloat16()
        if self.poison is not None:
            wide[tokens == self.poison] = float("inf")
        return {"narrow": wide[..., :2], "wide": wide}


def blocks_of(*rows):
    tokens = torch.tensor(rows, dtype=torch.int32)
    keep = tokens > 1
    place = torch.arange(tokens.shape[1], dtype=torch.int32).expand_as(tokens)
    return TokenBlocks(
        tokens=tokens,
        document=torch.where(keep, tokens // 10, -1).int(),
        position=torch.where(keep, place - 1, -1).int(),
        keep=keep,
    )


def test_kept_rows_come_in_order_with_their_map():
    model = Echo()
    (batch,) = harvest_rows(model, [blocks_of([1, 20, 21], [1, 22, 1])], SITES)
    assert batch.rows["wide"].tolist() == [[20, 1, 0, 0], [21, 2, 0, 0], [22, 1, 1, 0]]
    assert batch.rows["narrow"].tolist() == [[20, 1], [21, 2], [22, 1]]
    assert batch.map.token.tolist() == [20, 21, 22]
    assert batch.map.document.tolist() == [2, 2, 2]
    assert batch.map.position.tolist() == [0, 1, 0]
    assert len(batch) == 3
    assert model.calls == [((2, 3), SITES)]


def test_rows_keep_the_dtype_and_can_be_trained_on():
    (batch,) = harvest_rows(Echo(), [blocks_of([1, 20, 21])], SITES)
    rows = batch.rows["wide"]
    assert rows.dtype == torch.bfloat16
    assert not rows.is_inference()
    assert rows.untyped_storage().nbytes() == rows.nbytes


def test_a_batch_that_keeps_nothing_is_passed_over():
    model = Echo()
    found = list(harvest_rows(model, [blocks_of([1, 1]), blocks_of([1, 30])], SITES))
    assert [batch.map.token.tolist() for batch in found] == [[30]]
    assert len(model.calls) == 1


def test_non_finite_rows_name_the_site():
    with pytest.raises(UserError, match=r"wide.*1 of 2 rows.*float32"):
        list(harvest_rows(Echo(poison=21), [blocks_of([1, 20, 21])], ("wide", "narrow")))
    # what special tokens do is nobody's business: they are not kept
    assert len(list(harvest_rows(Echo(poison=1), [blocks_of([1, 20, 21])], SITES))) == 1
