"""The scaling benchmark's model of a run, where the answer can be worked out by hand."""

from dataclasses import replace

import pytest

from benchmarks.scaling import ROUNDS, Setting, Times, simulate

# a second for a batch of 200 rows, which four sites train on in four steps of 0.05 each: 0.8 on one rank
TIMES = Times(model=[1.0], step=[0.05], text=0.0, swap=0.0, swap_byte=0.0, share=0.0)
SETTING = Setting(
    sites=4, batch=100, passes=2, batch_rows=200, ahead_rows=400, row_bytes=1000.0, log_every=10
)
MANY = 1000.0


def seconds(world, times=TIMES, cores=MANY, **others):
    """Time of a round, from the rate."""
    return world * SETTING.batch_rows / simulate(times, SETTING, world, cores=cores, **others)


def test_one_rank_harvests_and_trains_in_turn():
    assert seconds(1) == pytest.approx(1.8)


def test_ranks_harvest_while_they_train():
    # two ranks: eight steps of two sites in 0.8, beside a forward pass of 1; the last steps come behind it
    assert seconds(2) == pytest.approx((ROUNDS * 1.0 + 0.8) / ROUNDS)
    # four ranks with a site each, 16 slow steps
    slow = replace(TIMES, step=[0.1])
    assert seconds(4, slow) == pytest.approx((1.0 + ROUNDS * 1.6) / ROUNDS)


def test_cores_bound_what_all_ranks_do_together():
    assert seconds(2, cores=1) == pytest.approx(2 * (1.0 + 0.8))
    assert seconds(2, cores=2) == pytest.approx(1.0 + 0.8)


def test_the_exchange_takes_a_link_or_a_processor():
    # half of 200 rows of 1,000 bytes leaves
    assert seconds(2, bandwidth=1e5) == pytest.approx((ROUNDS * 2.0 + 0.8) / ROUNDS)
    assert seconds(2, replace(TIMES, swap_byte=2e-5)) == pytest.approx((ROUNDS * 3.0 + 0.8) / ROUNDS)
    assert seconds(1, replace(TIMES, swap_byte=2e-5, swap=9.0), bandwidth=1.0) == pytest.approx(1.8)


def test_every_rank_reads_all_of_the_text():
    text = replace(TIMES, text=0.01)
    assert seconds(2, text) == pytest.approx((ROUNDS * (1.0 + 4.0) + 0.8) / ROUNDS)
    assert simulate(text, SETTING, 8, cores=MANY) < 1 / 0.01


def test_ranks_beyond_the_sites_harvest_or_divide_dictionaries():
    slow = replace(TIMES, step=[0.2])
    # eight ranks: 32 steps of 0.2, by four of the ranks or by two for each site
    assert seconds(8, slow) == pytest.approx((1.0 + ROUNDS * 6.4) / ROUNDS)
    assert seconds(8, slow, shards=True) == pytest.approx((1.0 + ROUNDS * 3.2) / ROUNDS)
    # 100 rows of 125 numbers a step and site in fp32, half of them each way: 50 kB
    assert seconds(8, slow, shards=True, bandwidth=1e6) == pytest.approx(
        (1.0 + 0.175 + ROUNDS * (3.2 + 32 * 0.05)) / ROUNDS
    )


def test_the_slowest_rank_is_waited_for():
    # of 16 ranks one is nearly always slow
    uneven = replace(TIMES, model=[1.0, 3.0], step=[1e-9])
    assert seconds(16, uneven) == pytest.approx(3.0, rel=1e-3)


def test_rounds_larger_than_the_store_are_harvested_while_nothing_is_trained():
    # eight ranks make 1,600 rows a round: the next begins with 800 of them to go, half of 6.4
    slow = replace(TIMES, step=[0.2], model=[4.0])
    assert seconds(8, slow) == pytest.approx((4.0 + 6.4 + (ROUNDS - 1) * (6.4 + 0.8)) / ROUNDS)
