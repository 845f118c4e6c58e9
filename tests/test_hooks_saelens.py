"""The same splices by SAELens's own bridge: the same logits."""

import pytest
import torch
from test_hooks import SITE, TOKENS, dictionary_at, plain_bridge

from activations.hooks import spliced

bridges = pytest.importorskip("sae_lens.analysis.sae_transformer_bridge")


@pytest.fixture(scope="module")
def theirs():
    """Their class over the same random weights; made of a bridge in the way that their own factory does."""
    bridge = plain_bridge()
    bridge.__class__ = bridges.SAETransformerBridge
    bridge._acts_to_saes, bridge._transcoder_output_hooks = {}, {}
    return bridge


@torch.no_grad()
@pytest.mark.parametrize("error_term", [True, False])
@pytest.mark.parametrize("architecture", ["jumprelu", "relu", "topk", "gated", "batchtopk"])
@pytest.mark.parametrize(
    "site", [SITE, "blocks.2.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.0.hook_resid_pre"]
)
def test_the_logits_are_saelens_s(theirs, site, architecture, error_term):
    ours = plain_bridge()
    made = dictionary_at(site, architecture=architecture, d_in=64 if site.endswith("z") else 32)
    live = made.to_saelens()
    live.turn_off_forward_pass_hook_z_reshaping()  # their bridge hands heads concatenated
    with spliced(ours, made, error_term=error_term, keep="all"):
        logits = ours(TOKENS)
    expected = theirs.run_with_saes(TOKENS, saes=[live], use_error_term=error_term)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, ours(TOKENS)) == error_term


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["jumprelu", "relu"])
def test_transcoders_too(theirs, architecture):
    ours = plain_bridge()
    made = dictionary_at("blocks.2.mlp.hook_in", "blocks.2.mlp.hook_out", architecture=architecture)
    with spliced(ours, made, keep="all"):
        logits = ours(TOKENS)
    expected = theirs.run_with_saes(TOKENS, saes=[made.to_saelens()])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits, ours(TOKENS))
