"""Shared values are made once and are never stale, however many threads want them."""

import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from viewer_fakes import SITES, fake_run

import viewer
from viewer.annotations import Annotations
from viewer.once import Kept, once

THREADS = 20


@pytest.fixture
def switching():
    """Threads take turns some thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(work):
    """What each of many threads gets that all start together."""
    start = threading.Barrier(THREADS)

    def go(number):
        start.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(go, range(THREADS)))


class Slow:
    def __init__(self):
        self.made = 0

    @once
    def value(self):
        """A value that takes its time."""
        self.made += 1
        time.sleep(0.02)
        return object()


def test_a_property_is_computed_once_for_each_object(switching):
    one, other = Slow(), Slow()
    values = at_once(lambda number: (one, other)[number % 2].value)
    assert one.made == other.made == 1 and set(values) == {one.value, other.value}
    assert Slow.value.__doc__ == "A value that takes its time." and not [k for k in vars(one) if "lock" in k]


def test_objects_do_not_wait_for_one_another():
    inside, go_on = threading.Event(), threading.Event()

    class Waits:
        @once
        def value(self):
            inside.set()
            return go_on.wait(10)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(lambda: Waits().value)
        assert inside.wait(10)
        assert Slow().value and not first.done()
        go_on.set()
        assert first.result()


def test_a_property_that_failed_is_tried_again():
    class Fails:
        tries = 0

        @once
        def value(self):
            self.tries += 1
            if self.tries == 1:
                raise ValueError("not yet")
            return self.tries

    thing = Fails()
    with pytest.raises(ValueError, match="not yet"):
        _ = thing.value
    assert thing.value == thing.value == 2


def test_a_kept_value_is_made_once_a_stamp(switching):
    kept, made = Kept(), []

    def make():
        made.append(time.sleep(0.01))
        return object()

    first = at_once(lambda _: kept.get("a", 1, make))
    assert len(set(first)) == len(made) == 1
    assert len(set(at_once(lambda _: kept.get("a", 2, make)))) == 1 and len(made) == 2
    assert kept.get("b", 2, make) != kept.get("a", 2, make)


def test_many_threads_read_one_run_as_one_does(tmp_path, switching):
    path = fake_run(tmp_path / "run").path
    alone = viewer.open(path)
    wanted = [(site, latent) for site in SITES for latent in range(len(alone.site(site)))]

    def read(run, site, latent):
        feature = run.site(site)[latent]
        related = feature.neighbours().to_json(), feature.cofiring().to_json()
        return (
            feature.site.name,
            *feature.facts(),
            feature.examples().to_json(),
            feature.drivers().to_json(),
            *related,
        )

    expected = {key: read(alone, *key) for key in wanted}
    found = alone.find(text="word99").to_json()
    shared = viewer.open(path)

    def browse(number):
        order = random.Random(number).sample(wanted, 12)
        wrong = [key for key in order if read(shared, *key) != expected[key]]
        return wrong, shared.find(text="word99").to_json() == found, shared.index.texts, shared.site(SITES[0])

    answers = at_once(browse)
    assert [(wrong, same) for wrong, same, *_ in answers] == [([], True)] * THREADS
    # the large things exist once
    assert len({id(texts) for *_, texts, _ in answers}) == len({id(site) for *_, site in answers}) == 1


def test_labels_of_many_threads_are_all_kept_and_all_seen(tmp_path, switching):
    shared = Annotations(tmp_path)

    def write(number):
        shared.set("site", number, "label", f"label {number}")
        return shared.get("site", number, "label")

    assert at_once(write) == [f"label {n}" for n in range(THREADS)]
    assert shared.labels("site") == Annotations(tmp_path).labels("site")
    assert len(shared.labels("site")) == THREADS


def test_a_slow_reader_does_not_bring_old_labels_back(tmp_path, monkeypatch):
    shared = Annotations(tmp_path)
    shared.set("site", 1, "label", "old")
    parse, inside, go_on = shared._parse, threading.Event(), threading.Event()

    def slowly():
        values = parse()
        inside.set()
        go_on.wait(10)
        return values

    with ThreadPoolExecutor() as pool:
        monkeypatch.setattr(shared, "_parse", slowly)
        slow = pool.submit(shared.get, "site", 1, "label")
        assert inside.wait(10)
        monkeypatch.setattr(shared, "_parse", parse)
        shared.set("site", 1, "label", "new")
        assert shared.get("site", 1, "label") == "new"
        go_on.set()
        assert slow.result() == "old"
    assert shared.get("site", 1, "label") == "new"
