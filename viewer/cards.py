"""A feature as a card for notebooks and as text for terminals. Everything that came from text is escaped."""

import html

import pandas as pd

from activations.sites import site_label
from viewer import markup
from viewer.features import Feature

CONTEXT, BAND_CONTEXT = 40, 16
"""Tokens that a card shows either side of an example's peak: of the highest, and in the bands."""
_TEXT_CONTEXT, _TEXT_AFTER = 12, 6
KINDS = {"cosine": "Same layer", "previous": "Layer before", "next": "Layer after"}
_RELATED, _DRIVERS, _EXAMPLES, _TEXT_EXAMPLES = 5, 8, 8, 5
_LONGEST_LINE = 120


def feature_text(feature: Feature) -> str:
    """What it is in a terminal: label, numbers, tokens and its best examples, the peak in brackets."""
    site = feature.site
    lines = [f"{site.name} latent {feature.latent}: " + ", ".join(f"{n} {v}" for n, v in feature.facts())]
    if feature.label:
        lines.append(f"  {one_line(feature.label)} ({source(feature)})")
    if feature.notes:
        lines.append(f"  notes  {one_line(feature.notes)}")
    logits, drivers = feature.logits(), feature.drivers()
    for tokens, word in (
        (drivers["token"].head(_DRIVERS), "fires on"),
        (logits.loc[logits["side"] == "top", "token"], "raises"),
        (logits.loc[logits["side"] == "bottom", "token"], "lowers"),
    ):
        if len(tokens):
            lines.append(f"  {word}  " + "  ".join(markup.readable(t) for t in tokens))
    for row in feature.examples(0, _TEXT_CONTEXT).head(_TEXT_EXAMPLES).to_dict("records"):
        text, peak = [markup.readable(t, alone=False) for t in row["tokens"]], row["peak"]
        text[peak] = f"[{text[peak]}]"
        around = "".join(text[: peak + _TEXT_AFTER + 1])
        lines.append(f"  {markup.number(row['activation']):>7}  {around}")
    return "\n".join(lines)


def feature_html(feature: Feature) -> str:
    """All that the index knows of it, to look at."""
    return (
        f'{markup.STYLE}<div class="js-card"><h4>{html.escape(feature.title())}</h4>'
        f"{label_html(feature)}{markup.facts_html(feature.facts())}"
        f"{markup.histogram_html(feature.histogram())}{markup.logits_html(feature.logits())}"
        f"{markup.drivers_html(feature.drivers().head(_DRIVERS))}"
        f"{examples_html(feature)}{related_html(feature)}</div>"
    )


def label_html(feature: Feature) -> str:
    """Its label, whose it is and what it rests on, and your notes."""
    shown = ""
    if feature.label:
        why = feature.label_evidence if feature.label_source == "automatic" else feature.automatic_label
        title = html.escape(one_line(why))
        shown = (
            f'<p class="js-label" title="{title}">{html.escape(one_line(feature.label))} '
            f"<small>{source(feature)}</small></p>"
        )
    return shown + (markup.note_html(markup.readable_text(feature.notes)) if feature.notes else "")


def examples_html(feature: Feature) -> str:
    """Its highest examples in full, and the samples of each fifth of its range, folded."""
    best, examples = feature.examples(0, CONTEXT).head(_EXAMPLES), feature.examples(context=BAND_CONTEXT)
    parts = ['<div class="js-h">Highest</div>', markup.examples_html(best, feature.max)]
    for band in sorted(set(examples["band"]) - {0}):
        rows = examples.loc[examples["band"] == band]
        low, high = (markup.number(end(rows["activation"].tolist())) for end in (min, max))
        inside = markup.examples_html(rows, feature.max)
        parts.append(f"<details><summary>Band {band} of 5: {low} to {high}</summary>{inside}</details>")
    return "".join(parts)


def related_html(feature: Feature) -> str:
    """Its neighbours by decoder cosine and what fires with it, side by side."""
    near, together = feature.neighbours(), feature.cofiring()
    lists = [_related_list(name, near.loc[near["kind"] == kind], "cosine") for kind, name in KINDS.items()]
    lists.append(_related_list("Fires together", together, "phi"))
    return f'<div class="js-logits">{"".join(lists)}</div>'


def _related_list(heading: str, rows: pd.DataFrame, value: str) -> str:
    if not len(rows):
        return ""
    items = "".join(
        f'<li title="{html.escape(one_line(row["label"]))}"><span class="js-t">{_place(row["site"])} · '
        f"{row['latent']} <small>{html.escape(one_line(row['label']))}</small></span>"
        f"<span>{row[value]:.2f}</span></li>"
        for row in rows.head(_RELATED).to_dict("records")
    )
    return f'<div><div class="js-h">{heading}, {value}</div><ol>{items}</ol></div>'


def _place(site: str) -> str:
    return html.escape(site_label(site))


def source(feature: Feature) -> str:
    """Whose its label is."""
    return "your label" if feature.label_source == "yours" else "automatic label"


def one_line(text: str) -> str:
    """Text of people or rules on one line of bounded length, not yet escaped."""
    line = " ".join(markup.readable_text(text).split())
    return line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + "…"
