"""The tables of one site's index, from the evidence of its firings and from its weights."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32

from activations.int8 import HasUnembedding
from sae import Dictionary
from viewer.evidence import Evidence
from viewer.lens import top_logits
from viewer.storage import DRIVERS, EXAMPLES, LATENTS, RELATED, SCHEMAS, make_table

LOGITS = 10
_RESIDUAL_KINDS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


def lowest_activation(dictionary: Dictionary) -> Float32[np.ndarray, " latent"]:
    """What each latent's activation is above where it fires."""
    threshold = dictionary.firing_threshold
    if threshold is None:
        return np.zeros(dictionary.cfg.d_sae, np.float32)
    return threshold.detach().float().clamp(min=0).cpu().numpy()


@torch.inference_mode()
def make_tables(
    model: HasUnembedding, dictionary: Dictionary, site: str, found: Evidence, vocabulary: Any
) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """A table of each of `storage.SCHEMAS`, and what the manifest says of them.

    `vocabulary` is what `lens.search_vocabulary` gave. Logits are null where the dictionary does not write
    to the residual stream.
    """
    threshold = dictionary.firing_threshold
    latents = {
        **found.latents,
        "threshold": None if threshold is None else threshold.detach().float().cpu().numpy(),
    }
    spoken = _speaks(dictionary, site, model)
    if spoken:
        ids, values = top_logits(model, dictionary.W_dec, count=LOGITS, vocabulary=vocabulary)
        half = ids.shape[1] // 2
        for side, span in (("top", slice(0, half)), ("bottom", slice(half, None))):
            latents |= {f"{side}_tokens": ids[:, span].numpy(), f"{side}_logits": values[:, span].numpy()}
    n = len(found.cofiring["latent"])
    related = {**found.cofiring, "kind": np.full(n, "cofiring"), "other_site": np.full(n, site)}
    columns = {LATENTS: latents, EXAMPLES: found.examples, DRIVERS: found.drivers, RELATED: related}
    tables = {name: make_table(SCHEMAS[name], table) for name, table in columns.items()}
    return tables, {"logits": LOGITS if spoken else 0}


def _speaks(dictionary: Dictionary, site: str, model: HasUnembedding) -> bool:
    """Whether it writes to the residual stream, which the unembedding reads."""
    cfg = dictionary.cfg
    return (cfg.site_out or site).endswith(_RESIDUAL_KINDS) and cfg.d_out == model.W_U.shape[0]
