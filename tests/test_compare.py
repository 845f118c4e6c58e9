"""Two dictionaries beside each other, against the whole table of cosines."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from viewer_fakes import D_MODEL, SITES, fake_dictionary, fake_run

import sae
import viewer
from sae import UserError
from viewer import compare
from viewer.compare import nearest


@hypothesis.given(a=st.integers(0, 9), b=st.integers(0, 9), seed=st.integers(0, 99), block=st.integers(1, 40))
@hypothesis.settings(deadline=None, max_examples=40)
def test_the_nearest_both_ways_are_those_of_the_whole_table(a, b, seed, block):
    generator = torch.Generator().manual_seed(seed)
    # whole numbers: equal products are frequent, and exact
    A, B = (torch.randint(-2, 3, (n, 3), generator=generator).float() for n in (a, b))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "_BLOCK_ELEMENTS", block)
        to_b, best_b, to_a, best_a = nearest(A, B)
    if not a or not b:
        assert (to_b == -1).all() and (to_a == -1).all() and not best_a.any() and not best_b.any()
        return
    table = (A @ B.T).numpy()
    assert np.array_equal(best_b, table.max(1)) and np.array_equal(best_a, table.max(0))
    assert np.array_equal(to_b, table.argmax(1)) and np.array_equal(to_a, table.argmax(0))


def other_run(tmp_path, edit):
    """A run whose dictionary at layer 0 is that of `fake_run`, edited: {name: tensor} to the same."""
    folder = fake_run(tmp_path / "other", index=False)
    dictionary = fake_dictionary(SITES[0])
    tensors = {name: value.detach().clone() for name, value in dictionary.state_dict().items()}
    tensors = edit(tensors)
    cfg = sae.DictionaryConfig(d_in=D_MODEL, d_sae=len(tensors["threshold"]), site_in=SITES[0], model="fake")
    sae.save(sae.build(cfg, tensors), folder.site_dir(SITES[0]))
    return viewer.open(folder.path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return viewer.open(fake_run(tmp_path_factory.mktemp("runs") / "mine").path)


def test_a_permuted_and_scaled_dictionary_matches_wholly(run, tmp_path):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))

    def edit(t):
        return {
            "W_enc": t["W_enc"][:, order], "b_enc": t["b_enc"][order], "threshold": t["threshold"][order],
            "W_dec": 3 * t["W_dec"][order], "b_dec": t["b_dec"],
        }  # fmt: skip

    found = run.compare(other_run(tmp_path, edit), layer=0)
    # ours without an index count as firing; theirs of the run with one do not
    assert set(found.matched["latent"]) == set(run.layer(0).live().tolist())
    assert (order.numpy()[found.matched["other"]] == found.matched["latent"]).all()
    assert found.matched["cosine"].to_numpy() == pytest.approx(1, abs=1e-5)
    assert len(found.new) == len(found.split) == len(found.merged) == 0 and "matched" in repr(found)


def test_what_is_new_and_what_split_at_another_width(run, tmp_path):
    noise = torch.Generator().manual_seed(2)

    def edit(t):
        # latent 3 becomes two that are near it, latent 4 is gone, one is new
        near = t["W_dec"][3] + 0.2 * torch.randn(2, D_MODEL, generator=noise)
        rows = torch.cat([t["W_dec"][:3], near, t["W_dec"][5:], 5 * torch.eye(D_MODEL)[:1]])
        n = len(rows)
        return {
            "W_enc": torch.zeros(D_MODEL, n), "b_enc": torch.zeros(n), "threshold": torch.ones(n),
            "W_dec": rows, "b_dec": t["b_dec"],
        }  # fmt: skip

    other = other_run(tmp_path, edit)
    found = run.compare(other, layer=0, cosine=0.8)
    assert found.split["latent"].tolist() == [3] and sorted(found.split["others"][0]) == [3, 4]
    assert (
        found.split["parts"].tolist() == [2] and found.split["cosines"][0][0] >= found.split["cosines"][0][1]
    )
    assert found.new["latent"].tolist() == [4]
    # latent 2 never fires here and is left out, so theirs has no match; 24 is new there
    assert set(found.gone["latent"]) == {2, 24}
    assert 3 in set(found.matched["latent"]) and len(found.ours) == 23 and len(found.theirs) == 25
    back = other.compare(run, site=SITES[0], cosine=0.8)
    assert back.merged["latent"].tolist() == [3] and back.gone["latent"].tolist() == [4]
    assert len(found.plot().data) == 2
    page = found._repr_html_()
    assert "js-card" in page and "only in" in page


def test_the_same_name_twice_is_told_apart_by_the_path(run, tmp_path):
    twin = viewer.open(fake_run(tmp_path / "mine").path)
    found = run.compare(twin, layer=1)
    assert found.names == (str(run.path), str(twin.path)) and len(found.matched) == len(found.ours)


def test_dictionaries_of_other_spaces_and_missing_ones_are_refused(run, tmp_path):
    folder = fake_run(tmp_path / "wide", index=False)
    cfg = sae.DictionaryConfig(d_in=D_MODEL + 1, d_sae=5, site_in=SITES[0], model="fake")
    sae.save(sae.JumpReLU(cfg), folder.site_dir(SITES[0]))
    with pytest.raises(UserError, match="16 wide and 17 wide"):
        run.compare(viewer.open(folder.path), layer=0)
    with pytest.raises(UserError, match="a layer or a site"):
        run.compare(run)
    (folder.site_dir(SITES[1]) / "cfg.json").unlink()
    with pytest.raises(UserError, match="must be here"):
        run.compare(viewer.open(folder.path), layer=1)


def test_hostile_labels_are_escaped(tmp_path):
    mine = viewer.open(fake_run(tmp_path / "<b>mine").path)
    live = mine.layer(0).live().tolist()
    for latent in live:
        mine.layer(0)[latent].label = "<img src=x onerror=1>"
    page = mine.compare(
        viewer.open(fake_run(tmp_path / "x", index=False).path), layer=0, cosine=1.1
    )._repr_html_()
    assert "<img" not in page and "&lt;img" in page and "<b>mine" not in page
