"""Sites of an index whose making overlaps: order, errors, interruptions, and the same files."""

import threading

import pytest
import torch
from test_index import TEXT, build
from test_index_files import files_of, numbered
from viewer_fakes import SITES, FakeModel, fake_dictionary

import viewer.index.build
from viewer.index.ahead import OneAhead
from viewer.index.build import build_index
from viewer.index.storage import MANIFEST, read_manifest


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def beside():
    names = ("jumpscope-ahead", "jumpscope-writer")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def test_one_item_is_made_ahead_and_no_more():
    begun, ended = [], [threading.Event() for _ in range(4)]

    def steps(item):
        begun.append((item, torch.get_num_threads()))
        yield
        ended[item].set()
        return -item

    before = torch.get_num_threads()
    with OneAhead(steps, range(4), 3) as made:
        assert ended[0].wait(10) and len(begun) == 1
        for item in range(4):
            assert made.take() == -item
            assert item == 3 or ended[item + 1].wait(10)
            assert begun == [(n, 3) for n in range(min(item + 2, 4))]
        with pytest.raises(IndexError):
            made.take()
    assert not beside()
    torch.set_num_threads(before)


def test_with_one_thread_the_caller_makes_what_it_asks_for():
    begun = []

    def steps(item):
        begun.append((item, threading.current_thread()))
        yield
        return item

    with OneAhead(steps, range(3), 1) as made:
        for item in range(3):
            assert len(begun) == item and made.take() == item
    assert begun == [(n, threading.main_thread()) for n in range(3)]


@pytest.mark.parametrize("mode", [False, True])
def test_things_are_made_in_the_mode_of_the_caller(threads, mode):
    def steps(item):
        yield
        return torch.is_inference_mode_enabled()

    with torch.inference_mode(mode), OneAhead(steps, range(2), threads) as made:
        assert [made.take(), made.take()] == [mode] * 2


def test_an_error_waits_until_its_item_is_asked_for(threads):
    def steps(item):
        yield
        if item == 1:
            raise MemoryError("of item 1")
        return item

    with OneAhead(steps, range(3), threads) as made:
        assert made.take() == 0
        with pytest.raises(MemoryError, match="of item 1"):
            made.take()
    assert not beside()


def test_to_leave_stops_the_steps_where_they_yield():
    begun, go_on, late = threading.Event(), threading.Event(), []

    def steps(item):
        if item == 1:
            begun.set()
            go_on.wait(10)
            yield
            late.append(item)
        yield

    with pytest.raises(KeyboardInterrupt), OneAhead(steps, range(3), 2) as made:
        made.take()
        assert begun.wait(10)
        # once the block has been left
        threading.Timer(0.2, go_on.set).start()
        raise KeyboardInterrupt
    assert not late and not beside()


def test_the_files_are_the_same_whatever_the_threads(threads, tmp_path):
    build(tmp_path / "some")
    torch.set_num_threads(3)
    build(tmp_path / "three")
    assert files_of(tmp_path / "some") == files_of(tmp_path / "three")


def build_again(out):
    dictionaries = {site: fake_dictionary(site, seed=n) for n, site in enumerate(SITES)}
    blocks = numbered()
    return build_index(
        FakeModel(), dictionaries, lambda start: blocks[start.document :], out,
        text=TEXT, examples=6, resume=True,
    )  # fmt: skip


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(("step", "begun"), [("read_logits", SITES[0]), ("make_tables", SITES[1])])
def test_what_ends_one_step_while_another_runs_ends_the_build(
    error, step, begun, two_threads, tmp_path, monkeypatch
):
    met, prepare = threading.Event(), viewer.index.build.prepare_site

    def fails(*args):
        assert met.wait(10)
        raise error(step)

    def prepare_tells(dictionaries, between, site, found):
        if site == begun:
            met.set()
        return prepare(dictionaries, between, site, found)

    monkeypatch.setattr(viewer.index.build, step, fails)
    monkeypatch.setattr(viewer.index.build, "prepare_site", prepare_tells)
    with pytest.raises(error, match=step):
        build_again(tmp_path / "out")
    assert not beside() and not list(tmp_path.rglob("*.tmp"))
    assert not any((tmp_path / "out" / site / MANIFEST).exists() for site in SITES)
    monkeypatch.undo()
    build_again(tmp_path / "out")
    build(tmp_path / "whole", numbered())
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_site_is_labelled_while_the_next_ones_logits_are_read(two_threads, tmp_path, monkeypatch):
    reading, labelling = [threading.Event() for _ in SITES], [threading.Event() for _ in SITES]
    read, make = viewer.index.build.read_logits, viewer.index.build.make_tables

    def read_tells(common, site):
        at = SITES.index(site)
        reading[at].set()
        assert at == 0 or labelling[at - 1].wait(10)
        return read(common, site)

    def make_tells(common, known, logits):
        at = sum(event.is_set() for event in labelling)
        labelling[at].set()
        assert at + 1 == len(SITES) or reading[at + 1].wait(10)
        assert torch.get_num_threads() == 2
        return make(common, known, logits)

    monkeypatch.setattr(viewer.index.build, "read_logits", read_tells)
    monkeypatch.setattr(viewer.index.build, "make_tables", make_tells)
    build(tmp_path / "out")
    assert all(event.is_set() for event in labelling)


def test_an_error_in_the_next_site_leaves_the_one_before_whole(threads, tmp_path, monkeypatch):
    gather, read, failed = (
        viewer.index.build.gather_evidence,
        viewer.index.build.read_logits,
        threading.Event(),
    )
    asked = []

    def gather_fails(*args, **kwargs):
        asked.append(args)
        if len(asked) == 2:
            failed.set()
            raise MemoryError("of the second site")
        return gather(*args, **kwargs)

    def read_waits(common, site):
        assert threads == 1 or site == SITES[0] or failed.wait(10)
        return read(common, site)

    monkeypatch.setattr(viewer.index.build, "gather_evidence", gather_fails)
    monkeypatch.setattr(viewer.index.build, "read_logits", read_waits)
    with pytest.raises(MemoryError, match="second"):
        build_again(tmp_path / "out")
    assert not beside()
    read_manifest(tmp_path / "out" / SITES[0], finished=False)
    assert not (tmp_path / "out" / SITES[1] / MANIFEST).exists()
    monkeypatch.undo()
    build_again(tmp_path / "out")
    build(tmp_path / "whole", numbered())
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
