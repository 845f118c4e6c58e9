"""The Features API: a run folder as Python objects that show themselves, and DataFrames.

    run = viewer.open("runs/demo");  feature = run.layer(9)[123];  feature.examples()

Nothing here needs the language model or Streamlit; the calls that need the model are in viewer/calls.py.
"""

import functools
import html
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from activations.sites import kind_of, layer_of, site_label
from sae.errors import UserError
from train.run_folder import RunFolder
from viewer import markup
from viewer.accumulate import histogram_edges
from viewer.calls import LiveCalls
from viewer.storage import EXAMPLES, LATENTS, TOKENS, read_manifest, read_rows

if TYPE_CHECKING:
    from activations.models import LanguageModel

_SCALARS = ["latent", "firings", "density", "mean", "max", "threshold"]
_METRICS = [
    "l0",
    "l0_target",
    "fvu",
    "delta_ce",
    "delta_ce_se",
    "ce_recovered_mean",
    "ce_recovered_zero",
    "kl",
    "dead",
]


class Run(LiveCalls):
    """A run folder, read only."""

    def __init__(self, folder: RunFolder, model: "LanguageModel | None" = None) -> None:
        self.folder = folder
        self._given_model = model
        self.path = folder.path
        self.name = folder.name

    @property
    def sites(self) -> list[str]:
        """The sites trained, in layer order."""
        return self.folder.sites()

    def site(self, name: str) -> "Site":
        """A site's features. Raises UserError when the run has no such site or the site no whole index."""
        if name not in self.sites:
            raise UserError(
                "the site must be one of the run's", repr(name), f"choose from {', '.join(self.sites)}"
            )
        return Site(self.folder.index_dir(name), name)

    def layer(self, layer: int, kind: str | None = None) -> "Site":
        """The site at a layer. `kind` (`resid_post`, `mlp_out`, ...) is needed where a layer has several."""
        here = [site for site in self.sites if layer_of(site) == layer and kind in (None, kind_of(site))]
        if len(here) != 1:
            layers = ", ".join(site_label(site) for site in self.sites)
            asked = f"layer {layer}" + (f" {kind}" if kind else "")
            do = "also name the kind" if here else f"choose from {layers}"
            raise UserError("a layer must name one site", f"{len(here)} sites for {asked}", do)
        return self.site(here[0])

    def overview(self) -> pd.DataFrame:
        """A row a site: site, layer, kind and the held-out metrics of eval.json (NaN for none)."""
        table = self.folder.eval_table()
        rows = [{"site": s, "layer": layer_of(s), "kind": kind_of(s), **table.get(s, {})} for s in self.sites]
        frame = pd.DataFrame(rows)
        return frame.reindex(columns=[*frame.columns, *(m for m in _METRICS if m not in frame)])

    def curves(self) -> pd.DataFrame:
        """The training log: a row per logging step and site. Empty when nothing was logged."""
        return self.folder.metrics()

    def __repr__(self) -> str:
        config = self.folder.config()
        what = f"{config.get('model', '?')}, {config.get('corpus', '?')}"
        first = f"run {self.name} ({self.folder.state()}): {what}"
        shown = self.overview()[["layer", "kind", *_METRICS]].to_string(
            index=False, na_rep="–", float_format="%.4g"
        )
        return f"{first}\n{shown}"

    def _repr_html_(self) -> str:
        config = self.folder.config()
        facts = [(k, str(config.get(k, "–"))) for k in ("model", "corpus", "width", "l0", "tokens")]
        cells = [
            [html.escape(site_label(row["site"])), *(markup.number(row[m]) for m in _METRICS)]
            for row in self.overview().to_dict("records")
        ]
        body = markup.facts_html([*facts, ("state", self.folder.state())]) + markup.table_html(
            ["site", *_METRICS], cells
        )
        return f'{markup.STYLE}<div class="js-card"><h4>{html.escape(self.name)}</h4>{body}</div>'


class Site:
    """The latents of one dictionary: `site[123]` is a Feature. UserError when the index is torn or absent."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.manifest: dict[str, Any] = read_manifest(folder)

    def __len__(self) -> int:
        return self.manifest["d_sae"]

    def __getitem__(self, latent: int) -> "Feature":
        if not 0 <= latent < len(self):
            raise UserError(
                f"a latent of {self.name} must be from 0 to {len(self) - 1}",
                str(latent),
                "choose one of those",
            )
        return Feature(self, int(latent))

    def __iter__(self) -> Iterator["Feature"]:
        return (Feature(self, latent) for latent in range(len(self)))

    @functools.cached_property
    def _scalars(self) -> pd.DataFrame:
        return read_rows(self.folder / LATENTS, columns=_SCALARS).to_pandas()

    def latents(self) -> pd.DataFrame:
        """A row a latent: latent, firings, density, mean and max over firings, threshold."""
        return self._scalars.copy()

    def live(self) -> np.ndarray:
        """The latents that fired at least once on the indexed text, in order."""
        return self._scalars.loc[self._scalars["firings"] > 0, "latent"].to_numpy()

    @functools.cached_property
    def _texts(self) -> dict[int, str]:
        table = read_rows(self.folder / TOKENS)
        return dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))

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
    """One latent and what the index knows of it."""

    def __init__(self, site: Site, latent: int) -> None:
        self.site, self.latent = site, latent
        self._row: dict[str, Any] = read_rows(site.folder / LATENTS, latent=latent).to_pylist()[0]
        self.density: float = self._row["density"]
        """Share of tokens on which it fires."""
        self.firings: int = self._row["firings"]
        self.mean: float = self._row["mean"]
        """Mean activation over its firings, in the model's own units; 0 when it never fired."""
        self.max: float = self._row["max"]
        self.threshold: float | None = self._row["threshold"]
        """None where a pre-activation alone does not decide whether it fires."""

    def examples(self) -> pd.DataFrame:
        """Its best documents, best first: document, position, token, activation, peak, tokens and values.

        tokens and values are lists of one length, the window around the peak; peak is the peak's place in
        them.
        """
        table = read_rows(self.site.folder / EXAMPLES, latent=self.latent)
        frame = table.drop_columns(["latent", "rank"]).to_pandas()
        texts = self.site._texts
        frame["token"] = [texts[i] for i in frame["token"]]
        frame["tokens"] = [[texts[i] for i in ids] for ids in frame["tokens"]]
        frame["values"] = [list(map(float, values)) for values in frame["values"]]
        return frame

    def logits(self) -> pd.DataFrame:
        """Tokens its decoder row raises and lowers most: side (top, bottom), token, id, logit per unit."""
        texts, rows = self.site._texts, []
        for side in ("top", "bottom"):
            for token, logit in zip(self._row[f"{side}_tokens"], self._row[f"{side}_logits"], strict=True):
                rows.append({"side": side, "token": texts[token], "id": token, "logit": logit})
        return pd.DataFrame(rows, columns=["side", "token", "id", "logit"])

    def histogram(self) -> pd.DataFrame:
        """Its activations where it fires, in logarithmic bins: lower, upper, count."""
        counts = np.array(self._row["histogram"], dtype=np.int64)
        first = self._row["histogram_first"]
        edges = histogram_edges()[first : first + len(counts) + 1]
        return pd.DataFrame({"lower": edges[: len(counts)], "upper": edges[1:], "count": counts})

    def facts(self) -> list[tuple[str, str]]:
        """Its numbers as (name, value) pairs for people."""
        often = f"fires on 1 token in {1 / self.density:,.0f}" if self.density else "never fires"
        fixed = [] if self.threshold is None else [("threshold", markup.number(self.threshold))]
        return [
            (often, markup.percent(self.density)),
            ("firings", f"{self.firings:,}"),
            ("highest", markup.number(self.max)),
            ("mean when firing", markup.number(self.mean)),
            *fixed,
        ]

    def __repr__(self) -> str:
        lines = [f"{self.site.name} latent {self.latent}: " + ", ".join(f"{n} {v}" for n, v in self.facts())]
        logits = self.logits()
        for side, word in (("top", "raises"), ("bottom", "lowers")):
            tokens = [markup.readable(t) for t in logits.loc[logits["side"] == side, "token"]]
            if tokens:
                lines.append(f"  {word}  " + "  ".join(tokens))
        for row in self.examples().head(5).to_dict("records"):
            text, peak = [markup.readable(t, alone=False) for t in row["tokens"]], row["peak"]
            text[peak] = f"[{text[peak]}]"
            around = "".join(text[max(0, peak - 12) : peak + 7])
            lines.append(f"  {markup.number(row['activation']):>7}  {around}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        title = f"{self.site.name} latent {self.latent}"
        return (
            f'{markup.STYLE}<div class="js-card"><h4>{html.escape(title)}</h4>'
            f"{markup.facts_html(self.facts())}"
            f"{markup.histogram_svg(self.histogram())}{markup.logits_html(self.logits())}"
            f'<div class="js-h">Examples</div>{markup.examples_html(self.examples(), self.max)}</div>'
        )


def open(path: Path | str, *, model: "LanguageModel | None" = None) -> Run:
    """Opens a run folder. Raises UserError when it is none.

    `model` is for the calls that need one (trace, steer, ablate, attribute); without it they load the run's.
    """
    return Run(RunFolder.open(path), model)
