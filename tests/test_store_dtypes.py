"""Stores in other dtypes than the rows': what rounding costs, and what does not fit."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from store_rows import FACTS, SITES, all_rows, source, whole, write

from activations.blocks import Cursor
from activations.harvest import RowBatch
from activations.quantise import Quantiser
from activations.store import open_store
from sae.errors import UserError

FULL = dataclasses.replace(FACTS, model_dtype="float32")


def test_float32_rows_are_kept_as_they_are_unless_asked(tmp_path):
    rows, _ = all_rows(dtype=torch.float32)
    for dtype, kind in (("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        store = write(tmp_path / dtype, facts=FULL, source=source(dtype=torch.float32), dtype=dtype)
        got, _ = whole(store.iter_rows())
        assert store.dtype == kind
        for site in SITES:
            assert torch.equal(got[site], rows[site].to(kind))
            # of the exact rows, whatever is kept of them
            torch.testing.assert_close(
                store.statistics[site].mean.double(), rows[site].double().mean(0), rtol=1e-6, atol=0
            )


def test_what_float16_cannot_hold_is_refused_and_named(tmp_path):
    def wide(start, wanted):
        for batch in source(dtype=torch.float32)(start):
            batch.rows[SITES[1]][-1, 2] = -70000.0
            yield batch

    with pytest.raises(UserError, match=rf"65,504.*70,000 at {SITES[1]}"):
        write(tmp_path / "s", facts=FULL, source=wide, dtype="float16")
    assert write(tmp_path / "b", facts=FULL, source=wide, dtype="bfloat16").rows == 100


@pytest.mark.parametrize(("model_dtype", "back"), [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_eight_bits_come_back_within_half_a_step(tmp_path, model_dtype, back):
    kind = getattr(torch, model_dtype)
    facts = dataclasses.replace(FACTS, model_dtype=model_dtype)
    store = write(tmp_path / "s", facts=facts, source=source(dtype=kind), dtype="int8")
    assert (store.dtype, store.manifest["dtype"]) == (getattr(torch, back), "int8")
    got, maps = whole(store.iter_rows())
    rows, expected = all_rows(dtype=kind)
    for site in SITES:
        exact = rows[site].double()
        first = exact[:30]
        deviation = (exact - first.mean(0)) / first.std(0, correction=0)
        step = first.std(0, correction=0) * deviation.abs().amax(1, keepdim=True) / 127
        rounding = torch.finfo(store.dtype).eps * exact.abs()
        assert ((got[site].double() - exact).abs() <= step / 2 * 1.001 + rounding).all()
        assert not torch.equal(got[site].double(), exact)
    assert torch.equal(maps["token"], expected["token"])
    with safe_open(tmp_path / "s" / "shard-00000.safetensors", framework="pt") as file:
        assert {file.get_slice(site).get_dtype() for site in SITES} == {"I8"}
        assert file.get_slice(f"{SITES[0]}.scale").get_shape() == [30]


def test_eight_bits_go_on_with_the_first_shards_units(tmp_path):
    straight = write(tmp_path / "straight", rows=200, dtype="int8")
    write(tmp_path / "s", rows=200, wanted_rows=90, dtype="int8")
    resumed = write(tmp_path / "s", rows=200, dtype="int8")
    assert resumed.manifest["shards"] == straight.manifest["shards"]
    assert resumed.manifest["quantisation"] == straight.manifest["quantisation"]
    part, _ = whole(resumed.iter_rows(start=77))
    assert torch.equal(part[SITES[0]], whole(straight.iter_rows())[0][SITES[0]][77:])


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    still=st.booleans(),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_quantising_rounds_to_the_nearest_step(rows, width, seed, still, scale):
    generator = torch.Generator().manual_seed(seed)
    exact = scale * torch.randn(rows, width, generator=generator)
    if still:
        exact[:, 0] = 3.0 * scale
    quantiser = Quantiser.fit(exact)
    later = exact + (2 * scale if still else 0)  # what stood still in the first shard moves in another
    scales = quantiser.scales(later)
    q = quantiser.encode(later, scales)
    step = quantiser.col.double() * scales.double()[:, None]
    error = (quantiser.decode(q, scales).double() - later.double()).abs()
    assert (error <= 0.501 * step + 1e-6 * later.abs().max()).all()
    assert int(q.abs().max()) <= 127


def test_rows_all_equal_survive_eight_bits(tmp_path):
    def still(start, wanted):
        for batch in source()(Cursor()):
            yield RowBatch(
                rows={site: torch.full_like(rows, 2.5) for site, rows in batch.rows.items()},
                map=batch.map,
                begin=batch.begin,
            )

    write(tmp_path / "s", source=still, dtype="int8")
    rows, _ = whole(open_store(tmp_path / "s").iter_rows())
    assert all((part == 2.5).all() for part in rows.values())
