"""The feature index against a search by brute force, and its files against damage."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from viewer_fakes import (
    CONTEXT,
    D_SAE,
    D_VOCAB,
    SITES,
    FakeModel,
    fake_blocks,
    fake_dictionary,
)

from activations.blocks import TokenBlocks
from sae import UserError
from viewer.accumulate import N_BINS, histogram_bin, histogram_edges
from viewer.index import build_index
from viewer.storage import EXAMPLES, LATENTS, MANIFEST, TOKENS, read_manifest

EXAMPLE_COUNT, WINDOW = 6, 4


def build(tmp_path, blocks=None, dictionaries=None, **kwargs):
    model = FakeModel()
    dictionaries = dictionaries or {site: fake_dictionary(site, seed=n) for n, site in enumerate(SITES)}
    blocks = fake_blocks() if blocks is None else blocks
    options = {"examples": EXAMPLE_COUNT, "context_tokens": WINDOW, **kwargs}
    return build_index(model, dictionaries, blocks, tmp_path.joinpath, **options), model, dictionaries


def brute_force(model, dictionary, site, blocks):
    """Firings by latent (activation, document, position, token, window, values, peak), and kept tokens."""
    firings = {latent: [] for latent in range(D_SAE)}
    kept = 0
    for batch in blocks:
        acts = dictionary.encode(model.activations(batch.tokens, [site])[site])
        for b in range(len(batch.tokens)):
            for p in range(CONTEXT):
                if not batch.keep[b, p]:
                    continue
                kept += 1
                doc = int(batch.document[b, p])
                near = [
                    q
                    for q in range(max(0, p - WINDOW), min(CONTEXT, p + WINDOW + 1))
                    if batch.keep[b, q] and int(batch.document[b, q]) == doc
                ]
                for latent in acts[b, p].nonzero().flatten().tolist():
                    firings[latent].append(
                        (
                            float(acts[b, p, latent]),
                            doc,
                            int(batch.position[b, p]),
                            int(batch.tokens[b, p]),
                            batch.tokens[b, near].tolist(),
                            acts[b, near, latent].tolist(),
                            near.index(p),
                        )
                    )
    return firings, kept


def top_documents(firings):
    best = {}
    for firing in sorted(firings, key=lambda f: (-f[0], f[1], f[2])):
        best.setdefault(firing[1], firing)
    return list(best.values())[:EXAMPLE_COUNT]


def test_every_figure_equals_a_brute_force_search(tmp_path):
    blocks = fake_blocks()
    folders, model, dictionaries = build(tmp_path, blocks)
    for site, folder in folders.items():
        firings, kept = brute_force(model, dictionaries[site], site, blocks)
        latents = pq.read_table(folder / LATENTS).to_pylist()
        examples = pq.read_table(folder / EXAMPLES).to_pylist()
        assert [row["latent"] for row in latents] == list(range(D_SAE))
        assert read_manifest(folder)["tokens"] == kept
        for row in latents:
            values = np.array([f[0] for f in firings[row["latent"]]], np.float32)
            assert row["firings"] == len(values) and row["density"] == len(values) / kept
            assert row["max"] == (values.max() if len(values) else 0)
            assert row["mean"] == np.float32(values.sum(dtype=np.float64) / max(1, len(values)))
            counts = np.zeros(N_BINS, int)
            counts[row["histogram_first"] : row["histogram_first"] + len(row["histogram"])] = row["histogram"]
            expected = np.histogram(values, histogram_edges())[0]
            assert counts.tolist() == expected.tolist() and counts.sum() == len(values)
        wanted = [
            (latent, rank, *firing)
            for latent in range(D_SAE)
            for rank, firing in enumerate(top_documents(firings[latent]))
        ]
        names = ("latent", "rank", "activation", "document", "position", "token", "tokens", "values", "peak")
        assert [tuple(row[name] for name in names) for row in examples] == wanted
        # the case is worth its name: a silent latent, one that always fires, full lists
        assert latents[2]["firings"] == 0 and latents[1]["density"] == 1.0
        assert sum(1 for row in examples if row["latent"] == 1) == EXAMPLE_COUNT


def test_one_forward_pass_serves_all_sites_and_progress_ends_at_its_total(tmp_path):
    seen = []
    _, model, _ = build(tmp_path, tokens=200, progress=lambda done, total: seen.append((done, total)))
    assert model.forwards == len(fake_blocks())
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_cut_into_batches_changes_nothing(tmp_path):
    blocks = fake_blocks()
    whole = [
        TokenBlocks(
            **{
                n: torch.cat([getattr(b, n) for b in blocks])
                for n in ("tokens", "document", "position", "keep")
            }
        )
    ]
    one, _, _ = build(tmp_path / "one", blocks)
    other, _, _ = build(tmp_path / "other", whole)
    for site in SITES:
        for name in (LATENTS, EXAMPLES, TOKENS):
            assert pq.read_table(one[site] / name).equals(pq.read_table(other[site] / name)), name


@pytest.mark.parametrize(
    "value", [1e-9, 2.0**-16, 0.75, 1.0, math.nextafter(1.125, 0), 1.125, 583.2, 2.0**24, 3e38]
)
def test_bins_hold_what_lies_between_their_edges(value):
    edges, place = histogram_edges(), int(histogram_bin(np.array([value], np.float32))[0])
    clipped = min(max(float(np.float32(value)), edges[0]), np.nextafter(edges[-1], 0))
    assert edges[place] <= clipped < edges[place + 1]


def test_a_transcoder_reads_one_site_and_speaks_at_the_other(tmp_path):
    reads, writes = "blocks.1.attn.hook_z", SITES[1]
    coder = fake_dictionary(reads, site_out=writes)
    silent = fake_dictionary(reads)
    folders, model, _ = build(tmp_path, dictionaries={writes: coder, reads: silent})
    manifest = read_manifest(folders[writes])
    assert (manifest["site_in"], manifest["site_out"]) == (reads, writes)
    rows = pq.read_table(folders[writes] / LATENTS).to_pylist()
    expected = (coder.W_dec * model.gamma) @ model.W_U
    assert [row["top_tokens"] for row in rows] == expected.topk(10, dim=1).indices.tolist()
    # what does not write to the residual stream has no logits, and says so
    assert read_manifest(folders[reads])["logits"] == 0
    assert pq.read_table(folders[reads] / LATENTS)["top_tokens"].to_pylist() == [[]] * D_SAE


def test_tokens_named_anywhere_have_their_text(tmp_path):
    folders, model, _ = build(tmp_path)
    folder = folders[SITES[0]]
    texts = pq.read_table(folder / TOKENS).to_pydict()
    assert texts["text"] == model.token_strings(texts["id"])
    named = {
        i for row in pq.read_table(folder / EXAMPLES).to_pylist() for i in (*row["tokens"], row["token"])
    }
    for row in pq.read_table(folder / LATENTS).to_pylist():
        named |= {*row["top_tokens"], *row["bottom_tokens"]}
    assert named == set(texts["id"]) and max(named) < D_VOCAB


def test_a_damaged_index_is_named(tmp_path):
    folders, _, _ = build(tmp_path)
    folder = folders[SITES[0]]
    read_manifest(folder)
    whole = (folder / EXAMPLES).read_bytes()
    for damage in (whole[:-10], whole[:-1] + bytes([whole[-1] ^ 1])):
        (folder / EXAMPLES).write_bytes(damage)
        with pytest.raises(UserError, match=EXAMPLES):
            read_manifest(folder)
    (folder / EXAMPLES).unlink()
    with pytest.raises(UserError, match="missing"):
        read_manifest(folder)
    (folder / EXAMPLES).write_bytes(whole)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(UserError, match="99"):
        read_manifest(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match="cut short"):
        read_manifest(folder)


def test_a_rebuild_that_dies_leaves_no_manifest(tmp_path, monkeypatch):
    build(tmp_path)
    monkeypatch.setattr(FakeModel, "token_strings", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(tmp_path)
    with pytest.raises(UserError, match="cut short"):
        read_manifest(tmp_path / SITES[0])
    assert not list((tmp_path / SITES[0]).glob("*.tmp"))


def test_what_cannot_be_indexed_is_refused(tmp_path):
    with pytest.raises(UserError, match="no token"):
        build(tmp_path, [])
    broken = fake_dictionary(SITES[0])
    broken.b_enc[3] = math.inf
    with pytest.raises(UserError, match="finite"):
        build(tmp_path, dictionaries={SITES[0]: broken})
    assert not list(tmp_path.iterdir())
