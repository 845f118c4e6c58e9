"""An index written by the plainest loops, for the tests of what reads it: every number can be seen here."""

import math
from collections import defaultdict

import numpy as np
import torch

from viewer.accumulate import N_BINS, histogram_bin
from viewer.firings import Firings, Texts
from viewer.storage import (
    DRIVERS,
    DRIVERS_SCHEMA,
    EXAMPLES,
    EXAMPLES_SCHEMA,
    LATENTS,
    LATENTS_SCHEMA,
    RELATED,
    RELATED_SCHEMA,
    make_table,
    write_site,
    write_texts,
    write_tokens,
)

BANDS, TOP, DENSE, COUNT = 5, 6, 0.1, 10


def write_fake_index(root, model, dictionaries, blocks):
    """The index of these dictionaries on all blocks; returns {site: {latent: {place: activation}}}."""
    joined = {
        n: torch.cat([getattr(b, n) for b in blocks]).numpy()
        for n in ("tokens", "document", "position", "keep")
    }
    texts = Texts(**{**joined, "document": joined["document"].astype(np.int64)})
    sha = write_texts(root, texts, {"corpus": "made up"})
    named, fired = set(texts.tokens.ravel().tolist()), {}
    layers = list(dictionaries)
    for site, dictionary in dictionaries.items():
        acts = model.activations(torch.from_numpy(texts.tokens), [site])[site].reshape(
            -1, dictionary.cfg.d_in
        )
        latents = dictionary.encode(acts).detach().numpy()[texts.place]
        fired[site] = [np.flatnonzero(column) for column in latents.T]
        firings = Firings(
            starts=np.cumsum([0, *map(len, fired[site])]).astype(np.int64),
            row=np.concatenate(fired[site]).astype(np.int32),
            activation=np.concatenate([latents[rows, n] for n, rows in enumerate(fired[site])]).astype(
                np.float32
            ),
        )
        logits = (dictionary.W_dec @ model.W_U).detach().numpy()
        tables = {
            LATENTS: make_table(LATENTS_SCHEMA, _latents(firings, texts, logits, model, dictionary)),
            EXAMPLES: make_table(EXAMPLES_SCHEMA, _examples(firings, texts)),
            DRIVERS: make_table(DRIVERS_SCHEMA, _drivers(firings, texts)),
            RELATED: make_table(RELATED_SCHEMA, _related(site, layers, dictionaries, firings, len(texts))),
        }
        for name in ("top_tokens", "bottom_tokens"):
            named.update(t for row in tables[LATENTS][name].to_pylist() for t in row)
        manifest = {
            "model": model.name, "site": site, "site_in": site, "site_out": site, "d_sae": len(firings),
            "corpus": "made <i>up</i>", "tokens": len(texts), "texts": sha,
            "logit_histogram_edges": [-20.0, 0.0, 20.0],
        }  # fmt: skip
        write_site(root / site, firings=firings, tables=tables, manifest=manifest)
    write_tokens(root, dict(zip(sorted(named), model.token_strings(sorted(named)), strict=True)))
    return fired


def _latents(firings, texts, logits, model, dictionary):
    columns = defaultdict(list)
    for latent in range(len(firings)):
        row, value = firings.latent(latent)
        density = len(row) / len(texts)
        bins = np.bincount(histogram_bin(value), minlength=N_BINS)
        filled = np.flatnonzero(bins)
        first, last = (filled[0], filled[-1]) if len(filled) else (0, -1)
        order = np.argsort(logits[latent], kind="stable")
        threshold = float(dictionary.firing_threshold[latent])
        best = int(texts.tokens.ravel()[texts.place[row[np.argmax(value)]]]) if len(row) else -1
        one = {
            "latent": latent,
            "state": "silent" if not len(row) else "dense" if density > DENSE else "live",
            "label": f"on{model.token_strings([best])[0]}" if len(row) else "",
            "label_evidence": "its highest activation",
            "firings": len(row),
            "density": density,
            "log10_density": math.log10(density) if density else None,
            "mean": value.mean() if len(row) else 0.0,
            "max": value.max() if len(row) else 0.0,
            "threshold": threshold,
            "histogram_first": first,
            "histogram": bins[first : last + 1].tolist(),
            "top_tokens": order[::-1][:COUNT].tolist(),
            "top_logits": logits[latent][order[::-1][:COUNT]].tolist(),
            "bottom_tokens": order[:COUNT].tolist(),
            "bottom_logits": logits[latent][order[:COUNT]].tolist(),
            "logit_histogram": [int((logits[latent] < 0).sum()), int((logits[latent] >= 0).sum())],
        }
        for name, item in one.items():
            columns[name].append(item)
    return columns


def _examples(firings, texts):
    rows = []
    for latent in range(len(firings)):
        best = {}
        for row, value in zip(*firings.latent(latent), strict=True):
            block, peak = divmod(int(texts.place[row]), texts.tokens.shape[1])
            unit = (block, int(texts.document[block, peak]))
            best[unit] = min(best.get(unit, (0, 0, 0)), (-float(value), block, peak))
        ordered = sorted(best.values())
        high = -ordered[0][0] if ordered else 0
        for rank, (value, block, peak) in enumerate(ordered[:TOP]):
            rows.append((latent, 0, rank, block, peak, -value, int(texts.tokens[block, peak])))
        for band in range(1, BANDS + 1):
            inside = [
                e
                for e in ordered
                if high * (BANDS - band) / BANDS < -e[0] <= high * (BANDS + 1 - band) / BANDS
            ]
            for rank, (value, block, peak) in enumerate(inside[:2]):
                rows.append((latent, band, rank, block, peak, -value, int(texts.tokens[block, peak])))
    return (
        dict(zip(EXAMPLES_SCHEMA.names, zip(*rows, strict=True), strict=True))
        if rows
        else _none(EXAMPLES_SCHEMA)
    )


def _drivers(firings, texts):
    rows, everywhere = [], np.bincount(texts.tokens.ravel()[texts.place], minlength=1)
    for latent in range(len(firings)):
        row, value = firings.latent(latent)
        token = texts.tokens.ravel()[texts.place[row]]
        found = []
        for one in np.unique(token).tolist():
            on = value[token == one]
            lift = (len(on) / len(row)) / (everywhere[one] / len(texts))
            found.append((one, len(on), float(on.mean()), float(on.sum() / value.sum()), lift))
        for order, key in (("activation", 3), ("lift", 4)):
            ranked = sorted(found, key=lambda f, key=key: -f[key])[:COUNT]
            rows += [(latent, order, rank, *f) for rank, f in enumerate(ranked)]
    return (
        dict(zip(DRIVERS_SCHEMA.names, zip(*rows, strict=True), strict=True))
        if rows
        else _none(DRIVERS_SCHEMA)
    )


def _related(site, layers, dictionaries, firings, tokens):
    rows, here = [], layers.index(site)
    rowsets = [set(firings.latent(n)[0].tolist()) for n in range(len(firings))]
    for latent in range(len(firings)):
        for kind, step in (("cofiring", 0), ("cosine", 0), ("next", 1), ("previous", -1)):
            if not 0 <= here + step < len(layers):
                continue
            other = layers[here + step]
            if kind == "cofiring":
                phi = [_phi(rowsets[latent], mine, tokens) for mine in rowsets]
                counts = [len(rowsets[latent] & mine) for mine in rowsets]
            else:
                mine, theirs = (
                    torch.nn.functional.normalize(dictionaries[s].W_dec, dim=1) for s in (site, other)
                )
                phi, counts = (theirs @ mine[latent]).tolist(), [None] * len(theirs)
            ranked = [n for n in np.argsort(-np.array(phi), kind="stable").tolist() if step or n != latent][
                :3
            ]
            rows += [(latent, kind, rank, other, n, phi[n], counts[n]) for rank, n in enumerate(ranked)]
    return dict(zip(RELATED_SCHEMA.names, zip(*rows, strict=True), strict=True))


def _phi(a, b, tokens):
    spread = len(a) * len(b) * (tokens - len(a)) * (tokens - len(b))
    return (tokens * len(a & b) - len(a) * len(b)) / math.sqrt(spread) if spread else 0.0


def _none(schema):
    return {name: [] for name in schema.names}
