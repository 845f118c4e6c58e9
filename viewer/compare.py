"""Two dictionaries of one site beside each other: what both have, what only one has, what split."""

import dataclasses
import html
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

import sae
from sae.errors import UserError
from viewer import charts, markup
from viewer.features import Site
from viewer.once import once

_BLOCK_ELEMENTS = 1 << 24
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two dictionaries have in common, by decoder cosine. Latents that never fired here are left out.

    They are told by the indexes, where there are any; `ours` is of the run that was asked, `theirs` of the
    other.
    """

    site: str
    names: tuple[str, str]
    cosine: float
    """How near two decoder rows must be to be the same."""
    ours: pd.DataFrame
    """latent, label, density, other (the nearest of theirs), cosine, and what it is: matched, part or new.

    matched: each is the other's nearest. part: near enough, but the other has one that is nearer. new: none
    of theirs is near enough."""
    theirs: pd.DataFrame
    """The same the other way round."""

    @once
    def matched(self) -> pd.DataFrame:
        """latent, other, cosine, label, other_label; the surest first."""
        pairs = self.ours.loc[self.ours["kind"] == "matched", ["latent", "other", "cosine", "label"]]
        theirs = self.theirs.loc[:, ["latent", "label"]].rename(
            columns={"latent": "other", "label": "other_label"}
        )
        return _falling(pairs.merge(theirs, on="other"), "cosine")

    @once
    def new(self) -> pd.DataFrame:
        """Ours that they have not: latent, label, density, other (the nearest), cosine."""
        return _only(self.ours)

    @once
    def gone(self) -> pd.DataFrame:
        """Theirs that we have not."""
        return _only(self.theirs)

    @once
    def split(self) -> pd.DataFrame:
        """Ours that are several of theirs: latent, label, parts, others, cosines."""
        return _parts(self.ours, self.theirs)

    @once
    def merged(self) -> pd.DataFrame:
        """Theirs that are several of ours."""
        return _parts(self.theirs, self.ours)

    def at(self, cosine: float) -> "Comparison":
        """The same at another `cosine`, without another look at the dictionaries."""
        sides = []
        for mine, other in ((self.ours, self.theirs), (self.theirs, self.ours)):
            back = pd.Series(other["other"].to_numpy(), index=other["latent"]).reindex(mine["other"])
            mutual = back.to_numpy() == mine["latent"].to_numpy()
            sides.append(mine.assign(kind=_kinds(mine["cosine"].to_numpy(), mutual, cosine)))
        return dataclasses.replace(self, cosine=cosine, ours=sides[0], theirs=sides[1])

    def plot(self) -> go.Figure:
        """How near the latents of each come to the other's."""
        sides = zip(self.names, (self.ours, self.theirs), strict=True)
        return charts.cosines({name: side["cosine"].to_numpy() for name, side in sides})

    def facts(self) -> list[tuple[str, str]]:
        """How many are what."""
        return [
            ("matched", f"{len(self.matched):,}"),
            (f"only in {self.names[0]}", f"{len(self.new):,} of {len(self.ours):,}"),
            (f"only in {self.names[1]}", f"{len(self.gone):,} of {len(self.theirs):,}"),
            (f"split in {self.names[1]}", f"{len(self.split):,}"),
            (f"split in {self.names[0]}", f"{len(self.merged):,}"),
        ]

    def __repr__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.facts())
        return f"{self.site}, {self.names[0]} against {self.names[1]}, cosine {self.cosine}: {facts}"

    def _repr_html_(self) -> str:
        rows = [
            [
                str(row["latent"]),
                str(row["other"]),
                markup.number(row["cosine"]),
                html.escape(markup.readable_text(row["label"])),
            ]
            for row in self.new.head(_SHOWN).to_dict("records")
        ]
        return (
            f'{markup.STYLE}<div class="js-card"><h4>{html.escape(repr(self).partition(":")[0])}</h4>'
            f'{markup.facts_html(self.facts())}<div class="js-h">Only in the first, most frequent first</div>'
            f"{markup.table_html(['latent', 'nearest', 'cosine', 'label'], rows)}</div>"
        )


def compare(
    dictionaries: tuple[sae.Dictionary, sae.Dictionary],
    indexes: tuple[Site | None, Site | None],
    *,
    names: tuple[str, str],
    site: str,
    cosine: float,
) -> Comparison:
    """Compares two dictionaries, of any widths. Raises UserError when their spaces differ."""
    W_dec = [d.W_dec.detach().float().cpu() for d in dictionaries]
    if W_dec[0].shape[1] != W_dec[1].shape[1]:
        raise UserError(
            "dictionaries to compare must write to the same space",
            f"{W_dec[0].shape[1]} wide and {W_dec[1].shape[1]} wide at {site}",
            "compare runs of the same model",
        )
    known = [_known(index, len(W)) for index, W in zip(indexes, W_dec, strict=True)]
    alive = [frame["alive"].to_numpy() for frame in known]
    rows = [
        torch.nn.functional.normalize(W[torch.from_numpy(np.flatnonzero(a))], dim=1)
        for W, a in zip(W_dec, alive, strict=True)
    ]
    theirs, cosine_ours, ours, cosine_theirs = nearest(*rows)
    return Comparison(
        site=site,
        names=names,
        cosine=cosine,
        ours=_side(known[0], known[1], theirs, cosine_ours, ours[theirs] == np.arange(len(theirs)), cosine),
        theirs=_side(known[1], known[0], ours, cosine_theirs, theirs[ours] == np.arange(len(ours)), cosine),
    )


def nearest(
    a: Float[Tensor, "latent_a d_out"], b: Float[Tensor, "latent_b d_out"]
) -> tuple[
    Int[np.ndarray, " latent_a"], Float[np.ndarray, " latent_a"],
    Int[np.ndarray, " latent_b"], Float[np.ndarray, " latent_b"],
]:  # fmt: skip
    """For each row of `a` the row of `b` with the highest product, and that; and the other way round.

    One product serves both ways, a block at a time. Of equal ones the first is taken. A side without rows
    leaves -1 and 0.
    """
    to_b, best_b = np.full(len(a), -1, np.int64), np.zeros(len(a), np.float32)
    to_a, best_a = np.full(len(b), -1, np.int64), np.full(len(b), -np.inf, np.float32)
    if not len(a) or not len(b):
        return to_b, best_b, to_a, np.zeros(len(b), np.float32)
    step = max(1, _BLOCK_ELEMENTS // len(b))
    for start in range(0, len(a), step):
        product = a[start : start + step] @ b.T
        value, index = product.max(dim=1)
        to_b[start : start + step], best_b[start : start + step] = index.numpy(), value.numpy()
        value, index = (x.numpy() for x in product.max(dim=0))
        better = value > best_a
        to_a[better], best_a[better] = start + index[better], value[better]
    return to_b, best_b, to_a, best_a


def _known(index: Site | None, n_latents: int) -> pd.DataFrame:
    """latent, label, density and whether it fired, of what an index says; without one all count as firing."""
    latent = np.arange(n_latents)
    if index is None:
        return pd.DataFrame({"latent": latent, "label": "", "density": np.nan, "alive": True})
    if len(index) != n_latents:
        raise UserError(
            "an index must be of the dictionary beside it",
            f"{len(index)} latents in the index of {index.name}, {n_latents} in the dictionary",
            "build the index again with `jumpscope index`",
        )
    frame = index.latents()[["latent", "label", "density", "state"]]
    return frame.assign(alive=frame["state"] != "silent").drop(columns="state")


def _side(
    mine: pd.DataFrame,
    other: pd.DataFrame,
    nearest: Int[np.ndarray, " here"],
    value: Float[np.ndarray, " here"],
    mutual: Bool[np.ndarray, " here"],
    cosine: float,
) -> pd.DataFrame:
    frame = mine.loc[mine["alive"], ["latent", "label", "density"]].reset_index(drop=True)
    theirs = other.loc[other["alive"], "latent"].to_numpy()
    frame["other"] = np.append(theirs, -1)[nearest]
    frame["cosine"] = value
    frame["kind"] = _kinds(value, mutual, cosine)
    return frame


def _kinds(
    value: Float[np.ndarray, " here"], mutual: Bool[np.ndarray, " here"], cosine: float
) -> Shaped[np.ndarray, " here"]:
    return np.where(value < cosine, "new", np.where(mutual, "matched", "part"))


def _only(frame: pd.DataFrame) -> pd.DataFrame:
    return _falling(frame.loc[frame["kind"] == "new"].drop(columns="kind"), "density")


def _parts(whole: pd.DataFrame, parts: pd.DataFrame) -> pd.DataFrame:
    """The latents of one side that are the nearest to two or more of the other, and near enough."""
    near = _falling(parts.loc[parts["kind"] != "new"], "cosine")
    groups = near.groupby("other", sort=True)
    frame = pd.DataFrame(
        {
            "parts": groups.size(),
            "others": groups["latent"].agg(list),
            "cosines": groups["cosine"].agg(list),
        }
    )
    frame = frame.loc[frame["parts"] > 1].rename_axis("latent").reset_index()
    frame = frame.merge(whole.loc[:, ["latent", "label"]], on="latent")
    return _falling(frame.loc[:, ["latent", "label", "parts", "others", "cosines"]], "parts")


def _falling(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows by a column, highest first; equal ones keep their order."""
    return frame.sort_values(by=column, ascending=False, kind="stable", ignore_index=True)
