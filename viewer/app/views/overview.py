"""Every layer at a glance: what it costs, how it trained."""

import html

import pandas as pd
import streamlit as st

from activations.sites import site_label
from sae.numbers import format_count
from viewer import charts, markup
from viewer.app.shell import address, plain, render
from viewer.runs import Run

_PARAMETERS = ("step", "site", "layer")


def show(run: Run) -> None:
    """The page."""
    config = run.config()
    st.title(plain(run.name))
    names = {
        "model": "model",
        "corpus": "corpus",
        "width": "latents a layer",
        "l0": "target L0",
        "tokens": "training tokens",
    }
    facts = [(name, _short(config[key])) for key, name in names.items() if key in config]
    st.html(markup.facts_html([*facts, ("state", run.state())]))
    overview = run.overview()
    if run.folder and run.folder.eval_table():
        show_metrics(overview)
    else:
        st.info(
            "No held-out metrics yet. Make them with `jumpscope eval`, then reload.", icon=":material/info:"
        )
    show_table(run, overview)
    show_curves(run)


def show_metrics(overview: pd.DataFrame) -> None:
    """Charts by layer."""
    left, right = st.columns(2)
    figures = [
        charts.by_layer(
            overview, {"l0": "L0", "l0_target": "target"}, title="Latents firing on a token (L0)"
        ),
        charts.by_layer(overview, {"fvu": "FVU"}, title="Variance left unexplained (FVU)"),
        charts.by_layer(
            overview, {"delta_ce": "delta CE"}, error="delta_ce_se", title="Loss added by splicing (nats)"
        ),
        charts.by_layer(
            overview,
            {"ce_recovered_mean": "against mean", "ce_recovered_zero": "against zero"},
            title="CE recovered",
            percent=True,
        ),
    ]
    for number, figure in enumerate(figures):
        (left, right)[number % 2].plotly_chart(
            figure, key=f"metric {number}", config={"displayModeBar": False}
        )


def show_table(run: Run, overview: pd.DataFrame) -> None:
    """Every site with its numbers; its name leads to its features."""
    with_index = set(run.indexed)
    rows = []
    for row in overview.to_dict("records"):
        label = html.escape(site_label(row["site"]))
        if row["site"] in with_index:
            link = html.escape(address("feature", site=row["site"]))
            label = f'<a href="{link}" target="_self" data-js-link>{label}</a>'
        error = (
            f" <small>± {markup.number(row['delta_ce_se'], 2)}</small>"
            if pd.notna(row["delta_ce_se"])
            else ""
        )
        rows.append(
            [
                label,
                f"{markup.number(row['l0'])} <small>of {markup.number(row['l0_target'])}</small>",
                markup.number(row["fvu"]),
                markup.number(row["delta_ce"]) + error,
                markup.percent(row["ce_recovered_mean"]),
                markup.percent(row["ce_recovered_zero"]),
                markup.percent(row["dead"]),
            ]
        )
    headings = [
        "site",
        "L0 of target",
        "FVU",
        "delta CE, nats",
        "CE recovered (mean)",
        "CE recovered (zero)",
        "dead",
    ]
    st.html(markup.table_html(headings, rows))
    if not with_index:
        st.info(
            "No feature index yet. Make one with `jumpscope index` to browse what the latents mean.",
            icon=":material/info:",
        )


def show_curves(run: Run) -> None:
    """The training log, one metric at a time."""
    metrics = run.curves()
    st.subheader("Training")
    if metrics.empty or not {"step", "site"} <= set(metrics.columns):
        st.info("Nothing was logged in training.", icon=":material/info:")
        return
    numeric = [c for c in metrics.select_dtypes("number").columns if c not in _PARAMETERS]
    shared = [c for c in ("l0", "fvu", "loss", "dead") if c in numeric]
    order = [*shared, *(c for c in numeric if c not in shared)]
    chosen = st.selectbox("Metric", order, key="curve", width=220) or order[0]
    labels = {site: site_label(site) for site in run.sites}
    st.plotly_chart(charts.curves(metrics, chosen, labels), key="curves", config={"displayModeBar": False})


def _short(value: object) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return format_count(value) if value >= 100_000 else markup.number(value)


render(show)
