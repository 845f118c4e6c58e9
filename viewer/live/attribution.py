"""Attribution: which features raise a next token, by gradients, and how well that predicts ablations."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.hooks import spliced
from sae.dictionary import Dictionary
from sae.errors import UserError
from viewer import markup
from viewer.live.model import Live
from viewer.live.trace import grid

_COLUMNS = "site layer position token latent activation gradient attribution share label density".split()
_SCALE = [[0.0, "rgb(59,120,194)"], [0.5, "rgba(128,128,128,0)"], [1.0, "rgb(196,106,18)"]]
# ablations that run as one batch
_ROWS = 16


def attribute(
    live: Live,
    text: str,
    target: str | int,
    *,
    against: str | int | None = None,
    sites: Sequence[str] | None = None,
) -> "Attribution":
    """Which features, at which sites and tokens of a text, raise the target as its next token.

    A feature's attribution is the gradient of the target's logit in its activation, times the activation: to
    first order, what the logit would fall by if the feature did not fire at that token. The logit is taken
    above that of `against`, or above the mean of all tokens, since a shift of all logits means nothing. All
    dictionaries stand in the model together with what they miss, so that the model is the one it was, and
    gradients are those of its whole computation after the feature. In the first few layers, where a feature
    is most of what the model knows of a token, it is no small change, and the guess is poor: `verify` tells.

    Attributions of different sites overlap: they are not parts of one sum. Targets are single tokens, as
    texts (" Paris", with its space) or ids. Raises UserError for other targets and for an empty text.
    """
    tokens = live.tokens(text)
    dictionaries = live.dictionaries(sites)
    goal = _Goal(live, target, against)
    model = live.model
    made = list(dictionaries.values())
    with spliced(model, made, error_term=True, gradients=True) as at:
        value = goal.of(model.run_body(tokens, gradients=True)[:, -1])[0]
    written = [dictionary.cfg.site_out for dictionary in made]
    latents = [at.latents[site] for site in written]
    gradients = torch.autograd.grad(value, latents, allow_unused=True)
    keep = live.ordinary(tokens[0])
    place = keep.cumsum(0) - 1
    rows = {}
    for site, acts, slopes in zip(dictionaries, latents, gradients, strict=True):
        acts = acts.detach()[0].cpu().float()
        slopes = torch.zeros_like(acts) if slopes is None else slopes[0].cpu().float()
        position, latent = acts.nonzero(as_tuple=True)
        own, slope = acts[position, latent], slopes[position, latent]
        found = {
            "position": place[position],
            "latent": latent,
            "activation": own,
            "gradient": slope,
            "attribution": own * slope,
        }
        rows[site] = pd.DataFrame({name: values.numpy() for name, values in found.items()})
    texts = live.strings(tokens[0, keep])
    frame: Any = live.with_facts(rows)
    frame["token"] = np.array(texts, dtype=object)[frame["position"].to_numpy()]
    order = frame["attribution"].abs().sort_values(ascending=False, kind="stable").index
    frame = frame.loc[order, _COLUMNS].reset_index(drop=True)
    return Attribution(live, tokens, texts, dictionaries, goal, float(value.detach()), frame)


class _Goal:
    """The number that is attributed: a logit above another, or above the mean."""

    def __init__(self, live: Live, target: str | int, against: str | int | None) -> None:
        self._live = live
        self.target = self._id(target)
        self.against = None if against is None else self._id(against)
        names = [live.model.token_strings([i])[0] for i in (self.target, self.against) if i is not None]
        self.name = f"logit of {names[0]!r} above " + (repr(names[1]) if names[1:] else "the mean")

    def _id(self, token: str | int) -> int:
        if isinstance(token, str):
            return self._live.token(token)
        d_vocab = self._live.model.d_vocab
        if not 0 <= token < d_vocab:
            raise UserError(f"a token's id is from 0 to {d_vocab - 1}", str(token), "choose one of those")
        return int(token)

    def of(self, final: Float[Tensor, "batch d_model"]) -> Float[Tensor, " batch"]:
        """From hidden states after the final norm."""
        logits = self._live.model.unembed(final).float()
        rest = logits.mean(-1) if self.against is None else logits[:, self.against]
        return logits[:, self.target] - rest


@dataclass(frozen=True, eq=False)
class Attribution:
    """What features do for a next token, to first order. `verify` measures it."""

    _live: Live
    _tokens: Int[Tensor, "1 pos"]
    tokens: list[str]
    """The text's tokens, without special ones: `position` counts them from 0."""
    _dictionaries: Mapping[str, Dictionary]
    _goal: _Goal
    value: float
    """What is attributed: the target's logit above the mean, or above that of another token."""
    frame: pd.DataFrame
    """A row a firing, largest attribution (either sign) first: site, layer, position, token, latent,
    activation, gradient (of the value, per unit of activation), attribution (their product), share of the
    feature's highest activation, label, density."""

    @property
    def sites(self) -> list[str]:
        """The sites attributed to, in layer order."""
        return list(self._dictionaries)

    def features(self) -> pd.DataFrame:
        """The same summed over tokens: site, layer, latent, tokens, attribution, label; largest first."""
        groups = self.frame.groupby(["site", "layer", "latent"], sort=False)
        sums: Any = groups.agg(
            tokens=("position", "size"), attribution=("attribution", "sum"), label=("label", "first")
        ).reset_index()
        order = sums["attribution"].abs().sort_values(ascending=False, kind="stable").index
        return sums.loc[order].reset_index(drop=True)

    def verify(self, k: int = 20, *, among: int | None = None, seed: int = 0) -> "Verification":
        """Ablates each of the `k` largest attributions alone, at its own token: how far does the value fall?

        With `among`, `k` are drawn from so many largest instead, so that not only extremes are looked at.
        Everything that follows in the model is computed anew; it costs a forward pass of `k` rows.
        """
        if k < 1 or self.frame.empty:
            raise UserError("there must be something to verify", f"{k} of {len(self.frame)}", "give more")
        top = self.frame.head(k if among is None else among)
        top = top.sample(min(k, len(top)), random_state=seed).sort_index()
        values = [self._ablated(top.iloc[start : start + _ROWS]) for start in range(0, len(top), _ROWS)]
        clean = self._value_of(self._tokens)
        top["measured"] = (clean - torch.cat(values)).numpy()
        return Verification(top)

    def _ablated(self, rows: pd.DataFrame) -> Float[Tensor, " row"]:
        """The value when each of some firings is ablated alone."""
        position = self._live.ordinary(self._tokens[0]).nonzero()[:, 0][torch.tensor(list(rows["position"]))]
        latent = torch.tensor(list(rows["latent"]))
        edits, made = {}, []
        for site in rows["site"].unique():
            here = torch.tensor((rows["site"] == site).to_numpy().nonzero()[0])

            def silence(acts: Tensor, here: Tensor = here) -> Tensor:
                acts[here, position[here], latent[here]] = 0
                return acts

            made.append(self._dictionaries[site])
            edits[made[-1].cfg.site_out] = silence
        tokens = self._tokens.expand(len(rows), -1)
        with spliced(self._live.model, made, error_term=True, edit=edits):
            return self._value_of(tokens)

    @torch.no_grad()
    def _value_of(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
        return self._goal.of(self._live.model.run_body(tokens)[:, -1]).cpu().clone()

    def heatmap(self) -> go.Figure:
        """Sites by tokens: the sum of attributions; the three largest on hover."""
        depth = np.full((len(self.sites), len(self.tokens)), np.nan)
        hover = np.full(depth.shape, "", dtype=object)
        groups: Any = self.frame.groupby(["site", "position"], sort=False)
        for (site, position), rows in groups:
            place = self.sites.index(site), int(position)
            depth[place] = rows["attribution"].sum()
            hover[place] = "<br>".join(map(_line, rows.head(3).to_dict("records")))
        most = float(np.nanmax(np.abs(depth), initial=1e-9))
        return grid(self.tokens, self.sites, depth, hover, "attribution", _SCALE, (-most, most))

    def __repr__(self) -> str:
        shown: Any = self.frame.head(10)[
            ["layer", "position", "token", "latent", "activation", "attribution"]
        ]
        text = shown.assign(token=shown["token"].map(markup.readable)).to_string(
            index=False, float_format="%.3g"
        )
        return f"{self._goal.name}: {self.value:.3f}\n{text}"

    def _repr_html_(self) -> str:
        cells = [
            [
                str(row["layer"]),
                markup.token_html(row["token"]),
                str(row["latent"]),
                markup.number(row["activation"]),
                f"{row['attribution']:+.3f}",
                html.escape(markup.readable(str(row["label"]), alone=False)) if row["label"] else "",
            ]
            for row in self.frame.head(20).to_dict("records")
        ]
        heads = ["layer", "token", "feature", "activation", "attribution", "label"]
        title = html.escape(markup.readable(f"{self._goal.name}: {self.value:.3f}", alone=False))
        return f'{markup.STYLE}<div class="js-card"><h4>{title}</h4>{markup.table_html(heads, cells)}</div>'


@dataclass(frozen=True, eq=False)
class Verification:
    """Attributions beside what ablations did."""

    frame: pd.DataFrame
    """The rows of the attribution that were measured, and a column `measured`: how far the value fell."""

    @property
    def correlation(self) -> float:
        """Pearson's, of attribution and measured fall; NaN for fewer than two rows."""
        return _correlation(self.frame[["attribution", "measured"]])

    @property
    def rank_correlation(self) -> float:
        """Spearman's."""
        return _correlation(self.frame[["attribution", "measured"]].rank())

    def figure(self) -> go.Figure:
        """Measured fall against attribution, with the line of equality."""
        frame = self.frame
        both = frame[["attribution", "measured"]].to_numpy()
        ends = [float(both.min()), float(both.max())]
        figure = go.Figure()
        figure.add_scatter(
            x=ends,
            y=ends,
            mode="lines",
            line={"color": "#8a8f98", "width": 1},
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=frame["attribution"],
            y=frame["measured"],
            mode="markers",
            marker={
                "color": frame["layer"],
                "colorscale": "Viridis",
                "colorbar": {"title": "layer"},
                "size": 8,
            },
            text=[f"layer {row['layer']}, feature {row['latent']}" for row in frame.to_dict("records")],
            hovertemplate="%{text}<br>attribution %{x:.3f}, measured %{y:.3f}<extra></extra>",
        )
        figure.update_xaxes(title="attribution")
        figure.update_yaxes(title="measured by ablation")
        figure.update_layout(
            height=340,
            showlegend=False,
            margin={"l": 8, "r": 8, "t": 8, "b": 8},
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
        )
        return figure

    def __repr__(self) -> str:
        n = len(self.frame)
        return (
            f"{n} attributions against ablations: correlation {self.correlation:.3f}, "
            f"of ranks {self.rank_correlation:.3f}"
        )


def _correlation(pairs: Any) -> float:
    both = pairs.to_numpy(dtype=float)
    return float(np.corrcoef(both.T)[0, 1]) if len(both) > 1 else float("nan")


def _line(row: dict) -> str:
    label = f" {html.escape(markup.readable(str(row['label'])))}" if row["label"] else ""
    token = html.escape(markup.readable(row["token"]))
    return f"{token}: <b>{row['latent']}</b>{label}, {row['attribution']:+.3f}"
