"""Dictionaries that fit a tiny model without training: a latent for each of the few tokens of a text."""

import torch
from conftest import wrapped_model

import sae
from activations.blocks import TokenBlocks
from train.fit import Rows

N_TOKENS = 32
"""Tokens that the text is made of, as many as the tiny models are wide: so the weights are square."""


def telling_model():
    """A tiny Gemma 3 whose rows tell their token, whose layers differ, and whose BOS is massive and matters.

    Attention adds little but what comes from BOS; MLPs add much. Rows have a mean, and what a row shares over
    its coordinates differs by token, as in models whose residual stream is not centred.
    """
    made = wrapped_model("gemma3")
    with torch.no_grad():
        for layer, block in enumerate(made.bridge.blocks):
            block.ln1_post.original_component.weight.add_(-0.9 if layer else -0.5)
            block.ln2_post.original_component.weight.add_(1)
        embedding = made._body.embed_tokens.weight
        generator = torch.Generator().manual_seed(2)
        embedding.add_(0.3 * torch.randn(len(embedding), 1, generator=generator))
        embedding.add_(0.5 * torch.randn(32, generator=generator))
        embedding[:, 0] = 0.0
        embedding[made.bos_id] = 0.0
        embedding[made.bos_id, 0] = 100.0
        made._body.layers[0].self_attn.v_proj.weight[:, 0] *= 300
    return made


def token_blocks(model, n=40, context=24, seed=0):
    """Blocks of the few tokens at random, a BOS within every token's sight."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(100, 100 + N_TOKENS, (n, context), generator=generator, dtype=torch.int32)
    tokens[:, ::6] = model.bos_id
    keep = tokens != model.bos_id
    position = torch.where(keep, torch.arange(context, dtype=torch.int32), -1)
    document = torch.where(keep, torch.arange(n, dtype=torch.int32)[:, None], -1)
    return [TokenBlocks(tokens=tokens, document=document, position=position, keep=keep)]


def training_rows(model, site, text="BOS"):
    """Rows of other text at a site, and the number of the token of each."""
    rows = Rows(model, token_blocks(model, n=120, seed=1), 2500)
    tokens = torch.cat([part.tokens[part.keep] for part in rows.blocks(text)])
    return rows.at(site, text).float(), tokens.long() - 100


def fitting(model, site, site_out="", text="BOS", **fields):
    """A dictionary that reads `site` and writes it or another: an L0 of about 1, an FVU of some percent."""
    x, tokens = training_rows(model, site, text)
    y = training_rows(model, site_out, text)[0] if site_out else x
    return of_rows(x, y, tokens, site, site_out, prepend_bos=text != "no BOS", **fields)


def of_rows(x, y, tokens, site, site_out="", architecture="jumprelu", **fields):
    """The dictionary whose latents fire on the rows of one token each, and write what is usual there."""
    members = torch.nn.functional.one_hot(tokens.clamp(0), N_TOKENS).float() * (tokens >= 0)[:, None]
    mean = x.mean(0)
    ones = torch.ones(len(x), 1)
    # 1 on the token's own rows and 0 on the others, as far as a linear map can
    reads = torch.cat([x - mean, ones], 1)
    solved = torch.linalg.solve(
        reads.T @ reads + 1e-3 * len(x) * torch.eye(reads.shape[1]), reads.T @ members
    )
    W_enc, b_enc = solved[:-1], solved[-1] - mean @ solved[:-1]
    acts = x @ W_enc + b_enc
    acts = torch.where(acts > 0.5, acts, 0)
    writes = torch.cat([acts, ones], 1)
    solved = torch.linalg.lstsq(writes, y, driver="gelsd").solution
    # latents of unlike units, so that norms matter; one threshold for all has to have one unit
    uneven = torch.rand(N_TOKENS, generator=torch.Generator().manual_seed(5))
    units = 0.5 + 1.5 * uneven if architecture == "jumprelu" else torch.ones(N_TOKENS)
    tensors = {
        "W_enc": W_enc * units,
        "b_enc": b_enc * units,
        "W_dec": solved[:-1] / units[:, None],
        "b_dec": solved[-1].contiguous(),
    }
    if architecture in ("jumprelu", "batchtopk"):
        tensors["threshold"] = 0.5 * units
    if architecture == "relu":
        tensors |= {"W_enc": 2 * W_enc, "b_enc": 2 * b_enc - 1}
    cfg = sae.DictionaryConfig(
        d_in=x.shape[1],
        d_sae=N_TOKENS,
        d_out=y.shape[1],
        site_in=site,
        site_out=site_out,
        model="tiny",
        architecture=architecture,
        k=int(architecture == "topk"),
        **({"l0_target": 1.0} | fields),
    )
    return sae.build(cfg, tensors)
