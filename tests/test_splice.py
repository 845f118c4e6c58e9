"""Splicing changes what it should and nothing else; losses equal those of full logits."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, wrapped_model

from activations.losses import next_token_losses
from activations.models import LanguageModel
from activations.sites import KINDS, expand_sites, layer_of, site_name
from activations.splice import clean_run, spliced_final
from sae.errors import UserError

TOKENS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return wrapped_model(request.param)


def sites_of(model: LanguageModel) -> list[str]:
    return [site for site in expand_sites(",".join(KINDS), "all", 4) if site in model._points]


def test_the_clean_activation_spliced_back_changes_nothing(model: LanguageModel) -> None:
    sites = sites_of(model)
    run = clean_run(model, TOKENS, sites)
    assert torch.equal(run.final, model.run_body(TOKENS))
    for site in sites:
        assert torch.equal(spliced_final(model, TOKENS, run, site, run.acts[site]), run.final), site


def test_skipping_blocks_gives_what_the_whole_model_gives(model: LanguageModel) -> None:
    sites = sites_of(model)
    run = clean_run(model, TOKENS, sites)
    for site in sites:
        replacement = run.acts[site].flip(1) + 0.5
        # in the middle of a block the residual stream goes past the hook: only writing there reaches it
        middle = site.endswith("hook_resid_mid")
        handle = model._points[site].register_forward_hook(
            lambda _m, _i, o, r=replacement, middle=middle: o.copy_(r) if middle else r
        )
        try:
            seen: dict[str, torch.Tensor] = {}
            ends = [site_name(layer_of(site), kind) for kind in ("mlp_out", "resid_post")]
            with model.watching({end: partial(seen.__setitem__, end) for end in ends}):
                expected = model.run_body(TOKENS)
            if middle:
                torch.testing.assert_close(seen[ends[1]], replacement + seen[ends[0]])
        finally:
            handle.remove()
        spliced = spliced_final(model, TOKENS, run, site, replacement)
        assert torch.equal(spliced, expected), site
        assert not torch.equal(spliced, run.final), site


def test_blocks_below_the_site_do_not_run(model: LanguageModel) -> None:
    sites = sites_of(model)
    run = clean_run(model, TOKENS, sites)
    ran: list[int] = []
    counters = [
        block.original_component.register_forward_hook(lambda *_args, layer=layer: ran.append(layer))
        for layer, block in enumerate(model.bridge.blocks)
    ]
    try:
        for site in sites:
            ran.clear()
            spliced_final(model, TOKENS, run, site, run.acts[site])
            first = layer_of(site) + site.endswith("hook_resid_post")
            assert ran == list(range(first, 4)), site
    finally:
        for counter in counters:
            counter.remove()


def test_an_error_while_splicing_leaves_the_model_whole(tiny_model: LanguageModel) -> None:
    site = "blocks.2.hook_mlp_out"
    run = clean_run(tiny_model, TOKENS, [site])

    def fail(*_args: object) -> None:
        raise KeyboardInterrupt

    handle = tiny_model.bridge.blocks[3].original_component.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        spliced_final(tiny_model, TOKENS, run, site, run.acts[site])
    handle.remove()
    assert torch.equal(tiny_model.run_body(TOKENS), run.final)


def test_only_what_was_kept_can_be_spliced_and_only_in_its_shape(tiny_model: LanguageModel) -> None:
    site = site_name(1, "attn_z")
    run = clean_run(tiny_model, TOKENS, [site])
    with pytest.raises(UserError, match="must have kept the site"):
        spliced_final(tiny_model, TOKENS, run, "blocks.2.hook_resid_post", run.final)
    with pytest.raises(UserError, match="shape"):
        spliced_final(tiny_model, TOKENS, run, site, run.final)


@pytest.mark.parametrize("vocab_chunk", [None, 1, 7, 299, 300, 1000])
def test_losses_equal_those_of_full_logits(model: LanguageModel, vocab_chunk: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    finals = 4 * torch.randn(3, 11, 32, generator=generator)
    targets = torch.randint(0, 300, (11,), generator=generator)
    ce, kl = next_token_losses(model, finals, targets, vocab_chunk=vocab_chunk)
    logits = model.unembed(finals)
    log_probs = logits.log_softmax(-1)
    for variant in range(3):
        torch.testing.assert_close(
            ce[variant], F.cross_entropy(logits[variant], targets, reduction="none"), rtol=1e-5, atol=2e-5
        )
        expected = F.kl_div(log_probs[variant], log_probs[0], reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(kl[variant], expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(kl[0], torch.zeros(11))


def test_losses_survive_logits_that_overflow_exp(tiny_model: LanguageModel) -> None:
    finals = 300 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    targets = torch.arange(5)
    logits = tiny_model.unembed(finals).double()
    assert logits.max() > 200
    ce, kl = next_token_losses(tiny_model, finals, targets, vocab_chunk=64)
    expected = F.cross_entropy(logits[1], targets, reduction="none")
    torch.testing.assert_close(ce[1].double(), expected, rtol=1e-5, atol=1e-3)
    log_probs = logits.log_softmax(-1)
    expected = (log_probs[0].exp() * (log_probs[0] - log_probs[1])).sum(-1)
    torch.testing.assert_close(kl[1].double(), expected, rtol=1e-5, atol=1e-3)


def test_rows_and_variants_do_not_leak_into_each_other(tiny_model: LanguageModel) -> None:
    finals = torch.randn(2, 600, 32, generator=torch.Generator().manual_seed(3))  # more rows than one tile
    targets = torch.randint(0, 300, (600,), generator=torch.Generator().manual_seed(4))
    ce, kl = next_token_losses(tiny_model, finals, targets)
    for row in (0, 255, 256, 511, 599):
        ce_alone, kl_alone = next_token_losses(tiny_model, finals[:, row : row + 1], targets[row : row + 1])
        torch.testing.assert_close(ce_alone[:, 0], ce[:, row])
        torch.testing.assert_close(kl_alone[:, 0], kl[:, row], rtol=1e-4, atol=1e-6)


def test_gemma_in_bf16(gemma: LanguageModel) -> None:
    """Identity costs nothing, zeroing costs nats, and the loss is that of the model's own logits."""
    ids = gemma.encode("The capital of France is Paris, and the capital of Italy is Rome.", add_bos=True)
    tokens = torch.tensor([ids])
    site = "blocks.9.hook_resid_post"
    run = clean_run(gemma, tokens, [site])
    same = spliced_final(gemma, tokens, run, site, run.acts[site])
    assert torch.equal(same, run.final)
    zeroed = run.acts[site].clone()
    zeroed[:, 1:] = 0
    variants = torch.stack([run.final, same, spliced_final(gemma, tokens, run, site, zeroed)])
    ce, kl = next_token_losses(gemma, variants[:, 0, :-1], tokens[0, 1:])
    expected = F.cross_entropy(gemma.unembed(run.final[0, :-1]).float(), tokens[0, 1:], reduction="none")
    torch.testing.assert_close(ce[0], expected, rtol=1e-2, atol=2e-2)
    assert torch.equal(ce[0], ce[1])
    assert kl[1].abs().max() < 1e-4
    assert ce[2].mean() > ce[0].mean() + 2
    assert kl[2].mean() > 2
