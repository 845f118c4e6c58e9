"""What live calls found, as HTML: for pages and notebooks. Every text from a model is escaped here."""

import html
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from activations.sites import site_label
from viewer import markup
from viewer.live.trace import strengths

Href = Callable[[str, int], str]
"""The address of a feature, from its site and latent."""

STYLE = """<style>
.js-lab{display:inline-block;max-width:min(24rem,38vw);overflow:hidden;text-overflow:ellipsis;vertical-align:bottom}
.js-live th:nth-child(-n+4):not(:nth-child(3)),.js-live td:nth-child(-n+4):not(:nth-child(3)){text-align:left}
.js-chances{max-width:46rem} .js-chances .js-bar{min-width:min(11rem,32vw)}
.js-chances th:nth-child(-n+3),.js-chances td:nth-child(-n+3){text-align:left}
.js-links a{color:inherit;text-decoration-color:rgb(20,150,130);text-underline-offset:3px}
.js-links ul{margin:.2rem 0 0;padding:0;list-style:none} .js-links li{padding:.15rem 0}
.js-bar{display:inline-block;min-width:7.5rem;padding:0 .4rem;border-radius:3px}
.js-sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1rem 2rem}
.js-side{border:1px solid rgba(128,128,128,.3);border-radius:6px;padding:.6rem .9rem .8rem;min-height:9rem}
.js-side p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.6}
.js-given{opacity:.75} .js-side .js-new{border-bottom:2px solid rgba(20,150,130,.55)}
</style>"""
_BEFORE, _AFTER, _RAISED, _LOWERED = "120,132,140", "20,150,130", "20,150,130", "150,90,200"
_FIRES = "245,145,20"


def features_html(rows: Any, href: Href) -> str:
    """Features of a trace (rows of `Trace.top`), each a link, with how near they are to their highest."""
    cells = [
        [
            html.escape(site_label(row["site"])),
            markup.token_html(row["token"]),
            _link(row, href),
            _label(row["label"]),
            markup.number(row["activation"]),
            _bar(share, _FIRES, markup.percent(row["share"])),
            markup.percent(row["density"]),
        ]
        for row, share in zip(rows.to_dict("records"), strengths(rows), strict=True)
    ]
    heads = ["layer", "token", "feature", "label", "activation", "of its highest", "fires on"]
    return _table(heads, cells)


def attributions_html(rows: Any, href: Href) -> str:
    """Attributions (rows of `Attribution.frame`), with what ablations measured where `measured` is known."""
    most = float(rows["attribution"].abs().max() or 1.0) if len(rows) else 1.0
    verified = "measured" in rows
    cells = []
    for row in rows.to_dict("records"):
        value = row["attribution"]
        colour = _RAISED if value > 0 else _LOWERED
        line = [
            html.escape(site_label(row["site"])),
            markup.token_html(row["token"]),
            _link(row, href),
            _label(row["label"]),
            markup.number(row["activation"]),
            _bar(abs(value) / most, colour, f"{value:+.3f}"),
        ]
        if verified:
            line.append(f"{row['measured']:+.3f}" if np.isfinite(row["measured"]) else "")
        cells.append(line)
    heads = ["layer", "token", "feature", "label", "activation", "attribution"]
    return _table(heads + ["by ablation"] * verified, cells)


def next_tokens_html(frame: Any) -> str:
    """The likeliest next tokens (the DataFrame of `Intervention.next_tokens`), with and without."""
    most = float(frame[["probability", "without"]].to_numpy().max()) or 1.0
    cells = [
        [
            markup.token_html(row["token"]),
            _bar(row["without"] / most, _BEFORE, markup.percent(row["without"])),
            _bar(row["probability"] / most, _AFTER, markup.percent(row["probability"])),
            _times(row["ratio"]),
        ]
        for row in frame.to_dict("records")
    ]
    return _table(["next token", "without", "with", "change"], cells, "js-chances")


def generation_html(prompt: str, text: str, without: str, *, note: str = "") -> str:
    """A text as it goes on with an intervention and without, side by side; new text is underlined."""
    sides = "".join(
        f'<section class="js-side"><h4 class="js-h" style="margin-top:0">{head}</h4>'
        f'<p><span class="js-given">{_shown(prompt)}</span><span class="js-new">{_shown(new)}</span></p>'
        "</section>"
        for head, new in (("Without", without), ("With", text))
    )
    return f'<div class="js-sides">{sides}</div>' + (markup.note_html(note) if note else "")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "js-live") -> str:
    return f'{STYLE}<div class="{kind}">{markup.table_html(headings, rows)}</div>'


def _link(row: dict, href: Href) -> str:
    address = html.escape(href(row["site"], int(row["latent"])))
    return f'<a href="{address}" target="_self" data-js-link>{row["latent"]}</a>'


def _label(label: object) -> str:
    shown = html.escape(markup.readable_text(str(label or "").replace("\n", " ")))
    return f'<span class="js-lab" title="{shown}">{shown}</span>'


def _bar(share: float, colour: str, text: str) -> str:
    """A number on a bar as long as a share of the cell."""
    end = f"{100 * min(1.0, max(0.0, share)) if np.isfinite(share) else 0:.0f}%"
    style = f"background:linear-gradient(90deg,rgba({colour},.34) {end},rgba(128,128,128,.08) {end})"
    return f'<span class="js-bar" style="{style}">{html.escape(text)}</span>'


def _times(ratio: float) -> str:
    """How many times as likely: an arrow says which way, so that colour need not."""
    if not np.isfinite(ratio):
        return "–"
    if 0.995 < ratio < 1.005:
        return "same"
    return f"▲ {markup.number(ratio)} ×" if ratio > 1 else f"▼ {markup.number(ratio)} ×"


def _shown(text: str) -> str:
    """A text of a model, its lines kept."""
    return html.escape(markup.readable_text(text))
