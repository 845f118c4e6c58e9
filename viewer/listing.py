"""A page of latents as an HTML table whose headings sort and whose rows lead to the features."""

import html
import math
from collections.abc import Callable

import pandas as pd

from activations.sites import site_label
from viewer import cards, markup
from viewer.catalogue import STATES
from viewer.feature_html import Links

STYLE = """<style>
.js-list{font-size:.9rem} .js-list .js-table{white-space:nowrap}
.js-list td.js-text,.js-list th.js-text{text-align:left}
.js-list td.js-wide{white-space:normal;min-width:15rem;max-width:34rem;overflow-wrap:anywhere}
.js-list td{vertical-align:top} .js-list td .js-t{white-space:pre}
.js-list tbody tr:hover{background:rgba(128,128,128,.1)}
.js-list th a{text-decoration:none;color:inherit} .js-list th a:hover{text-decoration:underline}
.js-list a:focus-visible{outline:2px solid rgb(20,150,130);outline-offset:2px;border-radius:3px}
.js-badge{border:1px solid currentColor;border-radius:3px;padding:0 .3rem;font-size:.75rem}
</style>"""
PAGES_STYLE = """<style>
.js-pages{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;align-items:baseline;font-size:.9rem;
  margin:.2rem 0 .5rem;
  font-variant-numeric:tabular-nums} .js-pages a{color:inherit;font-weight:600;text-underline-offset:3px;
  text-decoration-color:rgb(20,150,130)} .js-pages span{opacity:.75}
.js-pages a:focus-visible{outline:2px solid rgb(20,150,130);outline-offset:2px;border-radius:3px}
</style>"""
_COLUMNS = {
    "score": "score",
    "place": "feature",
    "label": "label",
    "token": "fires on",
    "density": "density",
    "firings": "firings",
    "max": "highest",
    "mean": "mean",
}
_TEXTS = ("place", "label", "token")


def table_html(
    rows: pd.DataFrame, links: Links, sorted_by: tuple[str, bool], sort: Callable[[str], str]
) -> str:
    """The rows of `catalogue.Found`. `sort` gives the address that sorts by a column, unescaped.

    `sorted_by` is the column in whose order they are, and whether it rises.
    """
    searched = bool(rows["score"].notna().to_numpy().any())
    columns = {name: said for name, said in _COLUMNS.items() if searched or name != "score"}
    heads = []
    for name, said in columns.items():
        now, arrow = "", ""
        if name == sorted_by[0]:
            now = f' aria-sort="{"ascending" if sorted_by[1] else "descending"}"'
            arrow = " ↑" if sorted_by[1] else " ↓"
        text = ' class="js-text"' if name in _TEXTS else ""
        link = f'<a href="{html.escape(sort(name))}" {links.attributes}>{said}{arrow}</a>'
        heads.append(f'<th scope="col"{text}{now}>{link}</th>')
    body = "".join(f"<tr>{_cells(row, links, searched)}</tr>" for row in rows.to_dict("records"))
    table = f'<table class="js-table"><thead><tr>{"".join(heads)}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="js-list js-scroll" tabindex="0" role="region" aria-label="features">{table}</div>'


def pages_html(
    total: int, page: int, size: int, attributes: str, to: Callable[[int], str], name: str = "pages"
) -> str:
    """Which rows of how many are shown, and the ways to the others. `to` gives a page's address, unescaped.

    `attributes` are those of each link, with PAGES_STYLE on the page. `name` is for those who
    cannot see where it stands: two on a page need two.
    """
    pages = max(1, math.ceil(total / size))
    low, high = (page - 1) * size + 1, min(total, page * size)
    ways = {"First": 1, "Previous page": page - 1, "Next page": page + 1, "Last": pages}
    shown = [
        f'<a href="{html.escape(to(number))}" {attributes}>{way}</a>'
        if 1 <= number <= pages and number != page
        else f"<span>{way}</span>"
        for way, number in ways.items()
    ]
    many = f"<b>{low:,} to {high:,}</b> of {total:,}" if total else "<b>None</b>"
    return f'<nav class="js-pages" aria-label="{html.escape(name)}"><div>{many}</div>{"".join(shown)}</nav>'


def _cells(row: dict, links: Links, searched: bool) -> str:
    place = html.escape(f"{site_label(row['site'])} · {row['latent']}")
    badges = [row["state"]] if row["state"] in STATES[1:] else []
    if not math.isnan(row["duplicate_of"]):
        badges.append(f"duplicate of {row['duplicate_of']:.0f}")
    odd = "".join(f' <span class="js-badge">{html.escape(badge)}</span>' for badge in badges)
    label = html.escape(cards.one_line(row["label"]))
    if row["label_source"] == "yours":
        label = f"<b>{label}</b> <small>your label</small>"
    if row["why"]:
        label += f"<br><small>{html.escape(cards.one_line(row['why']))}</small>"
    token = links.to_token(row["token"]) if row["token"] else ""
    fires = bool(row["firings"])
    cells = [
        f"<td>{markup.number(row['score'], 2)}</td>" if searched else "",
        f'<td class="js-text">{links.to_feature(row["site"], row["latent"], place)}{odd}</td>',
        f'<td class="js-text js-wide">{label}</td>',
        f'<td class="js-text">{token}</td>',
        f"<td>{markup.percent(row['density']) if fires else '–'}</td>",
        f"<td>{row['firings']:,}</td>",
        f"<td>{markup.number(row['max']) if fires else '–'}</td>",
        f"<td>{markup.number(row['mean']) if fires else '–'}</td>",
    ]
    return "".join(cells)
