"""Every layer at a glance: what it costs, how often latents fire, how thresholds sit, how it trained."""

import html
import math

import pandas as pd
import streamlit as st

from activations.sites import site_label
from sae.numbers import format_count
from viewer import charts, figures, markup
from viewer.app.shell import address, plain, render, set_address
from viewer.health import BARELY, LOG10_EDGES
from viewer.runs import Run

_FACTS = {
    "model": "model",
    "corpus": "corpus",
    "width": "latents a layer",
    "l0": "target L0",
    "tokens": "training tokens",
}
_PARAMETERS = ("step", "site", "layer", "rows")
_FIRST = ("l0", "fvu", "loss", "dead", "threshold")


def show(run: Run) -> None:
    """The page."""
    config, metrics, health = run.config(), run.overview(), run.health()
    st.title(plain(run.name), anchor=False)
    facts = [(name, _short(config[key])) for key, name in _FACTS.items() if key in config]
    parts = [figures.STYLE, markup.facts_html([*facts, ("state", run.state())])]
    last, evaluated = run.last_step(), bool(run.folder and run.folder.eval_table())
    if not evaluated and len(last):
        metrics = _of_training(metrics, last, config)
        parts.append(
            markup.note_html(
                f"Not evaluated yet: L0, FVU and dead are of training, at step {last['step'].max():,}."
            )
        )
    parts += [_layers(metrics), _table(metrics, health), _densities(health), _thresholds(health)]
    st.html("".join(parts))
    _advise(run, evaluated, health)
    show_curves(run)


def show_curves(run: Run) -> None:
    """The training log, one metric at a time."""
    log = run.curves()
    st.html(_section("Training", ""))
    if log.empty or not {"step", "site"} <= set(log.columns):
        set_address()
        st.info("Nothing was logged in training.", icon=":material/info:")
        return
    numeric = [c for c in log.select_dtypes("number").columns if c not in _PARAMETERS]
    order = [*(c for c in _FIRST if c in numeric), *(c for c in numeric if c not in _FIRST)]
    asked = st.query_params.get("curve", order[0])
    if asked not in order:
        st.warning(plain(f"The training log has no {asked[:40]!r}. It has {', '.join(order)}."))
    st.session_state["curve"] = asked if asked in order else order[0]
    chosen = st.selectbox("Metric", order, key="curve", width=220, on_change=_chosen) or order[0]
    _remember(chosen, order[0])
    labels = {site: site_label(site) for site in run.sites}
    figure = charts.curves(log, chosen, labels)
    st.plotly_chart(figure, key="curves", config={"displayModeBar": False}, height=340)


def _chosen() -> None:
    _remember(st.session_state["curve"], "")


def _remember(curve: str, usual: str) -> None:
    """In the address, where it is not what the page shows anyway."""
    if curve == usual:
        set_address()
    else:
        set_address(curve=curve)


def _of_training(metrics: pd.DataFrame, last: pd.DataFrame, config: dict) -> pd.DataFrame:
    """What training logged last, in the place of what is not measured yet."""
    known = last.set_index("site")
    filled = metrics.set_index("site")
    for name in ("l0", "fvu", "dead"):
        if name in known:
            filled[name] = known[name]
    if isinstance(config.get("l0"), int | float):
        filled["l0_target"] = float(config["l0"])
    return filled.reset_index()


def _layers(metrics: pd.DataFrame) -> str:
    """Charts by layer of what is known."""
    wanted = [
        ({"l0": "L0", "l0_target": "target"}, "Latents firing on a token (L0)", {}),
        ({"fvu": "FVU"}, "Variance left unexplained (FVU)", {}),
        ({"delta_ce": "delta CE"}, "Loss added by splicing, nats (delta CE)", {"error": "delta_ce_se"}),
        (
            {"ce_recovered_mean": "against the mean", "ce_recovered_zero": "against zero"},
            "CE recovered",
            {"as_percent": True},
        ),
        ({"kl": "KL"}, "KL from the whole model, nats", {}),
        ({"dead": "dead"}, "Dead latents", {"as_percent": True}),
    ]
    drawn = [
        figures.by_layer(metrics, columns, title=title, **more)
        for columns, title, more in wanted
        if metrics[list(columns)].notna().to_numpy().any()
    ]
    return _section("Layers", f'<div class="js-figs">{"".join(drawn)}</div>') if drawn else ""


def _table(metrics: pd.DataFrame, health: pd.DataFrame) -> str:
    """Every site with its numbers; its name and its counts lead to its features."""
    rows = []
    for row in metrics.merge(health.drop(columns=["layer", "kind"]), on="site").to_dict("records"):
        site, error = row["site"], row["delta_ce_se"]
        name = html.escape(site_label(site))
        whole = row["trouble"] == ""
        spread = f" <small>± {markup.number(error, 2)}</small>" if math.isfinite(error) else ""
        target = (
            f" <small>of {markup.number(row['l0_target'])}</small>" if math.isfinite(row["l0_target"]) else ""
        )
        rows.append(
            [
                _link(name, "features", site=site) if whole else name,
                markup.number(row["l0"]) + target,
                markup.number(row["fvu"]),
                markup.number(row["delta_ce"]) + spread,
                markup.percent(row["ce_recovered_mean"]),
                markup.percent(row["ce_recovered_zero"]),
                markup.percent(row["dead"]),
                *(_count(row, state) for state in ("silent", "dense", "duplicates")),
            ]
        )
    headings = [
        *("site", "L0 of target", "FVU", "delta CE, nats", "CE recovered (mean)", "CE recovered (zero)"),
        *("dead", "silent", "dense", "duplicates"),
    ]
    note = "Dead: silent in the evaluation. Silent, dense (over a tenth of tokens), duplicates: in the index."
    return markup.table_html(headings, rows) + markup.note_html(note)


def _densities(health: pd.DataFrame) -> str:
    """How often latents fire: a small histogram a site."""
    drawn = []
    for row in health.loc[health["trouble"] == ""].to_dict("records"):
        note = f"{row['silent']:,.0f} silent, {row['dense']:,.0f} dense"
        where = address("features", site=row["site"])
        drawn.append(
            figures.density(
                row["density"], LOG10_EDGES.tolist(), name=site_label(row["site"]), link=where, note=note
            )
        )
    if not drawn:
        return ""
    note = "Latents by the share of tokens on which they fire. Outlined bars: more than a tenth."
    return _section("Density", f'<div class="js-small">{"".join(drawn)}</div>{markup.note_html(note)}')


def _thresholds(health: pd.DataFrame) -> str:
    """Whether thresholds cut where they should."""
    known = health.loc[health["threshold_middle"].notna()]
    if not len(known):
        return ""
    shares = {"barely": f"highest under {BARELY} thresholds", "open": "threshold 0 or below"}
    drawn = figures.ranges(
        known,
        ("threshold_low", "threshold_middle", "threshold_high"),
        title="Threshold over mean activation",
        names="median, and the middle 80 % of latents",
    ) + figures.by_layer(known, shares, title="Latents whose threshold does not sit well", as_percent=True)
    note = (
        "Near 1, latents fire at the edge of their thresholds and a small change silences them; near 0, "
        "thresholds hold nothing back and weak firings count. A latent whose highest activation is barely "
        "above its threshold never stands out from its noise."
    )
    return _section("Thresholds", f'<div class="js-figs">{drawn}</div>{markup.note_html(note)}')


def _advise(run: Run, evaluated: bool, health: pd.DataFrame) -> None:
    """What is missing or torn, and which command makes it."""
    if run.folder and not evaluated:
        st.info(
            "No held-out metrics yet. Make them with `jumpscope eval`, then reload.", icon=":material/info:"
        )
    torn = health.loc[~health["trouble"].isin(["", "no index"])]
    missing = health.loc[health["trouble"] == "no index", "site"]
    if len(missing) == len(health):
        st.info(
            "No feature index yet. Make one with `jumpscope index` to browse what the latents mean.",
            icon=":material/info:",
        )
    elif len(missing):
        names = ", ".join(site_label(site) for site in missing)
        st.info(plain(f"Not indexed: {names}. `jumpscope index` goes on."), icon=":material/info:")
    for trouble, rows in torn.groupby("trouble", sort=False):
        names = ", ".join(site_label(site) for site in rows["site"])
        st.warning(plain(f"{names}: {trouble}"), icon=":material/warning:")


def _section(heading: str, body: str) -> str:
    return f'<section><h2 class="js-section">{html.escape(heading)}</h2>{body}</section>'


def _count(row: dict, state: str) -> str:
    """A count of latents in a state, leading to them."""
    if not math.isfinite(row[state]):
        return "–"
    text = f"{row[state]:,.0f}"
    if not row[state]:
        return text
    return _link(text, "features", site=row["site"], state=state.removesuffix("s"))


def _link(text: str, page: str, **parameters: object) -> str:
    return f'<a href="{html.escape(address(page, **parameters))}" target="_self" data-js-link>{text}</a>'


def _short(value: object) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return format_count(value) if value >= 100_000 else markup.number(value)


render(show)
