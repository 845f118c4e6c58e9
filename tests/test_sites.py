"""Names of sites and ranges of layers."""

import pytest
import torch
from conftest import wrapped_model
from hypothesis import given
from hypothesis import strategies as st

from activations.models import LanguageModel
from activations.sites import KINDS, expand_sites, kind_of, layer_of, parse_layers, site_label, site_name
from sae.errors import UserError


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("all", tuple(range(18))),
        ("9", (9,)),
        ("3-8", (3, 4, 5, 6, 7, 8)),
        ("::2", tuple(range(0, 18, 2))),
        ("1::6", (1, 7, 13)),
        ("-2:", (16, 17)),
        ("17, 0,9", (0, 9, 17)),
        ("3-5,4,::9", (0, 3, 4, 5, 9)),
    ],
)
def test_layer_ranges(spec: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(spec, 18) == layers


@pytest.mark.parametrize("spec", ["18", "3-18", "8-3", "x", "", "1,,2", "::0", "::-1", "20:", "-1"])
def test_bad_layers_are_refused(spec: str) -> None:
    with pytest.raises(UserError):
        parse_layers(spec, 18)


@given(st.integers(1, 60), st.data())
def test_a_range_holds_both_its_ends(n_layers: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, n_layers - 1))
    last = data.draw(st.integers(first, n_layers - 1))
    assert parse_layers(f"{first}-{last}", n_layers) == tuple(range(first, last + 1))


def test_sites_come_by_layer_and_then_in_the_order_of_computation() -> None:
    assert expand_sites("mlp_out,resid_post, attn_z", "2,0", 3) == (
        "blocks.0.attn.hook_z",
        "blocks.0.hook_mlp_out",
        "blocks.0.hook_resid_post",
        "blocks.2.attn.hook_z",
        "blocks.2.hook_mlp_out",
        "blocks.2.hook_resid_post",
    )


def test_full_names_pass_through_beside_kinds() -> None:
    assert expand_sites("blocks.10.hook_resid_mid,resid_pre", "10", 18) == (
        "blocks.10.hook_resid_pre",
        "blocks.10.hook_resid_mid",
    )


def test_names_and_kinds_are_inverse() -> None:
    for kind in KINDS:
        site = site_name(12, kind)
        assert (layer_of(site), kind_of(site), site_label(site)) == (12, kind, f"12 {kind}")


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean resid_post"):
        expand_sites("resid_pots", "all", 18)
    with pytest.raises(UserError, match=r"Did you mean blocks\.3\.hook_resid_post"):
        layer_of("blocks.3.resid_post")


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3", "llama", "gpt2"])
def test_what_the_mlp_reads_is_what_its_norm_gives_times_the_weight(architecture: str) -> None:
    model = wrapped_model(architecture)
    sites = [site_name(1, kind) for kind in ("ln2_normalized", "mlp_in")]
    before, after = model.activations(torch.arange(3, 27).view(2, 12), sites).values()
    norm = model.bridge.blocks[1].ln2.original_component
    weight = norm.weight + 1 if architecture.startswith("gemma") else norm.weight
    torch.testing.assert_close(before * weight + getattr(norm, "bias", torch.tensor(0.0)), after)
    torch.testing.assert_close(before.square().mean(-1), torch.ones(2, 12), rtol=0, atol=1e-4)


def test_embeddings_are_the_residual_stream_entering_the_first_block(tiny_model: LanguageModel) -> None:
    site, found = site_name(0, "resid_pre"), []
    handle = tiny_model.bridge.hook_dict["hook_embed"].register_forward_hook(
        lambda *args: found.append(args[2])
    )
    try:
        entering = tiny_model.activations(torch.arange(3, 15)[None], [site])[site]
    finally:
        handle.remove()
    assert torch.equal(found[0], entering)


@pytest.mark.parametrize(
    "kinds", ["", " , ", "blocks.18.hook_resid_post", "blocks.x.hook_resid_post", "hook.z"]
)
def test_bad_sites_are_refused(kinds: str) -> None:
    with pytest.raises(UserError):
        expand_sites(kinds, "all", 18)
