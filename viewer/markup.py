"""Text and HTML for tokens and features. Every string that came from a model or a corpus is escaped here.

(Not called html.py: Streamlit puts the folder of the app's script first on the import path, where that name
would stand in front of the standard library's.)
"""

import functools
import html
import math
import unicodedata
from collections.abc import Callable, Sequence
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
.js-on{position:relative} .js-on:hover::after{content:attr(data-t) " " attr(data-v);position:absolute;
  left:50%;bottom:100%;transform:translateX(-50%);padding:0 .4rem;border-radius:4px;
  background:#1d2327;color:#fff;font-size:.72rem;
  font-weight:600;line-height:1.5;white-space:pre;z-index:9;pointer-events:none}
.js-ex:focus .js-on:not(.js-peak):not(:hover)::after{content:attr(data-v);font-size:.7rem;font-weight:600;
  vertical-align:super;margin-left:1px;font-variant-numeric:tabular-nums}
.js-ex:focus{outline:2px solid rgb(20,150,130);outline-offset:-1px;border-radius:4px}
.js-far{display:none} .js-ex:has(details[open]) .js-far{display:inline} .js-cut{opacity:.65}
.js-ex:has(details[open]) .js-cut{display:none} .js-more{display:inline-block;margin:0 0 0 .8rem!important}
.js-ex .js-more summary{font-size:.75rem;opacity:.85}
.js-hist{margin:.2rem 0 .6rem} .js-hist>div{display:flex;height:4.2rem;
  border-bottom:1px solid rgba(128,128,128,.5)}
.js-hist i{flex:1;display:flex;align-items:flex-end;height:100%;min-width:0} .js-hist i i{margin-right:1px;
  min-height:0} .js-hist>div>i:hover{background:rgba(128,128,128,.25)}
.js-hist figcaption{display:flex;justify-content:space-between;font-size:.75rem;opacity:.8;
  font-variant-numeric:tabular-nums}
.js-card .js-hist{max-width:20rem}
.js-m{opacity:.65} .js-code{opacity:.75;font-family:monospace;font-size:.85em}
.js-logits{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.75rem,1fr));gap:0 1.5rem} .js-logits
ol{list-style:none;margin:0;padding:0} .js-logits
li{display:flex;justify-content:space-between;gap:.75rem;padding:.12rem .4rem;margin:0 0 2px;
  border-radius:3px;font-size:.9rem;font-variant-numeric:tabular-nums}
.js-wide ol{columns:11rem;column-gap:1.5rem}
.js-label{font-size:1.15rem;margin:.2rem 0;overflow-wrap:anywhere}
.js-label small{font-size:.75rem;opacity:.75} .js-card details{margin:.4rem 0} .js-card
summary{cursor:pointer;font-size:.85rem;opacity:.85}
.js-logits .js-t{overflow:hidden;text-overflow:ellipsis;white-space:pre}
.js-logits li>a{min-width:0;overflow:hidden;text-overflow:ellipsis}
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
    attributes = f' style="{html.escape(style)}"' if style else ""
    attributes += f' title="{html.escape(title)}"' if title else ""
    return f'<span class="{f"js-t {classes}".strip()}"{attributes}>{_inner_html(token, alone)}</span>'


@functools.lru_cache(maxsize=16384)
def _inner_html(token: str, alone: bool) -> str:
    """A token escaped. Most tokens of most pages are among a few thousand."""
    shown = html.escape(readable(token, alone=alone))
    # marks that stand for something invisible are quieter than the text
    for mark in ("↵", "⇥", "␍", "⍽", "·") if shown != html.escape(token) else ():
        shown = shown.replace(mark, f'<span class="js-m">{mark}</span>')
    return shown + "\n" if not alone and "\n" in token else shown


def example_html(
    tokens: Sequence[str], values: Sequence[float], peak: int, top: float, reach: int | None = None
) -> str:
    """A window of text: coloured and underlined where the latent fires, the peak bold with its value.

    The deeper the background the nearer to `top`, the latent's highest activation; each value shows on hover,
    and all of them where the example has the focus. Tokens further than `reach` from the peak are folded.
    """
    low, high = (0, len(tokens)) if reach is None else (max(0, peak - reach), peak + reach + 1)
    pieces = [(0, low), (low, high), (high, len(tokens))]
    before, shown, after = (_piece(tokens[a:b], values[a:b], peak - a, top, a == 0) for a, b in pieces)
    if before:
        before = f'<span class="js-far">{before}</span><span class="js-cut">… </span>'
    if after:
        after = f'<span class="js-cut"> …</span><span class="js-far">{after}</span>'
    return f"<p>{before}{shown}{after}</p>"


def _piece(tokens: Sequence[str], values: Sequence[float], peak: int, top: float, starts: bool) -> str:
    parts: list[str] = []
    quiet: list[str] = []
    for index, (token, value) in enumerate(zip(tokens, values, strict=True)):
        first = starts and index == 0
        if value <= 0:
            quiet.append(_quiet_html(token.removeprefix(" ") if first else token))
            continue
        parts += [_run_html(quiet), _firing_html(token, value, index == peak, top, first)]
        quiet = []
    return "".join((*parts, _run_html(quiet)))


def _run_html(quiet: Sequence[str]) -> str:
    """Tokens on which nothing fires are one run of text: letters join as they are read."""
    return f'<span class="js-t">{"".join(quiet)}</span>' if any(quiet) else ""


def _firing_html(token: str, value: float, is_peak: bool, top: float, first: bool) -> str:
    depth = 0.08 + 0.46 * min(1.0, value / top if top > 0 else 1.0)
    # the space before a word belongs to its token, but a coloured gap reads as part of the word before
    lead = " " if token.startswith(" ") and token.strip(" ") else ""
    shown = _inner_html(token[len(lead) :], False)
    said = number(value)
    span = (
        f'{"" if first else lead}<span class="js-t js-on{" js-peak" if is_peak else ""}" data-v="{said}" '
        f'data-t="{html.escape(readable(token))}" '
        f'style="background:rgba(245,145,20,{depth:.2f})">{shown}</span>'
    )
    return span + f'<span class="js-val">{said}</span>' if is_peak else span


def examples_html(examples: Any, top: float, reach: int | None = None) -> str:
    """All of a feature's examples (the DataFrame of `Feature.examples`), one under another.

    Each can have the focus, and shows its values then. With `reach`, what is further away unfolds.
    """
    if not len(examples):
        return '<p class="js-h">No examples: it never fired on the indexed text.</p>'
    rows = []
    columns = (examples[name] for name in ("document", "position", "tokens", "values", "peak"))
    for document, position, tokens, values, peak in zip(*columns, strict=True):
        where = f"document {document}, token {position}"
        more = ""
        if reach is not None and (peak > reach or len(tokens) - peak - 1 > reach):
            more = '<details class="js-more"><summary>More context</summary></details>'
        rows.append(
            f'<div class="js-ex" tabindex="0" role="group" aria-label="{where}">'
            f"{example_html(tokens, values, peak, top, reach)}<small>{where}</small>{more}</div>"
        )
    return "".join(rows)


def logits_html(logits: Any, show: Callable[[str], str] | None = None) -> str:
    """The tokens a feature raises and lowers (the DataFrame of `Feature.logits`), with bars.

    `show` makes the HTML of a token, for instance with a link.
    """
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
            items.append(f'<li style="{bar}">{(show or token_html)(token)}<span>{logit:+.2f}</span></li>')
        lists.append(f'<div><div class="js-h">{heading}</div><ol>{"".join(items)}</ol></div>')
    return f'<div class="js-logits">{"".join(lists)}</div>'


def drivers_html(drivers: Any, show: Callable[[str], str] | None = None) -> str:
    """The tokens that a feature fires on (the DataFrame of `Feature.drivers`), with bars; `show` as above."""
    if not len(drivers):
        return ""
    items = []
    for row in drivers.to_dict("records"):
        share = f"{100 * row['share']:.0f}%"
        bar = f"background:linear-gradient(90deg,rgba(245,145,20,.26) {share},transparent {share})"
        hover = f"{row['count']} firings, mean {number(row['mean'])}, {number(row['lift'])} times chance"
        text = f"{(show or token_html)(row['token'])}<span>{percent(row['share'])}</span>"
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


def histogram_html(
    histogram: Any, *, of: str = "activations", colour: str = "#c46a12", scale: str = "log scale"
) -> str:
    """A small picture of a histogram (the DataFrame of `Feature.histogram`); bars tell on hover.

    Without SVG, which Streamlit takes out of HTML.
    """
    if not len(histogram):
        return ""
    most = max(1, histogram["count"].max())
    bars = "".join(
        f'<i title="{number(lower)} to {number(upper)}: {count:,}">'
        f'<i style="height:{100 * count / most:.1f}%;background:{colour}"></i></i>'
        for lower, upper, count in zip(
            histogram["lower"], histogram["upper"], histogram["count"], strict=True
        )
    )
    low, high = number(histogram["lower"].iloc[0]), number(histogram["upper"].iloc[-1])
    label = f"histogram of {of} from {low} to {high}, {scale}"
    return (
        f'<figure class="js-hist"><div role="img" aria-label="{label}">{bars}</div>'
        f"<figcaption><span>{low}</span><span>{scale}, most {most:,}</span><span>{high}</span></figcaption>"
        "</figure>"
    )


def _quiet_html(token: str) -> str:
    # a single space between two words is seen as it is
    return token if token in ("", " ") else _inner_html(token, False)


def _character(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    if unicodedata.category(character) in _HIDDEN_CATEGORIES and character not in _JOINERS:
        return f"⟨U+{ord(character):04X}⟩"
    return character
