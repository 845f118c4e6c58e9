"""Automatic labels on texts made so that the right label is known, and against sums by hand."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from viewer.index.firings import Firings, Texts
from viewer.index.labels import _words_of, make_labels
from viewer.index.words import Reading, kind_of_token, plain_word, quoted, stem

WORDS = (
    " the", " of", " Paris", " paris", "Paris", " found", " founded", " founding", " unfair", " untold",
    " unseen", " unkind", " unlike",
    " 7", "8", " 1999", ",", ".", " Rome", " Oslo", " album", " song", " band", " cat", " dog",
    " tree", " house",
    " walk", " green", " blue", "ing", "\n", " was", " is", " are", " States", " United", "€", " it", " sat",
)  # fmt: skip
STRINGS = dict(enumerate(WORDS))
PLAIN = [" cat", " dog", " tree", " house", " walk", " green", " blue", " the", " of", " it"]
DOCUMENTS, LENGTH = 60, 30


def make_text(seed=0, sprinkle=(), topics=False):
    """Documents of common words with others sprinkled in, a tenth of them about music when asked."""
    rng = np.random.default_rng(seed)
    ids = {word: i for i, word in STRINGS.items()}
    tokens = np.array([[ids[w] for w in rng.choice(PLAIN, LENGTH)] for _ in range(DOCUMENTS)], np.int32)
    for word in sprinkle:
        tokens[rng.random(tokens.shape) < 0.03] = ids[word]
    if topics:
        music = rng.random((DOCUMENTS, LENGTH)) < 0.2
        music[np.arange(DOCUMENTS) % 10 > 1] = False
        tokens[music] = rng.choice([ids[" album"], ids[" song"]], music.sum())
    shape = tokens.shape
    document = np.repeat(np.arange(DOCUMENTS, dtype=np.int64)[:, None], LENGTH, 1)
    position = np.repeat(np.arange(LENGTH, dtype=np.int32)[None], DOCUMENTS, 0)
    return Texts(tokens=tokens, document=document, position=position, keep=np.ones(shape, bool))


def fire(*rows_and_values):
    """Firings of several latents, each given by its rows and its activations there."""
    counts = [len(rows) for rows, _ in rows_and_values]
    return Firings(
        starts=np.cumsum([0, *counts]).astype(np.int64),
        row=np.concatenate([rows for rows, _ in rows_and_values] or [[]]).astype(np.int32),
        activation=np.concatenate([values for _, values in rows_and_values] or [[]]).astype(np.float32),
    )


def spelled(texts):
    return np.array([STRINGS[i] for i in texts.tokens.reshape(-1).tolist()], object)


def shifted(words, step):
    """The words `step` places on in the same document; "" beyond its ends."""
    grid = np.full((DOCUMENTS, LENGTH), "", object)
    old = words.reshape(DOCUMENTS, LENGTH)
    grid[:, max(0, -step) : LENGTH - max(0, step)] = old[:, max(0, step) : LENGTH + min(0, step)]
    return grid.reshape(-1)


def label_of(texts, where, **kwargs):
    """The label of a latent that fires where a mask says, with activations that differ."""
    rows = np.flatnonzero(where)
    values = 1 + np.random.default_rng(1).random(len(rows))
    labels = make_labels(fire((rows, values)), Reading.of(texts, STRINGS), **kwargs)
    return labels.text[0], labels.kind[0], float(labels.share[0]), labels.evidence[0]


ALL = tuple(w for w in WORDS if w not in PLAIN)


@pytest.mark.parametrize(
    ("fires_on", "text", "kind"),
    [
        (lambda w: w == " Paris", "“·Paris”", "token"),
        (lambda w: w in (" Paris", " paris", "Paris"), "“Paris”", "word"),
        (lambda w: w in (" found", " founded", " founding"), "“found” / “founded” / “founding”", "stem"),
        (lambda w: w.startswith(" un"), "words that start with “un”", "start 2"),
        (lambda w: w in (" 7", "8", " 1999"), "numbers", "kind"),
        (lambda w: w in (",", ".", "€"), "punctuation", "kind"),
        (lambda w: w in (" was", " is", " are"), "forms of be", "group"),
        (lambda w: w in (" cat", " green"), "“cat”, “green”", "list of words"),
        (lambda w: w == "\n", "“\\n”", "token"),
    ],
)
def test_what_a_latent_fires_on_is_named(fires_on, text, kind):
    texts = make_text(sprinkle=ALL)
    where = np.array([fires_on(w) for w in spelled(texts)])
    if kind == "list of words":
        # one order of two that are equally telling
        where &= (spelled(texts) == " cat") | (np.arange(len(where)) % 4 != 0)
    found = label_of(texts, where)
    assert found[:2] == (text, kind)
    assert found[2] == pytest.approx(1)
    assert "100% of its activation" in found[3]


def test_the_token_before_and_the_next_one():
    texts = make_text(sprinkle=ALL)
    words = spelled(texts)
    assert label_of(texts, shifted(words, -1) == " of")[:2] == ("after “of”", "after word")
    assert label_of(texts, np.isin(shifted(words, 1), [" 7", "8", " 1999"]))[:2] == (
        "before numbers",
        "before kind",
    )
    texts.tokens[::3, 10:12] = [WORDS.index(" United"), WORDS.index(" States")]
    words = spelled(texts)
    united = (words == " States") & (shifted(words, -1) == " United")
    assert label_of(texts, united)[:2] == ("“United States”", "phrase")


def test_places_in_text_and_sentence():
    texts = make_text(sprinkle=ALL)
    position = texts.position.reshape(-1)
    assert label_of(texts, position == 0)[:2] == ("the first token of a text", "position")
    ends = shifted(spelled(texts), -1)
    starts = np.isin(ends, [".", "\n"])
    assert label_of(texts, starts)[:2] == ("the start of a sentence", "position")


def test_a_word_raised_in_two_spellings_counts_once_and_the_order_is_kept():
    reading = Reading.of(make_text(), STRINGS)
    strings = STRINGS | {900: " Cat", 901: "DOG", 902: "nowhere"}
    dog, cat, tree = (WORDS.index(f" {word}") for word in ("dog", "cat", "tree"))
    raised = np.array([[dog, 900, cat, 901, 902, tree], [902, tree, 901, dog, 902, 900], [902] * 6])
    found = _words_of(raised, reading, strings)
    dog, cat, tree = (reading.word_of[word] for word in ("dog", "cat", "tree"))
    assert found.tolist() == [[dog, cat, tree, -1, -1, -1], [tree, dog, cat, -1, -1, -1], [-1] * 6]
    assert _words_of(raised[:, :0], reading, strings).shape == (3, 0)


def test_a_next_word_that_the_latent_raises_is_predicted():
    texts = make_text(sprinkle=(" album", " song"))
    following = shifted(spelled(texts), 1)
    where = np.isin(following, [" album", " song"])
    raised = np.array([[WORDS.index(" album"), WORDS.index(" song"), WORDS.index("€")]])
    text, kind, share, _ = label_of(texts, where, top_tokens=raised, strings=STRINGS)
    assert kind == "predicts" and set(text.removeprefix("predicts ").split(", ")) == {"“album”", "“song”"}
    assert share == pytest.approx(1)
    # without the logits it is only known what comes next
    assert label_of(texts, where)[1] == "list of before words"


def test_what_stands_nearby():
    texts = make_text(topics=True)
    music = np.isin(spelled(texts), [" album", " song"]).reshape(DOCUMENTS, LENGTH)
    after = np.maximum.accumulate(music, axis=1).reshape(-1) & ~music.reshape(-1)
    where = after & (np.random.default_rng(0).random(len(after)) < 0.2)
    text, kind, share, _ = label_of(texts, where)
    assert kind == "near" and set(text.removeprefix("near ").split(", ")) <= {"“album”", "“song”"}
    assert share > 0.7


def test_nearness_is_not_claimed_for_the_documents_that_it_was_found_in():
    # a latent that fires in a few documents at random: some word is always near
    texts = make_text(seed=3)
    rng = np.random.default_rng(0)
    firings = fire(
        *[(np.sort(rng.choice(DOCUMENTS * LENGTH, 12, replace=False)), np.ones(12)) for _ in range(50)]
    )
    kinds = make_labels(firings, Reading.of(texts, STRINGS)).kind
    assert kinds.count("near") + kinds.count("strongest near") == 0


def test_mixed_rare_and_silent_ones_say_so():
    texts = make_text(sprinkle=ALL)
    rng = np.random.default_rng(0)
    anywhere = np.sort(rng.choice(DOCUMENTS * LENGTH, 300, replace=False))
    rome = np.flatnonzero(spelled(texts) == " Rome")
    strong = (np.sort(np.r_[np.setdiff1d(anywhere, rome), rome]),)
    values = np.where(np.isin(strong[0], rome), 9.0, 4.5)
    firings = fire((anywhere, np.ones(300)), (rome[:2], np.ones(2)), ([], []), (strong[0], values))
    labels = make_labels(firings, Reading.of(texts, STRINGS))
    assert labels.kind[:3] == ["mixed", "rare", "silent"] and labels.share[:3].tolist() == [0, 0, 0]
    assert labels.text[1] == "rare: “Rome”" and labels.text[2] == "never fired here"
    assert labels.text[3] == "at its strongest: “Rome”" and labels.kind[3] == "strongest word"
    assert labels.share[3] == pytest.approx(values[values == 9].sum() / values.sum())


def test_one_document_makes_no_label():
    texts = make_text(sprinkle=(" Rome",))
    texts.tokens[texts.tokens == WORDS.index(" Rome")] = WORDS.index(" cat")
    texts.tokens[4, 5:12] = WORDS.index(" Rome")
    where = spelled(texts) == " Rome"
    assert label_of(texts, where)[1] == "mixed"
    texts.tokens[9, 3] = WORDS.index(" Rome")
    assert label_of(texts, spelled(texts) == " Rome")[0] == "“Rome”"


def test_nothing_at_all():
    nothing = np.zeros((1, 4), np.int32)
    texts = Texts(tokens=nothing, document=nothing - np.int64(1), position=nothing - 1, keep=nothing > 0)
    labels = make_labels(fire(([], []), ([], [])), Reading.of(texts, STRINGS))
    assert labels.kind == ["silent"] * 2
    assert make_labels(fire(), Reading.of(texts, STRINGS)).text == []


def test_special_tokens_and_other_documents_are_no_neighbours():
    texts = make_text()
    texts.keep[:, 0] = False
    texts.document[:, 0], texts.position[:, 0] = -1, -1
    reading = Reading.of(texts, STRINGS)
    after = next(view for view in reading.views if view.kind == "after word")
    assert len(after.key) == texts.keep.sum() == len(reading.document)
    first = texts.position.reshape(-1)[texts.place] == 1
    assert (after.key[first] == -1).all() and (after.key[~first] >= 0).all()
    assert (reading.next_word.reshape(DOCUMENTS, LENGTH - 1)[:, -1] == -1).all()


@functools.cache
def sprinkled(seed):
    texts = make_text(seed=seed, sprinkle=(" Paris", " 7", " Rome", ","))
    return texts, Reading.of(texts, STRINGS)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60))
def test_the_share_is_that_of_the_activation(seed, n):
    texts, reading = sprinkled(seed % 3)
    rng = np.random.default_rng(seed)
    liked = rng.choice(sorted(set(spelled(texts))), 2)
    odds = np.where(np.isin(spelled(texts), liked), 0.9, 0.01)
    rows = np.flatnonzero(rng.random(len(odds)) < odds)[:n]
    values = rng.random(len(rows)) + 0.1
    labels = make_labels(fire((rows, values)), reading)
    words = np.array([plain_word(w) for w in spelled(texts)])[rows]
    if labels.kind[0] in ("word", "list of words"):
        named = {w.strip("“”").casefold() for w in labels.text[0].split(", ")}
        share = values[np.isin(words, list(named))].sum() / values.sum()
        assert labels.share[0] == pytest.approx(share, rel=1e-5) and share >= 0.5
    elif labels.kind[0] == "mixed":
        for word in set(words):
            share = values[words == word].sum() / values.sum()
            there = np.isin(np.array([plain_word(w) for w in spelled(texts)]), [word])
            documents = {r // LENGTH for r in rows[words == word]}
            unlikely = there.mean() * 2 <= share * 0.999
            assert share < 0.5 or not unlikely or (words == word).sum() < 3 or len(documents) < 2


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        (" 1999", "numbers"), ("1,000", "numbers"), (",", "punctuation"), ("\n\n", "line breaks"),
        ("  ", "spaces"), ("", "spaces"), (" Paris", "capitalised words"), (" NATO", "capital letters"),
        ("ing", "inner parts of words"), (" cat", ""), ("привет", "cyrillic script"), ("中", "cjk script"),
        (" a1", "letters mixed with signs"),
    ],
)  # fmt: skip
def test_kinds_of_tokens(token, kind):
    assert kind_of_token(token) == kind


def test_stems_and_quotes():
    assert {stem(w) for w in ("found", "founded", "founding", "founder")} == {"found"}
    assert stem("cat") == stem("1999") == stem("") == ""
    assert quoted("a\x00\u202eb") == "“a\\x00\\u202eb”" and quoted("x" * 99) == f"“{'x' * 40}…”"
