"""A text through all layers: which features fire where, and which of them make the next token likely."""

import html
from collections.abc import Sequence

import pandas as pd
import streamlit as st

from activations.sites import site_label
from viewer import markup
from viewer.app import live_widgets
from viewer.app.background import Resident
from viewer.app.live_widgets import LONGEST_TEXT, MOST_TOKENS, answer
from viewer.app.shell import address, plain, render, set_address
from viewer.app.token_map import choice, token_map
from viewer.runs import Run

SAMPLES = (
    "The Eiffel Tower is in Paris, the capital of",
    "def add(a, b):\n    return a +",
    "In 1945 the Second World War came to an end, and",
    "She opened the door and walked into the",
)
_LISTED, _LISTED_OF_ALL = 10, 25
# tokens of a text whose next token is explained: gradients take the memory of every latent at each
_EXPLAINED = 64
_ROWS, _VERIFIED = 20, 10
VIEWS = {"map": "Layers and tokens", "explain": "Explain the next token"}


def show(run: Run) -> None:
    """The page."""
    text = live_widgets.text_state()
    view = st.query_params.get("view", "map")
    if view not in VIEWS:
        st.warning(plain(f"There is no view {view[:40]!r}: showing {VIEWS['map']}."))
        view = "map"
    st.title("Prompt")
    # the address is the state: widgets are set from it, and their callbacks write to it
    live_widgets.set_widgets(prompt=text, view=view)
    st.text_area(
        "Text", key="prompt", height=90, max_chars=LONGEST_TEXT, on_change=_typed,
        placeholder="Type or paste a text, then Ctrl+Enter",
    )  # fmt: skip
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button("Read it", type="primary")
        st.segmented_control(
            "View", list(VIEWS), key="view", format_func=lambda v: VIEWS[v], required=True,
            label_visibility="collapsed", on_change=_viewed,
        )  # fmt: skip
    if not text:
        st.html(_samples())
    elif not live_widgets.fits_address(text):
        st.caption("This text is too long for the address: a copied link will come without it.")
    _write()
    resident = live_widgets.ready(run)
    if resident is not None and text:
        (_map if view == "map" else _explain)(run, resident, text)


@st.fragment
def _map(run: Run, resident: Resident, text: str) -> None:
    """Layers by tokens, and the features of the token that is chosen."""
    trace = answer(resident, ("trace", text, _labels(run)), lambda: run.trace(text, limit=MOST_TOKENS))
    if trace is None:
        return
    dense = st.query_params.get("dense") == "1"
    token = _number(st.query_params.get("token"), len(trace.tokens))
    asked = st.query_params.get("site", "")
    if asked and asked not in trace.sites:
        st.warning(plain(f"This run has no site {asked[:80]!r}: showing all."))
    site = asked if asked in trace.sites else ""
    if trace.n_cut:
        said = f"Read are the first {len(trace.tokens):,} tokens; {trace.n_cut:,} more were left out."
        st.info(plain(said), icon=":material/content_cut:")
    densest = 1.0 if dense else 0.1
    row = trace.sites.index(site) if site else -1
    token_map(
        trace,
        densest=densest,
        chosen=(row, token),
        key="map",
        on_choice=lambda: _chosen(trace.sites),
    )
    live_widgets.set_widgets(dense=dense, layer=site)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox(
            "Layer", ["", *trace.sites], key="layer", width=190, on_change=_layered,
            format_func=lambda s: site_label(s) if s else "all layers",
        )  # fmt: skip
        st.toggle("Dense features too", key="dense", on_change=_densed)
    here = trace.frame["position"] == token
    here &= (trace.frame["site"] == site) if site else True
    rows = trace.strongest(trace.frame.loc[here], densest=densest)
    listed = rows.head(_LISTED if site else _LISTED_OF_ALL)
    where = site_label(site) if site else "all layers"
    title = f"{markup.readable(trace.tokens[token])} at {where}: {len(listed)} strongest of {len(rows)}"
    st.html(f'<h2 class="js-h">{html.escape(title)}</h2>{_features(listed)}')
    left_out = "" if dense else "Features that fire on more than a tenth of all tokens are left out. "
    st.html(markup.note_html(left_out + "BOS and other special tokens are not read."))


def _explain(run: Run, resident: Resident, text: str) -> None:
    """Features by what they do for a next token."""
    n_tokens = len(run.model.encode(text))
    if n_tokens > _EXPLAINED:
        st.info(plain(f"A text to explain has at most {_EXPLAINED} tokens; this one has {n_tokens:,}."))
        return
    likeliest = answer(resident, ("next", text), lambda: run.next_tokens(text))
    if likeliest is None:
        return
    target = _target(run, likeliest)
    found = answer(resident, ("attribute", text, target, _labels(run)), lambda: run.attribute(text, target))
    if found is None:
        return
    rows = found.frame.head(_ROWS)
    token = markup.readable(run.model.token_strings([target])[0])
    st.html(f'<h2 class="js-h">Features that raise or lower {html.escape(token)} most</h2>')
    table = st.empty()
    verified = None
    if st.query_params.get("verify") == "1":
        table.html(_attributions(rows))
        verified = answer(resident, ("verify", text, target), lambda: found.verify(_VERIFIED))
    else:
        st.button(f"Verify the first {_VERIFIED} by ablation", on_click=_write, kwargs={"verify": "1"})
    if verified is not None:
        rows = rows.join(verified.frame["measured"])
    table.html(_attributions(rows))
    said = (
        f"The logit of {token} is {found.value:.2f} above the mean of all tokens. An attribution is gradient "
        "times activation: about how far that would fall if the feature did not fire on that token. "
        "Those of different layers overlap: they are not parts of one sum."
    )
    if verified is not None:
        said += f" Ablating the first {len(verified.frame)}, one at a time, agrees with a correlation of "
        said += f"{verified.correlation:.2f}."
    st.html(markup.note_html(said))


def _target(run: Run, likeliest: pd.DataFrame) -> int:
    """The token to explain: the address's, else the model's likeliest. Draws what it is chosen with."""
    names = dict(zip(likeliest["id"].tolist(), likeliest["token"], strict=True))
    chances = dict(zip(likeliest["id"].tolist(), likeliest["probability"], strict=True))
    asked = st.query_params.get("target", "")
    target = next(iter(names))
    if asked:
        if asked.isascii() and asked.isdecimal() and len(asked) < 10 and int(asked) < run.model.d_vocab:
            target = int(asked)
        else:
            st.warning(plain(f"A token's id is from 0 to {run.model.d_vocab - 1}, not {asked[:40]!r}."))
    names.setdefault(target, run.model.token_strings([target])[0])
    live_widgets.set_widgets(target=target)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox(
            "Next token", list(names), key="target", width=260, on_change=_aimed,
            format_func=lambda i: plain(markup.readable(names[i]))
            + (f"  ({markup.percent(chances[i])})" if i in chances else ""),
        )  # fmt: skip
        other = st.text_input(
            "Or another", key="other", width=220, max_chars=80, placeholder="a word, with its space",
            on_change=_aimed_at, args=(run,),
        )  # fmt: skip
    if other and (pieces := run.model.encode(other)) and len(pieces) != 1:
        shown = ", ".join(map(markup.readable, run.model.token_strings(pieces)))
        st.warning(plain(f"{other!r} is {len(pieces)} tokens: {shown}. Mind the space before a word."))
    return target


def _features(rows: pd.DataFrame) -> str:
    from viewer.live.pictures import features_html

    if not len(rows):
        return markup.note_html("No feature fires here.")
    return features_html(rows, lambda site, latent: address("feature", site=site, latent=latent))


def _attributions(rows: pd.DataFrame) -> str:
    from viewer.live.pictures import attributions_html

    return attributions_html(rows, lambda site, latent: address("feature", site=site, latent=latent))


def _samples() -> str:
    from viewer.live.pictures import STYLE

    links = "".join(
        f'<li><a href="{html.escape(address("prompt", text=text))}" target="_self" data-js-link>'
        f"{html.escape(markup.readable_text(text.replace(chr(10), ' ')))}</a></li>"
        for text in SAMPLES
    )
    return f'{STYLE}<div class="js-links"><p class="js-note">For instance</p><ul>{links}</ul></div>'


def _labels(run: Run) -> int:
    """Changes when a label does, so that answers with labels in them are not shown for ever."""
    path = run.index.annotations.path
    return path.stat().st_mtime_ns if path.is_file() else 0


def _number(asked: str | None, n_tokens: int) -> int:
    """The token of the address, by number from 0; without one, the last."""
    if asked is None:
        return n_tokens - 1
    if asked.isascii() and asked.isdecimal() and len(asked) < 10 and int(asked) < n_tokens:
        return int(asked)
    st.warning(plain(f"A token here is a number from 0 to {n_tokens - 1}, not {asked[:40]!r}."))
    return n_tokens - 1


def _write(text: str | None = None, **changes: str) -> None:
    """Makes the address say what is shown, with changes; an empty value is left out."""
    known = ("view", "token", "site", "dense", "target", "verify")
    now = {name: st.query_params[name] for name in known if name in st.query_params}
    now = {name: value for name, value in {**now, **changes}.items() if value}
    set_address(**live_widgets.text_parameters(live_widgets.text_state() if text is None else text), **now)


def _typed() -> None:
    # of another text, another token
    _write(st.session_state["prompt"], token="", target="", verify="")


def _viewed() -> None:
    _write(view="" if st.session_state["view"] == "map" else st.session_state["view"])


def _chosen(sites: Sequence[str]) -> None:
    place = choice("map")
    if place is not None:
        row, column = place
        _write(site=sites[row] if 0 <= row < len(sites) else "", token=str(column))


def _layered() -> None:
    _write(site=st.session_state["layer"])


def _densed() -> None:
    _write(dense="1" if st.session_state["dense"] else "")


def _aimed() -> None:
    _write(target=str(st.session_state["target"]), verify="")


def _aimed_at(run: Run) -> None:
    pieces = run.model.encode(st.session_state["other"])
    if len(pieces) == 1:
        st.session_state["other"] = ""
        _write(target=str(pieces[0]), verify="")


render(show)
