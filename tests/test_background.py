"""Models behind the pages: loaded once, shared, called one at a time; and why, where they are not there."""

import threading
import time

import pytest
from tiny_run import tiny_run

import viewer
from sae.errors import UserError
from viewer.app import background
from viewer.app.background import Turns, resident


@pytest.fixture
def apart(monkeypatch):
    """A viewer that has seen no run yet."""
    monkeypatch.setattr(background, "_residents", {})
    monkeypatch.setattr(background, "_models", {})


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_folder):
    home = tmp_path_factory.mktemp("runs")
    return [tiny_run(home / name, tiny_folder, index=False) for name in ("one", "two")]


def settled(live, seconds=60.0):
    end = time.monotonic() + seconds
    while live.state == "loading":
        assert time.monotonic() < end, live.doing
        time.sleep(0.01)
    return live.state


def test_turns_are_taken_in_the_order_asked_one_at_a_time():
    turns, order, inside = Turns(), [], []

    def call(name):
        with turns.taken():
            inside.append(name)
            assert len(inside) == 1
            time.sleep(0.01)
            order.append(inside.pop())

    with turns.taken():
        threads = []
        for name in range(5):
            threads.append(threading.Thread(target=call, args=(name,)))
            threads[-1].start()
            while len(turns._queue) < name + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3, 4]


def test_one_who_waits_is_told_and_may_leave_and_a_failure_gives_the_turn_up(monkeypatch):
    monkeypatch.setattr(background, "_LOOK", 0.01)
    turns, told = Turns(), []

    def waiting(ahead):
        told.append(ahead)
        if len(told) == 3:
            raise KeyboardInterrupt

    with turns.taken(), pytest.raises(KeyboardInterrupt), turns.taken(waiting):
        raise AssertionError("two at once")
    assert told == [1, 1, 1]
    with pytest.raises(ZeroDivisionError), turns.taken():
        raise ZeroDivisionError
    with turns.taken(lambda ahead: pytest.fail("nobody is ahead")):
        pass


def test_a_model_is_loaded_once_for_all_its_runs_and_pages_do_not_wait(apart, folders, monkeypatch):
    from viewer.live import model

    real, loads, go = model.load_model, [], threading.Event()

    def slow(name, **how):
        loads.append(name)
        assert go.wait(30)
        return real(name, **how)

    monkeypatch.setattr("viewer.live.model.load_model", slow)
    runs = [viewer.open(folder) for folder in folders]
    lives = [resident(run) for run in runs]
    assert [live.state for live in lives] == ["loading", "loading"] and resident(runs[0]) is lives[0]
    assert "model" in lives[0].doing and lives[0].seconds >= 0
    go.set()
    assert [settled(live) for live in lives] == ["ready", "ready"]
    assert len(loads) == 1 and runs[0].model is runs[1].model
    # opened anew, as after the run was written anew
    again = viewer.open(folders[0])
    fresh = resident(again)
    assert fresh is not lives[0] and settled(fresh) == "ready" and again.model is runs[0].model


def test_a_call_is_computed_once_and_a_failed_one_is_not_kept(apart, folders):
    live = resident(viewer.open(folders[0]))
    assert settled(live) == "ready"
    made = []

    def compute():
        made.append(threading.get_ident())
        time.sleep(0.05)
        return len(made)

    answers = []
    threads = [threading.Thread(target=lambda: answers.append(live.call("key", compute))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers == [1] * 8 and len(made) == 1
    with pytest.raises(ZeroDivisionError):
        live.call("bad", lambda: 1 / 0)
    assert live.call("bad", lambda: "well") == "well" and live.kept("key") == 1
    for number in range(3 * background._KEPT):
        live.call(number, lambda number=number: number)
        assert live.kept("key") == 1
    assert len(live._kept) == background._KEPT and live.kept("bad") is None


def test_calls_of_many_threads_on_one_model_answer_as_alone(apart, folders):
    run = viewer.open(folders[0])
    live = resident(run)
    assert settled(live) == "ready"
    texts = [f"The capital of {name}" for name in ("France", "Italy", "Rome", "Paris")]
    alone = [run.trace(text).frame for text in texts]
    next_alone = [run.steer({(1, 3): 2.0}, unit="absolute").next_tokens(text) for text in texts]
    found = {}

    def ask(number):
        text = texts[number]
        frame = live.call(("t", text), lambda: run.trace(text).frame)
        steered = run.steer({(1, 3): 2.0}, unit="absolute")
        found[number] = frame, live.call(("n", text), lambda: steered.next_tokens(text))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in range(4):
        assert found[number][0].equals(alone[number]) and found[number][1].equals(next_alone[number])


def test_a_model_that_cannot_be_had_is_told_and_can_be_asked_for_again(apart, folders, monkeypatch, tmp_path):
    run = viewer.open(tiny_run(tmp_path / "run", tmp_path / "gone", index=False))
    live = resident(run)
    assert settled(live) == "absent" and "gone" in live.why and not live.on_request
    monkeypatch.setattr(
        "viewer.live.model.load_model", lambda *a, **k: (_ for _ in ()).throw(MemoryError("no memory"))
    )
    live = resident(viewer.open(folders[0]))
    assert settled(live) == "absent" and "no memory" in live.why
    monkeypatch.undo()
    live.load()
    assert settled(live) == "ready"


def test_a_visit_neither_downloads_nor_fills_the_memory(apart, folders, monkeypatch, tmp_path):
    asked = []

    def load(name, **how):
        asked.append(name)
        raise UserError("it must be there", "nothing", "look")

    monkeypatch.setattr("viewer.live.model.load_model", load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    live = resident(viewer.open(tiny_run(tmp_path / "run", "nobody/nothing-of-ours", index=False)))
    assert settled(live) == "absent" and live.on_request and "downloaded" in live.why and not asked
    live.load(asked=True)
    assert settled(live) == "absent" and not live.on_request and asked == ["nobody/nothing-of-ours"]

    class Full:
        available = 1000

    monkeypatch.setattr(background.psutil, "virtual_memory", Full)
    live = resident(viewer.open(folders[1]))
    assert settled(live) == "absent" and live.on_request and "memory" in live.why and len(asked) == 1
