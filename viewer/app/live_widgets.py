"""What pages that need the language model share, and two boxes for a feature's page."""

import html
from collections.abc import Callable, Hashable
from typing import Any
from urllib.parse import quote

import streamlit as st

from sae.errors import UserError
from viewer import markup
from viewer.app import background
from viewer.app.background import Resident
from viewer.app.shell import address, plain
from viewer.features import Feature
from viewer.runs import Run

LONGEST_TEXT = 20_000
"""Characters that can be typed."""
_LONGEST_IN_ADDRESS = 6_000
MOST_TOKENS = 200
"""Tokens of a text that are traced; the rest is cut, and said to be."""
_BOX_TOKENS = 24
_LAST = "last_prompt"


def ready(run: Run) -> Resident | None:
    """The run's live side once its model is loaded; until then says what is going on, and looks again."""
    resident = background.resident(run)
    if resident.state == "loading":
        _watch(resident)
        return None
    if resident.state == "absent":
        _absent(resident)
        return None
    return resident


@st.fragment(run_every=1.0)
def _watch(resident: Resident) -> None:
    if resident.state != "loading":
        st.rerun()
    what = f"Loading {resident.doing}: {resident.seconds:.0f} s. Everything else works meanwhile."
    st.html(f'<p class="js-note" role="status">{html.escape(what)}</p>')


def _absent(resident: Resident) -> None:
    what = "The language model is not loaded." if resident.on_request else "The language model is not here."
    rest = "Prompts, steering and explanations need it; everything else works without."
    st.info(plain(f"{what} {resident.why} {rest}"), icon=":material/info:")
    label = "Load it all the same" if resident.on_request else "Try again"
    st.button(
        label,
        key=f"load {label}",
        on_click=resident.load,
        kwargs={"asked": resident.on_request},
    )


def answer(resident: Resident, key: Hashable, compute: Callable[[], Any]) -> Any:
    """`Resident.call`, telling while others are ahead. None where the call is refused, which is told."""
    place = st.empty()

    def waiting(ahead: int) -> None:
        # Streamlit ends a script that is no longer wanted when it next draws
        calls = "one other call" if ahead == 1 else f"{ahead} other calls"
        place.html(f'<p class="js-note" role="status">Waiting for {calls} of the model to end.</p>')

    try:
        found = resident.call(key, compute, waiting)
    except UserError as error:
        place.warning(plain(str(error)), icon=":material/error:")
        return None
    place.empty()
    return found


def set_widgets(**values: object) -> None:
    """Makes widgets, by key, show what the address says; what is half typed in one that does so stays."""
    for key, value in values.items():
        if key not in st.session_state or st.session_state[key] != value:
            st.session_state[key] = value


def text_state(default: str = "") -> str:
    """The text that the address has; without one, the last one of this session."""
    return st.query_params.get("text", st.session_state.get(_LAST, default))[:LONGEST_TEXT]


def text_parameters(text: str) -> dict[str, str]:
    """A text as a parameter of the address; kept by the session alone where an address cannot hold it."""
    st.session_state[_LAST] = text
    return {"text": text} if fits_address(text) else {}


def fits_address(text: str) -> bool:
    """Whether a link with the text would still work everywhere."""
    return len(quote(text, errors="replace")) <= _LONGEST_IN_ADDRESS


@st.fragment
def try_text(run: Run, feature: Feature) -> None:
    """A text of your own, coloured by where this feature fires."""
    from viewer.live.trace import Trace

    st.session_state.setdefault("try_text", text_state())
    text = st.text_area(
        "Try your own text", key="try_text", height=80, max_chars=LONGEST_TEXT,
        placeholder="Type a text, then Ctrl+Enter", on_change=_keep, args=("try_text",),
    )  # fmt: skip
    asked = st.button("Show where it fires", key="try_go") or st.session_state.pop("try_text typed", False)
    resident = ready(run)
    if resident is None or not text:
        return
    site = feature.site.name
    # of all latents of the site, so that the next feature has its answer at once
    key = ("try", site, text)
    trace: Trace | None = resident.kept(key)
    if trace is None and asked:
        trace = answer(resident, key, lambda: run.trace(text, sites=[site], limit=MOST_TOKENS))
    if trace is None:
        return
    mine = trace.frame.loc[trace.frame["latent"] == feature.latent]
    values = [0.0] * len(trace.tokens)
    for position, value in zip(mine["position"], mine["activation"], strict=True):
        values[position] = float(value)
    top = max(feature.max, *values)
    peak = max(range(len(values)), key=values.__getitem__)
    said = f"Fires on {len(mine)} of {len(values)} tokens." if len(mine) else "It does not fire on this text."
    cut = f" {trace.n_cut:,} more tokens were left out." if trace.n_cut else ""
    st.html(
        f'<div class="js-ex">{markup.example_html(trace.tokens, values, peak, top)}</div>'
        + markup.note_html(said + cut)
    )
    link = address("prompt", **({"text": text} if fits_address(text) else {}))
    st.html(_link(link, "All layers of this text"))


@st.fragment
def steer_box(run: Run, feature: Feature) -> None:
    """This feature steered in a prompt, beside the model as it is."""
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    st.session_state.setdefault("steer_text", text_state("I think that"))
    text = left.text_input(
        "Prompt to steer", key="steer_text", max_chars=2000, on_change=_keep, args=("steer_text",)
    )
    strength = right.slider(
        "Strength, in units of its highest activation", -3.0, 3.0, 1.0, 0.1, key="steer_strength"
    )
    asked = st.button("Generate", key="steer_go")
    resident = ready(run)
    if resident is None or not text:
        return
    site, latent = feature.site.name, feature.latent
    steered = ((site, latent, strength),)
    generation(run, resident, steered, text, _BOX_TOKENS, 0.0, 0, only_kept=not asked)
    fits = {"text": text} if fits_address(text) else {}
    link = address("steer", f=f"{site}:{latent}:{strength:g}", **fits)
    st.html(_link(link, "More features and settings"))


Steered = tuple[str, int, float | None]
"""A site, a latent and its strength, or None where it is ablated."""


def generation(
    run: Run,
    resident: Resident,
    steered: tuple[Steered, ...],
    text: str,
    n_new: int,
    temperature: float,
    seed: int,
    *,
    only_kept: bool = False,
) -> None:
    """Writes on from a text, with features steered and without, drawn as it is written.

    It ends early when the session does anything else. With `only_kept` only what was written before is shown.
    """
    from viewer.live.pictures import STYLE, generation_html

    key = ("generate", steered, text, n_new, temperature, seed)
    if only_kept and resident.kept(key) is None:
        return
    st.html(STYLE)
    place, sides = st.empty(), {"with": "", "without": ""}

    def progress(side: str, written: str, count: int) -> None:
        sides[side] = written
        note = f"{side.capitalize()}: {count} of {n_new} tokens. Any change stops it."
        place.html(generation_html(text, sides["with"], sides["without"], note=note))

    def compute() -> Any:
        changed = intervention(run, steered)
        how = {"max_new_tokens": n_new, "temperature": temperature, "seed": seed}
        return changed.generate(text, **how, progress=progress)

    found = answer(resident, key, compute)
    if found is not None:
        place.html(generation_html(text, found.text, found.without))


def intervention(run: Run, steered: tuple[Steered, ...]) -> Any:
    """The intervention that steers and ablates these."""
    strengths = {(site, latent): strength for site, latent, strength in steered if strength is not None}
    ablated = [(site, latent) for site, latent, strength in steered if strength is None]
    return run.intervene(strengths, ablated)


def _link(href: str, text: str) -> str:
    from viewer.live.pictures import STYLE

    link = f'<a href="{html.escape(href)}" target="_self" data-js-link>{html.escape(text)}</a>'
    return f'{STYLE}<div class="js-links">{link}</div>'


def _keep(key: str) -> None:
    st.session_state[_LAST] = st.session_state[key]
    st.session_state[f"{key} typed"] = True
