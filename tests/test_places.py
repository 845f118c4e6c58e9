"""Folders behind URLs: stores there, and what their drivers may do."""

import dataclasses
import uuid

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from store_rows import FACTS, SITES, all_rows, assert_same, source, whole, write

from activations.places import Place
from activations.store import open_store
from activations.store_writer import begun_store
from sae.errors import UserError


@pytest.fixture
def url():
    return f"memory://stores/{uuid.uuid4().hex}"


def test_a_store_behind_a_url_is_written_continued_and_read(url, tmp_path):
    assert begun_store(url) is None
    write(url, rows=60)
    store = write(url, rows=100)
    assert_same(whole(store.iter_rows()), all_rows())
    assert_same(whole(store.iter_rows(SITES)), all_rows())
    straight = write(tmp_path / "s", rows=100)
    assert store.manifest["shards"] == straight.manifest["shards"]
    assert store.verify() == {}


def test_file_urls_are_local_folders(tmp_path):
    store = write(f"file://{tmp_path}/s")
    assert store.place.folder == tmp_path / "s"
    assert (tmp_path / "s" / ".lock").exists()


def test_harm_behind_a_url_is_named(url):
    store = write(url)
    files = fsspec.filesystem("memory")
    shard = store.place.of("shard-00001.safetensors")
    content = files.cat_file(shard)
    files.pipe_file(shard, content[:-1] + b"x")
    assert list(store.verify()) == ["shard-00001.safetensors"]
    files.pipe_file(shard, content[:-50])
    with pytest.raises(UserError, match=r"shard-00001.*instead of"):
        open_store(url)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors must be whole.*too early"):
        list(store.iter_rows())
    files.rm_file(shard)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors must be whole"):
        list(store.iter_rows())


def test_two_harvests_behind_a_url_the_later_one_wins(url):
    def overtaken(start, wanted):
        for batch in source()(start, wanted):
            yield batch
            if batch.begin.kept == 34:
                write(url, rows=100)

    with pytest.raises(UserError, match="took it over"):
        write(url, source=overtaken)
    store = open_store(url)
    assert_same(whole(store.iter_rows()), all_rows())
    assert store.verify() == {}


def test_a_driver_that_fails_is_one_error_and_the_harvest_goes_on(url, monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("SlowDown: reduce your request rate")

    def failing(start, wanted):
        for batch in source()(start, wanted):
            if batch.begin.kept == 85:
                monkeypatch.setattr(MemoryFileSystem, "_open", refused)
            yield batch

    with pytest.raises(UserError, match=r"within reach.*SlowDown"):
        write(url, source=failing)
    monkeypatch.undo()
    assert open_store(url).rows in (30, 60)  # the second shard was being written by then
    assert_same(whole(write(url).iter_rows()), all_rows())


def test_folders_that_cannot_replace_in_one_go_move_a_file_into_place(url, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "protocol", "slowfs")
    place = Place(url)
    place.make()
    place.replace("manifest.json", b"old")
    place.replace("manifest.json", b"new")
    assert place.read("manifest.json") == b"new"
    assert place.sizes() == {"manifest.json": 3}


def test_unknown_kinds_and_missing_drivers_say_what_to_do():
    with pytest.raises(UserError, match="fsspec knows"):
        Place("nosuchthing://bucket/x")
    fsspec.register_implementation("fakes3", "nosuch.module.S3", errtxt="Install fakes3fs to access it")
    with pytest.raises(UserError, match="pip install fakes3fs"):
        Place("fakes3://bucket/x")


def test_facts_are_checked_there_too(url):
    write(url)
    with pytest.raises(UserError, match="seed 3 there, 4 asked"):
        write(url, facts=dataclasses.replace(FACTS, seed=4))
