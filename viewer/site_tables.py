"""The tables of one site's index, from the evidence of its firings and from its weights."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32

from activations.int8 import HasUnembedding
from sae import Dictionary
from viewer.evidence import Evidence
from viewer.lens import TokenLogits, Vocabulary, logit_histogram_edges, top_logits
from viewer.storage import DRIVERS, EXAMPLES, LATENTS, RELATED, SCHEMAS, make_table

LOGITS = 10
_SIDES = ("top_tokens", "top_logits", "bottom_tokens", "bottom_logits")
_RESIDUAL_KINDS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


def lowest_activation(dictionary: Dictionary) -> Float32[np.ndarray, " latent"]:
    """What each latent's activation is above where it fires."""
    threshold = dictionary.firing_threshold
    if threshold is None:
        return np.zeros(dictionary.cfg.d_sae, np.float32)
    return threshold.detach().float().clamp(min=0).cpu().numpy()


@torch.inference_mode()
def make_tables(
    model: HasUnembedding, dictionary: Dictionary, site: str, found: Evidence, vocabulary: Vocabulary
) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """A table of each of `storage.SCHEMAS`, and what the manifest says of them.

    `vocabulary` is the model's. A dictionary that does not write to the residual
    stream has no logits.
    """
    threshold = dictionary.firing_threshold
    latents = {
        **found.latents,
        "threshold": None if threshold is None else threshold.detach().float().cpu().numpy(),
    }
    facts: dict[str, Any] = {"logits": 0}
    latents |= dict.fromkeys(_SIDES, np.zeros((dictionary.cfg.d_sae, 0)))
    if _speaks(dictionary, site, model):
        found_logits = top_logits(model, dictionary.W_dec, count=LOGITS, vocabulary=vocabulary)
        latents |= _logit_columns(found_logits)
        facts = {"logits": LOGITS, "logit_histogram_edges": logit_histogram_edges().tolist()}
    n = len(found.cofiring["latent"])
    related = {**found.cofiring, "kind": np.full(n, "cofiring"), "other_site": np.full(n, site)}
    columns = {LATENTS: latents, EXAMPLES: found.examples, DRIVERS: found.drivers, RELATED: related}
    tables = {name: make_table(SCHEMAS[name], table) for name, table in columns.items()}
    return tables, facts


def _logit_columns(found: TokenLogits) -> dict[str, np.ndarray]:
    half = found.ids.shape[1] // 2
    sides = {
        f"{side}_{name}": values[:, span]
        for side, span in (("top", slice(0, half)), ("bottom", slice(half, None)))
        for name, values in (("tokens", found.ids), ("logits", found.logits))
    }
    spread = {"logit_mean": found.mean, "logit_std": found.std, "logit_skew": found.skew}
    return {**sides, **spread, "logit_histogram": found.histogram}


def _speaks(dictionary: Dictionary, site: str, model: HasUnembedding) -> bool:
    """Whether it writes to the residual stream, which the unembedding reads."""
    cfg = dictionary.cfg
    return (cfg.site_out or site).endswith(_RESIDUAL_KINDS) and cfg.d_out == model.W_U.shape[0]
