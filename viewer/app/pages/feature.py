"""One feature: how often and how hard it fires, on what, and what it says."""

import random

import numpy as np
import streamlit as st

from activations.sites import site_label
from sae.errors import UserError
from viewer import cards, charts, markup
from viewer.app.shell import plain, render, set_address
from viewer.features import Feature, Site
from viewer.runs import Run


def show(run: Run) -> None:
    """The page."""
    sites = run.indexed
    if not sites:
        raise UserError(
            "the run must have a feature index", f"none in {run.path}", "build one with `jumpscope index`"
        )
    wanted = st.query_params.get("site", st.session_state.get("last_site", sites[0]))
    name = wanted if wanted in sites else sites[0]
    site = run.site(name)
    live = site.live()
    latent = _latent(site, live)
    go(name, latent)
    controls(sites, site, live, latent)
    if wanted != name:
        st.warning(plain(f"This run has no indexed site {wanted!r}: showing {name}."))
    if not len(live):
        st.warning(
            f"No latent of this site fired on the {site.manifest['tokens']:,} indexed tokens: all are dead."
        )
    show_feature(site[latent])


def controls(sites: list[str], site: Site, live: np.ndarray, latent: int) -> None:
    """Which site, which latent, and the ways to the next."""
    # the address is the state: widgets are set from it, and their callbacks write to it
    st.session_state.update(site=site.name, latent=latent)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox("Site", sites, key="site", format_func=site_label, on_change=_chosen, width=190)
        st.number_input("Latent", 0, len(site) - 1, key="latent", on_change=_chosen, width=150)
        before, after = live[live < latent], live[live > latent]
        previous = int(before[-1]) if len(before) else latent
        following = int(after[0]) if len(after) else latent
        st.button(
            "Previous",
            icon=":material/chevron_left:",
            shortcut="Left",
            on_click=go,
            args=(site.name, previous),
            disabled=not len(before),
        )
        st.button(
            "Next",
            icon=":material/chevron_right:",
            shortcut="Right",
            on_click=go,
            args=(site.name, following),
            disabled=not len(after),
        )
        anywhere = int(random.choice(live)) if len(live) else latent
        st.button(
            "Random",
            icon=":material/casino:",
            shortcut="D",
            on_click=go,
            args=(site.name, anywhere),
            disabled=not len(live),
        )


def show_feature(feature: Feature) -> None:
    """All that the index knows of it."""
    st.header(plain(feature.title()))
    st.html(cards.label_html(feature) + markup.facts_html(feature.facts()))
    if not feature.firings:
        st.info(
            "This latent never fired on the indexed text. What it would say is below.", icon=":material/info:"
        )
    left, right = st.columns([2, 3], gap="large")
    with left:
        st.html(markup.logits_html(feature.logits()) + markup.drivers_html(feature.drivers()))
        if feature.firings:
            st.html('<div class="js-h">Activations where it fires</div>')
            st.plotly_chart(
                charts.histogram(feature.histogram()), key="histogram", config={"displayModeBar": False}
            )
    with right:
        manifest = feature.site.manifest
        st.html(
            cards.examples_html(feature)
            + cards.related_html(feature)
            + markup.note_html(
                f"From {manifest['tokens']:,} tokens of {manifest['corpus']}, a place of each document."
            )
        )


def go(site: str, latent: int) -> None:
    """Makes a feature the one shown, in the address and for the next visit to this page."""
    set_address(site=site, latent=latent)
    st.session_state["last_site"], st.session_state["last_latent"] = site, latent


def _chosen() -> None:
    go(st.session_state["site"], st.session_state["latent"])


def _latent(site: Site, live: np.ndarray) -> int:
    """The latent that the address asks for, else the last one seen, else the first that fires."""
    first = int(live[0]) if len(live) else 0
    asked = st.query_params.get("latent")
    if asked is None and "site" not in st.query_params:
        asked = str(st.session_state.get("last_latent", first))
    if asked is None:
        return first
    if not asked.isascii() or not asked.isdecimal() or int(asked) >= len(site):
        st.warning(
            plain(
                f"A latent here is a number from 0 to {len(site) - 1}, not {asked[:40]!r}: showing {first}."
            )
        )
        return first
    return int(asked)


render(show)
