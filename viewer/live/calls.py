"""The calls of a run that need its language model, which is loaded by the first of them.

Browsing a run needs neither the model nor the packages that run it, so they are imported within.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from viewer.once import once

if TYPE_CHECKING:
    import pandas as pd

    from activations.models import LanguageModel
    from viewer.live.attribution import Attribution
    from viewer.live.interventions import Intervention
    from viewer.live.model import Live
    from viewer.live.trace import Trace


class LiveCalls:
    """What a run does with its language model. Features are `Feature`s, or (site or layer, latent) pairs."""

    _given_model: "LanguageModel | None" = None

    @once
    def _live(self) -> "Live":
        from viewer.live.model import Live

        return Live(self, self._given_model)  # pyright: ignore[reportArgumentType]  # a Run, which mixes it in

    @property
    def model(self) -> "LanguageModel":
        """The run's language model, loaded on first use in fp32; UserError, with why, if it cannot be had."""
        return self._live.model

    def use_model(self, model: "LanguageModel") -> None:
        """Gives it a language model that is loaded already, for instance that of another run."""
        self._live.use(model)

    def trace(self, text: str, *, sites: Sequence[str] | None = None, limit: int | None = None) -> "Trace":
        """Which features fire on a text, at every site and token: `.frame`, `.top()`, `.heatmap()`.

        With a `limit` a longer text is cut after so many tokens, or where the model's context ends.
        """
        from viewer.live.trace import trace

        return trace(self._live, text, sites=sites, limit=limit)

    def next_tokens(self, text: str, k: int = 10) -> "pd.DataFrame":
        """The model's `k` likeliest next tokens: token, id, probability."""
        from viewer.live.interventions import next_tokens

        return next_tokens(self._live, text, k)

    def steer(self, strengths: Mapping[Any, float], *, unit: str = "max") -> "Intervention":
        """The model with features added at every token: `.generate`, `.next_tokens`, `.logits`, `.loss`.

        A strength of 1 adds a feature's highest activation on the indexed text times its decoder row; with
        `unit="absolute"`, exactly its decoder row.
        """
        from viewer.live.interventions import intervention

        return intervention(self._live, strengths, unit=unit)

    def intervene(
        self, strengths: Mapping[Any, float], ablated: Sequence[Any] = (), *, unit: str = "max"
    ) -> "Intervention":
        """Features steered as by `steer`, and others ablated, at once."""
        from viewer.live.interventions import intervention

        return intervention(self._live, strengths, ablated, unit=unit)

    def ablate(self, *features: Any) -> "Intervention":
        """The model without features: `.generate`, `.next_tokens`, `.logits`, `.loss`."""
        from viewer.live.interventions import intervention

        return intervention(self._live, {}, features)

    def attribute(
        self,
        text: str,
        target: str | int,
        *,
        against: str | int | None = None,
        sites: Sequence[str] | None = None,
    ) -> "Attribution":
        """Which features raise a next token, gradient times activation: `.frame`, `.features()`, `.verify()`.

        Of the target's logit above the mean of all, or above that of `against`.
        """
        from viewer.live.attribution import attribute

        return attribute(self._live, text, target, against=against, sites=sites)
