"""Whether a dictionary fits the model it is said to belong to, and if not, which usual cause explains it.

A dictionary fits when it leaves at most 0.7 of the variance unexplained, its L0 is within a factor of 2 of
the published one, the model loses less with it than with the mean activation in its place, and no other
site, scale or folding fits it far better. A cause explains a misfit when the change that it names brings FVU
to 0.5 at most, L0 within a factor of 2, and what the model loses to half of what the mean costs; and when FVU
falls to half of what it was (0.8 where the change is hook or BOS alone, with nothing to choose), or L0
comes right. Random dictionaries do not get there: their FVU stays near 1, whatever is changed.

FVU here leaves out the rows with massive activations (`train.fit.measure`).
"""

import dataclasses
import html
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.models import LanguageModel
from sae.dictionary import Dictionary, DictionaryConfig
from sae.errors import UserError
from sae.probe import make_probe
from train import causes
from train.evals import evaluate, first_tokens
from train.fit import Rows, Text, as_text
from train.search import L0_OCTAVES, MOST_FVU, Published, Search, Tried

Verdict = Literal["fits", "explained", "unexplained"]
Progress = Callable[[str, int, int], None]

LEAST_CE_RECOVERED = 0.5
"""Of what mean ablation costs, when a cause is believed."""
# where the mean activation costs less than so many nats, the loss says nothing of a dictionary
_CE_COUNTS = 0.1
# rows that candidates are compared on: as many as tell sites apart, and few enough for a hundred candidates
_ROWS = 768
# rows that a probe's few are chosen from
_SAMPLE = 256
# Gemma Scope 2's words at 270M, rising over the first third of the layers
_WORDS = {"small": (10.0, 20.0), "big": (60.0, 120.0)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `check` found out. Its text and its HTML say it in words; `frame` holds every candidate."""

    cfg: DictionaryConfig
    model: str
    published: Published | None
    verdict: Verdict
    wrong: tuple[str, ...]
    """What does not look as it should, in words; empty for a dictionary that fits."""
    claimed: Tried | None
    """The dictionary as it says of itself; None where the model has no such site."""
    cause: Tried | None
    """The change that explains a misfit."""
    closest: Tried | None
    """The change that fits best, whether it explains anything or not."""
    losses: dict[str, dict[str, Any]]
    """What `train.evals.evaluate` says of `claimed`, and of `changed`: the cause, or else the closest."""
    tried: tuple[Tried, ...]
    sample: tuple[Tensor, Tensor]
    """Some rows where the dictionary that fits reads and writes; none where there is no such dictionary."""

    @property
    def dictionary(self) -> Dictionary | None:
        """The dictionary that fits the model, as it was or put right, with a probe of activations seen here;
        None where no cause was found or no weights can do it.
        """
        sound = self.claimed if self.verdict == "fits" else self.cause
        made = None if sound is None else sound.candidate.put_right()
        if made is not None:
            x, y = self.sample
            made.probe = make_probe(made, x, y if made.cfg.transcoder else None)
        return made

    @property
    def summary(self) -> str:
        """The verdict in a sentence."""
        if self.verdict == "fits":
            return "fits"
        if self.cause is not None:
            cause = self.cause.candidate
            return f"does not fit, explained by {' + '.join(cause.causes)}: {cause.what}"
        singles = dict.fromkeys(one.candidate.causes[0] for one in self.tried if one.candidate.causes)
        return f"does not fit, unexplained by {len(self.tried)} changes and pairs of {', '.join(singles)}"

    @property
    def frame(self) -> pd.DataFrame:
        """Every candidate, the best first: `causes`, `change`, `site_in`, `site_out`, `l0`, `fvu`."""
        rows = [
            {
                "causes": " + ".join(one.candidate.causes) or "none",
                "change": one.candidate.what,
                "site_in": one.candidate.site[0],
                "site_out": one.candidate.site[1],
                "l0": one.fit.l0,
                "fvu": one.fit.fvu,
            }
            for one in self.tried
        ]
        return pd.DataFrame(rows).sort_values("fvu", ignore_index=True)

    def rows(self) -> list[tuple[str, Tried, dict[str, Any]]]:
        """What a table shows: a name, the candidate and its losses, where they were measured."""
        shown = [("as it says", self.claimed, self.losses.get("claimed", {}))]
        changed = self.cause or (self.closest if self.verdict == "unexplained" else None)
        if changed is not None:
            name = "put right" if self.cause else "closest"
            shown.append((f"{name}: {changed.candidate.what}", changed, self.losses.get("changed", {})))
        return [(name, one, losses) for name, one, losses in shown if one is not None]

    def __str__(self) -> str:
        lines = [self.summary, *(f"  {what}" for what in self.wrong)]
        for name, one, losses in self.rows():
            spliced = "".join(
                f", {word} {losses[key]:.3f}"
                for key, word in (("delta_ce", "delta CE"), ("ce_recovered_mean", "CE recovered"))
                if losses.get(key) is not None
            )
            lines.append(f"  {name}: L0 {one.fit.l0:.1f}, FVU {one.fit.fvu:.4f}{spliced}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        shown = self.frame.head(10).to_html(index=False, float_format="{:.4g}".format)
        return f"<pre>{html.escape(str(self))}</pre>{shown}"


def check(
    dictionary: Dictionary,
    model: LanguageModel,
    blocks: Iterable[TokenBlocks],
    *,
    published: Published | None = None,
    tokens: int = 4096,
    loss_tokens: int = 512,
    progress: Progress | None = None,
) -> Diagnosis:
    """Measures a dictionary on held-out text and, where it does not look as published, finds out why.

    `published` is what `published_l0` makes of the config where it is not given. L0 and FVU are over `tokens`
    kept tokens of the blocks, losses over `loss_tokens`; candidates are compared on the first 768. Raises
    UserError when no site of the model is as wide as the dictionary, and when there is no text.
    """
    made = check_all(
        {"": dictionary},
        model,
        blocks,
        published={} if published is None else {"": published},
        tokens=tokens,
        loss_tokens=loss_tokens,
        progress=progress,
    )
    return made[""]


def check_all(
    dictionaries: Mapping[str, Dictionary],
    model: LanguageModel,
    blocks: Iterable[TokenBlocks],
    *,
    published: Mapping[str, Published] | None = None,
    tokens: int = 4096,
    loss_tokens: int = 512,
    progress: Progress | None = None,
) -> dict[str, Diagnosis]:
    """`check` for several dictionaries, by name: they are measured together and searched one by one."""
    report = progress or (lambda what, done, total: None)
    text = list(first_tokens(blocks, tokens))
    if not text:
        raise UserError("there must be text to check on", "no token", "give a larger corpus")
    rows = Rows(model, text, _ROWS)
    searches: dict[str, Search] = {}
    for name, dictionary in dictionaries.items():
        check_width(dictionary.cfg, model)
        said = (published or {}).get(name) or published_l0(dictionary.cfg)
        searches[name] = Search(dictionary, model, rows, said)
    found = _losses(
        {name: search for name, search in searches.items() if search.readable},
        model,
        text,
        loss_tokens,
        report,
    )
    return {
        name: _diagnose(name, search, found.get(name, {}), model, text, loss_tokens, report)
        for name, search in searches.items()
    }


# candidates that are tried for a dictionary with nothing wrong, about
_SOME = 40


def check_width(cfg: DictionaryConfig, model: LanguageModel) -> None:
    """Raises UserError when no site of the model is as wide as what the dictionary reads or writes."""
    known = causes.widths(model)
    for what, width in (("d_in", cfg.d_in), ("d_out", cfg.d_out)):
        if width not in known.values():
            of_width: dict[int, dict[str, None]] = {}
            for site, each in known.items():
                of_width.setdefault(each, {})[re.sub(r"blocks\.\d+\.", "", site)] = None
            found = "; ".join(f"{each}: {', '.join(names)}" for each, names in of_width.items())
            raise UserError(
                f"a site of {model.name} must be as wide as the dictionary's {what}, {width}",
                f"sites {found}",
                "name the model that it was trained on with --model",
            )


def published_l0(cfg: DictionaryConfig, source: str = "") -> Published | None:
    """The L0 that a dictionary was published with: its config's, its k, or what its id says in a word."""
    if cfg.l0_target:
        return Published(float(cfg.l0_target), float(cfg.l0_target), "its config or id")
    if cfg.k:
        return Published(float(cfg.k), float(cfg.k), "its k")
    word = re.search(r"_l0_(small|big)", source)
    if word and "270m" in source:
        return Published(*_WORDS[word[1]], f"l0_{word[1]} at 270M")
    return None


def _diagnose(
    name: str,
    search: Search,
    losses: dict[str, Any],
    model: LanguageModel,
    text: list[TokenBlocks],
    loss_tokens: int,
    report: Progress,
) -> Diagnosis:
    wrong = _wrong(search, losses)
    label = f"causes tried {name}".strip()
    # how many it takes shows on the way
    cause = search.cause(passes=not wrong, on_tried=lambda n: report(label, n, max(n + 1, _SOME)))
    report(label, len(search.tried), len(search.tried))
    closest = search.closest()
    changed = cause or (closest if wrong else None)
    after: dict[str, Any] = {}
    if changed is not None and (better := changed.candidate.put_right()) is not None:
        after = _spliced({"": better}, changed.candidate.text, model, text, loss_tokens, report)[""]
        if cause is not None and not _good_loss(after, LEAST_CE_RECOVERED):
            cause = None
    if cause is not None and not wrong and search.claimed is not None:
        before = search.claimed.fit.fvu
        wrong = (f"FVU {before:.3f}, where it could be {cause.fit.fvu:.3f}",)
    sound = search.claimed if not wrong else cause
    rows = (torch.empty(0), torch.empty(0))
    if sound is not None:
        site, text_read = sound.candidate.site, sound.candidate.text
        rows = (search.rows.at(site[0], text_read)[:_SAMPLE], search.rows.at(site[1], text_read)[:_SAMPLE])
    return Diagnosis(
        cfg=search.dictionary.cfg,
        model=model.name,
        published=search.published,
        verdict="fits" if not wrong else "unexplained" if cause is None else "explained",
        wrong=wrong,
        claimed=search.claimed,
        cause=cause,
        closest=closest,
        losses={name: found for name, found in (("claimed", losses), ("changed", after)) if found},
        tried=tuple(search.tried),
        sample=rows,
    )


def _wrong(search: Search, losses: Mapping[str, Any]) -> tuple[str, ...]:
    """What is wrong with a dictionary as it says of itself, in words."""
    cfg = search.dictionary.cfg
    if not search.readable:
        where = cfg.site_in if cfg.site_in == cfg.site_out else f"{cfg.site_in} -> {cfg.site_out}"
        return (f"the model has no site {where or '(none is said)'} of width {cfg.d_in}",)
    found: list[str] = []
    said = search.published
    if said and said.octaves_off(losses["l0"]) > L0_OCTAVES:
        found.append(f"L0 {losses['l0']:.1f} and not {said}, as {said.where} says")
    if losses["fvu"] is None or not losses["fvu"] <= MOST_FVU:
        found.append(
            f"FVU {losses['fvu'] or math.inf:.3f}, where a dictionary that works has far less than 1"
        )
    if not _good_loss(losses, 0.0):
        cost = losses["ce_mean"] - losses["ce_clean"]
        found.append(f"delta CE {losses['delta_ce']:.3f} nats, and the mean activation costs {cost:.3f} only")
    return tuple(found)


def _good_loss(losses: Mapping[str, Any], recovered: float) -> bool:
    """Whether the model loses little enough: true where mean ablation costs too little to tell."""
    ablated, clean, delta = (losses.get(name) for name in ("ce_mean", "ce_clean", "delta_ce"))
    if ablated is None or clean is None or delta is None or ablated - clean < _CE_COUNTS:
        return True
    # a small sample must not condemn
    delta -= 2 * (losses.get("delta_ce_se") or 0.0)
    return delta < (1 - recovered) * (ablated - clean)


def _losses(
    searches: Mapping[str, Search],
    model: LanguageModel,
    text: list[TokenBlocks],
    loss_tokens: int,
    report: Progress,
) -> dict[str, dict[str, Any]]:
    """All dictionaries as they say of themselves, in one evaluation for each way of reading the text."""
    found: dict[str, dict[str, Any]] = {}
    ways: dict[Text, None] = dict.fromkeys(search.base.text for search in searches.values())
    for way in ways:
        alike = {name: search.dictionary for name, search in searches.items() if search.base.text == way}
        found |= _spliced(alike, way, model, text, loss_tokens, report)
    return found


def _spliced(
    dictionaries: Mapping[str, Dictionary],
    way: Text,
    model: LanguageModel,
    text: list[TokenBlocks],
    loss_tokens: int,
    report: Progress,
) -> dict[str, dict[str, Any]]:
    blocks = [as_text(part, way, model.bos_id) for part in text]
    tokens = sum(int(part.keep.sum()) for part in blocks)
    return evaluate(model, dictionaries, blocks, tokens=tokens, loss_tokens=loss_tokens, progress=report)
