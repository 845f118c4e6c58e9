"""Harvesting rows from a model: what is kept, in which order, and what is refused."""

import json

import pytest
import torch

from activations.blocks import TokenBlocks, iter_blocks
from activations.corpora import load_corpus
from activations.harvest import harvest_rows
from activations.ring import ShuffleRing
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


def test_a_real_model_is_harvested_into_the_ring_with_its_way_back(tiny_model, tmp_path):
    lines = [
        json.dumps({"text": f"The capital of France is Paris, and number {i} is <bos> Rome."})
        for i in range(40)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = load_corpus(str(tmp_path / "a.jsonl"))
    sites = ("blocks.1.attn.hook_z", "blocks.2.hook_resid_post")
    widths = {site: tiny_model.site_width(site) for site in sites}
    assert widths == {sites[0]: 64, sites[1]: 32}
    found = {}
    for size in (1, 3):
        blocks = list(iter_blocks(tiny_model, corpus, split="all", context=32, blocks_per_batch=size))
        found[size] = list(harvest_rows(tiny_model, blocks, sites))
        for batch in found[size]:
            for document, position, token in zip(
                batch.map.document[:5], batch.map.position[:5], batch.map.token[:5], strict=True
            ):
                ids = tiny_model.encode(corpus.document(int(document)).text)
                assert ids[int(position)] == int(token)
    alone, together = (torch.cat([batch.rows[sites[1]] for batch in found[size]]) for size in (1, 3))
    # specials written out in a text are left out as well, and what is kept does not hang on the batch
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert not torch.isin(
        torch.cat([batch.map.token for batch in found[1]]), torch.tensor(tiny_model.special_ids)
    ).any()
    sizes = {"rows": 64, "batch": 16, "passes": 2, "seed": 0}
    ring = ShuffleRing(lambda _: iter(found[3]), widths, dtype=tiny_model.dtype, **sizes)
    batches = [{site: batch[site] for site in sites} for batch in ring]
    assert len(batches) == len(alone) * 2 // 16
    assert {tuple(batch[sites[0]].shape) for batch in batches} == {(16, 64)}
