"""One site's latents as objects that show themselves, and as DataFrames.

    feature = run.layer(9)[123];  feature.examples();  feature.label = "capital cities"

Nothing here needs the language model or Streamlit.
"""

import functools
import html
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from activations.sites import site_label
from sae.errors import UserError
from viewer import charts, markup
from viewer.index.histogram import histogram_edges
from viewer.tables import IndexFolder, SiteTables
from viewer.windows import windows

COFIRING = "cofiring"


class Site:
    """The latents of one dictionary: `site[123]` is a Feature. UserError when the index is torn or absent."""

    def __init__(self, index: IndexFolder, name: str) -> None:
        self.index, self.name = index, name
        self.tables: SiteTables = index.site(name)
        self.manifest: dict[str, Any] = self.tables.manifest

    def __len__(self) -> int:
        return self.tables.n_latents

    def __getitem__(self, latent: int) -> "Feature":
        if not 0 <= latent < len(self):
            has = f"must be from 0 to {len(self) - 1}" if len(self) else "cannot be asked for: there is none"
            raise UserError(f"a latent of {self.name} {has}", str(latent), "choose another")
        return Feature(self, int(latent))

    def __iter__(self) -> Iterator["Feature"]:
        return (Feature(self, latent) for latent in range(len(self)))

    def latents(self) -> pd.DataFrame:
        """A row a latent: every column of latents.parquet that is no list, with labels of your own."""
        frame = self.tables.scalars.to_pandas()
        own = self.index.annotations.labels(self.name)
        frame["label"] = self.index.labels(self.name)
        frame["label_source"] = np.where(frame["label"] == "", "", "automatic")
        frame.loc[frame["latent"].isin(list(own)), "label_source"] = "yours"
        return frame

    def live(self) -> np.ndarray:
        """The latents that fired at least once on the indexed text, in order."""
        scalars = self.tables.scalars
        return scalars["latent"].to_numpy()[scalars["firings"].to_numpy() > 0]

    def plot_density(self) -> go.Figure:
        """How many latents fire how often."""
        return charts.density(self.latents())

    def __repr__(self) -> str:
        m = self.manifest
        silent = len(self) - len(self.live())
        text = f"{m['tokens']:,} tokens of {m['corpus']}"
        return f"{self.name}: {len(self):,} latents of {m['model']} on {text}, {silent:,} silent"

    def _repr_html_(self) -> str:
        m, live = self.manifest, len(self.live())
        facts = [
            ("latents", f"{len(self):,}"),
            ("fired", f"{live:,}"),
            ("tokens", f"{m['tokens']:,}"),
            ("corpus", m["corpus"]),
        ]
        title = f"<h4>{html.escape(self.name)}</h4>"
        return f'{markup.STYLE}<div class="js-card">{title}{markup.facts_html(facts)}</div>'


class Feature:
    """One latent and what the index knows of it. Equal to another of the same latent of the same index."""

    def __init__(self, site: Site, latent: int) -> None:
        self.site, self.latent = site, latent
        self._row: dict[str, Any] = site.tables.latents.of(latent).to_pylist()[0]
        self.state: str = self._row["state"]
        """live, silent (it never fired on the indexed text) or dense (on more than a tenth of its tokens)."""
        self.density: float = self._row["density"]
        """Share of tokens on which it fires."""
        self.firings: int = self._row["firings"]
        self.mean: float = self._row["mean"]
        """Mean activation over its firings, in the model's own units; 0 when it never fired."""
        self.max: float = self._row["max"]
        self.threshold: float | None = self._row["threshold"]
        """None where a pre-activation alone does not decide whether it fires."""
        self.decoder_norm: float | None = self._row["decoder_norm"]
        """L2 norm of its decoder row."""
        self.duplicate_of: int | None = self._row["duplicate_of"]
        """The first latent of the site with nearly the same decoder row and firings."""
        self.automatic_label: str = self._row["label"] or ""
        """Made from the evidence by rules, without a language model."""
        self.label_evidence: str = self._row["label_evidence"] or ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Feature) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def label(self) -> str:
        """Your label if there is one, else the automatic one. Setting it writes it; "" takes yours back."""
        return self._annotation("label") or self.automatic_label

    @label.setter
    def label(self, text: str) -> None:
        self._annotate("label", text)

    @property
    def label_source(self) -> str:
        """`yours`, `automatic`, or "" where there is no label."""
        return "yours" if self._annotation("label") else "automatic" if self.automatic_label else ""

    @property
    def notes(self) -> str:
        """Your notes on it; setting them writes them."""
        return self._annotation("notes")

    @notes.setter
    def notes(self, text: str) -> None:
        self._annotate("notes", text)

    def examples(self, band: int | None = None, context: int | None = None) -> pd.DataFrame:
        """Where it fires, one place a document: band, rank, block, document, position, token, activation, ...

        Band 0 is the highest; bands 1 to 5 are samples of the fifths of its range of activations, highest
        first; None is all, in that order. tokens and values are lists of one length: the text around, at
        most `context` tokens either side (None: all of the document that the model read with it), and the
        activation on each. peak is the place of the token in them.
        """
        if band is not None and not 0 <= band <= 5:
            raise UserError("a band must be from 0 to 5", str(band), "0 is the highest activations")
        if context is not None and context < 0:
            raise UserError("the context must be 0 tokens or more", str(context), "leave it out for all")
        table = self.site.tables.examples.of(self.latent).drop_columns(["latent"])
        if band is not None:
            table = table.filter(np.asarray(table["band"]) == band)
        return windows(table, self._fired, self.site.index.texts, self.site.index.strings, context)

    def bands(self) -> pd.DataFrame:
        """The fifths of its range of activations, highest first: band (1 to 5), lower, upper, count.

        count is its firings from lower to upper. Empty for a latent that never fired.
        """
        lower = self._row["quantiles"] or []
        upper = [self.max, *lower][: len(lower)]
        rising = np.sort(self._fired[1])
        least = len(rising) - np.searchsorted(rising, np.array(lower, np.float32))
        count = np.diff(least, prepend=0)
        number = range(1, len(lower) + 1)
        return pd.DataFrame({"band": number, "lower": lower, "upper": upper, "count": count})

    def activations(self) -> pd.DataFrame:
        """Every firing, in the order of the text: row, block, document, position, token, activation."""
        texts, (row, activation) = self.site.index.texts, self._fired
        place = texts.place[row]
        return pd.DataFrame(
            {
                "row": row,
                "block": place // texts.tokens.shape[1],
                "document": texts.document.reshape(-1)[place],
                "position": texts.position.reshape(-1)[place],
                "token": self.site.index.strings.of(texts.tokens.reshape(-1)[place]),
                "activation": activation,
            }
        )

    def logits(self) -> pd.DataFrame:
        """Tokens its decoder row raises and lowers most: side (top, bottom), token, id, logit per unit."""
        ids = {side: self._row[f"{side}_tokens"] or [] for side in ("top", "bottom")}
        both = [*ids["top"], *ids["bottom"]]
        return pd.DataFrame(
            {
                "side": [side for side, some in ids.items() for _ in some],
                "token": self.site.index.strings.of(both),
                "id": both,
                "logit": [*(self._row["top_logits"] or []), *(self._row["bottom_logits"] or [])],
            }
        )

    def histogram(self) -> pd.DataFrame:
        """Its activations where it fires, in logarithmic bins: lower, upper, count."""
        first = self._row["histogram_first"] or 0
        return _bins(histogram_edges()[first:], self._row["histogram"])

    def logit_histogram(self) -> pd.DataFrame:
        """How its logits spread over the vocabulary, in standard deviations: lower, upper, count."""
        edges = self.site.manifest.get("logit_histogram_edges", [])
        return _bins(np.array(edges, dtype=float), self._row["logit_histogram"])

    def drivers(self, order: str = "activation") -> pd.DataFrame:
        """The tokens it fires on: token, id, count, mean, share (of its activation), lift.

        `order` is "activation" (by share) or "lift" (how much likelier than by chance).
        """
        if order not in ("activation", "lift"):
            raise UserError('order must be "activation" or "lift"', repr(order), "choose one of those")
        table = self.site.tables.drivers.of(self.latent)
        table = table.filter(np.asarray(table["order"]) == order).drop_columns(["latent", "order", "rank"])
        frame = table.rename_columns({"token": "id"}).to_pandas()
        frame.insert(0, "token", self.site.index.strings.of(frame["id"].to_numpy()))
        return frame

    def neighbours(self) -> pd.DataFrame:
        """Latents whose decoder rows point the same way: kind, site, latent, label, cosine.

        Kind is cosine (its own site), previous or next (the indexed layer before and after).
        """
        table = self._related.filter(np.asarray(self._related["kind"]) != COFIRING).drop_columns(["count"])
        return self._labelled(table).rename_columns({"value": "cosine"}).to_pandas()

    def cofiring(self) -> pd.DataFrame:
        """Latents of its site that fire on the same tokens: site, latent, label, phi, count of those."""
        table = self._related.filter(np.asarray(self._related["kind"]) == COFIRING).drop_columns(["kind"])
        return self._labelled(table).rename_columns({"value": "phi"}).to_pandas().astype({"count": "int64"})

    def neurons(self) -> pd.DataFrame:
        """The largest entries of its decoder row: neuron, value, share (of the row's L1 norm)."""
        return pd.DataFrame(self._row["neuron_alignment"] or [], columns=["neuron", "value", "share"])

    def direction(self) -> Float[Tensor, " d_out"]:
        """Its decoder row: what it writes, per unit of activation. UserError when only the index is here."""
        return self.site.index.decoder(self.site.name)[self.latent]

    def plot_histogram(self) -> go.Figure:
        """Its activations where it fires."""
        return charts.histogram(self.histogram())

    def plot_logits(self) -> go.Figure:
        """The tokens it raises and lowers."""
        return charts.bars(self.logits(), "logit")

    def plot_drivers(self) -> go.Figure:
        """The tokens it fires on."""
        return charts.bars(self.drivers(), "share")

    def facts(self) -> list[tuple[str, str]]:
        """Its numbers as (name, value) pairs for people."""
        often = f"fires on 1 token in {1 / self.density:,.0f}" if self.density else "never fires"
        fixed = [] if self.threshold is None else [("threshold", markup.number(self.threshold))]
        cosine = self._row["encoder_decoder_cosine"]
        return [
            (often, markup.percent(self.density)),
            ("firings", f"{self.firings:,}"),
            ("highest", markup.number(self.max)),
            ("mean when firing", markup.number(self.mean)),
            *fixed,
            *([] if cosine is None else [("encoder · decoder", markup.number(cosine))]),
        ]

    def title(self) -> str:
        """Where it is, for people: `9 resid_post · 123`."""
        return f"{site_label(self.site.name)} · {self.latent}"

    def __repr__(self) -> str:
        from viewer.cards import feature_text  # late: cards are made of features

        return feature_text(self)

    def _repr_html_(self) -> str:
        from viewer.cards import feature_html

        return feature_html(self)

    @property
    def _key(self) -> tuple[str, str, int]:
        return str(self.site.index.root.resolve()), self.site.name, self.latent

    @functools.cached_property
    def _fired(self) -> tuple[np.ndarray, np.ndarray]:
        return self.site.tables.firings.latent(self.latent)

    @functools.cached_property
    def _related(self) -> pa.Table:
        table = self.site.tables.related.of(self.latent).drop_columns(["latent", "rank"])
        return table.rename_columns({"other_site": "site", "other": "latent"})

    def _labelled(self, table: pa.Table) -> pa.Table:
        """With a column `label`, of latents of the columns `site` and `latent`."""
        sites, latents = (table[name].to_numpy() for name in ("site", "latent"))
        labels = np.full(len(table), "", dtype=object)
        # a neighbour's site may have been indexed elsewhere
        for site in set(sites) & set(self.site.index.sites()):
            here = sites == site
            labels[here] = self.site.index.labels_of(site, latents[here].tolist())
        return table.add_column(
            table.column_names.index("latent") + 1, "label", pa.array(labels, pa.string())
        )

    def _annotation(self, field: str) -> str:
        return self.site.index.annotations.get(self.site.name, self.latent, field)

    def _annotate(self, field: str, text: str) -> None:
        self.site.index.annotations.set(self.site.name, self.latent, field, text)


def _bins(edges: np.ndarray, counts: list[int] | None) -> pd.DataFrame:
    """A histogram whose first bin starts at the first edge."""
    number = np.array(counts or [], dtype=np.int64)
    return pd.DataFrame({"lower": edges[: len(number)], "upper": edges[1 : len(number) + 1], "count": number})
