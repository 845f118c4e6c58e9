"""Interventions: what the model writes and loses when features are steered or ablated."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from activations.edits import Addition, Edit
from activations.hooks import spliced
from activations.losses import next_token_losses
from sae.errors import UserError
from viewer import markup
from viewer.live.model import Key, Live

_CONTEXT = 256
_ROWS = 8


Progress = Callable[[str, str, int], None]
"""Told after each new token which side is being written (`with` or `without`), its text so far, and how many
tokens that is. What it raises ends the generation."""


def intervention(
    live: Live, strengths: Mapping[Any, float], ablated: Sequence[Any] = (), *, unit: str = "max"
) -> "Intervention":
    """Features steered by their strengths, and others that do not fire. Features are as `Live.keys` has them.

    Steering adds to features' activations at every ordinary token: each one's decoder row, so many times. A
    strength of 1 is the feature's highest activation on the indexed text, so that strengths mean the same for
    features and models of any scale; with `unit="absolute"` it is 1 in the model's own units. Negative ones
    push the other way. Ablating takes each activation times its decoder row away, and nothing else.

    Raises UserError for features that the run does not have, and for unit max where the index knows no
    maximum.
    """
    if unit not in ("max", "absolute"):
        raise UserError("the unit must be max or absolute", repr(unit), "choose one of them")
    keys = live.keys([*strengths, *ablated])
    steered, silenced = keys[: len(strengths)], keys[len(strengths) :]
    added: dict[str, dict[int, float]] = {}
    removed: dict[str, list[int]] = {}
    raised = []
    for (site, latent), strength in zip(steered, strengths.values(), strict=True):
        if not math.isfinite(strength):
            raise UserError(
                "a strength must be a finite number", f"{strength} for {latent} at {site}", "give one"
            )
        scale = _highest(live, (site, latent)) if unit == "max" else 1.0
        added.setdefault(site, {})[latent] = strength * scale
        raised.append(f"{latent} at {site} {strength:+g}{' x its highest' if unit == 'max' else ''}")
    for site, latent in silenced:
        removed.setdefault(site, []).append(latent)
    lowered = [f"{latent} at {site}" for site, latent in silenced]
    names = [f"{what}: {', '.join(of)}" for what, of in (("steered", raised), ("ablated", lowered)) if of]
    edits = {
        site: _edit(added.get(site, {}), removed.get(site, [])) for site in dict.fromkeys([*added, *removed])
    }
    return Intervention(live, edits, "; ".join(names))


def _edit(added: Mapping[int, float], removed: Sequence[int]) -> Edit:
    """The edit of one site."""
    addition = Addition(added)
    if not removed:
        # one that can be written without going by the activations
        return addition

    def edit(acts: Tensor) -> Tensor:
        acts[..., removed] = 0
        return addition(acts) if added else acts

    return edit


def next_tokens(live: Live, text: str, k: int) -> pd.DataFrame:
    """The `k` likeliest next tokens: token, id, probability."""
    probability, ids = _next(live, text).topk(min(k, live.model.d_vocab))
    tokens = live.model.token_strings(ids.tolist())
    return pd.DataFrame({"token": tokens, "id": ids.numpy(), "probability": probability.numpy()})


class Intervention:
    """The model with features steered or ablated. What the dictionaries miss is kept, bit for bit.

    The model itself is never changed: hooks stand in it while a call runs.
    """

    def __init__(self, live: Live, edits: Mapping[str, Edit], name: str) -> None:
        """`edits` go by the run's sites."""
        self._live = live
        self._edits = edits
        self.name = name

    def at_work(self) -> AbstractContextManager[Any]:
        """Within it the run's model (`run.model`) has the intervention, whatever runs it."""
        made = self._live.dictionaries(list(self._edits))
        edits = {made[site].cfg.site_out: edit for site, edit in self._edits.items()}
        return spliced(self._live.model, made.values(), error_term=True, edit=edits)

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> "Generation":
        """How the model goes on from a prompt with the intervention and without, side by side.

        A temperature of 0 takes the likeliest token each time; above it both sides draw from the same seed.
        Without the intervention the same prompt goes on as it did the last time, and is not computed again.
        Raises UserError for a prompt that is empty, or too long for that many more tokens.
        """
        tokens = self._live.tokens(prompt)
        limit = self._live.model.max_context
        if tokens.shape[1] + max_new_tokens > limit:
            found = f"{tokens.shape[1]} tokens and {max_new_tokens} new ones"
            raise UserError(f"{self._live.model.name} reads at most {limit} tokens", found, "ask for fewer")
        how = (max_new_tokens, temperature, seed)
        with self.at_work():
            text = _continued(self._live, tokens, *how, partial(progress, "with") if progress else None)
        key = (prompt, *how)
        without = self._live.continuations.get(key)
        if without is None:
            without = _continued(self._live, tokens, *how, partial(progress, "without") if progress else None)
            self._live.continuations = {key: without}
        return Generation(prompt, text, without, self.name)

    def logits(self, text: str) -> Float[Tensor, "pos d_vocab"]:
        """Logits at each token of a text, BOS first, with the intervention."""
        tokens = self._live.tokens(text)
        with self.at_work():
            return self._live.model.unembed(self._live.model.run_body(tokens))[0]

    def next_tokens(self, text: str, k: int = 10) -> pd.DataFrame:
        """The likeliest next tokens, with the intervention and without.

        Columns token, id, probability, without, and ratio of the two; the `k` likeliest of either side.
        """
        model = self._live.model
        with self.at_work():
            here = _next(self._live, text)
        without = _next(self._live, text)
        ids = torch.cat([side.topk(min(k, len(side))).indices for side in (here, without)]).unique()
        frame = pd.DataFrame(
            {
                "token": model.token_strings(ids.tolist()),
                "id": ids.numpy(),
                "probability": here[ids].numpy(),
                "without": without[ids].numpy(),
                "ratio": (here[ids] / without[ids]).numpy(),
            }
        )
        return frame.sort_values(by="probability", ascending=False, ignore_index=True)

    def loss(self, texts: str | Sequence[str], *, context: int = _CONTEXT) -> "LossChange":
        """The loss of the next token on texts, with the intervention and without, token by token.

        Texts longer than `context` tokens are read in pieces, each behind BOS. Scored are ordinary tokens
        whose next token is ordinary, as in the evaluation. Raises UserError when there is none.
        """
        model = self._live.model
        pieces = self._pieces([texts] if isinstance(texts, str) else list(texts), context)
        tables = [self._losses(pieces[n : n + _ROWS]) for n in range(0, len(pieces), _ROWS)]
        frame = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
        if not len(frame):
            raise UserError("texts must hold two tokens in a row", "none that could be scored", "give others")
        frame["token"] = model.token_strings(frame.pop("id").tolist())
        frame["difference"] = frame["loss"] - frame["without"]
        columns = ["text", "position", "token", "loss", "without", "difference", "kl"]
        order: Any = frame.sort_values(by=["text", "position"], ignore_index=True)
        return LossChange(order[columns], self.name)

    def _pieces(self, texts: Sequence[str], context: int) -> list[tuple[int, int, list[int]]]:
        """(text, position of the first token, token ids) of each piece, long ones first."""
        model = self._live.model
        front = [] if model.bos_id is None else [model.bos_id]
        room = min(context, model.max_context) - len(front)
        if room < 2:
            raise UserError("a context must have room for two tokens", str(context), "give a larger one")
        pieces = []
        for number, text in enumerate(texts):
            ids = model.encode(text)
            pieces += [
                (number, start, front + ids[start : start + room]) for start in range(0, len(ids), room)
            ]
        return sorted(pieces, key=lambda piece: -len(piece[2]))

    def _losses(self, pieces: Sequence[tuple[int, int, list[int]]]) -> pd.DataFrame:
        """A row a scored token of pieces that run as one batch; `id` is the token's."""
        model = self._live.model
        longest = max(len(ids) for _, _, ids in pieces)
        # behind the text, where causal attention does not look
        filler = int(model.special_ids[0]) if model.special_ids else 0
        tokens = torch.tensor([ids + [filler] * (longest - len(ids)) for _, _, ids in pieces])
        there = torch.tensor([[p < len(ids) for p in range(longest)] for _, _, ids in pieces])
        scored = _scored(self._live.ordinary(tokens) & there)
        with self.at_work():
            changed = model.run_body(tokens)
        rows = scored.to(changed.device)
        finals = torch.stack([model.run_body(tokens)[:, :-1][rows], changed[:, :-1][rows]])
        targets = tokens[:, 1:][scored]
        ce, kl = (values.cpu() for values in next_token_losses(model, finals, targets))
        piece, position = scored.nonzero(as_tuple=True)
        first = torch.tensor([start for _, start, _ in pieces])
        n_front = int(model.bos_id is not None)
        columns = {
            "text": torch.tensor([number for number, _, _ in pieces])[piece],
            "position": first[piece] + position + 1 - n_front,
            "id": targets,
            "loss": ce[1],
            "without": ce[0],
            "kl": kl[1],
        }
        return pd.DataFrame({name: values.numpy() for name, values in columns.items()})

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Generation:
    """A text as it goes on with an intervention and without."""

    prompt: str
    text: str
    """What the model wrote with the intervention."""
    without: str
    name: str
    """The intervention's."""

    def __repr__(self) -> str:
        return f"{self.name}\n  {self.prompt!r} ...\n  with:    {self.text!r}\n  without: {self.without!r}"

    def _repr_html_(self) -> str:
        from viewer.live.pictures import STYLE, generation_html  # late: pictures are made of these

        title = html.escape(markup.readable_text(self.name))
        body = generation_html(self.prompt, self.text, self.without)
        return f'{markup.STYLE}{STYLE}<div class="js-card"><h4>{title}</h4>{body}</div>'


@dataclass(frozen=True, eq=False)
class LossChange:
    """The loss of the next token with an intervention and without, in nats."""

    frame: pd.DataFrame
    """A row a scored token: text, position and token (the one predicted; BOS does not count), loss, without,
    difference, and kl, the divergence KL(without || with) of the predictions."""
    name: str
    """The intervention's."""

    @property
    def loss(self) -> float:
        """Mean with the intervention, per token."""
        return float(self.frame["loss"].to_numpy().mean())

    @property
    def without(self) -> float:
        """Mean without it."""
        return float(self.frame["without"].to_numpy().mean())

    @property
    def difference(self) -> float:
        """What the intervention adds to the loss, per token."""
        return float(self.frame["difference"].to_numpy().mean())

    @property
    def standard_error(self) -> float:
        """Of the difference: paired, and by text, since tokens of a text are no independent draws.

        NaN for a single text.
        """
        texts: Any = self.frame.groupby("text")["difference"].agg(["sum", "size"])
        n = len(texts)
        if n < 2:
            return math.nan
        # of a ratio of sums, since texts differ in length
        rest = texts["sum"] - self.difference * texts["size"]
        return math.sqrt(float((rest**2).sum()) * n / (n - 1)) / len(self.frame)

    def __repr__(self) -> str:
        error = self.standard_error
        more = f" ± {markup.number(error)}" if math.isfinite(error) else ""
        n_texts = self.frame["text"].nunique()
        return (
            f"{self.name}\n  loss {self.loss:.4f}, without {self.without:.4f}, difference "
            f"{self.difference:+.4g}{more} nats a token, {len(self.frame):,} tokens of {n_texts} texts"
        )


def _scored(keep: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos_minus_one"]:
    """Positions that are kept and whose next one is."""
    return keep[:, :-1] & keep[:, 1:]


def _next(live: Live, text: str) -> Float[Tensor, " d_vocab"]:
    """The probability of each next token, as the model stands."""
    return live.model.unembed(live.model.run_body(live.tokens(text))[0, -1]).float().softmax(-1).cpu()


def _continued(
    live: Live,
    tokens: Int[Tensor, "1 pos"],
    n_new: int,
    temperature: float,
    seed: int,
    progress: Callable[[str, int], None] | None,
) -> str:
    """How the model, as it stands, goes on."""
    model = live.model
    devices = [model.device] if model.device.type == "cuda" else []
    new: list[int] = []
    text = ""
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        parts: Any = model.bridge.generate_stream(
            tokens.to(model.device),
            max_new_tokens=n_new,
            max_tokens_per_yield=1,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            return_type="tokens",
            verbose=False,
        )
        for part in parts:
            # the first part begins with what it was given
            new += part[0, 0 if new else tokens.shape[1] :].tolist()
            text = str(model.tokenizer.decode(new, skip_special_tokens=True))
            if progress is not None:
                progress(text, len(new))
    return text


def _highest(live: Live, key: Key) -> float:
    site, latent = key
    highest = float(live.facts(site)["max"].to_numpy()[latent])
    if not highest > 0:
        found = f"no firing of {latent} at {site} in the run's index"
        raise UserError(
            "a strength in units of a feature's highest activation needs one", found, 'give unit="absolute"'
        )
    return highest
