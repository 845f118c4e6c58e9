"""A comparison of two dictionaries as HTML: how near their latents are, and tables of what became of them."""

import html
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Int

from viewer import cards, markup
from viewer.compare import Comparison

KINDS = ("matched", "new", "gone", "split", "merged")
_BINS = 50
_PARTS = 8

STYLE = """<style>
.js-cos{margin:.5rem 0 1.25rem;max-width:60rem}
.js-cos p{margin:0 0 .3rem;font-size:.8rem;overflow-wrap:anywhere}
.js-bars{position:relative;display:flex;gap:1px;height:4.5rem;align-items:flex-end}
.js-bars.js-down{align-items:flex-start;border-top:1px solid currentColor}
.js-bars i{flex:1;background:rgb(20,150,130)} .js-down i{background:rgb(210,120,20)}
.js-bars b{position:absolute;top:0;bottom:0;border-left:1px dashed currentColor}
.js-cos div:last-of-type{display:flex;justify-content:space-between;font-size:.75rem;opacity:.8;
  font-variant-numeric:tabular-nums}
.js-tabs{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;margin:0 0 .75rem;
  border-bottom:1px solid rgba(128,128,128,.35)}
.js-tabs a{color:inherit;text-decoration:none;padding:.4rem 0;border-bottom:3px solid transparent;
  margin-bottom:-1px;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.js-tabs a:hover{border-color:rgba(128,128,128,.6)}
.js-tabs [aria-current]{font-weight:600;border-color:rgb(20,150,130)}
.js-cmp td,.js-cmp th{text-align:left!important;vertical-align:top} .js-cmp .n{text-align:right!important}
.js-cmp .w{white-space:normal;min-width:11rem;overflow-wrap:anywhere}
.js-tabs a:focus-visible,.js-cmp a:focus-visible{outline:2px solid rgb(20,150,130);
  outline-offset:2px}
</style>"""

Side = Callable[[int], str]
"""The HTML of a latent of one side, for instance its number with a link."""
Labels = Callable[[Sequence[int]], Sequence[str]]
"""The labels of latents of one side."""


def tabs_html(found: Comparison, shown: str, address: Callable[[str], str]) -> str:
    """What there is to see, with how many of each; `address` of a kind, not yet escaped."""
    items = []
    for kind in KINDS:
        here = ' aria-current="page"' if kind == shown else ""
        link = f'<a href="{html.escape(address(kind))}" target="_self" data-js-link{here}>'
        items.append(f"{link}{html.escape(_title(found, kind))} {len(getattr(found, kind)):,}</a>")
    return f'<nav class="js-tabs" aria-label="What to list">{"".join(items)}</nav>'


def meaning(found: Comparison, kind: str) -> str:
    """What a table lists, in words."""
    ours, theirs = found.names
    cosine = markup.number(found.cosine)
    return {
        "matched": f"Each is the other's nearest, with a decoder cosine of at least {cosine}. Surest first.",
        "new": f"Latents of {ours} with none of {theirs} as near as {cosine}, most frequent first.",
        "gone": f"Latents of {theirs} with none of {ours} as near as {cosine}, most frequent first.",
        "split": f"Latents of {ours} nearest to two or more of {theirs}, with at least {cosine}.",
        "merged": f"Latents of {theirs} nearest to two or more of {ours}, with at least {cosine}.",
    }[kind]


def table_html(
    found: Comparison,
    kind: str,
    rows: pd.DataFrame,
    latents: tuple[Side, Side],
    labels: tuple[Labels, Labels],
) -> str:
    """Some rows of one of the tables; `latents` and `labels` are of ours and of theirs."""
    names = found.names
    if kind in ("gone", "merged"):
        latents, labels, names = (latents[1], latents[0]), (labels[1], labels[0]), names[::-1]
    mine, other = latents
    own = _cells(labels[0](rows["latent"].tolist()))
    if kind in ("split", "merged"):
        heads = [("", names[0]), ("w", "label"), ("n", "parts"), ("w", f"in {names[1]}, with cosine")]
        cells = zip(
            map(mine, rows["latent"]), own, map(str, rows["parts"]),
            (_parts(o, c, other) for o, c in zip(rows["others"], rows["cosines"], strict=True)),
            strict=True,
        )  # fmt: skip
        return _table(heads, cells)
    cosine = [f"{value:.3f}" for value in rows["cosine"]]
    near = [other(n) if n >= 0 else "–" for n in rows["other"]]
    others = rows["other"].tolist()
    known = near if -1 in others else _cells(labels[1](others))
    if kind == "matched":
        heads = [("n", "cosine"), ("", names[0]), ("w", "label"), ("", names[1]), ("w", "label")]
        return _table(heads, zip(cosine, map(mine, rows["latent"]), own, near, known, strict=True))
    heads = [
        ("", names[0]), ("w", "label"), ("n", "density"), ("n", "cosine"), ("", f"nearest in {names[1]}"),
        ("w", "label"),
    ]  # fmt: skip
    density = map(markup.percent, rows["density"])
    return _table(heads, zip(map(mine, rows["latent"]), own, density, cosine, near, known, strict=True))


def cosines_html(found: Comparison) -> str:
    """How near each latent has one of the other: ours above the line, theirs below, the limit dashed."""
    values = [side["cosine"].to_numpy() for side in (found.ours, found.theirs)]
    low = min([0.0, *(np.floor(v.min() * 10) / 10 for v in values if len(v))])
    edges = np.linspace(low, 1, _BINS + 1)
    counts = [np.histogram(np.clip(v, low, 1), edges)[0] for v in values]
    most = max(1, *(int(c.max()) for c in counts))
    cut = f'<b style="left:{100 * (found.cosine - low) / (1 - low):.2f}%"></b>'
    ours, theirs = (html.escape(name) for name in found.names)
    said = (
        f"Histogram of the cosine of each latent with its nearest of the other, from {low:.1f} to 1: "
        f"{ours} above the line, {theirs} below"
    )
    ticks = "".join(f"<span>{value:.2f}</span>" for value in np.linspace(low, 1, 5))
    # bars of plain elements: Streamlit takes SVG out of HTML
    return (
        f'<figure class="js-cos"><p>Cosine of each latent with its nearest: {ours} above the line, '
        f"{theirs} below; dashed {markup.number(found.cosine)}; the highest bar is {most:,} latents</p>"
        f'<div role="img" aria-label="{said}"><div class="js-bars">{_bars(counts[0], most)}{cut}</div>'
        f'<div class="js-bars js-down">{_bars(counts[1], most)}{cut}</div></div><div>{ticks}</div></figure>'
    )


def _bars(counts: Int[np.ndarray, " bin"], most: int) -> str:
    return "".join(f'<i style="height:{100 * count / most:.1f}%"></i>' for count in counts.tolist())


def _title(found: Comparison, kind: str) -> str:
    ours, theirs = found.names
    return {
        "matched": "In both",
        "new": f"Only in {ours}",
        "gone": f"Only in {theirs}",
        "split": f"Split in {theirs}",
        "merged": f"Split in {ours}",
    }[kind]


def _cells(labels: Sequence[str]) -> list[str]:
    return [html.escape(cards.one_line(label)) for label in labels]


def _parts(others: Sequence[int], cosines: Sequence[float], other: Side) -> str:
    shown = [f"{other(n)} <small>{c:.3f}</small>" for n, c in zip(others[:_PARTS], cosines, strict=False)]
    more = [f"and {len(others) - _PARTS:,} more"] if len(others) > _PARTS else []
    return ", ".join(shown + more)


def _table(heads: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col" class="{kind}">{html.escape(name)}</th>' for kind, name in heads)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{cell}</td>' for (kind, _), cell in zip(heads, row, strict=True))
        + "</tr>"
        for row in rows
    )
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    # a box that scrolls is reached with the keyboard only when it can have the focus
    return (
        f'<div class="js-scroll" tabindex="0" role="region" aria-label="Latents">'
        f'<table class="js-table js-cmp">{table}</table></div>'
    )
