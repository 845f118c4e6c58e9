"""Gradients of latents while dictionaries are spliced in: those of the spliced model, by differences."""

import pytest
import torch
from test_hooks import D_SAE, SITE, TOKENS, dictionary_at, plain_bridge

from activations.edits import clamp, scale, steer
from activations.hooks import spliced
from activations.models import LanguageModel
from sae.errors import UserError

LATER = "blocks.3.hook_mlp_out"


@pytest.fixture(scope="module")
def bridge():
    """In fp64, so that differences say something, and of an architecture that computes in fp64 throughout."""
    return plain_bridge("gpt2", dtype=torch.float64).requires_grad_(False)


def double_at(site=SITE, site_out="", **fields):
    return dictionary_at(site, site_out, dtype=torch.float64, **fields)


def loss_of(bridge):
    return bridge(TOKENS)[:, :, 7].sum()


def difference(bridge, made, site, entry, error_term, edit):
    """The slope of the loss in one latent's activation at one position, from two passes on either side."""

    def nudged(by):
        def nudge(acts):
            acts[entry] += by
            return acts if edit is None else edit(acts)

        with torch.no_grad(), spliced(bridge, made, error_term=error_term, edit={site: nudge}, keep="all"):
            return float(loss_of(bridge))

    step = 1e-4
    return (nudged(step) - nudged(-step)) / (2 * step)


@pytest.mark.parametrize("error_term", [True, False])
@pytest.mark.parametrize("site", [SITE, "blocks.1.hook_resid_mid", "blocks.1.attn.hook_z"])
@pytest.mark.parametrize("edit", [None, scale(5, 6, by=3.0), steer(5, by=1.0)])
def test_the_gradient_of_a_latent_is_the_slope_of_the_loss(bridge, error_term, site, edit):
    made = [double_at(site), double_at(LATER, architecture="relu")]
    with spliced(
        bridge, made, error_term=error_term, edit=edit and {site: edit}, gradients=True, keep="all"
    ) as at:
        loss = loss_of(bridge)
    (gradient,) = torch.autograd.grad(loss, [at.latents[site]], retain_graph=True)
    for entry in ((0, 3, 5), (1, 8, 5), (1, 0, 20)):
        slope = difference(bridge, made, site, entry, error_term, edit)
        assert float(gradient[entry]) == pytest.approx(slope, rel=1e-4, abs=1e-6), entry
    loss.backward()
    torch.testing.assert_close(at.latents[site].grad, gradient)
    assert at.latents[LATER].grad.shape == (2, 9, D_SAE) and at.latents[LATER].grad.any()


def test_recording_changes_no_logits(bridge):
    clean = bridge(TOKENS)
    with spliced(bridge, double_at(), error_term=True, gradients=True) as at:
        recorded = bridge(TOKENS)
    assert torch.equal(recorded, clean)
    recorded.sum().backward()
    grad = at.latents[SITE].grad
    assert grad[:, 1:].any() and not grad[:, 0].any()  # BOS is left alone


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("error_term", [True, False])
@pytest.mark.parametrize("site", [SITE, "blocks.1.hook_resid_mid"])
def test_gradients_of_what_comes_before_are_those_of_the_spliced_model(bridge, gradients, error_term, site):
    """Through the dictionary and not twice: by differences in the embeddings."""
    into = "blocks.0.hook_resid_pre"
    made, edit = double_at(site), clamp(3, to=1.0)
    shift = torch.zeros(32, dtype=torch.float64, requires_grad=True)

    def loss_at(by, gradients=False):
        options = {"error_term": error_term, "edit": edit, "keep": "all", "gradients": gradients}
        with spliced(bridge, made, **options), bridge.hooks(fwd_hooks=[(into, lambda x, hook: x + by)]):
            return loss_of(bridge)

    (gradient,) = torch.autograd.grad(loss_at(shift, gradients), shift)
    for axis in (0, 13):
        step = 1e-6 * torch.eye(32, dtype=torch.float64)[axis]
        with torch.no_grad():
            slope = float(loss_at(step) - loss_at(-step)) / 2e-6
        assert float(gradient[axis]) == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_training_a_dictionary_in_place(bridge):
    """Weights of the dictionary get gradients as well, at the site that is written in place too."""
    for site in (SITE, "blocks.1.hook_resid_mid"):
        made = double_at(site).requires_grad_(True)
        with spliced(bridge, made, gradients=True):
            loss_of(bridge).backward()
        assert all(made.get_parameter(name).grad.any() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))


def test_weights_that_ask_for_gradients_do_not_hold_the_latents():
    """As a bridge comes: a graph is recorded, and what is stored is out of it."""
    bridge = plain_bridge()
    with spliced(bridge, dictionary_at(), edit=steer(3, by=1.0)) as at:
        logits = bridge(TOKENS)
    assert logits.requires_grad and not at.latents[SITE].requires_grad


def test_backward_hooks_of_the_bridge():
    bridge = plain_bridge(
        "gpt2", dtype=torch.float64
    )  # whose weights ask for gradients: the bridge wants that
    with spliced(bridge, double_at(), edit=steer(3, by=1.0), gradients=True) as at:
        _, cache = bridge.run_with_cache(TOKENS, incl_bwd=True, return_type="loss")
    assert at.latents[SITE].grad.any() and cache["blocks.1.hook_out_grad"].any()
    middle = "blocks.1.hook_resid_mid"
    with spliced(bridge, double_at(middle)), pytest.raises(UserError, match="no backward hook"):
        bridge.run_with_cache(TOKENS, incl_bwd=True, return_type="loss")


def test_our_own_passes_record_nothing(tiny_model: LanguageModel):
    with spliced(tiny_model, dictionary_at(), gradients=True), pytest.raises(UserError, match="record"):
        tiny_model.run_body(TOKENS)
