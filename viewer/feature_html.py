"""One feature in full, as HTML that the viewer and static pages share. Cards for notebooks are in `cards`."""

import html
import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from activations.sites import kind_of, layer_of, site_label
from sae.errors import UserError
from viewer import cards, markup
from viewer.features import Feature

REACH, FAR = 24, 96
"""Tokens shown either side of an example's peak, at first and when it is unfolded."""
_SHOWN = 8
_LONGEST_LINK = 200
_BEST = 10

STYLE = """<style>
.js-f h1{font-size:1.75rem;font-weight:600;line-height:1.25;padding:0;margin:0}
.js-top{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;align-items:baseline} .js-top a{font-size:.85rem}
.js-f a,.js-strip a{color:inherit;text-decoration-color:rgb(20,150,130);text-underline-offset:3px}
.js-f a:focus-visible,.js-strip a:focus-visible,.js-f summary:focus-visible{outline:2px solid rgb(20,150,130);
  outline-offset:2px;border-radius:3px}
.js-why{font-size:.85rem;opacity:.8;margin:0 0 .3rem;overflow-wrap:anywhere}
.js-state{font-size:.9rem;margin:.5rem 0;padding:.5rem .8rem;border-left:4px solid rgba(245,145,20,.9);
  background:rgba(128,128,128,.1);border-radius:0 4px 4px 0}
.js-notes{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.9rem;margin:.5rem 0;padding:.5rem .8rem;
  border-left:4px solid rgb(20,150,130);background:rgba(128,128,128,.1);border-radius:0 4px 4px 0}
.js-two{display:grid;grid-template-columns:minmax(0,1.7fr) minmax(17rem,1fr);gap:0 3rem}
@media(max-width:900px){.js-two{grid-template-columns:minmax(0,1fr)}}
.js-f h2,.js-strip h2{font-size:1rem;font-weight:600;padding:0;margin:1.2rem 0 .3rem;letter-spacing:0}
.js-two>*>h2:first-child{margin-top:.2rem} .js-strip h2{margin-top:0}
.js-none{margin:0;padding:.5rem 0 .5rem 1.1rem;font-size:.9rem;opacity:.75}
.js-band{border-bottom:1px solid rgba(128,128,128,.25)} .js-band>summary{cursor:pointer;padding:.5rem 0;
  font-size:.9rem;font-variant-numeric:tabular-nums}
.js-strip ol{list-style:none;display:grid;grid-template-columns:repeat(auto-fit,minmax(3.9rem,1fr));gap:4px;
  margin:.2rem 0 0;padding:0}
.js-strip li{margin:0;padding:0;min-height:3.9rem}
.js-strip li>*{display:block;height:100%;padding:.25rem .4rem;border:1px solid rgba(128,128,128,.35);
  border-radius:4px;font-size:.75rem;line-height:1.35;text-decoration:none;font-variant-numeric:tabular-nums;
  white-space:nowrap;overflow:hidden}
.js-strip b{display:block;font-size:.95rem}
.js-strip [aria-current]{border:2px solid currentColor;font-weight:600}
.js-strip li>a:hover{border-color:currentColor}
ol.js-rel{list-style:none;margin:0;padding:0} .js-rel li{display:flex;gap:.7rem;font-size:.9rem;margin:0;
  padding:.12rem 0;font-variant-numeric:tabular-nums;white-space:nowrap}
.js-rel li>span:nth-child(2){flex:1;overflow:hidden;text-overflow:ellipsis;opacity:.8}
.js-rel a{font-weight:600}
</style>"""


@dataclass(frozen=True)
class Links:
    """Where links lead: addresses, not yet escaped; "" for no link."""

    feature: Callable[[str, int], str]
    """Of a site's latent."""
    token: Callable[[str], str] = lambda token: ""
    """Of the latents that a token drives."""
    attributes: str = ""
    """What else every link has, as HTML."""
    here: str = ""
    """Of the page itself, to be copied."""

    def to_feature(self, site: str, latent: int, inside: str, title: str = "") -> str:
        """`inside`, HTML, linked to a feature."""
        return self._link(self.feature(site, latent), inside, title)

    def to_token(self, token: str) -> str:
        """A token, linked to what it drives."""
        where = self.token(token) if len(token) <= _LONGEST_LINK else ""
        return self._link(where, markup.token_html(token), "")

    def _link(self, where: str, inside: str, title: str) -> str:
        if not where:
            return inside
        told = f' title="{html.escape(title)}"' if title else ""
        return f'<a href="{html.escape(where)}"{told} {self.attributes}>{inside}</a>'


def head_html(feature: Feature, links: Links) -> str:
    """Its place, label, notes and numbers, and what is odd about it."""
    label = ""
    if feature.label:
        yours = feature.label_source == "yours"
        label = (
            f'<p class="js-label">{html.escape(cards.one_line(feature.label))} '
            f"<small>{cards.source(feature)}</small></p>"
        )
        why = (
            f"Automatic label: {feature.automatic_label}" if yours else f"Evidence: {feature.label_evidence}"
        )
        if feature.automatic_label:
            label += f'<p class="js-why">{html.escape(cards.one_line(why))}</p>'
    else:
        label = '<p class="js-label"><small>No label: nothing that it fires on stands out.</small></p>'
    notes = (
        f'<div class="js-notes" aria-label="notes">{html.escape(markup.readable_text(feature.notes))}</div>'
        if feature.notes
        else ""
    )
    copy = (
        f'<a href="{html.escape(links.here)}" target="_self" data-js-copy>Copy link</a>' if links.here else ""
    )
    return (
        f'<div class="js-f"><div class="js-top"><h1>{html.escape(feature.title())}</h1>{copy}</div>'
        f"{label}{notes}"
        f"{markup.facts_html(feature.facts())}{_state_html(feature, links)}</div>"
    )


def strip_html(feature: Feature, sites: list[str], found: pd.DataFrame | None, links: Links) -> str:
    """The same direction through the layers: at each site the nearest latent (`Run.follow`), linked.

    `found` is None while they are looked for: the same boxes, of the same size.
    """
    rows = {} if found is None else {row["site"]: row for row in found.to_dict("records")}
    several = len({kind_of(site) for site in sites}) > 1
    items = []
    for site in sites:
        place = html.escape(site_label(site) if several else str(layer_of(site)))
        if site == feature.site.name:
            inside = f"{place}<b>this</b>{feature.latent}"
            items.append(f'<li><div aria-current="true">{inside}</div></li>')
        elif site not in rows:
            items.append(f"<li><div>{place}<b>{'…' if found is None else '–'}</b>&nbsp;</div></li>")
        else:
            items.append(f"<li>{_step(rows[site], place, links)}</li>")
    told = "Nearest latent of each layer by decoder cosine"
    return (
        f'<div class="js-strip" role="region" aria-label="{told}"><h2>This direction through the layers</h2>'
        f'<ol>{"".join(items)}</ol><p class="js-note">{told}: layer, cosine, latent.'
        f"{_chance(feature)}</p></div>"
    )


def main_html(feature: Feature, links: Links) -> str:
    """Its examples by band, and beside them what it says and fires on, and what is near it."""
    examples = _examples_html(feature)
    return f'<div class="js-f js-two"><div>{examples}</div><div>{_side_html(feature, links)}</div></div>'


def _state_html(feature: Feature, links: Links) -> str:
    tokens = f"{feature.site.manifest['tokens']:,}"
    said = []
    if feature.state == "silent":
        said.append(
            f"<b>Silent.</b> It never fired on the {tokens} indexed tokens. It may be dead, or wait for "
            "text that is not among them; what it would say, if it fired, is below."
        )
    elif feature.state == "dense":
        said.append(
            f"<b>Dense.</b> It fires on {markup.percent(feature.density)} of tokens, more than a tenth. Such "
            "latents often carry the position or the size of the activation, and no meaning of their own."
        )
    if feature.duplicate_of is not None:
        other = links.to_feature(feature.site.name, feature.duplicate_of, f"latent {feature.duplicate_of}")
        said.append(f"<b>Duplicate.</b> It points the same way and fires on the same tokens as {other}.")
    return "".join(f'<p class="js-state">{text}</p>' for text in said)


def _step(row: dict, place: str, links: Links) -> str:
    depth = 0.5 * max(0.0, row["cosine"])
    inside = f"{place}<b>{row['cosine']:.2f}</b>{row['latent']}"
    title = cards.one_line(f"{site_label(row['site'])} · {row['latent']} {row['label']}")
    where = html.escape(links.feature(row["site"], row["latent"]))
    return (
        f'<a href="{where}" title="{html.escape(title)}" {links.attributes} '
        f'style="background:rgba(20,150,130,{depth:.2f})">{inside}</a>'
    )


def _examples_html(feature: Feature) -> str:
    examples = feature.examples(context=FAR)
    if not len(examples):
        return "<h2>Examples</h2>" + markup.note_html("None: it never fired on the indexed text.")
    best = examples.loc[examples["band"] == 0]
    parts = ["<h2>Highest activations</h2>", markup.examples_html(best.head(_SHOWN), feature.max, REACH)]
    if len(best) > _SHOWN:
        inside = markup.examples_html(best.iloc[_SHOWN:], feature.max, REACH)
        parts.append(_band_html(f"{len(best) - _SHOWN} more of the highest", inside))
    parts.append("<h2>Examples by strength</h2>")
    for band, lower, upper, count in feature.bands().itertuples(index=False):
        rows = examples.loc[examples["band"] == band]
        share = markup.percent(count / max(1, feature.firings))
        name = f"{markup.number(lower)} to {markup.number(upper)}: {count:,} firings, {share}"
        parts.append(_band_html(name, markup.examples_html(rows, feature.max, REACH) if len(rows) else ""))
    manifest = feature.site.manifest
    note = (
        f"From {manifest['tokens']:,} tokens of {manifest['corpus']}, a place of each document. The bands "
        "are fifths of its range of activations, with a few places drawn from each. A value shows on hover, "
        "all of an example's when it has the focus or is clicked."
    )
    return "".join(parts) + markup.note_html(note)


def _band_html(name: str, inside: str) -> str:
    if not inside:
        return f'<p class="js-band js-none">{name}</p>'
    return f'<details class="js-band"><summary>{name}</summary>{inside}</details>'


def _side_html(feature: Feature, links: Links) -> str:
    parts = []
    drivers, logits = feature.drivers(), feature.logits()
    if feature.firings:
        parts += ["<h2>Activations where it fires</h2>", markup.histogram_html(feature.histogram())]
        parts += ["<h2>What it fires on</h2>", markup.drivers_html(drivers.head(_BEST), links.to_token)]
    parts += ["<h2>What it says</h2>", markup.logits_html(logits, links.to_token)]
    spread = feature.logit_histogram()
    if len(logits) and len(spread):
        parts.append(
            markup.histogram_html(
                spread, of="logits over the vocabulary", colour="rgb(20,150,130)", scale="standard deviations"
            )
        )
    parts += ["<h2>What is near it</h2>", related_html(feature, links), _row_html(feature)]
    return "".join(parts)


def related_html(feature: Feature, links: Links) -> str:
    """Its neighbours by decoder cosine and what fires with it, each linked."""
    near, together = feature.neighbours(), feature.cofiring()
    lists = [
        _related_list(f"{name}, by decoder cosine", near.loc[near["kind"] == kind], "cosine", links)
        for kind, name in cards.KINDS.items()
    ]
    lists.append(_related_list("Fires on the same tokens, by phi", together, "phi", links))
    return "".join(lists) or markup.note_html("Nothing: the index has no neighbours of it.")


def _related_list(heading: str, rows: pd.DataFrame, value: str, links: Links) -> str:
    if not len(rows):
        return ""
    items = []
    for row in rows.head(_BEST // 2).to_dict("records"):
        label = html.escape(cards.one_line(row["label"]))
        place = html.escape(f"{site_label(row['site'])} · {row['latent']}")
        link = links.to_feature(row["site"], row["latent"], place)
        items.append(
            f'<li><span>{link}</span><span title="{label}">{label}</span><span>{row[value]:.2f}</span></li>'
        )
    return f'<div class="js-h">{heading}</div><ol class="js-rel">{"".join(items)}</ol>'


def _row_html(feature: Feature) -> str:
    """What its decoder row is like."""
    facts = []
    if feature.decoder_norm is not None:
        facts.append(f"norm {markup.number(feature.decoder_norm)}")
    neurons = [
        f"{row['neuron']} ({row['value']:+.2f}, {markup.percent(row['share'])})"
        for row in feature.neurons().to_dict("records")
    ]
    if neurons:
        facts.append(f"largest entries {', '.join(neurons)} of its L1 norm")
    return f'<div class="js-h">Decoder row</div><p class="js-why">{"; ".join(facts)}</p>' if facts else ""


def _chance(feature: Feature) -> str:
    """What cosine says nothing."""
    try:
        width = len(feature.direction())
    except UserError:
        return ""
    best = (2 * math.log(max(2, len(feature.site))) / width) ** 0.5
    return f" The nearest of as many random directions would come to about {best:.2f}."
