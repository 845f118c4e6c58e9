"""Tokens as people sort them: words, their families, beginnings and endings, kinds; and text seen that way.

A view sorts every row of a text by one such property of the token there, of the one before or of the next.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int32, Int64

from viewer.index.firings import Texts

# words that grammar sorts; a text in another language simply has none of them
_GROUPS = {
    "prepositions": "of in to for with on at from by about as into like through after over between out "
    "against during without before under around among towards upon within along across behind beyond near",
    "conjunctions": "and but or nor so yet because although though while whereas if unless until since",
    "determiners": "the a an this that these those each every some any no",
    "pronouns": "i you he she it we they me him her us them his hers its their theirs my our your who whom "
    "himself herself itself themselves",
    "forms of be": "be is are was were been being am",
    "forms of have": "have has had having",
    "modal verbs": "can could may might must shall should will would",
    "question words": "what which who whom whose when where why how",
    "months": "january february march april may june july august september october november december",
    "weekdays": "monday tuesday wednesday thursday friday saturday sunday",
    "number words": "one two three four five six seven eight nine ten eleven twelve hundred thousand million "
    "billion first second third fourth fifth",
}
_GROUP_OF = {word: group for group, words in _GROUPS.items() for word in words.split()}
# longest first; what is left must still be a word
_ENDINGS = (
    "ations",
    "ation",
    "ings",
    "ers",
    "ing",
    "ies",
    "ied",
    "ion",
    "ed",
    "er",
    "es",
    "ly",
    "s",
    "y",
    "e",
)
_SHORTEST_STEM = 4
_SENTENCE_END = re.compile(r"[.!?。！？]")
_MEMBERS = 3
_SHORTEST_NEAR = 3
_LONGEST = 40
_LEADS = {
    "start 2": "words that start with ",
    "start 3": "words that start with ",
    "end 2": "words that end with ",
    "end 3": "words that end with ",
}


class View(NamedTuple):
    """Every row of a text sorted by one property."""

    kind: str
    key: Int32[np.ndarray, " row"]
    """The property's number, -1 where the row has none."""
    lead: str
    """What a label says before the names of properties."""
    names: list[str]
    share: Float64[np.ndarray, " key"]
    """Of all rows, those that have it."""


@dataclass(frozen=True, eq=False)
class Reading:
    """A text as labels read it; one serves all sites of an index."""

    views: list[View]
    document: Int64[np.ndarray, " row"]
    topic_word: Int32[np.ndarray, " row"]
    """The word at each row, numbered by `topic_words`; -1 where it is too short to be a topic."""
    topic_words: list[str]
    """Quoted as they are spelled most."""
    next_word: Int32[np.ndarray, " row"]
    """The word after each row, -1 where there is none."""
    word_of: dict[str, int]
    """A word's number in `next_word`, by `plain_word`."""
    words: list[str]
    """Each of these, quoted as it is spelled most."""

    @classmethod
    def of(cls, texts: Texts, strings: Mapping[int, str]) -> "Reading":
        """`strings` has the text of every token of `texts`."""
        ids, token = np.unique(texts.tokens, return_inverse=True)
        token = token.reshape(-1)
        spelled = [strings[i] for i in ids.tolist()]
        document = texts.document.reshape(-1)
        before = _beside(texts, -1)
        after = _beside(texts, 1)
        place = texts.place
        here = token[place]
        # -1 stands for no token: its property is in a last place of every table, and is -1
        beside = [np.where(near[place] >= 0, token[near[place]], len(ids)) for near in (before, after)]
        words, word_of = _numbered([plain_word(s) for s in spelled])
        usual = _usual_spelling(spelled, np.bincount(here, minlength=len(ids)))
        tables = _tables(spelled, usual)
        views = [_view(kind, _LEADS.get(kind, ""), *tables[kind], here) for kind in tables]
        views.append(_phrases(beside[0], here, spelled))
        for side, near in zip(("after", "before"), beside, strict=True):
            views += [_view(f"{side} {k}", f"{side} ", *tables[k], near) for k in ("word", "kind", "group")]
        views.append(_positions(texts, beside[0], spelled))
        near_words = [w if w.isalpha() and len(w) >= _SHORTEST_NEAR else "" for w in map(plain_word, spelled)]
        return cls(
            views=views,
            document=document[place],
            topic_word=_numbered(near_words)[0][here],
            topic_words=[usual[w] for w in dict.fromkeys(filter(None, near_words))],
            next_word=words[beside[1]],
            word_of=word_of,
            words=[usual[w] for w in word_of],
        )


def plain_word(token: str) -> str:
    """A token without the space around it and without case; "" where nothing is left."""
    return token.strip().casefold()


def quoted(text: str) -> str:
    """Text in quotation marks, cut where it is long; what cannot be seen is shown by its number."""
    cut = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    return f"“{''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in cut)}”"


def kind_of_token(token: str) -> str:
    """What sort of token it is, for people; "" for a common word in lower case."""
    text = token.strip()
    if not text:
        return "line breaks" if "\n" in token else "spaces"
    if all(c.isdigit() or c in ",.%" for c in text) and any(c.isdigit() for c in text):
        return "numbers"
    if not any(c.isalnum() for c in text):
        return "punctuation"
    if not text.isalpha():
        return "letters mixed with signs"
    script = unicodedata.name(text[0], "").partition(" ")[0]
    if script != "LATIN":
        return f"{script.lower()} script"
    if text.isupper():
        return "capital letters"
    if text[0].isupper():
        return "capitalised words"
    return "" if token[0].isspace() else "inner parts of words"


def stem(word: str) -> str:
    """A word without the ending that grammar gives it, roughly; "" for what is no word of some length."""
    if not word.isalpha() or len(word) < _SHORTEST_STEM:
        return ""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= _SHORTEST_STEM:
            return word[: -len(ending)]
    return word


def _tables(spelled: Sequence[str], usual: Mapping[str, str]) -> dict[str, tuple[np.ndarray, list[str]]]:
    """For each property of a token: its number by token (-1: none; an extra last place too), and names."""
    words = [plain_word(s) for s in spelled]
    long = [w if w.isalpha() and len(w) > _SHORTEST_STEM else "" for w in words]
    found: dict[str, tuple[np.ndarray, list[str]]] = {
        "token": (np.append(np.arange(len(spelled)), -1).astype(np.int32), [_spelling(s) for s in spelled])
    }
    keys = {
        "word": words,
        "stem": [stem(w) for w in words],
        "start 2": [w[:2] for w in long],
        "start 3": [w[:3] for w in long],
        "end 2": [w[-2:] for w in long],
        "end 3": [w[-3:] for w in long],
        "kind": [kind_of_token(s) for s in spelled],
        "group": [_GROUP_OF.get(w, "") for w in words],
    }
    for kind, values in keys.items():
        table, numbers = _numbered(values)
        names = list(numbers)
        if kind == "stem":
            names = _families(table, words, len(numbers))
        elif kind not in ("kind", "group"):
            names = [usual[n] if kind == "word" else quoted(n) for n in names]
        found[kind] = (table, names)
    return found


def _usual_spelling(spelled: Sequence[str], counts: Int64[np.ndarray, " token"]) -> dict[str, str]:
    """Each word, by `plain_word`, quoted as it is spelled most."""
    usual: dict[str, str] = {}
    for _, token in sorted(zip((-counts).tolist(), spelled, strict=True)):
        usual.setdefault(plain_word(token), quoted(token.strip()))
    return usual


def _numbered(values: Sequence[str]) -> tuple[Int32[np.ndarray, " value_plus_one"], dict[str, int]]:
    """Numbers for what is not empty, in order of first use; -1 for what is, and in an extra last place."""
    numbers: dict[str, int] = {}
    table = [numbers.setdefault(value, len(numbers)) if value else -1 for value in values]
    return np.array([*table, -1], np.int32), numbers


def _families(table: np.ndarray, words: Sequence[str], n_stems: int) -> list[str]:
    """Each stem by some of its words."""
    members: list[dict[str, None]] = [{} for _ in range(n_stems)]
    for number, word in zip(table[:-1].tolist(), words, strict=True):
        if number >= 0:
            members[number][word] = None
    return [" / ".join(quoted(w) for w in sorted(m, key=lambda w: (len(w), w))[:_MEMBERS]) for m in members]


def _view(kind: str, lead: str, table: np.ndarray, names: list[str], token: np.ndarray) -> View:
    return _counted(kind, lead, table[token], names)


def _counted(kind: str, lead: str, key: np.ndarray, names: list[str]) -> View:
    counts = np.bincount(key[key >= 0], minlength=len(names))
    return View(kind, key.astype(np.int32), lead, names, counts / max(len(key), 1))


def _phrases(before: np.ndarray, here: np.ndarray, spelled: Sequence[str]) -> View:
    """Pairs of neighbouring tokens that the text has twice at least."""
    n = len(spelled)
    pair = np.where(before < n, before.astype(np.int64) * n + here, -1)
    values, key, counts = np.unique(pair, return_inverse=True, return_counts=True)
    often = (counts > 1) & (values >= 0)
    number = np.where(often, np.cumsum(often) - 1, -1)
    names = [quoted(f"{spelled[v // n]}{spelled[v % n]}".strip()) for v in values[often].tolist()]
    return _counted("phrase", "", number[key.reshape(-1)], names)


def _positions(texts: Texts, before: np.ndarray, spelled: Sequence[str]) -> View:
    """Beginnings: of a text, and of a sentence."""
    ends = np.array([bool(_SENTENCE_END.search(s)) or "\n" in s for s in spelled] + [False])
    position = texts.position.reshape(-1)[texts.place]
    key = np.where(position == 0, 0, np.where(ends[before], 1, -1))
    return _counted("position", "", key, ["the first token of a text", "the start of a sentence"])


def _beside(texts: Texts, step: int) -> Int64[np.ndarray, " place"]:
    """The place `step` tokens on in the same document, -1 where there is none."""
    blocks, context = texts.tokens.shape
    column = np.arange(context) + step
    inside = (column >= 0) & (column < context)
    document = texts.document
    other = document[:, column.clip(0, context - 1)]
    same = inside & (other == document) & (document >= 0)
    places = np.arange(blocks)[:, None] * context + column
    return np.where(same, places, -1).reshape(-1)


def _spelling(token: str) -> str:
    """A token quoted as it is spelled, with a dot for a space at its beginning."""
    return quoted("·" + token[1:] if token.startswith(" ") else token)
