"""Dictionaries that fit a tiny model without training: both directions of each principal axis, gated."""

import torch

import sae
from activations.blocks import TokenBlocks
from train.fit import Rows


def random_blocks(model, n=40, context=24, seed=0):
    """Blocks of random tokens behind BOS, two documents in each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, model.d_vocab, (n, context), generator=generator, dtype=torch.int32)
    tokens[:, 0] = tokens[:, context // 2] = model.bos_id
    keep = tokens != model.bos_id
    position = torch.where(keep, torch.arange(context, dtype=torch.int32), -1)
    document = torch.where(keep, torch.arange(n, dtype=torch.int32)[:, None], -1)
    return [TokenBlocks(tokens=tokens, document=document, position=position, keep=keep)]


def fitting(model, site, site_out="", architecture="jumprelu", text="BOS", l0=14.0, **fields):
    """A dictionary that reads `site` and writes it or another, with an FVU of some percent."""
    rows = Rows(model, random_blocks(model, n=120, seed=1), 2500)
    x, y = (rows.at(name, text).float() for name in (site, site_out or site))
    return of_rows(x, y, site, site_out, architecture, l0, prepend_bos=text != "no BOS", **fields)


def of_rows(x, y, site, site_out="", architecture="jumprelu", l0=14.0, **fields):
    mean = x.mean(0)
    axes = torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors.T
    generator = torch.Generator().manual_seed(5)
    norms = 0.5 + 1.5 * torch.rand(2 * len(axes), 1, generator=generator)
    directions = torch.cat([axes, -axes])
    W_enc = (directions / norms).T.contiguous()
    b_enc = -mean @ W_enc
    pre = x @ W_enc + b_enc
    # one height for all in units of the activations, so in units of each latent divided by its norm
    height = (pre * norms.T).flatten().sort().values[-round(l0 * len(x))]
    tensors = {"W_enc": W_enc, "b_enc": b_enc}
    acts = torch.where(pre * norms.T > height, pre, 0)
    # what the latents say of y, by least squares: for y = x nearly the directions themselves
    if site_out and site_out != site:
        lhs = torch.cat([acts, torch.ones(len(x), 1)], 1)
        solved = torch.linalg.lstsq(lhs, y, driver="gelsd").solution
        tensors |= {"W_dec": solved[:-1].contiguous(), "b_dec": solved[-1].contiguous()}
    else:
        tensors |= {"W_dec": directions * norms, "b_dec": mean}
    if architecture in ("jumprelu", "batchtopk"):
        tensors["threshold"] = (height / norms[:, 0]).clamp(min=0)
    k = round(l0) if architecture == "topk" else 0
    cfg = sae.DictionaryConfig(
        d_in=x.shape[1],
        d_sae=2 * len(axes),
        d_out=y.shape[1],
        site_in=site,
        site_out=site_out,
        model="tiny",
        architecture=architecture,
        k=k,
        **({"l0_target": l0} | fields),
    )
    return sae.build(cfg, tensors)
