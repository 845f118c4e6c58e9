"""The model with features steered and ablated, beside the model as it is."""

import html
import math

import streamlit as st

from activations.sites import site_label
from sae.errors import UserError
from viewer import markup
from viewer.app import live_widgets
from viewer.app.background import Resident
from viewer.app.live_widgets import Steered, answer
from viewer.app.shell import address, plain, render, set_address
from viewer.runs import Run

MOST_FEATURES, STRONGEST = 12, 4.0
# new tokens: fewest, most, and as many as without being told
_NEW = (1, 200, 40)
_HOTTEST = 2.0
_OFF = "off"
_LONGEST_PROMPT = 4000
_SHOWN = 10


def show(run: Run) -> None:
    """The page."""
    steered = _steered(run)
    text = live_widgets.text_state("I think that")[:_LONGEST_PROMPT]
    n_new, temperature, seed = _settings()
    going = st.query_params.get("go") == "1"
    st.title("Steer")
    _features(run, steered)
    _add(run, steered)
    # the address is the state: widgets are set from it, and their callbacks write to it
    live_widgets.set_widgets(steer_prompt=text, new=n_new, heat=temperature, seed=seed)
    st.text_area("Prompt", key="steer_prompt", height=90, max_chars=_LONGEST_PROMPT, on_change=_typed)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.number_input("New tokens", *_NEW[:2], key="new", on_change=_changed, width=130)
        st.number_input("Temperature", 0.0, _HOTTEST, step=0.1, key="heat", on_change=_changed, width=130)
        st.number_input("Seed", 0, 2**31 - 1, key="seed", on_change=_changed, width=130)
        st.button(
            "Generate", type="primary", disabled=not (steered and text), on_click=_write, kwargs={"go": "1"}
        )
        stop = st.empty()
    _write(steered=steered, go="1" if going else "")
    resident = live_widgets.ready(run)
    if resident is None or not steered or not text:
        return
    _next_tokens(run, resident, steered, text)
    if going:
        st.html('<h2 class="js-h">How it goes on</h2>')
        stop.button("Stop", icon=":material/stop:", on_click=_write, kwargs={"go": ""})
        live_widgets.generation(run, resident, steered, text, n_new, temperature, seed)
        stop.empty()


def _features(run: Run, steered: tuple[Steered, ...]) -> None:
    """A row a feature: what it is, how strongly, or not at all."""
    if not steered:
        st.html(
            markup.note_html(
                "Choose a feature below, or come here from a feature's page. A strength of 1 adds its "
                "highest activation at every token; ablated, it does not fire."
            )
        )
    else:
        st.html(markup.note_html("Strengths are in units of each feature's highest activation."))
    for place, (site, latent, strength) in enumerate(steered):
        name = f"{site}:{latent}"
        link = html.escape(address("feature", site=site, latent=latent))
        label = html.escape(markup.readable_text(_label(run, site, latent)))
        live_widgets.set_widgets(**{f"strength {name}": strength or 0.0, f"off {name}": strength is None})
        with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
            st.html(
                f'<div class="js-table"><a href="{link}" target="_self" data-js-link>'
                f"{html.escape(site_label(site))} · {latent}</a><br><small>{label}</small></div>",
                width=230,
            )
            st.slider(
                f"Strength of {site_label(site)} · {latent}", -STRONGEST, STRONGEST, step=0.1,
                key=f"strength {name}", disabled=strength is None, label_visibility="collapsed", width=320,
                on_change=_restrung, args=(steered, place),
            )  # fmt: skip
            st.toggle("Ablate", key=f"off {name}", on_change=_restrung, args=(steered, place))
            st.button(
                "Remove", key=f"remove {name}", icon=":material/close:", type="tertiary", on_click=_write,
                kwargs={"steered": steered[:place] + steered[place + 1 :], "go": ""},
            )  # fmt: skip


def _add(run: Run, steered: tuple[Steered, ...]) -> None:
    """Where another feature is named."""
    if len(steered) >= MOST_FEATURES:
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox("Layer", run.sites, key="add_site", format_func=site_label, width=190)
        st.number_input("Feature", 0, None, 0, key="add_latent", width=150)
        st.button("Add", icon=":material/add:", on_click=_added, args=(steered,))


def _next_tokens(run: Run, resident: Resident, steered: tuple[Steered, ...], text: str) -> None:
    from viewer.live.pictures import next_tokens_html

    found = answer(
        resident,
        ("next", steered, text),
        lambda: live_widgets.intervention(run, steered).next_tokens(text, _SHOWN),
    )
    if found is not None:
        st.html(f'<h2 class="js-h">Next token</h2>{next_tokens_html(found)}')


def _steered(run: Run) -> tuple[Steered, ...]:
    """The features of the address; what is none is told and left out."""
    found: dict[tuple[str, int], float | None] = {}
    asked = st.query_params.get("f", "")
    for part in asked.split(",") if asked else []:
        try:
            site, latent, strength = part.rsplit(":", 2)
            if site not in run.sites or not latent.isascii() or not latent.isdecimal() or len(latent) > 9:
                raise ValueError
            value = None if strength == _OFF else float(strength)
            if value is not None and not math.isfinite(value):
                raise ValueError
            if int(latent) >= _width(run, site):
                raise ValueError
        except ValueError:
            st.warning(plain(f"{part[:80]!r} is no feature of this run with a strength, and is left out."))
            continue
        found[site, int(latent)] = value if value is None else max(-STRONGEST, min(STRONGEST, value))
    if len(found) > MOST_FEATURES:
        st.warning(f"At most {MOST_FEATURES} features are steered at once: the first of them.")
    return tuple((site, latent, value) for (site, latent), value in found.items())[:MOST_FEATURES]


def _width(run: Run, site: str) -> int:
    """How many latents a site has."""
    return len(run.site(site)) if site in run.indexed else run.dictionary(site).cfg.d_sae


def _settings() -> tuple[int, float, int]:
    """New tokens, temperature and seed; a bad value is told, and the usual one taken."""
    values = []
    for name, low, high, usual in (("n", *_NEW), ("t", 0.0, _HOTTEST, 0.0), ("seed", 0, 2**31 - 1, 0)):
        asked = st.query_params.get(name)
        value = usual
        if asked is not None:
            try:
                value = type(usual)(asked)
                if not low <= value <= high:
                    raise ValueError
            except ValueError:
                value = usual
                st.warning(plain(f"{name} is from {low:g} to {high:g}, not {asked[:40]!r}: taking {usual}."))
        values.append(value)
    return values[0], values[1], values[2]


def _label(run: Run, site: str, latent: int) -> str:
    try:
        return run.index.labels_of(site, [latent])[0]
    except UserError:
        # a site without an index
        return ""


def _write(steered: tuple[Steered, ...] | None = None, text: str | None = None, **changes: str) -> None:
    """Makes the address say what is shown, with changes; an empty value is left out."""
    now = {name: st.query_params[name] for name in ("f", "n", "t", "seed", "go") if name in st.query_params}
    if steered is not None:
        now["f"] = ",".join(
            f"{site}:{latent}:{_OFF if strength is None else f'{strength:g}'}"
            for site, latent, strength in steered
        )
    now = {name: value for name, value in {**now, **changes}.items() if value}
    text = live_widgets.text_state("I think that") if text is None else text
    set_address(**now, **live_widgets.text_parameters(text))


def _typed() -> None:
    _write(text=st.session_state["steer_prompt"], go="")


def _changed() -> None:
    state = st.session_state
    _write(n=str(state["new"]), t=f"{state['heat']:g}", seed=str(state["seed"]), go="")


def _restrung(steered: tuple[Steered, ...], place: int) -> None:
    site, latent, _ = steered[place]
    name, state = f"{site}:{latent}", st.session_state
    strength = None if state[f"off {name}"] else round(state[f"strength {name}"], 2)
    _write(steered=(*steered[:place], (site, latent, strength), *steered[place + 1 :]), go="")


def _added(steered: tuple[Steered, ...]) -> None:
    site, latent = st.session_state["add_site"], st.session_state["add_latent"]
    rest = tuple(one for one in steered if one[:2] != (site, latent))
    _write(steered=(*rest, (site, latent, 1.0)), go="")


render(show)
