"""The text around the places where a latent fires, with its activation on every token."""

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Bool, Float32, Int

from viewer.index.firings import Texts
from viewer.tables import Strings


def windows(
    examples: pa.Table,
    fired: tuple[Int[np.ndarray, " here"], Float32[np.ndarray, " here"]],
    texts: Texts,
    strings: Strings,
    context: int | None,
) -> pd.DataFrame:
    """Examples (block, peak, activation, ...) with document, position, tokens and values.

    `fired` is the rows on which the latent fires, rising, and its activations. tokens and values are lists
    of one length: the tokens of the same document within the block, at most `context` either side of the
    peak, and the activation on each. `peak` becomes the peak's place in them.
    """
    block, peak = examples["block"].to_numpy(), examples["peak"].to_numpy()
    spans = [_span(texts.document[b], int(p), context) for b, p in zip(block, peak, strict=True)]
    flat = [texts.tokens[b, span] for b, span in zip(block, spans, strict=True)]
    words = iter(strings.of(np.concatenate([*flat, np.zeros(0, np.int32)])))
    rows = [texts.row_of[b, span] for b, span in zip(block, spans, strict=True)]
    values = iter(_values(np.concatenate([*rows, np.zeros(0, np.int32)]), *fired).tolist())
    shown = {name: examples[name].to_numpy() for name in examples.column_names}
    shown |= {
        "document": texts.document[block, peak],
        "position": texts.position[block, peak],
        "token": strings.of(texts.tokens[block, peak]),
        "tokens": [[next(words) for _ in ids] for ids in flat],
        "values": [[next(values) for _ in ids] for ids in flat],
        "peak": [int(p) - span.start for p, span in zip(peak, spans, strict=True)],
    }
    return pd.DataFrame(shown)


def near(texts: Texts, wanted: Int[np.ndarray, " token"], reach: int) -> Bool[np.ndarray, "block pos"]:
    """Where a token of `wanted` is at most `reach` tokens away in the same document: a mask [block, pos]."""
    hit = np.isin(texts.tokens, wanted)
    found = hit.copy()
    for shift in range(1, min(reach, hit.shape[1] - 1) + 1):
        same = texts.document[:, shift:] == texts.document[:, :-shift]
        found[:, shift:] |= hit[:, :-shift] & same
        found[:, :-shift] |= hit[:, shift:] & same
    return found


def _span(document: Int[np.ndarray, " pos"], peak: int, context: int | None) -> slice:
    """The peak's document within its block, cut to `context` tokens either side."""
    reach = len(document) if context is None else context
    low, high = max(0, peak - reach), min(len(document), peak + reach + 1)
    other = np.flatnonzero(document[low:high] != document[peak]) + low
    before, after = other[other < peak], other[other > peak]
    return slice(int(before[-1]) + 1 if len(before) else low, int(after[0]) if len(after) else high)


def _values(
    rows: Int[np.ndarray, " pos"],
    fired: Int[np.ndarray, " here"],
    activation: Float32[np.ndarray, " here"],
) -> Float32[np.ndarray, " pos"]:
    """The activation on each row; 0 where it does not fire and where there is no row (-1)."""
    place = np.searchsorted(fired, rows)
    hit = np.append(fired, np.int32(-2))[place] == rows
    return np.where(hit, np.append(activation, np.float32(0))[place], np.float32(0)).astype(np.float32)
