"""Runs as Python objects: a run folder, or an index alone, and everything that can be asked of all its sites.

run = viewer.open("runs/demo");  run.layer(9)[123];  run.find(token=" Paris");  run.sql("select ...")
"""

import contextlib
import functools
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

import sae
from activations.sites import kind_of, layer_of, site_label
from sae.errors import UserError
from train.run_folder import RunFolder
from viewer import find, markup
from viewer.catalogue import Catalogue, Choice, Found
from viewer.compare import Comparison, compare
from viewer.features import Feature, Site
from viewer.health import NUMBERS, site_health
from viewer.live.calls import LiveCalls
from viewer.once import Kept
from viewer.places import find_place
from viewer.query import query
from viewer.tables import IndexFolder, SiteTables

if TYPE_CHECKING:
    from activations.models import LanguageModel

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
    """A run folder, or a folder with an index only. Reads all; writes nothing but labels and notes."""

    def __init__(
        self, path: Path, index: Path, folder: RunFolder | None, model: "LanguageModel | None" = None
    ) -> None:
        self._given_model = model
        self.path = path
        self.name = path.resolve().name
        self.folder = folder
        """None where there is an index and no run."""
        self.index = IndexFolder(index, path)
        self._sites: Kept[Site] = Kept()
        self._log: Kept[pd.DataFrame] = Kept()
        self._health: Kept[dict[str, Any]] = Kept()
        self._catalogue: Kept[Catalogue] = Kept()

    @property
    def sites(self) -> list[str]:
        """The sites trained, in layer order; without a run, the sites of the index."""
        return self.folder.sites() if self.folder else sorted(self.index.sites(), key=layer_of)

    @property
    def indexed(self) -> list[str]:
        """Those of its sites that have an index."""
        have = set(self.index.sites())
        return [site for site in self.sites if site in have]

    def site(self, name: str) -> Site:
        """A site's features. Raises UserError when the run has no such site or the site no whole index."""
        self._check(name)
        return self._sites.get(name, self.index.site(name), lambda: Site(self.index, name))

    def site_at(self, layer: int, kind: str | None = None) -> str:
        """The site at a layer. `kind` (`resid_post`, `mlp_out`, ...) is needed where a layer has several."""
        here = [site for site in self.sites if layer_of(site) == layer and kind in (None, kind_of(site))]
        if len(here) != 1:
            layers = ", ".join(site_label(site) for site in self.sites)
            asked = f"layer {layer}" + (f" {kind}" if kind else "")
            do = "also name the kind" if here else f"choose from {layers}"
            raise UserError("a layer must name one site", f"{len(here)} sites for {asked}", do)
        return here[0]

    def layer(self, layer: int, kind: str | None = None) -> Site:
        """The features at a layer, as `site_at` finds it."""
        return self.site(self.site_at(layer, kind))

    def dictionary(self, site: str) -> sae.Dictionary:
        """A site's dictionary. Raises UserError when only its index is here."""
        self._check(site)
        return self.index.dictionary(site)

    def latents(self) -> pd.DataFrame:
        """A row a latent of every indexed site: site, layer, kind, and the columns of `Site.latents`."""
        frames = []
        for name in self.indexed:
            frame = self.site(name).latents()
            frame.insert(0, "site", name)
            frame.insert(1, "layer", layer_of(name))
            frame.insert(2, "kind", kind_of(name))
            frames.append(frame)
        if not frames:
            raise self._no_index()
        return pd.concat(frames, ignore_index=True)

    def dead(self) -> pd.DataFrame:
        """The latents that never fired on the indexed text, as in `latents`."""
        return self._in_state("silent")

    def dense(self) -> pd.DataFrame:
        """The latents that fire on more than a tenth of its tokens, as in `latents`."""
        return self._in_state("dense")

    def duplicates(self, cosine: float = 0.9) -> pd.DataFrame:
        """Pairs of latents of a site whose decoder rows nearly agree: site, latent, other, cosine, jaccard.

        jaccard is the share of the tokens on which either fires that both fire on. Pairs are found among
        the nearest neighbours that the index keeps.
        """
        if not self.indexed:
            raise self._no_index()
        return find.duplicates({name: self.site(name) for name in self.indexed}, cosine)

    def find(
        self,
        *,
        token: str | int | None = None,
        text: str | None = None,
        like: Feature | None = None,
        sites: Sequence[str] | None = None,
        limit: int = 20,
    ) -> pd.DataFrame:
        """Latents, best first: site, layer, latent, label, why, score and more; of `sites`, or all indexed.

        By `token`: those that fire on it, as it reads (" Paris", with its space) or by its number. By
        `text`: those whose label, tokens, contexts or logits have its words. By `like`: those whose decoder
        rows point the same way. See `viewer.find` for the scores.
        """
        asked = [value for value in (token, text, like) if value is not None]
        if len(asked) != 1:
            raise UserError(
                "find needs one of token, text and like", f"{len(asked)} of them", "give just one"
            )
        if like is not None:
            return find.find_like(like, self.index, sites or self.sites, limit)
        if not self.indexed:
            raise self._no_index()
        if token is not None:
            return find.find_token(token, self.index, sites or self.indexed, limit)
        return find.find_text(str(text), self.index, sites or self.indexed, limit)

    def follow(self, feature: Feature) -> pd.DataFrame:
        """The same direction through the layers: site, layer, latent, label, cosine, a row a site.

        At each other site the latent whose decoder row has the highest cosine with the feature's. Sites
        that write to another width are left out. Raises UserError when the dictionaries are not here.
        """
        return find.follow(feature, self.index, self.sites)

    def browse(
        self, choice: Choice, among: pd.DataFrame | None = None, *, start: int = 0, rows: int = 50
    ) -> Found:
        """A page of the latents that `choice` leaves, of those of `among` (an answer of `find`) or of all."""
        tables, torn = self._whole()
        catalogue = self._catalogue.get("", tables, lambda: Catalogue(self.index, tables))
        return catalogue.browse(choice, among, torn, start=start, rows=rows)

    def compare(
        self,
        other: "Run | sae.Dictionary",
        layer: int | None = None,
        *,
        kind: str | None = None,
        site: str = "",
        cosine: float = 0.7,
    ) -> Comparison:
        """Which latents of a site another run, or a dictionary, has too. Name the site by layer, or in full.

        Needs both dictionaries, and takes what it can from the indexes. `cosine` is how near two decoder
        rows must be to be the same.
        """
        if (layer is None) == (not site):
            raise UserError("compare needs a layer or a site", f"{layer=}, {site=}", "give one of the two")
        name = site if layer is None else self.site_at(layer, kind)
        if isinstance(other, sae.Dictionary):
            pair = (self.dictionary(name), other)
            indexes = (self._index_of(name), None)
            return compare(pair, indexes, names=(self.name, "the dictionary"), site=name, cosine=cosine)
        names = (self.name, other.name) if self.name != other.name else (str(self.path), str(other.path))
        return compare(
            (self.dictionary(name), other.dictionary(name)),
            (self._index_of(name), other._index_of(name)),
            names=names, site=name, cosine=cosine,
        )  # fmt: skip

    def warm(self) -> None:
        """Reads what searching and following need of all sites, so that the first of them is quick, too."""
        with contextlib.suppress(UserError, OSError):
            _ = self.index.strings.by_word
        for name in self.indexed:
            # what is torn is told where it is asked for
            with contextlib.suppress(UserError, OSError):
                self.index.site(name).warm()
                self.index.decoder_norm(name)
        with contextlib.suppress(UserError, OSError):
            self.browse(Choice(sort="token"))

    def sql(self, statement: str) -> pd.DataFrame:
        """The answer to a SELECT over latents, examples, drivers, related, tokens and labels.

        The first four are the index's files, whose columns `viewer.index.storage` tells, of all sites, with
        the columns site and layer; tokens has id and text; labels is what you wrote. Nothing can be written.
        """
        if not self.indexed:
            raise self._no_index()
        return query(statement, self.index, self.indexed)

    def overview(self) -> pd.DataFrame:
        """A row a site: site, layer, kind and the held-out metrics of eval.json (NaN for none)."""
        table = self.folder.eval_table() if self.folder else {}
        rows = [{"site": s, "layer": layer_of(s), "kind": kind_of(s), **table.get(s, {})} for s in self.sites]
        frame = pd.DataFrame(rows)
        frame = frame.reindex(columns=[*frame.columns, *(m for m in _METRICS if m not in frame)])
        # what is null in eval.json is no number
        return frame.assign(**{m: pd.to_numeric(frame[m], errors="coerce") for m in _METRICS})

    def health(self) -> pd.DataFrame:
        """A row a site: site, layer, kind, the numbers of `viewer.health.site_health`, and trouble.

        trouble says why a site's index cannot be read, and is "" where it can; its numbers are NaN, and its
        `density` None. So one torn index hides no other.
        """
        rows, have = [], set(self.index.sites())
        for site in self.sites:
            row: dict[str, Any] = {"site": site, "layer": layer_of(site), "kind": kind_of(site)}
            try:
                tables = self.index.site(site)
                row |= self._health.get(site, tables, functools.partial(site_health, tables))
                trouble = ""
            except UserError as error:
                trouble = str(error) if site in have else "no index"
            rows.append({**row, "trouble": trouble})
        return pd.DataFrame(rows).reindex(columns=["site", "layer", "kind", *NUMBERS, "density", "trouble"])

    def curves(self) -> pd.DataFrame:
        """The training log: a row per logging step and site. Empty when nothing was logged."""
        if not self.folder:
            return pd.DataFrame()
        return self._log.get(None, self.folder.metrics_stamp(), self.folder.metrics).copy()

    def last_step(self) -> pd.DataFrame:
        """The last row of the training log of each site, with layer and kind. Empty as `curves`."""
        log = self.curves()
        if log.empty or not {"step", "site"} <= set(log.columns):
            return pd.DataFrame()
        last = log.groupby("site").last()
        rows = [{"site": s, "layer": layer_of(s), "kind": kind_of(s)} for s in self.sites if s in last.index]
        return pd.DataFrame(rows).join(last, on="site")

    def config(self) -> dict[str, Any]:
        """The training config; without a run, the model and corpus of the index."""
        if self.folder:
            return self.folder.config()
        for site in self.sites:
            # one torn site must not hide what the others say
            with contextlib.suppress(UserError):
                manifest = self.index.site(site).manifest
                return {key: manifest[key] for key in ("model", "corpus") if key in manifest}
        return {}

    @property
    def model_name(self) -> str:
        """The language model whose activations its dictionaries read."""
        return self.config().get("model") or self.dictionary(self.sites[0]).cfg.model

    def state(self) -> str:
        """`running`, `done`, `stopped: why`, `failed: why`, or `index only`."""
        return self.folder.state() if self.folder else "index only"

    def __repr__(self) -> str:
        config = self.config()
        what = f"{config.get('model', '?')}, {config.get('corpus', '?')}"
        first = f"run {self.name} ({self.state()}): {what}"
        shown = self.overview()[["layer", "kind", *_METRICS]].to_string(
            index=False, na_rep="–", float_format="%.4g"
        )
        return f"{first}\n{shown}"

    def _repr_html_(self) -> str:
        config = self.config()
        facts = [(k, str(config.get(k, "–"))) for k in ("model", "corpus", "width", "l0", "tokens")]
        cells = [
            [html.escape(site_label(row["site"])), *(markup.number(row[m]) for m in _METRICS)]
            for row in self.overview().to_dict("records")
        ]
        body = markup.facts_html([*facts, ("state", self.state())]) + markup.table_html(
            ["site", *_METRICS], cells
        )
        return f'{markup.STYLE}<div class="js-card"><h4>{html.escape(self.name)}</h4>{body}</div>'

    def _check(self, site: str) -> None:
        if site not in self.sites:
            raise UserError(
                "the site must be one of the run's", repr(site), f"choose from {', '.join(self.sites)}"
            )

    def _index_of(self, site: str) -> Site | None:
        return self.site(site) if site in self.indexed else None

    def _whole(self) -> tuple[dict[str, SiteTables], dict[str, str]]:
        """The tables of the sites whose index can be read, and why the others' cannot."""
        tables, torn = {}, {}
        for site in self.indexed:
            try:
                tables[site] = self.site(site).tables
            except UserError as error:
                torn[site] = str(error)
        return tables, torn

    def _in_state(self, state: str) -> pd.DataFrame:
        latents = self.latents()
        return latents.loc[latents["state"] == state].reset_index(drop=True)

    def _no_index(self) -> UserError:
        return UserError(
            "the run must have a feature index", f"none in {self.path}", "build one with `jumpscope index`"
        )


def open(path: Path | str, *, model: "LanguageModel | None" = None) -> Run:
    """Opens a run folder, or an index without a run (or one site of it). Raises UserError for others.

    `model` is for the calls that need one (trace, steer, ablate, attribute); without it they load the run's.
    """
    place = find_place(path)
    return Run(place.home, place.index, place.folder, model)
