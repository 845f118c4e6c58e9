"""All features: a table to sort and filter, and the search by words, token and label, through all layers."""

import contextlib
import html
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from activations.sites import site_label
from sae.errors import UserError
from viewer import feature_html, listing
from viewer.app.shell import address, plain, render, set_address
from viewer.catalogue import SORTS, STATES, Choice, Found
from viewer.runs import Run

PAGE = 50
# as many latents as a search by words or token finds
MOST = 1000
LONGEST = 300
WAYS = {"words": "About these words", "token": "Fires on this token", "label": "Label has this text"}
_FALLING = ("density", "firings", "mean", "max", "score")
# what the address says unless it says otherwise, and so leaves out
DEFAULTS: dict[str, str] = {
    "q": "", "by": "words", "site": "", "state": "", "low": "", "high": "", "least": "", "sort": "",
    "reverse": "", "page": "1",
}  # fmt: skip


def show(run: Run) -> None:
    """The page."""
    if not run.indexed:
        raise UserError(
            "the run must have a feature index", f"none in {run.path}", "build one with `jumpscope index`"
        )
    asked = read_address(run)
    st.title("Features")
    controls(run, asked)
    set_address(**_short(asked))
    choice = _choice(asked)
    page = int(asked["page"])
    try:
        among = search(run, asked)
        found = run.browse(choice, among, start=(page - 1) * PAGE, rows=PAGE)
    except UserError as error:
        st.warning(plain(str(error)), icon=":material/search_off:")
        return
    for why in found.torn.values():
        st.warning(plain(why), icon=":material/error:")
    if not len(found.rows) and page > 1:
        page = max(1, math.ceil(found.total / PAGE))
        found = run.browse(choice, among, start=(page - 1) * PAGE, rows=PAGE)
    if asked["q"] and asked["by"] == "words":
        where = html.escape(address("prompt", text=asked["q"]))
        st.html(
            f'<p class="js-note"><a href="{where}" target="_self" data-js-link>Read it with the model</a> '
            "to see which features fire on it, layer by layer.</p>"
        )
    st.html(table_html(asked, choice, found, page))


def read_address(run: Run) -> dict[str, str]:
    """What the address asks for, all of it given and valid; what is not is told and left out."""
    asked = {name: st.query_params.get(name, usual)[:LONGEST] for name, usual in DEFAULTS.items()}
    known: Mapping[str, Any] = {
        "by": WAYS,
        "site": ("", *run.indexed),
        "state": ("", *STATES),
        "sort": ("", *SORTS),
    }
    for name, values in known.items():
        if asked[name] not in values:
            st.warning(plain(f"There is no {name} {asked[name]!r} here."))
            asked[name] = DEFAULTS[name]
    for name in ("low", "high", "least", "page"):
        if asked[name] and not _number(asked[name], whole=name == "page"):
            st.warning(plain(f"{name} must be a number, not {asked[name]!r}."))
            asked[name] = DEFAULTS[name]
    return asked


def controls(run: Run, asked: dict[str, str]) -> None:
    """The search and the filters, set from the address; what is chosen goes back into it."""
    state = {name: asked[name] for name in ("q", "by", "site", "state")}
    # percentages are for people, shares for the address
    state |= {name: 100 * float(asked[name]) if asked[name] else None for name in ("low", "high")}
    state["least"] = float(asked["least"]) if asked["least"] else None
    st.session_state.update({f"features {name}": value for name, value in state.items()})

    def options(name: str, said: Mapping[str, str], width: int) -> None:
        st.selectbox(
            name.capitalize(), list(said), key=f"features {name}", format_func=lambda v: said.get(v, v),
            on_change=_chosen, width=width,
        )  # fmt: skip

    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.text_input(
            "Search", key="features q", max_chars=LONGEST, on_change=_chosen, width=320,
            placeholder="Paris, or several words", icon=":material/search:",
        )  # fmt: skip
        options("by", WAYS, 210)
        options("site", {"": "All layers", **{site: site_label(site) for site in run.indexed}}, 170)
        options("state", {"": "All", **{name: name.capitalize() for name in STATES}}, 130)
        for name, label in {"low": "Density from, %", "high": "to, %", "least": "Highest from"}.items():
            st.number_input(
                label, min_value=0.0, value=None, key=f"features {name}", on_change=_chosen, format="%g",
                width=120,
            )  # fmt: skip


def search(run: Run, asked: dict[str, str]) -> pd.DataFrame | None:
    """What is found by words or token; None where the table needs no search."""
    text, sites = asked["q"], [asked["site"]] if asked["site"] else None
    if not text.strip(" ") and not (text and asked["by"] == "token"):
        return None
    if asked["by"] == "words":
        return run.find(text=text, sites=sites, limit=MOST)
    return _by_token(run, text, sites) if asked["by"] == "token" else None


def table_html(asked: dict[str, str], choice: Choice, found: Found, page: int) -> str:
    """The table between the ways to its other pages, or what to try where it is empty."""
    links = feature_html.Links(
        feature=lambda site, latent: address("feature", site=site, latent=latent),
        token=lambda token: address("features", q=token, by="token"),
        attributes='target="_self" data-js-link',
    )
    if not found.total:
        return listing.STYLE + (
            '<p class="js-state">No feature is like this. Try another spelling or a token with its space '
            "in front, search in all layers, or take filters away.</p>"
        )

    def to(**changes: str) -> str:
        return address("features", **_short({**asked, **changes}))

    def sort(column: str) -> str:
        again = column == choice.sort and not choice.reverse
        return to(sort=column, reverse="1" if again else "", page="1")

    rises = (choice.sort not in _FALLING) != choice.reverse
    above, below = (
        listing.pages_html(
            found.total, page, PAGE, links.attributes, lambda number: to(page=str(number)), name
        )
        for name in ("pages, above the table", "pages, below the table")
    )
    table = listing.table_html(found.rows, links, (choice.sort, rises), sort)
    return f"{listing.STYLE}{listing.PAGES_STYLE}{above}{table}{below if len(found.rows) > 20 else ''}"


def _by_token(run: Run, text: str, sites: list[str] | None) -> pd.DataFrame:
    """By a token as it reads; where the text has none such, also with a space in front or a capital."""
    bare = text.strip(" ")
    for spelled in dict.fromkeys((text, f" {bare}", f" {bare.capitalize()}", bare.capitalize())):
        with contextlib.suppress(UserError):
            return run.find(token=spelled, sites=sites, limit=MOST)
    return run.find(token=text, sites=sites, limit=MOST)


def _choice(asked: dict[str, str]) -> Choice:
    searched = asked["q"].strip() and asked["by"] != "label"
    return Choice(
        site=asked["site"],
        state=asked["state"],
        label=asked["q"] if asked["by"] == "label" else "",
        density=(float(asked["low"] or 0), float(asked["high"] or 1)),
        highest=float(asked["least"] or 0),
        sort=asked["sort"] or ("score" if searched else "place"),
        reverse=bool(asked["reverse"]),
    )


def _chosen() -> None:
    """A control was used: the address says so, on the first page, best first for a new search."""
    state = {
        name: st.session_state[f"features {name}"]
        for name in DEFAULTS
        if f"features {name}" in st.session_state
    }
    shares = {name: "" if state[name] is None else f"{state[name] / 100:g}" for name in ("low", "high")}
    least = "" if state["least"] is None else f"{state['least']:g}"
    kept = {name: st.query_params.get(name, "") for name in ("sort", "reverse")}
    if state["q"] != st.query_params.get("q", ""):
        kept = {}
    set_address(**_short({**DEFAULTS, **kept, **state, **shares, "least": least}))


def _short(asked: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in asked.items() if value and value != DEFAULTS[name]}


def _number(text: str, *, whole: bool) -> bool:
    if whole:
        return text.isascii() and text.isdecimal() and 0 < int(text) < 10**9
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


render(show)
