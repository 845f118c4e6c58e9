"""The viewer's plotly figures: marks and axes. Text and paper take the colours of where they are shown."""

import html
import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from viewer.markup import readable

TEAL, AMBER, GREY = "#0d8275", "#c46a12", "#8a8f98"
_SERIES = (TEAL, AMBER, "#7a5ab8", "#3b78c2", "#b5476b")
_POINTS = 400
"""Of a line: a browser draws some ten thousand points at once, and a screen has no more columns."""
# by layer, early to late; light and dark ends stay visible on white and on near black
_DEPTH = ((59, 120, 194), (13, 130, 117), (196, 106, 18))


def histogram(frame: pd.DataFrame) -> go.Figure:
    """Activations where a feature fires: counts by logarithmic bin."""
    middle = (frame["lower"] * frame["upper"]) ** 0.5
    figure = go.Figure(
        go.Bar(
            x=middle,
            y=frame["count"],
            width=frame["upper"] - frame["lower"],
            marker={"color": AMBER, "line": {"width": 0}},
            customdata=frame[["lower", "upper"]],
            hovertemplate="%{customdata[0]:.3~g} to %{customdata[1]:.3~g}: %{y} tokens<extra></extra>",
        )
    )
    if len(frame):
        decades = math.log10(frame["upper"].iloc[-1] / frame["lower"].iloc[0])
        # 1, 2 and 5 in each decade while there is room for their labels
        dtick = "D2" if decades < 2.5 else 1
        figure.update_xaxes(type="log", title="activation", dtick=dtick, tickformat="~s")
    else:
        figure.update_xaxes(title="activation (it never fired here)", showticklabels=False)
    figure.update_yaxes(title="tokens")
    return _plain(figure, 220)


def bars(frame: pd.DataFrame, value: str) -> go.Figure:
    """A bar a token, best first: columns `token` and `value`."""
    colour = [TEAL if v >= 0 else _SERIES[2] for v in frame[value]]
    figure = go.Figure(
        go.Bar(x=frame[value], y=list(range(len(frame))), orientation="h", marker_color=colour)
    )
    # plotly reads markup in labels, and would merge tokens that look alike
    names = [html.escape(readable(token)) for token in frame["token"]]
    figure.update_yaxes(tickvals=list(range(len(frame))), ticktext=names, autorange="reversed")
    figure.update_xaxes(title=value)
    return _plain(figure, 60 + 22 * max(1, len(frame)))


def density(latents: pd.DataFrame) -> go.Figure:
    """How many latents fire on what share of tokens; those that never fire are told beside it."""
    fired = latents["log10_density"].dropna()
    figure = go.Figure(go.Histogram(x=fired, nbinsx=60, marker_color=TEAL))
    figure.update_xaxes(title=f"log10 of the share of tokens ({len(latents) - len(fired):,} never fired)")
    figure.update_yaxes(title="latents")
    return _plain(figure, 260)


def cosines(values: dict[str, Float[np.ndarray, " latent"]]) -> go.Figure:
    """How close each dictionary's latents come to the other's: a histogram each."""
    figure = go.Figure()
    for number, (name, cosine) in enumerate(values.items()):
        figure.add_histogram(
            x=cosine, name=html.escape(name), marker_color=_SERIES[number], opacity=0.6,
            xbins={"start": -1, "end": 1.02, "size": 0.02},
        )  # fmt: skip
    figure.update_layout(barmode="overlay", showlegend=True)
    figure.update_xaxes(title="cosine with the nearest decoder row of the other")
    figure.update_yaxes(title="latents")
    return _plain(figure, 300, top=40)


def curves(metrics: pd.DataFrame, metric: str, labels: dict[str, str]) -> go.Figure:
    """A metric over training, a line a site, coloured from early to late layers, of up to _POINTS steps."""
    figure = go.Figure()
    by_site = dict(tuple(metrics.dropna(subset=[metric]).groupby("site")))
    sites = [site for site in labels if site in by_site]
    for place, site in enumerate(sites):
        rows = by_site[site]
        shown = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _POINTS)).astype(int))
        figure.add_scatter(
            x=rows["step"].to_numpy()[shown], y=rows[metric].to_numpy()[shown],
            name=labels[site], mode="lines",
            line={"color": _between(place / max(1, len(sites) - 1)), "width": 1.5},
        )  # fmt: skip
    figure.update_xaxes(title="step")
    figure.update_yaxes(title=metric)
    return _plain(figure, 340, top=40)


def _between(share: float) -> str:
    low, high = (_DEPTH[0], _DEPTH[1]) if share < 0.5 else (_DEPTH[1], _DEPTH[2])
    part = 2 * share if share < 0.5 else 2 * share - 1
    return "rgb({},{},{})".format(*(round(a + (b - a) * part) for a, b in zip(low, high, strict=True)))


def _plain(figure: go.Figure, height: int, top: int = 8) -> go.Figure:
    figure.update_layout(
        height=height,
        margin={"l": 8, "r": 8, "t": top, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        bargap=0.05,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )
    return figure
