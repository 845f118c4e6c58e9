"""Norms in one pass on a CPU have the bits of the model's own; who looks inside a norm sees the bridge's."""

import pytest
import torch
from conftest import wrapped_model
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from activations.norms import PlainNorms, _is_gemmas, quick_norm


def gemmas(d, seed=0):
    norm = Gemma3RMSNorm(d).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(seed))
    return norm.requires_grad_(False)


def rows(*shape, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * scale).to(torch.bfloat16)


@pytest.mark.parametrize("shape", [(1, 1), (7, 63), (2048, 640), (2, 3, 640), (3, 0, 64)])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_the_bits_are_the_models_own(shape, scale):
    norm, x = gemmas(shape[-1]), rows(*shape, scale=scale)
    assert torch.equal(quick_norm(norm, x), norm(x))


def test_heads_that_were_transposed_keep_their_layout():
    norm, x = gemmas(256), rows(2, 130, 4, 256).transpose(1, 2)
    quick = quick_norm(norm, x)
    assert torch.equal(quick, norm(x)) and quick.stride() == norm(x).stride()


def test_what_lies_in_pieces_is_left_to_the_model():
    norm, x = gemmas(64), rows(6, 128)[:, ::2]
    assert torch.equal(quick_norm(norm, x), norm(x))


def test_what_is_not_finite_stays_so():
    norm, x = gemmas(64), rows(5, 64)
    x[1, 3], x[2, 5], x[3] = torch.inf, torch.nan, 0
    quick, own = quick_norm(norm, x), norm(x)
    assert torch.equal(quick.isnan(), own.isnan()) and torch.equal(quick.nan_to_num(), own.nan_to_num())


class Rounded(Gemma3RMSNorm):
    """The norm of models that round before they multiply."""

    def forward(self, x):
        return self._norm(x.float()).type_as(x) * (1 + self.weight)


def test_a_norm_of_another_kind_is_seen_to_be_one():
    assert _is_gemmas(gemmas(64))
    other = Rounded(64).to(torch.bfloat16).requires_grad_(False)
    torch.nn.init.normal_(other.weight, generator=torch.Generator().manual_seed(0))
    assert not _is_gemmas(other)


class Outside(Gemma3RMSNorm):
    """The norm of models that add epsilon to the root."""

    def _norm(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


def test_where_epsilon_stands_is_seen():
    other = Outside(64, eps=1e-5).to(torch.bfloat16).requires_grad_(False)
    assert not _is_gemmas(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_hooks_the_inside_of_a_norm_sees_it_and_all_else_stays_the_same(dtype):
    model, tokens = wrapped_model("gemma3"), torch.arange(3, 23).view(2, 10)
    model.bridge.to(dtype)
    norm, seen = model.bridge.blocks[2].ln1, []
    plain = model.run_body(tokens)
    with model._norms.standing_in() as standing:
        # four of each block, two on queries and keys, the last one
        assert len(standing) == 6 * 4 + 1
    handle = norm.hook_normalized.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    assert torch.equal(model.run_body(tokens), plain) and len(seen) == 1
    with model._norms.standing_in() as standing:
        assert len(standing) == 6 * 4 and norm not in standing
    handle.remove()
    model._norms = PlainNorms(torch.nn.Identity())
    assert torch.equal(model.run_body(tokens), plain)
    assert "forward" not in norm.__dict__


def test_hooks_of_a_norm_itself_still_run():
    model, tokens, seen = wrapped_model("gemma3"), torch.arange(3, 13)[None], []
    norm = model.bridge.blocks[1].ln2
    for register in (norm.register_forward_pre_hook, norm.register_forward_hook):
        register(lambda *_args: seen.append(1))
    model.run_body(tokens)
    assert "forward" not in norm.__dict__ and len(seen) == 2
