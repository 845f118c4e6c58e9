"""The feature index as a whole: what one pass over the text leaves behind."""

import math
from dataclasses import fields

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from viewer_fakes import CONTEXT, D_SAE, D_VOCAB, SITES, FakeModel, fake_blocks, fake_dictionary

from activations.blocks import TokenBlocks
from sae import UserError
from viewer.index.build import IndexBuilder, build_index
from viewer.index.storage import (
    EXAMPLES,
    FIRINGS,
    LATENTS,
    RELATED,
    SCHEMAS,
    TOKENS,
    read_firings,
    read_manifest,
    read_texts,
    read_tokens,
    verify_firings,
)

TEXT = {"corpus": "made up"}


def build(out, blocks=None, dictionaries=None, **kwargs):
    model = FakeModel()
    dictionaries = dictionaries or {site: fake_dictionary(site, seed=n) for n, site in enumerate(SITES)}
    blocks = fake_blocks() if blocks is None else blocks
    options = {"examples": 6, "text": TEXT, **kwargs}
    return build_index(model, dictionaries, lambda start: blocks, out, **options), model, dictionaries


def joined(blocks):
    return {f.name: torch.cat([getattr(b, f.name) for b in blocks]) for f in fields(TokenBlocks)[:4]}


def test_every_firing_is_there_and_the_texts_say_where(tmp_path):
    folders, model, dictionaries = build(tmp_path)
    whole, texts = joined(fake_blocks()), read_texts(tmp_path)
    for name, tensor in whole.items():
        assert np.array_equal(getattr(texts, name), tensor.numpy())
    kept = whole["keep"].numpy()
    assert len(texts) == kept.sum() and np.array_equal(texts.row_of >= 0, kept)
    assert np.array_equal(texts.place[texts.row_of[kept]], np.flatnonzero(kept))
    for site, folder in folders.items():
        acts = dictionaries[site].encode(model.activations(whole["tokens"], [site])[site][whole["keep"]])
        firings, dense = read_firings(folder), np.zeros((len(texts), D_SAE), np.float32)
        verify_firings(folder)
        for latent in range(len(firings)):
            row, activation = firings.latent(latent)
            assert (np.diff(row) > 0).all()
            dense[row, latent] = activation
        assert np.array_equal(dense, acts.numpy())
        latents = pq.read_table(folder / LATENTS).to_pydict()
        assert latents["latent"] == list(range(D_SAE))
        assert latents["firings"] == (dense > 0).sum(0).tolist()
        # the case is worth its name: a silent latent, one that always fires
        assert latents["state"][2] == "silent" and latents["log10_density"][2] is None
        assert latents["density"][1] == 1.0 and latents["state"][1] == "dense"
        manifest = read_manifest(folder)
        assert manifest["tokens"] == len(texts) and manifest["corpus"] == "made up"
        assert sum(manifest["states"].values()) == D_SAE and manifest["states"]["silent"] >= 1
        examples = pq.read_table(folder / EXAMPLES).to_pydict()
        assert max(examples["rank"]) == 5 and set(examples["band"]) == set(range(6))
        assert max(examples["peak"]) < CONTEXT
        for name, schema in SCHEMAS.items():
            assert pq.read_schema(folder / name).equals(schema, check_metadata=False)
            latent = pq.read_table(folder / name)["latent"].to_numpy()
            assert (np.diff(latent) >= 0).all()


def test_one_forward_pass_serves_all_sites_and_progress_ends_at_its_total(tmp_path):
    seen = []
    _, model, _ = build(tmp_path, tokens=200, progress=lambda done, total: seen.append((done, total)))
    assert model.forwards == len(fake_blocks())
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_cut_into_batches_and_parts_changes_no_file(tmp_path, monkeypatch):
    one, _, _ = build(tmp_path / "one")
    other, _, _ = build(tmp_path / "other", [TokenBlocks(**joined(fake_blocks()))])
    monkeypatch.setattr("viewer.index.parts._PART_BYTES", 1)
    parts, _, _ = build(tmp_path / "parts")
    for site in SITES:
        for name in (*SCHEMAS, FIRINGS):
            wanted = (one[site] / name).read_bytes()
            assert (other[site] / name).read_bytes() == wanted == (parts[site] / name).read_bytes(), name
    assert not (tmp_path / "parts" / "parts").exists()


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
    assert [row["bottom_tokens"] for row in rows] == (-expected).topk(10, dim=1).indices.tolist()
    edges = manifest["logit_histogram_edges"]
    assert all(len(row["logit_histogram"]) == len(edges) - 1 for row in rows)
    # what does not write to the residual stream has no logits, and says so
    assert read_manifest(folders[reads])["logits"] == 0
    assert pq.read_table(folders[reads] / LATENTS)["top_tokens"].to_pylist() == [[]] * D_SAE


def test_tokens_named_anywhere_have_their_text(tmp_path):
    folders, model, _ = build(tmp_path)
    strings = read_tokens(tmp_path)
    assert list(strings.values()) == model.token_strings(list(strings))
    named = set(np.unique(read_texts(tmp_path).tokens).tolist())
    for folder in folders.values():
        for row in pq.read_table(folder / LATENTS).to_pylist():
            named |= {*row["top_tokens"], *row["bottom_tokens"]}
    assert named == set(strings) and max(named) < D_VOCAB
    assert pq.read_schema(tmp_path / TOKENS).names == ["id", "text"]


def test_only_silent_latents_are_an_index_too(tmp_path):
    dead = fake_dictionary(SITES[0], threshold=1e6)
    dead.b_enc.zero_()
    folders, _, _ = build(tmp_path, dictionaries={SITES[0]: dead})
    folder = folders[SITES[0]]
    assert read_manifest(folder)["states"] == {"live": 0, "silent": D_SAE, "dense": 0}
    assert read_firings(folder).starts.tolist() == [0] * (D_SAE + 1)
    assert [pq.read_metadata(folder / name).num_rows for name in SCHEMAS] == [D_SAE, 0, 0, 10 * D_SAE]


def test_neighbours_copies_and_coordinates_come_from_the_weights(tmp_path):
    dictionaries = {site: fake_dictionary(site, seed=n) for n, site in enumerate(SITES)}
    one = dictionaries[SITES[0]]
    for name in ("W_enc", "W_dec"):
        weight = getattr(one, name) if name == "W_dec" else getattr(one, name).T
        weight[7] = weight[5]
    folders, _, _ = build(tmp_path, dictionaries=dictionaries)
    related = pq.read_table(folders[SITES[0]] / RELATED).to_pandas()
    assert (np.diff(related["latent"]) >= 0).all()
    assert set(related["kind"]) == {"cosine", "cofiring", "next"}
    unit = {site: torch.nn.functional.normalize(d.W_dec, dim=1) for site, d in dictionaries.items()}
    for kind, other in (("cosine", SITES[0]), ("next", SITES[1])):
        cosine = unit[SITES[0]] @ unit[other].T
        if kind == "cosine":
            cosine.fill_diagonal_(-2)
        for latent in range(D_SAE):
            rows = related[(related["kind"] == kind) & (related["latent"] == latent)]
            assert rows["rank"].tolist() == list(range(10)) and set(rows["other_site"]) == {other}
            assert rows["value"].tolist() == pytest.approx(cosine[latent].topk(10).values.tolist(), abs=1e-5)
    cofiring = related[related["kind"] == "cofiring"]
    assert (
        cofiring["count"].notna().all() and related.loc[related["kind"] != "cofiring", "count"].isna().all()
    )
    latents = pq.read_table(folders[SITES[0]] / LATENTS).to_pylist()
    assert [row["duplicate_of"] for row in latents] == [5 if n == 7 else None for n in range(D_SAE)]
    manifests = [read_manifest(folder) for folder in folders.values()]
    assert manifests[0]["duplicates"] == 1 and manifests[0]["next"] == SITES[1]
    assert manifests[1]["previous"] == SITES[0] and "next" not in manifests[1]
    row = one.W_dec[3]
    assert [n["neuron"] for n in latents[3]["neuron_alignment"]] == row.abs().topk(3).indices.tolist()
    assert latents[3]["decoder_norm"] == pytest.approx(float(row.norm()))
    expected = torch.nn.functional.cosine_similarity(one.W_enc[:, 3], row, dim=0)
    assert latents[3]["encoder_decoder_cosine"] == pytest.approx(float(expected), abs=1e-5)


def test_what_cannot_be_indexed_is_refused(tmp_path):
    with pytest.raises(UserError, match="no token"):
        build(tmp_path, [])
    nothing = joined(fake_blocks())
    nothing["keep"] = torch.zeros_like(nothing["keep"])
    with pytest.raises(UserError, match="no token"):
        build(tmp_path, [TokenBlocks(**nothing)])
    broken = fake_dictionary(SITES[0])
    broken.b_enc[3] = math.inf
    with pytest.raises(UserError, match="latents must be finite"):
        build(tmp_path, dictionaries={SITES[0]: broken})
    for bad in (math.inf, math.nan):
        model = FakeModel()
        model.table[SITES[0]][int(fake_blocks()[0].tokens[0, 1]), 3] = bad
        with pytest.raises(UserError, match=f"activations at {SITES[0]} must be finite"):
            build_index(
                model, {SITES[0]: fake_dictionary(SITES[0])}, lambda start: fake_blocks(), tmp_path, text=TEXT
            )
    narrow = fake_dictionary(SITES[0])
    model = FakeModel()
    model.table[SITES[0]] = model.table[SITES[0]][:, :5]
    model.where[SITES[0]] = model.where[SITES[0]][:, :5]
    with pytest.raises(UserError, match=r"d_in 16 .* 5 wide"):
        build_index(model, {SITES[0]: narrow}, lambda start: fake_blocks(), tmp_path, text=TEXT)
    assert not list(tmp_path.iterdir())


def test_a_builder_takes_each_batch_once_from_every_site(tmp_path):
    dictionaries = {site: fake_dictionary(site) for site in SITES}
    model, (first, second) = FakeModel(), fake_blocks(2)
    builder = IndexBuilder(model, dictionaries, tmp_path, text=TEXT)
    from sae.sparse import SparseEncoder

    x = model.activations(first.tokens, SITES)
    latents = {site: SparseEncoder(d).encode(x[site][first.keep]) for site, d in dictionaries.items()}
    builder.add(SITES[0], first, latents[SITES[0]])
    with pytest.raises(ValueError, match="rows of"):
        builder.add(SITES[0], first, latents[SITES[0]])
    with pytest.raises(ValueError, match="1 of 2 sites"):
        builder.add(SITES[0], second, latents[SITES[0]])
