"""What needs the language model: tracing a text, steering, ablating and attributing. A run's live side.

The model is loaded when it is first needed, so that a run can be browsed where its model cannot be had.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from activations.models import LanguageModel, load_model
from activations.sites import layer_of, site_label
from sae.dictionary import Dictionary
from sae.errors import UserError

_FACTS = {"label": "", "max": float("nan"), "density": float("nan")}


@runtime_checkable
class Browsed(Protocol):
    """What is needed of a run: `viewer.runs.Run`."""

    index: Any

    @property
    def sites(self) -> list[str]: ...
    @property
    def model_name(self) -> str: ...
    def site(self, name: str) -> Any: ...
    def dictionary(self, site: str) -> Dictionary: ...


Key = tuple[str, int]
"""A latent: the run's name of its site, and its number."""


class Live:
    """A run's language model and dictionaries, each loaded on first use and then kept."""

    def __init__(self, run: Browsed, model: LanguageModel | None = None) -> None:
        self.run = run
        self._model = model
        self._dictionaries: dict[str, Dictionary] = {}
        self._sites: dict[str, Any] = {}
        self.continuations: dict[Any, str] = {}
        """How the untouched model went on from the latest prompt: it is asked for with every intervention."""

    def use(self, model: LanguageModel) -> None:
        """Makes a loaded model the run's."""
        if model is not self._model:
            self._model, self._dictionaries, self.continuations = model, {}, {}

    @property
    def model(self) -> LanguageModel:
        """The run's language model, in fp32: small effects, and generation with a cache, suffer from bf16.

        Raises UserError, saying why, when it cannot be had here.
        """
        if self._model is None:
            name = self.run.model_name
            try:
                with torch.inference_mode(False):  # weights born in it could never take part in a gradient
                    self._model = load_model(name, dtype="fp32", progress=False)
            except UserError as error:
                raise UserError(
                    "tracing, steering, ablating and attributing need the run's language model",
                    f"{name!r} cannot be had here: {error}",
                    "give one with viewer.open(path, model=...); browsing works without",
                ) from error
        return self._model

    def dictionary(self, site: str) -> Dictionary:
        """The dictionary of one of the run's sites, on the model's device once that is loaded."""
        if site not in self._dictionaries:
            device = "cpu" if self._model is None else self._model.device
            with torch.inference_mode(False):
                self._dictionaries[site] = self.run.dictionary(site).to(device).requires_grad_(False)
        return self._dictionaries[site]

    def dictionaries(self, sites: Sequence[str] | None = None) -> dict[str, Dictionary]:
        """Dictionaries by site, all or some; UserError when one does not fit the model."""
        model = self.model
        found = {site: self.dictionary(site) for site in (self.run.sites if sites is None else sites)}
        for site, dictionary in found.items():
            cfg = dictionary.cfg
            for place, width in ((cfg.site_in, cfg.d_in), (cfg.site_out, cfg.d_out)):
                if model.site_width(place) != width:
                    must = f"the dictionary of {site} must be as wide as the model at {place}"
                    asked = f"{width} for {model.site_width(place)} of {model.name}"
                    raise UserError(must, asked, "open the run with the model that it was trained on")
        return found

    def tokens(self, text: str) -> Int[Tensor, "1 pos"]:
        """A text's tokens behind BOS, which the model's reading begins with. UserError for an empty text."""
        model = self.model
        ids = model.encode(text, add_bos=True)
        if len(ids) == (model.bos_id is not None):
            raise UserError("the text must hold at least one token", repr(text), "give some text")
        return torch.tensor([ids])

    def ordinary(self, tokens: Int[Tensor, "*batch pos"]) -> Bool[Tensor, "*batch pos"]:
        """Where tokens are not special: dictionaries are not trained on the others, so they are left out."""
        return ~torch.isin(tokens, torch.tensor(self.model.special_ids, dtype=torch.long))

    def strings(self, tokens: Int[Tensor, " pos"]) -> list[str]:
        """The tokens as they read in a text."""
        return self.model.token_strings(tokens.tolist())

    def token(self, text: str) -> int:
        """The id of a text that is one token, for instance " Paris". Raises UserError for other texts."""
        ids = self.model.encode(text)
        if len(ids) != 1:
            shown = ", ".join(map(repr, self.model.token_strings(ids)))
            hint = "mind the space in front of a word: ' Paris', not 'Paris'"
            raise UserError("a target must be one token", f"{text!r} is {len(ids)}: {shown}", hint)
        return ids[0]

    def keys(self, features: Sequence[Any]) -> list[Key]:
        """Features, or pairs of a site or layer and a latent, as sites and numbers, each of them once.

        Raises UserError for a feature of another run, a latent that is none and one that is named twice.
        """
        keys = [self._key(feature) for feature in features]
        for site, latent in keys:
            d_sae = self.dictionary(site).cfg.d_sae
            if not 0 <= latent < d_sae:
                raise UserError(
                    f"a latent of {site} must be from 0 to {d_sae - 1}", str(latent), "choose one of those"
                )
        if twice := {key for key in keys if keys.count(key) > 1}:
            names = ", ".join(f"{latent} at {site}" for site, latent in sorted(twice))
            raise UserError("each feature must be named once", f"{names} several times", "name it once")
        if not keys:
            raise UserError("at least one feature must be named", "none", "give a feature")
        return keys

    def _key(self, feature: Any) -> Key:
        if not isinstance(feature, tuple):
            site = feature.site
            if site.index is not self.run.index:
                found = f"latent {feature.latent} of {site.name} in {site.index.home}"
                raise UserError("the features must be of this run", found, "take them from this run")
            return site.name, int(feature.latent)
        place, latent = feature
        if isinstance(place, str):
            return place, int(latent)
        here = [site for site in self.run.sites if layer_of(site) == place]
        if len(here) != 1:
            names = ", ".join(map(site_label, self.run.sites))
            raise UserError(
                "a layer must name one site", f"{len(here)} sites for layer {place}", f"choose from {names}"
            )
        return here[0], int(latent)

    def facts(self, site: str) -> pd.DataFrame:
        """What the index knows of each latent: label, max, density; empty and NaN where there is no index."""
        try:
            if site not in self._sites:
                self._sites[site] = self.run.site(site)
            known = self._sites[site].latents()
        except UserError:
            known = pd.DataFrame(index=range(self.dictionary(site).cfg.d_sae))
        return pd.DataFrame(
            {name: known[name].to_numpy() if name in known else other for name, other in _FACTS.items()},
            index=known.index,
        )

    def with_facts(self, firings: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
        """Rows with a column `latent`, by site, as one table with site, layer, label and density.

        Also `share`: the activation over the highest that the index has seen of the latent.
        """
        parts = []
        for site, rows in firings.items():
            facts = self.facts(site).iloc[rows["latent"].to_numpy()]
            share = rows["activation"].to_numpy() / facts["max"].where(facts["max"] > 0).to_numpy()
            more = {"site": site, "layer": layer_of(site), "share": share}
            parts.append(
                rows.assign(**more, label=facts["label"].to_numpy(), density=facts["density"].to_numpy())
            )
        return pd.concat(parts, ignore_index=True)
