"""One feature: how often and how hard it fires, on what, what it says, and where else its direction is."""

import random

import numpy as np
import pandas as pd
import streamlit as st

from activations.sites import site_label
from sae.errors import UserError
from viewer import feature_html
from viewer.app import labels, live_widgets
from viewer.app.shell import address, copy_links, plain, render, set_address
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
    feature = site[latent]
    controls(sites, feature, live)
    if wanted != name:
        st.warning(plain(f"This run has no indexed site {wanted!r}: showing {name}."))
    if not len(live):
        st.warning(
            f"No latent of this site fired on the {site.manifest['tokens']:,} indexed tokens: all are dead."
        )
    show_feature(run, feature)


def controls(sites: list[str], feature: Feature, live: np.ndarray) -> None:
    """Which site, which latent, the ways to the next, and what can be done with this one."""
    site, latent = feature.site, feature.latent
    # the address is the state: widgets are set from it, and their callbacks write to it
    st.session_state.update(site=site.name, latent=latent)
    before, after = live[live < latent], live[live > latent]
    ways = {
        "Previous": ("chevron_left", "Left", before[-1:]),
        "Next": ("chevron_right", "Right", after[:1]),
        "Random": ("casino", "D", live[[random.randrange(len(live))]] if len(live) else live),
    }
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox("Site", sites, key="site", format_func=site_label, on_change=_chosen, width=190)
        st.number_input("Latent", 0, len(site) - 1, key="latent", on_change=_chosen, width=150)
        for name, (icon, key, to) in ways.items():
            st.button(
                name,
                icon=f":material/{icon}:",
                shortcut=key,
                on_click=go,
                args=(site.name, int(to[0]) if len(to) else latent),
                disabled=not len(to),
            )
        st.button("Label", icon=":material/edit:", shortcut="E", on_click=labels.begin, args=(feature,))
        export(feature)
    labels.dialog(feature)


def export(feature: Feature) -> None:
    """A button that gives the page as a file; made when it is pressed."""

    def page() -> str:
        from viewer.static import feature_page  # late: few pages are exported

        return feature_page(feature)

    st.download_button(
        "Export",
        page,
        file_name=f"{feature.site.name}.{feature.latent}.html",
        mime="text/html",
        icon=":material/download:",
        on_click="ignore",
        help="This page as a file that opens without a server",
    )


def show_feature(run: Run, feature: Feature) -> None:
    """All that the index knows of it, and where else its direction is."""
    links = feature_html.Links(
        feature=lambda site, latent: address("feature", site=site, latent=latent),
        token=lambda token: address("features", q=token, by="token"),
        attributes='target="_self" data-js-link',
        here=address("feature", site=feature.site.name, latent=feature.latent),
    )
    st.html(feature_html.STYLE + feature_html.head_html(feature, links))
    strip = st.empty()
    strip.html(feature_html.strip_html(feature, run.sites, None, links))
    st.html(feature_html.main_html(feature, links))
    # last, because it reads every decoder: the page is there by now, and has kept its place
    strip.html(feature_html.strip_html(feature, run.sites, _follow(run, feature), links))
    st.subheader("Try it")
    # asked once here: each box would tell on its own that the model is not there
    if live_widgets.ready(run) is not None:
        live_widgets.try_text(run, feature)
        live_widgets.steer_box(run, feature)
    copy_links()


def go(site: str, latent: int) -> None:
    """Makes a feature the one shown, in the address and for the next visit to this page."""
    set_address(site=site, latent=latent)
    st.session_state["last_site"], st.session_state["last_latent"] = site, latent


def _follow(run: Run, feature: Feature) -> pd.DataFrame:
    """The nearest latent of each layer; of the layers beside it where the dictionaries are not here."""
    try:
        return run.follow(feature)
    except UserError:
        near = feature.neighbours()
        return near.loc[near["kind"] != "cosine"].drop_duplicates("kind")


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
