"""Token blocks: documents packed into equal rows for the model, with the way back to each document."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int32
from torch import Tensor

from activations.corpora import Corpus, Split
from sae.errors import UserError

# far apart, so that the passes of neighbouring seeds do not repeat one another's orders
_SEED_STRIDE = 1_000_003


@runtime_checkable
class Tokenizes(Protocol):
    """What packing needs of a language model."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def special_ids(self) -> Sequence[int]: ...
    @property
    def max_context(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...


@runtime_checkable
class TokenizesMany(Protocol):
    """Texts to tokens, `at_once` of them, as a model's `encode` gives them one by one."""

    at_once: int

    def encode_all(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]: ...


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A place between two batches of a stream: all that is needed to go on from there."""

    epoch: int = 0
    """Passes over the corpus made."""
    document: int = 0
    """Documents of this pass, in its order, that are wholly packed."""
    offset: int = 0
    """Tokens of the next document that are packed."""
    kept: int = 0
    """Kept tokens so far; of rows: the number of the next one."""


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """A few blocks of tokens, on the CPU, and where each token comes from.

    `document` is `Document.id` and `position` the token's index in ``model.encode(document.text)``; both are
    -1 where the token stands for no text (BOS and padding), and `position` is -1 for special tokens found
    inside a document too. `keep` marks the tokens to train and measure on: those that are not special, up
    to the number of tokens asked for.
    """

    tokens: Int32[Tensor, "block pos"]
    document: Int32[Tensor, "block pos"]
    position: Int32[Tensor, "block pos"]
    keep: Bool[Tensor, "block pos"]
    begin: Cursor | None = None
    """Where the stream stood before this batch; None for blocks that are no part of one."""


def iter_blocks(
    model: Tokenizes,
    corpus: Corpus,
    *,
    split: Split,
    context: int = 256,
    blocks_per_batch: int = 8,
    seed: int = 0,
    max_tokens: int | None = None,
    epochs: int | None = 1,
    start: Cursor | None = None,
    many: TokenizesMany | None = None,
) -> Iterator[TokenBlocks]:
    """Packs a corpus into blocks of `context` tokens, a batch of blocks at a time.

    Each block starts with BOS and each document follows a BOS; a document cut by the end of a block goes on
    in the next one, behind its BOS. A model without BOS gets the documents end to end. The last block is
    padded, the last batch may have fewer blocks. Texts are tokenised as they are needed, by `many` at a time
    if that is given.

    `max_tokens` stops after exactly that many kept tokens. `epochs` is the number of passes over the
    corpus, None for no end; each pass of a finite corpus has its own order. `start`, the `begin` of a batch
    that the same call gave before, gives that batch and those after it again, without tokenising what
    comes before. Raises UserError.
    """
    if not 2 <= context <= model.max_context:
        raise UserError(
            f"the context must be 2 to {model.max_context} tokens, as long as the model reads",
            str(context),
            "change --context",
        )
    for name, value in (
        ("blocks_per_batch", blocks_per_batch),
        ("max_tokens", max_tokens),
        ("epochs", epochs),
    ):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1", str(value), f"give a larger {name}")
    start = start or Cursor()
    texts = _tokenised(many or _OneByOne(model), corpus, split, seed, epochs, start)
    blocks = _pack(model, texts, context, start.offset)
    return _batches(_limit(blocks, max_tokens, start.kept), blocks_per_batch)


@dataclass(frozen=True)
class _Text:
    """A tokenised document and its place: the pass over the corpus, and its number in that pass."""

    epoch: int
    number: int
    id: int
    tokens: np.ndarray


class _Block:
    """One block while it is filled: plain arrays, so that packing costs little beside tokenising."""

    def __init__(self, context: int, pad: int) -> None:
        self.begin = Cursor()
        self.tokens = np.full(context, pad, dtype=np.int32)
        self.document = np.full(context, -1, dtype=np.int32)
        self.position = np.full(context, -1, dtype=np.int32)
        self.keep = np.zeros(context, dtype=bool)
        self.filled = 0

    @property
    def room(self) -> int:
        return len(self.tokens) - self.filled

    def separate(self, bos: int) -> None:
        self.tokens[self.filled] = bos
        self.filled += 1

    def take(self, ids: np.ndarray, document: int, start: int) -> int:
        """Copies as many of ``ids[start:]`` as there is room for, and returns how many."""
        count = min(self.room, len(ids) - start)
        span = slice(self.filled, self.filled + count)
        self.tokens[span] = ids[start : start + count]
        self.document[span] = document
        self.position[span] = np.arange(start, start + count)
        self.filled += count
        return count

    def finish(self, special: np.ndarray) -> "_Block":
        self.position[np.isin(self.tokens, special)] = -1
        self.keep = self.position >= 0
        return self


class _OneByOne:
    def __init__(self, model: Tokenizes) -> None:
        self.at_once, self._model = 1, model

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._model.encode(text) for text in texts]


def _tokenised(
    many: TokenizesMany, corpus: Corpus, split: Split, seed: int, epochs: int | None, start: Cursor
) -> Iterator[_Text]:
    for epoch in itertools.count(start.epoch) if epochs is None else range(start.epoch, epochs):
        skipped = start.document if epoch == start.epoch else 0
        n_tokens = 0
        documents = corpus.documents(split, seed + _SEED_STRIDE * epoch)
        numbered = enumerate(itertools.islice(documents, skipped, None), skipped)
        while chunk := list(itertools.islice(numbered, many.at_once)):
            encoded = many.encode_all([document.text for _, document in chunk])
            for (number, document), tokens in zip(chunk, encoded, strict=True):
                ids = np.array(tokens, dtype=np.int32)
                n_tokens += len(ids)
                yield _Text(epoch, number, document.id, ids)
        if not n_tokens and not skipped:  # without this an endless pass would spin for ever
            raise UserError(
                "the corpus must hold tokens", f"no token in {corpus.name}", "give another corpus"
            )


def _pack(model: Tokenizes, texts: Iterable[_Text], context: int, offset: int) -> Iterator[_Block]:
    """Blocks in their order; the first text is packed from `offset` on."""
    special = np.array(sorted(model.special_ids), dtype=np.int32)
    bos = model.bos_id
    # padding follows every token of the last block, so under causal attention its identity changes nothing
    pad = bos if bos is not None else int(special[0]) if len(special) else 0
    block = _Block(context, pad)
    for text in texts:
        start, offset = offset, 0
        while start < len(text.tokens):
            if not block.filled:
                block.begin = Cursor(epoch=text.epoch, document=text.number, offset=start)
            if bos is not None and (start == 0 or block.filled == 0):
                block.separate(bos)
            start += block.take(text.tokens, text.id, start)
            if not block.room:
                yield block.finish(special)
                block = _Block(context, pad)
    if block.filled:
        yield block.finish(special)


def _limit(blocks: Iterable[_Block], max_tokens: int | None, kept: int) -> Iterator[_Block]:
    for block in blocks:
        block.begin = dataclasses.replace(block.begin, kept=kept)
        if max_tokens is not None:
            block.keep &= np.cumsum(block.keep) <= max_tokens - kept
        kept += int(block.keep.sum())
        yield block
        if kept == max_tokens:
            return


def _batches(blocks: Iterator[_Block], size: int) -> Iterator[TokenBlocks]:
    while batch := list(itertools.islice(blocks, size)):
        yield TokenBlocks(
            tokens=torch.from_numpy(np.stack([block.tokens for block in batch])),
            document=torch.from_numpy(np.stack([block.document for block in batch])),
            position=torch.from_numpy(np.stack([block.position for block in batch])),
            keep=torch.from_numpy(np.stack([block.keep for block in batch])),
            begin=batch[0].begin,
        )
