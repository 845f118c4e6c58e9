"""Packing documents into token blocks, and the way back from a row to its document and position."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activations.blocks import Cursor, iter_blocks
from activations.corpora import FiniteCorpus, StreamedCorpus, _numbered
from activations.textfiles import Record
from sae.errors import UserError

BOS, EOS = 1, 2


class Letters:
    """A tokenizer of one token a character; "$" stands for a special token written out in a text."""

    max_context = 64

    def __init__(self, bos_id: int | None = BOS):
        self.bos_id = bos_id
        self.special_ids = (EOS,) if bos_id is None else (bos_id, EOS)

    def encode(self, text, add_bos=False):
        return [EOS if letter == "$" else ord(letter) for letter in text]


def corpus_of(texts):
    records = (Record(text) for text in texts)
    return FiniteCorpus(list(_numbered(records)), name="x", source="x", licence="x")


def gather(blocks):
    blocks = list(blocks)
    return {
        name: torch.cat([getattr(b, name) for b in blocks])
        for name in ("tokens", "document", "position", "keep")
    }


def pack(texts, model=None, **options):
    options = {"split": "all", "context": 8, "blocks_per_batch": 3, **options}
    return gather(iter_blocks(model or Letters(), corpus_of(texts), **options))


documents = st.lists(st.text("abc$", max_size=30), min_size=1, max_size=12)


@given(documents, st.integers(2, 20), st.integers(1, 4), st.integers(0, 5))
def test_every_kept_row_leads_back_to_its_token_and_none_is_lost(texts, context, blocks_per_batch, seed):
    model, corpus = Letters(), corpus_of(texts)
    if not any(texts):
        return
    got = gather(
        iter_blocks(model, corpus, split="all", context=context, blocks_per_batch=blocks_per_batch, seed=seed)
    )
    seen = set()
    for token, document, position in zip(
        got["tokens"][got["keep"]], got["document"][got["keep"]], got["position"][got["keep"]], strict=True
    ):
        assert model.encode(corpus.document(int(document)).text)[int(position)] == int(token)
        seen.add((int(document), int(position)))
    assert seen == {(i, j) for i, text in enumerate(texts) for j, letter in enumerate(text) if letter != "$"}
    assert len(seen) == int(got["keep"].sum())
    assert not torch.isin(got["tokens"][got["keep"]], torch.tensor(model.special_ids)).any()
    assert ((got["position"] == -1) == ~got["keep"]).all()
    assert (got["tokens"][:, 0] == BOS).all()


def test_blocks_start_with_bos_and_documents_are_separated_by_it():
    got = pack(["abcdefghij", "klm"], context=8, seed=0)
    order = [int(d) for d in got["document"].flatten() if d >= 0]
    assert order == sorted(order) or order == sorted(order, reverse=True)
    letters = ["".join("|" if t == BOS else chr(t) for t in row) for row in got["tokens"]]
    # the last block is padded with BOS, which is never kept
    assert letters in (["|abcdefg", "|hij|klm"], ["|klm|abc", "|defghij"])


def test_padding_and_written_out_specials_are_not_kept():
    got = pack(["ab$c"], context=8)
    assert got["tokens"].tolist() == [[BOS, 97, 98, EOS, 99, BOS, BOS, BOS]]
    assert got["position"].tolist() == [[-1, 0, 1, -1, 3, -1, -1, -1]]
    assert got["document"].tolist() == [[-1, 0, 0, 0, 0, -1, -1, -1]]


def test_a_model_without_bos_gets_documents_end_to_end():
    got = pack(["abcde", "fgh"], Letters(bos_id=None), context=4)
    assert "".join(map(chr, got["tokens"].flatten())) in ("abcdefgh", "fghabcde")
    assert got["keep"].all()


@pytest.mark.parametrize("limit", [1, 6, 7, 13, 20])
def test_max_tokens_is_exact(limit):
    assert int(pack(["abcdefghij", "klmnopqrst"], max_tokens=limit)["keep"].sum()) == limit


def test_epochs_repeat_the_documents_in_orders_of_their_own():
    texts = [letter * 7 for letter in "abcdefghijkl"]
    got = pack(texts, epochs=2)
    first, second = got["document"][:12, 1].tolist(), got["document"][12:, 1].tolist()
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    endless = iter_blocks(Letters(), corpus_of(texts), split="all", context=8, epochs=None)
    assert sum(len(blocks.tokens) for blocks in itertools.islice(endless, 20)) == 160


def test_packing_is_lazy():
    read = []

    def records():
        for i in range(1_000_000):
            read.append(i)
            yield Record("abcdefg")

    corpus = StreamedCorpus(records, name="x", source="x", licence="x")
    blocks = iter_blocks(Letters(), corpus, split="all", context=8, blocks_per_batch=2)
    assert not read
    next(blocks)
    assert len(read) == 2


def test_an_endless_pass_over_no_tokens_ends():
    class Silent(Letters):
        def encode(self, text, add_bos=False):
            return []

    with pytest.raises(UserError, match="no token"):
        next(iter_blocks(Silent(), corpus_of(["abc"]), split="all", context=8, epochs=None))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"context": 1}, "2 to 64"),
        ({"context": 65}, "2 to 64"),
        ({"blocks_per_batch": 0}, "blocks_per_batch"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_bad_sizes_are_refused_before_anything_is_read(options, part):
    with pytest.raises(UserError, match=part):
        iter_blocks(Letters(), corpus_of(["abc"]), split="all", **{"context": 8, **options})


@given(documents, st.integers(2, 9), st.integers(1, 3), st.sampled_from([BOS, None]), st.integers(0))
def test_a_stream_goes_on_from_any_batch(texts, context, blocks_per_batch, bos, place):
    if not any(letter != "$" for text in texts for letter in text):
        return
    told = {"split": "all", "context": context, "blocks_per_batch": blocks_per_batch, "seed": 3}
    told |= {"epochs": None, "max_tokens": 30}
    model, corpus = Letters(bos), corpus_of(texts)
    whole = list(iter_blocks(model, corpus, **told))
    assert whole[0].begin == Cursor()
    kept = [int(batch.keep.sum()) for batch in whole]
    assert [batch.begin.kept for batch in whole] == [sum(kept[:i]) for i in range(len(whole))]
    assert sum(kept) == 30
    place %= len(whole)
    rest = iter_blocks(model, corpus, **told, start=whole[place].begin)
    for again, expected in zip(rest, whole[place:], strict=True):
        assert again.begin == expected.begin
        for name in ("tokens", "document", "position", "keep"):
            assert torch.equal(getattr(again, name), getattr(expected, name))
