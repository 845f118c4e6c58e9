"""What ranks do together: refusals that reach all, slow ranks that are named, machines that are too small."""

import logging
import re

import pytest
import torch
from fake_ranks import on_ranks

from activations.exchange import RefusedByAll
from activations.ranks import alone
from sae.errors import UserError
from train.room import crowded
from train.together import Stragglers, by_first, divide, together


def refusing(error):
    def work():
        raise error

    return work


def test_every_rank_learns_what_all_have_done_or_one_refuses():
    assert on_ranks(3, lambda ranks: together(ranks, "it", lambda: ranks.rank * 10)) == [[0, 10, 20]] * 3
    assert on_ranks(3, lambda ranks: by_first(ranks, "it", lambda: ranks.rank + 7)) == [7] * 3
    for error, words in ((UserError("a", "b", "c"), "A. Found: b. C."), (OSError(5, "no disk"), "no disk")):

        def work(ranks, error=error):
            return together(ranks, "it", refusing(error) if ranks.rank == 1 else lambda: 0)

        found = on_ranks(3, work)
        assert {type(one) for one in found} == {RefusedByAll}
        assert len(set(map(str, found))) == 1 and words.lower() in str(found[0]).lower()


def test_one_rank_alone_gets_its_own_errors_and_values():
    value = object()
    assert together(alone(), "it", lambda: value) == [value]
    with pytest.raises(OSError, match="no disk"):
        by_first(alone(), "it", refusing(OSError(5, "no disk")))


def test_other_mistakes_are_not_for_all_to_refuse():
    def work(ranks):
        with pytest.raises(ZeroDivisionError):
            together(ranks, "it", lambda: 1 // 0)
        return "told by its end"

    assert on_ranks(2, work) == ["told by its end"] * 2


FAST = {"model": 2.0, "exchange": 1.0, "step": 4.0, "wait": 1.0}


@pytest.mark.parametrize(
    ("slow", "loads", "words"),
    [
        ({"model": 3.5}, (2, 2, 2), "rank 2 is slow.*forward passes take 1.8"),
        ({"step": 8.0}, (2, 2, 2), "rank 2 is slow.*training steps take 2.0"),
        ({"step": 8.0}, (2, 2, 4), ""),  # it has twice as much to train
        ({"step": 8.0}, (2, 2, 0), ""),  # it has nothing to train
        ({"model": 2.9, "wait": 60.0}, (2, 2, 2), ""),
    ],
)
def test_a_slow_rank_is_named_once(slow, loads, words, caplog):
    look = Stragglers([float(load) for load in loads])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            look.look([FAST, FAST, {**FAST, **slow}])
    assert len(caplog.records) == bool(words)
    if words:
        assert re.search(words, caplog.text)


def test_short_times_and_one_rank_name_nobody(caplog):
    looks = Stragglers([1.0, 1.0])
    # in its first steps a rank compiles
    looks.look([{"model": 1.0}, {"model": 90.0}])
    looks.look([{"model": 0.1}, {"model": 0.9}])
    looks.look([{}, {"step": 9.0}])
    alone = Stragglers([1.0])
    for _ in range(2):
        alone.look([{"model": 90.0, "step": 9.0}])
    assert caplog.text == ""
    looks.look([{"model": 0.1}, {"model": 1.1}])
    assert "rank 1 is slow" in caplog.text


def test_sites_are_divided_by_the_width_of_their_rows():
    found = divide({"a": 4, "b": 1, "c": 1, "d": 2}, torch.float32, 2)
    assert found.owner == {"a": 0, "b": 1, "c": 1, "d": 1}
    assert found.sites(1) == {"b": 1, "c": 1, "d": 2}


def test_a_machine_must_have_room_for_all_its_ranks():
    def rank(host, need, free):
        return {"host": host, "need": need, "free": free}

    roomy = [rank("a", 3, 10), rank("a", 6, 9), rank("b", 5, 5)]
    assert crowded(roomy) is None
    error = crowded([*roomy, rank("b", 2**30, 5)])
    assert "2 ranks on b" in str(error) and "1.0 GiB" in str(error)
