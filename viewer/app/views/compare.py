"""Two dictionaries of one site beside each other: what both have, what only one has, what split."""

import html
import math
from collections.abc import Callable, Sequence

import streamlit as st

from activations.sites import site_label
from sae.errors import UserError
from viewer import compare_html, listing, markup
from viewer.app import others
from viewer.app.others import Other
from viewer.app.shell import address, current, open_run, plain, render, run_paths, set_address
from viewer.compare import Comparison
from viewer.runs import Run

COSINE, ROWS = 0.7, 50


def show(run: Run) -> None:
    """The page."""
    st.title("Compare")
    # the controls stand above what decides them
    body, end = st.container(), st.container()
    with end:
        other = _other()
    if other is None:
        return
    with body:
        show_comparison(run, other)


def show_comparison(run: Run, other: Other) -> None:
    """The controls, and what they ask for."""
    sites = [s for s in run.sites if s in other.run.sites] if other.run else run.sites
    if not sites:
        must, do = "runs to compare must have a site in common", "choose others"
        raise UserError(must, f"none in {current()} and {other.name}", do)
    site, cosine = _controls(sites, other)
    shown, part = _choice("show", compare_html.KINDS, "matched"), _part()
    set_address(**_address(other, sites, site=site, cosine=cosine, show=shown, part=part))
    if other.dictionary is not None:
        _tell_place(other, site)
    with st.spinner(f"Comparing the latents of {plain(site_label(site))}: seconds, once"):
        found = others.compared(run, other, site, cosine, names=(current(), other.name))
    now = {"site": site, "cosine": cosine, "show": shown}
    _draw(
        run, other, found, shown, part, lambda **it: address("compare", **_address(other, sites, **now | it))
    )


def _address(other: Other, sites: Sequence[str], **values: object) -> dict[str, str]:
    """What the address must say: what is not as it would be without. A page that always completed its
    address would leave two entries in the browser's history."""
    usual = {"site": _usual_site(sites, other), "cosine": COSINE, "show": "matched", "part": 1}
    names = [name for name in run_paths() if name != current()]
    which = {} if other.run and other.name == names[0] else other.parameters()
    texts = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return which | {name: text for name, text in texts.items() if values[name] != usual[name]}


def _usual_site(sites: Sequence[str], other: Other) -> str:
    own = other.dictionary.cfg.site_out if other.dictionary is not None else ""
    return own if own in sites else sites[len(sites) // 2]


def _draw(run: Run, other: Other, found: Comparison, shown: str, part: int, at: Callable[..., str]) -> None:
    site = found.site
    rows = getattr(found, shown)
    parts = max(1, math.ceil(len(rows) / ROWS))
    part = min(part, parts)
    here = rows.iloc[(part - 1) * ROWS : part * ROWS]
    latents = (
        lambda n: _latent(current(), site, n, site in run.indexed),
        lambda n: _latent(other.name, site, n, other.run is not None and site in other.run.indexed),
    )
    labels = (lambda ns: _labels(run, site, ns), lambda ns: _labels(other.run, site, ns))
    pages = ""
    if parts > 1:
        link = 'target="_self" data-js-link'
        pages = listing.PAGES_STYLE + listing.pages_html(
            len(rows), part, ROWS, link, lambda number: at(part=number), "rows"
        )
    st.html(
        compare_html.STYLE
        + compare_html.cosines_html(found)
        + compare_html.tabs_html(found, shown, lambda kind: at(show=kind))
        + markup.note_html(compare_html.meaning(found, shown))
        + (
            compare_html.table_html(found, shown, here, latents, labels)
            if len(here)
            else '<p class="js-h">None. Another cosine may find some.</p>'
        )
        + pages
        + markup.note_html(_told(run, other, found))
    )


def _controls(sites: Sequence[str], other: Other) -> tuple[str, float]:
    """Site and cosine, from the address."""
    usual = _usual_site(sites, other)
    asked = st.query_params.get("site", usual)
    site = asked if asked in sites else usual
    if asked != site:
        st.warning(plain(f"{asked[:80]!r} is not a site of both: showing {site}."))
    cosine = _cosine()
    st.session_state.update(compare_site=site, compare_cosine=cosine)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        if other.run is not None:
            names = [name for name in run_paths() if name != current()]
            st.session_state["compare_with"] = other.name
            st.selectbox(plain(f"{current()} with"), names, key="compare_with", on_change=_chosen, width=220)
        st.selectbox("Site", sites, key="compare_site", format_func=site_label, on_change=_chosen, width=190)
        st.slider(
            "The same from cosine", 0.3, 1.0, step=0.05, key="compare_cosine", on_change=_chosen, width=260
        )
    return site, cosine


def _chosen() -> None:
    """A control was used: the address says so, from the first row on."""
    state, hub = st.session_state, st.query_params.get("hub")
    which = {"hub": hub} if hub else {"with": state["compare_with"]}
    kind = st.query_params.get("show", "matched")
    set_address(**which, site=state["compare_site"], cosine=f"{state['compare_cosine']:g}", show=kind)


def _other() -> Other | None:
    """What the address asks for, else the first other run; None, with the way to have one, for nothing."""
    names = [name for name in run_paths() if name != current()]
    asked, wanted = st.query_params.get("with"), st.query_params.get("hub", "")
    name = wanted
    if wanted or not names:
        name = _ask_hub(wanted)
    elif others.may_fetch():
        with st.expander("With a published dictionary instead"):
            name = _ask_hub("")
    if name and (dictionary := others.fetched(name)) is not None:
        return Other(name, None, dictionary)
    if wanted or not names:
        return None
    if asked not in (None, current(), *names):
        st.warning(plain(f"This viewer has no other run {asked[:80]!r}: showing {names[0]}."))
    chosen = asked if asked in names else names[0]
    return Other(chosen, open_run(chosen), None)


def _ask_hub(wanted: str) -> str:
    """The id of a dictionary of the hub that is here by now; "" until one is asked for and found."""
    if wanted and others.fetched(wanted) is not None:
        return wanted
    if len(run_paths()) == 1:
        st.info("To compare two runs, serve both: `jumpscope view RUN OTHER`.", icon=":material/info:")
    if not others.may_fetch():
        if wanted:
            st.info("Dictionaries of the hub are fetched at the viewer's own machine only.")
        return ""
    with st.form("hub", border=False):
        st.text_input(
            "Or a published dictionary, by its id at the hub",
            value=wanted[:200],
            key="hub_id",
            placeholder="google/gemma-scope-2-270m-pt/resid_post/layer_9_width_16k_l0_medium",
        )
        if st.form_submit_button("Fetch and compare"):
            try:
                return others.fetch(st.session_state["hub_id"])
            except UserError as error:
                st.error(plain(str(error)), icon=":material/error:")
    return ""


def _tell_place(other: Other, site: str) -> None:
    runs = [name for name in run_paths() if name != current()]
    if runs:
        link = html.escape(address("compare", **{"with": runs[0]}, site=site))
        st.html(
            f'<a class="js-note" href="{link}" target="_self" data-js-link>Compare with a run instead</a>'
        )
    own = other.dictionary.cfg.site_out if other.dictionary is not None else ""
    if own != site:
        st.info(
            plain(f"{other.name} was made for {own or 'a site that its files do not name'}, not for {site}.")
        )


def _latent(run: str, site: str, latent: int, indexed: bool) -> str:
    if not indexed:
        return str(latent)
    link = html.escape(address("feature", run=run, site=site, latent=latent))
    return f'<a href="{link}" target="_self" data-js-link>{latent}</a>'


def _labels(run: Run | None, site: str, latents: Sequence[int]) -> Sequence[str]:
    """Labels as they are now: a comparison is kept longer than they stay."""
    if run is None or site not in run.indexed:
        return [""] * len(latents)
    return run.index.labels_of(site, latents)


def _told(run: Run, other: Other, found: Comparison) -> str:
    counts = f"{len(found.ours):,} latents of {found.names[0]}, {len(found.theirs):,} of {found.names[1]}"
    bare = [
        n for n, r in ((current(), run), (other.name, other.run)) if r is None or found.site not in r.indexed
    ]
    why = f"; all of {' and '.join(bare)}, which has no index here" if bare else ""
    return f"Compared are those that fired on the indexed text: {counts}{why}."


def _choice(name: str, values: Sequence[str], default: str) -> str:
    asked = st.query_params.get(name, default)
    if asked not in values:
        st.warning(plain(f"There is no table {asked[:40]!r}: showing {default}."))
        return default
    return asked


def _part() -> int:
    asked = st.query_params.get("part", "1")
    return max(1, int(asked)) if asked.isascii() and asked.isdecimal() and len(asked) < 9 else 1


def _cosine() -> float:
    asked = st.query_params.get("cosine", str(COSINE))
    try:
        value = float(asked)
    except ValueError:
        value = math.nan
    if not 0.3 <= value <= 1:
        st.warning(plain(f"The cosine must be from 0.3 to 1, not {asked[:20]!r}: showing {COSINE}."))
        return COSINE
    return value


render(show)
