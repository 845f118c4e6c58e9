"""A trace: which features fire on a text, at every site and every token."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from activations.sites import site_label
from viewer import markup
from viewer.live.model import Live

_COLUMNS = ["site", "layer", "position", "token", "latent", "activation", "share", "label", "density"]
_SCALE = [[0.0, "rgba(196,106,18,0)"], [1.0, "rgba(196,106,18,1)"]]
DENSE = 0.1
"""Features that fire on more than this share of tokens say little about any of them."""


@torch.inference_mode()
def trace(live: Live, text: str, *, sites: Sequence[str] | None = None, limit: int | None = None) -> "Trace":
    """Which features fire on a text: one forward pass, and each dictionary on what it reads there.

    Special tokens are left out, as everywhere. With a `limit` a longer text is cut after so many tokens, or
    where the model's context ends. Raises UserError for an empty text, one longer than the model's context
    and a site that the run does not have.
    """
    tokens = live.tokens(text)
    n_tokens = tokens.shape[1]
    if limit is not None:
        tokens = tokens[:, : min(limit + (live.model.bos_id is not None), live.model.max_context)]
    dictionaries = live.dictionaries(sites)
    keep = live.ordinary(tokens[0])
    read = {made.cfg.site_in for made in dictionaries.values()}
    acts = live.model.activations(tokens, sorted(read))
    firings = {}
    for site, made in dictionaries.items():
        x = acts[made.cfg.site_in][0, keep.to(live.model.device)].to(made.W_enc.device)
        latents = made.encode(x).cpu()
        row, latent = latents.nonzero(as_tuple=True)
        found = {"position": row, "latent": latent, "activation": latents[row, latent].float()}
        firings[site] = pd.DataFrame({name: values.numpy() for name, values in found.items()})
    texts = live.strings(tokens[0, keep])
    frame: Any = live.with_facts(firings)
    frame["token"] = np.array(texts, dtype=object)[frame["position"].to_numpy()]
    return Trace(texts, list(dictionaries), frame[_COLUMNS], n_tokens - tokens.shape[1])


@dataclass(frozen=True, eq=False)
class Trace:
    """What fires where on a text."""

    tokens: list[str]
    """The text's tokens, without special ones: `position` counts them from 0."""
    sites: list[str]
    """The sites traced, in layer order."""
    frame: pd.DataFrame
    """A row a firing: site, layer, position, token, latent, activation, share (of the highest activation that
    the index has seen of the latent), label, density. The last three are empty where there is no index."""
    n_cut: int = 0
    """Tokens of the text beyond the limit, which were not read."""

    def top(self, k: int = 1, *, densest: float = DENSE) -> pd.DataFrame:
        """The `k` strongest features at each site and position, by share; dense ones are left out.

        A feature that the index knows no highest activation of counts by its activation.
        """
        best = self.strongest(self.frame, densest=densest)
        best = best.assign(_rank=best.index).groupby(["site", "position"], sort=False).head(k)
        places = {site: number for number, site in enumerate(self.sites)}
        place = [places[site] for site in best["site"]]
        return (
            best.assign(_place=place)
            .sort_values(by=["_place", "position", "_rank"])
            .drop(columns=["_place", "_rank"])
            .reset_index(drop=True)
        )

    @staticmethod
    def strongest(rows: pd.DataFrame, *, densest: float = DENSE) -> pd.DataFrame:
        """Some rows of `frame`, strongest first as in `top`; dense features are left out."""
        rows = rows.loc[~(rows["density"] > densest)]
        order = strengths(rows).sort_values(ascending=False, kind="stable").index
        return rows.loc[order].reset_index(drop=True)

    def heatmap(self, *, densest: float = DENSE) -> go.Figure:
        """Sites by tokens: how near the strongest feature is to its highest activation; three on hover."""
        best = self.top(3, densest=densest)
        depth = np.full((len(self.sites), len(self.tokens)), np.nan)
        hover = np.full(depth.shape, "", dtype=object)
        best["strength"] = strengths(best).clip(0, 1)
        groups: Any = best.groupby(["site", "position"], sort=False)
        for (site, position), rows in groups:
            place = self.sites.index(site), int(position)
            depth[place] = rows["strength"].iloc[0]
            hover[place] = "<br>".join(map(_line, rows.to_dict("records")))
        return grid(self.tokens, self.sites, depth, hover, "strongest share of highest", _SCALE, (0.0, 1.0))

    def __repr__(self) -> str:
        counts = self.frame.groupby("site", sort=False).size().reindex(self.sites, fill_value=0)
        first = f"trace of {len(self.tokens)} tokens through {len(self.sites)} sites"
        lines = [first + f": {len(self.frame):,} firings"]
        best = self.top().assign(strength=lambda rows: strengths(rows))
        for site in self.sites:
            rows = best.loc[best["site"] == site].nlargest(4, "strength")
            shown = "  ".join(
                f"{markup.readable(row['token'])}:{row['latent']}" for row in rows.to_dict("records")
            )
            lines.append(f"  {site_label(site):>14} {counts[site] / len(self.tokens):6.1f} a token  {shown}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        best = self.top()
        shares = strengths(best).clip(0, 1)
        cells = {
            (row["site"], row["position"]): _cell(row, float(share))
            for row, share in zip(best.to_dict("records"), shares, strict=True)
        }
        rows = [
            [html.escape(site_label(site)), *(cells.get((site, p), "") for p in range(len(self.tokens)))]
            for site in reversed(self.sites)
        ]
        head = ["", *map(markup.readable, self.tokens)]
        note = (
            "The strongest feature at each site and token; the deeper, the nearer to its highest activation."
        )
        return (
            f'{markup.STYLE}<div class="js-card">{markup.table_html(head, rows)}'
            f'<p class="js-note">{note} Its label shows on hover.</p></div>'
        )


def grid(
    tokens: Sequence[str],
    sites: Sequence[str],
    values: np.ndarray,
    hover: np.ndarray,
    title: str,
    scale: list[list[float | str]],
    span: tuple[float, float],
) -> go.Figure:
    """A heatmap of sites (early ones below) by tokens, from arrays [site, token]; NaN is left blank."""
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=list(range(len(tokens))),
            y=[site_label(site) for site in sites],
            customdata=hover,
            colorscale=scale,
            zmin=span[0],
            zmax=span[1],
            colorbar={"title": {"text": title, "side": "right"}, "thickness": 12},
            hovertemplate="%{y}<br>%{customdata}<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    # plotly reads tags in its texts
    names = [html.escape(markup.readable(token)) for token in tokens]
    figure.update_xaxes(tickvals=list(range(len(tokens))), ticktext=names, tickangle=-60, showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_layout(
        height=120 + 24 * len(sites),
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    return figure


def strengths(rows: Any) -> Any:
    """How strongly features fire: of their highest activation, or of their site's strongest of these rows."""
    most = rows.groupby("site")["activation"].transform("max")
    return rows["share"].fillna(rows["activation"] / most)


def _line(row: dict) -> str:
    share = f" ({markup.percent(row['share'])} of its highest)" if np.isfinite(row["share"]) else ""
    label = f" {html.escape(markup.readable(str(row['label'])))}" if row["label"] else ""
    token = html.escape(markup.readable(row["token"]))
    return f"{token}: <b>{row['latent']}</b>{label}, {markup.number(row['activation'])}{share}"


def _cell(row: dict, share: float) -> str:
    title = f"{row['label'] or 'no label'}: {markup.number(row['activation'])}"
    style = f"background:rgba(245,145,20,{0.08 + 0.52 * share:.2f})"
    return f'<span style="{style};padding:1px 4px" title="{html.escape(title)}">{row["latent"]}</span>'
