"""A batch in parts, each on a thread of its own, gives what each part gives alone."""

import pytest
import torch
from conftest import CONFIGS, wrapped_model

from activations import side_by_side as module
from activations.models import LanguageModel
from activations.side_by_side import own_part, side_by_side
from activations.sites import KINDS, expand_sites
from activations.splice import clean_run, spliced_final

TOKENS = torch.randint(3, 300, (5, 12), generator=torch.Generator().manual_seed(0))
HALVES = (slice(0, 3), slice(3, 5))


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return wrapped_model(request.param)


@pytest.fixture
def two_threads(monkeypatch):
    """Two threads, and any batch long enough to be shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(module, "_LEAST", 1)
    monkeypatch.setattr(module, "_UNEVEN", 2)
    yield
    torch.set_num_threads(before)


def alone(work):
    """What each half gives by itself, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [work(half) for half in HALVES]
    finally:
        torch.set_num_threads(before)


def sites_of(model):
    return [site for site in expand_sites(",".join(KINDS), "all", 4) if site in model._points]


def test_activations_are_those_of_the_parts(model, two_threads):
    sites = sites_of(model)
    found = model.activations(TOKENS, sites)
    parts = alone(lambda half: model.activations(TOKENS[half], sites))
    for site in sites:
        assert torch.equal(found[site], torch.cat([part[site] for part in parts])), site


def test_a_pass_may_end_early_in_every_part(model, two_threads):
    site = sites_of(model)[0]
    found = model.activations(TOKENS, [site, site])
    assert list(found) == [site]
    assert found[site].shape[:2] == TOKENS.shape


def test_splices_are_those_of_the_parts(model, two_threads):
    sites = sites_of(model)
    run = clean_run(model, TOKENS, sites)
    runs = alone(lambda half: clean_run(model, TOKENS[half], sites))
    assert torch.equal(run.final, torch.cat([part.final for part in runs]))
    for site in sites:
        replacement = run.acts[site].flip(1) + 0.5
        found = spliced_final(model, TOKENS, run, site, replacement)
        of_half = dict(zip([half.start for half in HALVES], runs, strict=True))
        parts = alone(
            lambda half, site=site, replacement=replacement, of_half=of_half: spliced_final(
                model, TOKENS[half], of_half[half.start], site, replacement[half]
            )
        )
        assert torch.equal(found, torch.cat(parts)), site


def test_a_run_of_chosen_blocks_splices_as_that_batch(tiny_model):
    sites = sites_of(tiny_model)
    run, blocks = clean_run(tiny_model, TOKENS, sites), torch.tensor([4, 0, 0, 2])
    for site in sites:
        replacement = run.acts[site][blocks].flip(1) + 0.5
        found = spliced_final(tiny_model, TOKENS[blocks], run.at(site, blocks), site, replacement)
        chosen = clean_run(tiny_model, TOKENS[blocks], sites)
        expected = spliced_final(tiny_model, TOKENS[blocks], chosen, site, replacement)
        torch.testing.assert_close(found, expected)


def test_every_thread_knows_its_blocks(two_threads):
    seen = side_by_side(TOKENS, lambda part: (own_part(), part))
    assert [blocks for blocks, _ in seen] == list(HALVES)
    assert torch.equal(torch.cat([part for _, part in seen]), TOKENS)
    assert torch.equal(TOKENS[own_part()], TOKENS)


@pytest.mark.parametrize(
    ("blocks", "length", "parts"),
    [(8, 128, 2), (8, 127, 1), (1, 4096, 1), (3, 4096, 1), (2, 512, 2), (7, 512, 2), (5, 512, 1)],
)
def test_a_batch_is_shared_out_where_that_is_faster(blocks, length, parts):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert len(side_by_side(torch.zeros(blocks, length, dtype=torch.long), len)) == parts
    finally:
        torch.set_num_threads(before)


def test_what_a_part_raises_is_raised_and_nothing_stays(two_threads):
    def run(part):
        if own_part().start:
            raise ValueError("second half")
        return part

    with pytest.raises(ValueError, match="second half"):
        side_by_side(TOKENS, run)
    assert side_by_side(TOKENS, lambda _: own_part()) == list(HALVES)
