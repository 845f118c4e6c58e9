"""Writing an activation store: going on, adding to it, and what is refused or survived."""

import dataclasses
import errno
import os
import resource

import pytest
import torch
from filelock import FileLock
from store_rows import FACTS, SITES, all_rows, assert_same, files, source, whole, write

from activations.store import manifest_bytes, open_store
from activations.store_writer import begun_store
from sae.errors import UserError


def cut_off(rows, error=KeyboardInterrupt):
    """A source that fails once it has given that many rows."""

    def batches(start, wanted):
        for batch in source(100)(start, wanted):
            if batch.begin.kept >= rows:
                raise error
            yield batch

    return batches


@pytest.mark.parametrize("at", [17, 34, 51, 68, 85])
def test_a_harvest_cut_off_goes_on_and_ends_as_if_it_had_not_been(tmp_path, at):
    write(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", source=cut_off(at), wanted_rows=200)
    if at > 30:
        begun = open_store(tmp_path / "s")
        assert (begun.complete, begun.rows) == (False, at // 30 * 30)
    starts = []
    write(tmp_path / "s", source=source(100, starts=starts))
    assert files(tmp_path / "s") == files(tmp_path / "straight")
    assert_same(whole(open_store(tmp_path / "s").iter_rows()), all_rows())
    # no more than one batch is run again
    assert at <= 30 or starts[0].kept > begun.rows - 17


def test_rows_are_added_to_a_finished_store(tmp_path):
    write(tmp_path / "s", rows=100)
    shards, _ = files(tmp_path / "s")
    more = write(tmp_path / "s", rows=143)
    assert (more.rows, more.complete) == (143, True)
    assert_same(whole(more.iter_rows()), all_rows(143))
    assert [entry["rows"] for entry in more.manifest["shards"].values()] == [30, 30, 30, 10, 30, 13]
    assert shards.items() <= files(tmp_path / "s")[0].items()
    exact = all_rows(143)[0][SITES[0]].double()
    torch.testing.assert_close(more.statistics[SITES[0]].mean.double(), exact.mean(0), rtol=1e-6, atol=0)
    assert more.statistics[SITES[0]].n == 143


@pytest.mark.parametrize("wanted", [100, 40])
def test_enough_rows_are_left_alone(tmp_path, wanted):
    write(tmp_path / "s")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    store = write(tmp_path / "s", source=lambda start, wanted: pytest.fail("harvested"), wanted_rows=wanted)
    assert (store.rows, store.complete) == (100, True)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()} == before


def test_a_cut_off_store_with_enough_rows_becomes_complete(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", source=cut_off(68), wanted_rows=200)
    store = write(tmp_path / "s", source=lambda start, wanted: pytest.fail("harvested"), wanted_rows=60)
    assert (store.rows, store.complete) == (60, True)


def test_a_text_that_ends_is_said_and_not_read_again(tmp_path):
    store = write(tmp_path / "s", rows=60, wanted_rows=1000)
    assert (store.rows, store.complete, store.manifest["corpus_ended"]) == (60, True, True)
    assert (
        write(tmp_path / "s", source=lambda start, wanted: pytest.fail("again"), wanted_rows=2000).rows == 60
    )


def test_exactly_the_wanted_rows_are_kept_and_no_batch_more_is_made(tmp_path):
    given = []

    def counted(start, wanted):
        for batch in source(400)(start, wanted):
            given.append(len(batch))
            yield batch

    for wanted, batches in ((60, 4), (90, 3)):
        given.clear()
        assert write(tmp_path / "s", source=counted, wanted_rows=wanted).rows == wanted
        assert len(given) == batches
    assert_same(whole(open_store(tmp_path / "s").iter_rows()), all_rows(90))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "other"),
        ("tokenizer_hash", "xyz"),
        ("corpus", "sotu"),
        ("split", "all"),
        ("context", 128),
        ("seed", 4),
        ("model_batch", 4),
        ("model_dtype", "float32"),
        ("widths", {SITES[0]: 4}),
    ],
)
def test_other_facts_are_refused_with_the_difference(tmp_path, name, value):
    write(tmp_path / "s")
    before = files(tmp_path / "s")
    facts = dataclasses.replace(FACTS, **{name: value})
    with pytest.raises(UserError) as refused:
        write(tmp_path / "s", facts=facts, wanted_rows=200)
    shown = (SITES[1], SITES[0]) if name == "widths" else (repr(getattr(FACTS, name)), repr(value), name)
    assert all(text in refused.value.found for text in shown)
    assert files(tmp_path / "s") == before
    with pytest.raises(UserError, match="dtype 'bfloat16' there, 'int8' asked"):
        write(tmp_path / "s", dtype="int8", wanted_rows=200)


def test_a_folder_of_other_things_is_refused_before_anything_is_harvested(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("dear")
    (tmp_path / "file").write_text("x")
    for name, found in (("other", "thesis.tex"), ("file", "a file at")):
        with pytest.raises(UserError, match=found):
            write(tmp_path / name, source=lambda start, wanted: pytest.fail("harvested"))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_what_a_killed_harvest_left_is_cleared_away(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    for name in ("shard-00000.safetensors", ".shard-00001.safetensors.abc.tmp", ".lock"):
        (folder / name).write_bytes(b"half")
    assert begun_store(folder) is None
    write(folder, rows=60)
    (folder / "shard-00002.safetensors").write_bytes(b"unlisted")
    (folder / "notes.txt").write_text("mine")
    write(folder, rows=61)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "manifest.json",
        "notes.txt",
        *(f"shard-0000{i}.safetensors" for i in range(3)),
    ]
    assert open_store(folder).verify() == {}


def test_a_second_harvest_is_refused_at_once(tmp_path):
    write(tmp_path / "s")
    with FileLock(tmp_path / "s" / ".lock"), pytest.raises(UserError, match="another process"):
        write(tmp_path / "s", wanted_rows=200)
    write(tmp_path / "s", rows=120)


@pytest.mark.parametrize("harm", ["taken", "gone"])
def test_a_harvest_whose_store_was_taken_over_stops(tmp_path, harm):
    manifest = tmp_path / "s" / "manifest.json"

    def overtaken(start, wanted):
        for batch in source(100)(start, wanted):
            if batch.begin.kept == 51 and harm == "gone":
                manifest.unlink()
            elif batch.begin.kept == 51:
                manifest.write_bytes(manifest_bytes({**open_store(tmp_path / "s").manifest, "writer": "b"}))
            yield batch

    with pytest.raises(UserError, match="took it over"):
        write(tmp_path / "s", source=overtaken)
    assert not (tmp_path / "s" / "shard-00003.safetensors").exists()
    if harm == "taken":
        assert open_store(tmp_path / "s").manifest["writer"] == "b"


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_a_full_disk_is_said_and_the_harvest_goes_on_later(tmp_path, monkeypatch, call):
    write(tmp_path / "straight")
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) > 2 * call:  # a file is flushed, then its folder
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="room for the file"):
            write(tmp_path / "s")
    assert not list((tmp_path / "s").glob("*.tmp"))
    assert open_store(tmp_path / "s").verify() == {}
    write(tmp_path / "s")
    assert files(tmp_path / "s") == files(tmp_path / "straight")


def test_a_limit_on_the_size_of_files_is_said(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(UserError, match="ulimit"):
            write(tmp_path / "s", rows=300, shard_rows=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write(tmp_path / "s", rows=300, shard_rows=300)
    assert_same(whole(open_store(tmp_path / "s").iter_rows()), all_rows(300))


def test_no_rows_make_no_store(tmp_path):
    with pytest.raises(UserError, match="hold rows"):
        write(tmp_path / "s", rows=0, wanted_rows=10)
    assert begun_store(tmp_path / "s") is None
    assert write(tmp_path / "s").rows == 100


def test_progress_is_told(tmp_path):
    told = []
    write(tmp_path / "s", on_rows=told.append)
    assert told == [17, 34, 51, 68, 85, 100]


def test_a_source_that_skips_rows_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="row 0 must come next"):
        write(
            tmp_path / "s",
            source=lambda start, wanted: source(100)(dataclasses.replace(start, kept=17), wanted),
        )
