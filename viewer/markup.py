"""Text and HTML for tokens and features. Every string that came from a model or a corpus is escaped here.

(Not called html.py: Streamlit puts the folder of the app's script first on the import path, where that name
would stand in front of the standard library's.)
"""

import functools
import html
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

LONGEST_TOKEN = 60
_VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
# what can reorder, hide or break the text around it is shown by its number instead
_HIDDEN_CATEGORIES = {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"}
_JOINERS = {"\u200d", "\ufe0f"}

STYLE = """<style> .js-card{max-width:60rem;font-size:.95rem;line-height:1.5} .js-card
h4,.js-h{font-size:.8rem;font-weight:600;letter-spacing:.02em;margin:1rem 0 .35rem;opacity:.75}
.js-facts{display:flex;flex-wrap:wrap;gap:.6rem 2rem;margin:.25rem 0 .5rem} .js-facts
div{display:flex;flex-direction:column} .js-facts
b{font-size:1.3rem;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums} .js-facts
span{font-size:.8rem;opacity:.75} .js-ex{padding:.55rem 0;border-bottom:1px solid
rgba(128,128,128,.25);overflow-wrap:anywhere} .js-ex p{margin:0;line-height:1.85;white-space:pre-wrap}
.js-ex small{opacity:.75;font-size:.75rem;font-variant-numeric:tabular-nums} .js-t{unicode-bidi:isolate}
.js-on{border-radius:3px 3px 0 0;border-bottom:2px solid rgba(190,90,0,.9);padding:1px 0}
.js-peak{font-weight:700;padding:1px 2px;border-bottom-width:4px;border-bottom-style:double}
.js-val{font-size:.7rem;font-weight:600;vertical-align:super;margin-left:1px;font-variant-numeric:tabular-nums}
.js-m{opacity:.55} .js-code{opacity:.75;font-family:monospace;font-size:.85em}
.js-logits{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.75rem,1fr));gap:0 1.5rem} .js-logits
ol{list-style:none;margin:0;padding:0} .js-logits
li{display:flex;justify-content:space-between;gap:.75rem;padding:.12rem .4rem;margin:0 0 2px;
  border-radius:3px;font-size:.9rem;font-variant-numeric:tabular-nums}
.js-wide ol{columns:11rem;column-gap:1.5rem}
.js-label{font-size:1.15rem;margin:.2rem 0;overflow-wrap:anywhere}
.js-label small{font-size:.75rem;opacity:.75} .js-card details{margin:.4rem 0} .js-card
summary{cursor:pointer;font-size:.85rem;opacity:.85}
.js-logits .js-t{overflow:hidden;text-overflow:ellipsis;white-space:pre}
.js-note{font-size:.8rem;opacity:.75;margin:.75rem 0 0} .js-scroll{overflow-x:auto}
.js-table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.9rem;white-space:nowrap}
.js-table th{text-align:right;font-weight:600;font-size:.78rem;padding:.35rem .7rem;opacity:.8;
  border-bottom:2px solid rgba(128,128,128,.4)}
.js-table td{text-align:right;padding:.3rem .7rem;border-bottom:1px solid rgba(128,128,128,.2)}
.js-table tr>:first-child{text-align:left;padding-left:0}
.js-table small{opacity:.75}
.js-table a{color:inherit;font-weight:600;text-decoration-color:rgb(20,150,130);text-underline-offset:3px}
</style>"""


def readable(token: str, *, alone: bool = True) -> str:
    """A token as text that can be seen, not yet escaped for HTML.

    Newlines are ↵, tabs ⇥, and what is invisible or reorders text is shown as ⟨U+202E⟩. Spaces are · where
    they would be lost: at the ends of a token that stands `alone`, and in a token that is nothing else.
    """
    shown = "".join(_character(c) for c in token[:LONGEST_TOKEN])
    if len(token) > LONGEST_TOKEN:
        shown += f"… ({len(token):,} characters)"
    if not shown:
        return "⟨empty⟩"
    if alone or not shown.strip(" "):
        inner = shown.strip(" ")
        head = len(shown) - len(shown.lstrip(" "))
        tail = len(shown) - head - len(inner)
        shown = "·" * head + inner + "·" * tail
    return shown


def readable_text(text: str) -> str:
    """Text that a person or a rule wrote, with what cannot be seen shown as in `readable`, at any length."""
    return "".join(c if c == "\n" else _character(c) for c in text)


def number(value: float | int, figures: int = 3) -> str:
    """A number to so many figures, without an exponent where that is short: 0.0123, 4.56, 1,234."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    # rounded first, so that 99.96 is 100 and not 100.0
    rounded = float(f"{value:.{figures - 1}e}")
    digits = max(0, figures - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:.{digits}f}"


def percent(share: float | int) -> str:
    """A share as a percentage: 0.0123 is 1.23 %."""
    return f"{number(100 * share)} %" if math.isfinite(share) else "–"


def token_html(token: str, *, alone: bool = True, style: str = "", classes: str = "", title: str = "") -> str:
    """A token as an escaped span."""
    shown = html.escape(readable(token, alone=alone))
    # marks that stand for something invisible are quieter than the text
    for mark in ("↵", "⇥", "␍", "⍽", "·") if shown != html.escape(token) else ():
        shown = shown.replace(mark, f'<span class="js-m">{mark}</span>')
    if not alone and "\n" in token:
        shown += "\n"
    attributes = f' style="{html.escape(style)}"' if style else ""
    attributes += f' title="{html.escape(title)}"' if title else ""
    return f'<span class="{f"js-t {classes}".strip()}"{attributes}>{shown}</span>'


def example_html(tokens: Sequence[str], values: Sequence[float], peak: int, top: float) -> str:
    """A window of text: coloured and underlined where the latent fires, the peak bold with its value.

    The deeper the background the nearer to `top`, the latent's highest activation; each value shows on hover.
    """
    parts = []
    for index, (token, value) in enumerate(zip(tokens, values, strict=True)):
        if value <= 0:
            token = token.removeprefix(" ") if index == 0 else token
            # a single space between two words is seen as it is
            parts.append(" " if token == " " else _quiet_html(token) if token else "")
            continue
        depth = 0.08 + 0.52 * min(1.0, value / top if top > 0 else 1.0)
        classes = "js-on js-peak" if index == peak else "js-on"
        style = f"background:rgba(245,145,20,{depth:.2f})"
        # the space before a word belongs to its token, but a coloured gap reads as part of the word before
        lead = " " if token.startswith(" ") and token.strip(" ") else ""
        hover = f"{readable(token)}: {number(value)}"
        parts.append(
            (lead if index else "")
            + token_html(token[len(lead) :], alone=False, style=style, classes=classes, title=hover)
        )
        if index == peak:
            parts.append(f'<span class="js-val">{number(value)}</span>')
    return f"<p>{''.join(parts)}</p>"


def examples_html(examples: Any, top: float) -> str:
    """All of a feature's examples (the DataFrame of `Feature.examples`), one under another."""
    if not len(examples):
        return '<p class="js-h">No examples: it never fired on the indexed text.</p>'
    rows = []
    columns = (examples[name] for name in ("document", "position", "tokens", "values", "peak"))
    for document, position, tokens, values, peak in zip(*columns, strict=True):
        where = f"<small>document {document}, token {position}</small>"
        rows.append(f'<div class="js-ex">{example_html(tokens, values, peak, top)}{where}</div>')
    return "".join(rows)


def logits_html(logits: Any) -> str:
    """The tokens a feature raises and lowers (the DataFrame of `Feature.logits`), with bars."""
    if not len(logits):
        return '<p class="js-h">No logits: this site does not write to the residual stream.</p>'
    largest = logits["logit"].abs().max() or 1.0
    lists = []
    for side, heading, colour in (("top", "Raises", "20,150,130"), ("bottom", "Lowers", "150,90,200")):
        items = []
        here = logits[logits["side"] == side]
        for token, logit in zip(here["token"], here["logit"], strict=True):
            share = 100 * abs(logit) / largest
            bar = (
                f"background:linear-gradient(90deg,rgba({colour},.24) {share:.0f}%,transparent {share:.0f}%)"
            )
            items.append(f'<li style="{bar}">{token_html(token)}<span>{logit:+.2f}</span></li>')
        lists.append(f'<div><div class="js-h">{heading}</div><ol>{"".join(items)}</ol></div>')
    return f'<div class="js-logits">{"".join(lists)}</div>'


def drivers_html(drivers: Any) -> str:
    """The tokens that a feature fires on (the DataFrame of `Feature.drivers`), with bars."""
    if not len(drivers):
        return ""
    items = []
    for row in drivers.to_dict("records"):
        share = f"{100 * row['share']:.0f}%"
        bar = f"background:linear-gradient(90deg,rgba(245,145,20,.26) {share},transparent {share})"
        hover = f"{row['count']} firings, mean {number(row['mean'])}, {number(row['lift'])} times chance"
        text = f"{token_html(row['token'])}<span>{percent(row['share'])}</span>"
        items.append(f'<li style="{bar}" title="{hover}">{text}</li>')
    return (
        '<div class="js-h">Fires on, by share of its activation</div>'
        f'<div class="js-logits js-wide"><ol>{"".join(items)}</ol></div>'
    )


def facts_html(facts: Sequence[tuple[str, str]]) -> str:
    """Pairs of (name, value) side by side."""
    items = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in facts
    )
    return f'<div class="js-facts">{items}</div>'


def note_html(text: str) -> str:
    """A quiet line of text."""
    return f'<p class="js-note">{html.escape(text)}</p>'


def table_html(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    table = f'<table class="js-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="js-scroll">{table}</div>'


def histogram_svg(histogram: Any) -> str:
    """A small picture of a histogram (the DataFrame of `Feature.histogram`), without axes."""
    if not len(histogram):
        return ""
    width, tall = 300, 60
    step = width / len(histogram)
    most = histogram["count"].max()
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{tall * (1 - count / most):.1f}" width="{max(step - 1, 1):.1f}" '
        f'height="{tall * count / most:.1f}"/>'
        for i, count in enumerate(histogram["count"])
    )
    low, high = number(histogram["lower"].iloc[0]), number(histogram["upper"].iloc[-1])
    label = f"histogram of activations from {low} to {high}, logarithmic"
    return (
        f'<svg viewBox="0 0 {width} {tall}" width="{width}" height="{tall}" role="img" aria-label="{label}" '
        f'fill="rgb(210,120,20)">{bars}</svg><div><small>{low} to {high}, log scale</small></div>'
    )


@functools.lru_cache(maxsize=16384)
def _quiet_html(token: str) -> str:
    """A token of running text on which nothing fires. Most tokens of most pages are among a few thousand."""
    return token_html(token, alone=False)


def _character(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    if unicodedata.category(character) in _HIDDEN_CATEGORIES and character not in _JOINERS:
        return f"⟨U+{ord(character):04X}⟩"
    return character
