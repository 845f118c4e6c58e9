"""Labels and notes: kept beside the run, whoever writes, whatever ends a writer."""

import json
import shutil
import subprocess
import sys

import pytest
from viewer_fakes import SITES, fake_run

import viewer
from sae import UserError
from viewer.annotations import Annotations


@pytest.fixture
def run(tmp_path):
    return viewer.open(fake_run(tmp_path / "mine").path)


def test_a_label_stays_and_moves_with_the_folder(run, tmp_path):
    feature = run.layer(0)[5]
    automatic = feature.label
    unlabelled = "automatic" if automatic else ""
    assert feature.label_source == unlabelled and automatic == feature.automatic_label
    feature.label, feature.notes = "cities\n<b>\ud800", "first\nsecond"
    again = viewer.open(run.path).layer(0)[5]
    assert (again.label, again.notes, again.label_source) == ("cities\n<b>?", "first\nsecond", "yours")
    assert "&lt;b&gt;" in again._repr_html_() and "<b>?" not in again._repr_html_()
    assert run.latents().loc[5, "label_source"] == "yours" and run.layer(0)[6].label_source != "yours"
    moved = viewer.open(shutil.copytree(run.path, tmp_path / "moved"))
    assert moved.layer(0)[5].label == again.label and moved.layer(1)[5].label_source != "yours"
    feature.label = ""
    assert again.label == automatic and again.label_source == unlabelled and again.notes == "first\nsecond"
    assert run.index.annotations.table()["notes"].tolist() == ["first\nsecond"]


def test_what_a_killed_writer_left_hides_nothing(tmp_path, caplog):
    notes = Annotations(tmp_path)
    notes.set("a", 1, "label", "one")
    with notes.path.open("ab") as file:
        file.write(b'{"site": "a", "latent": 1, "lab')
    assert notes.get("a", 1, "label") == "one"
    notes.set("a", 2, "label", "two")
    with notes.path.open("ab") as file:
        file.write(b'[1]\n{"site": "a"}\n{"site": "a", "latent": "x", "label": ""}\n\xff\xfe\n')
    fresh = Annotations(tmp_path)
    assert fresh.labels("a") == {1: "one", 2: "two"} and "line 2" in caplog.text
    assert all(json.loads(line) for line in notes.path.read_bytes().splitlines()[:1])


def test_two_writers_at_once_lose_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from viewer.annotations import Annotations\n"
        "notes = Annotations(Path(sys.argv[1]))\n"
        "for n in range(60): notes.set('s', n, 'label', sys.argv[2] * 3000)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), who]) for who in ("a", "b")]
    assert [writer.wait() for writer in writers] == [0, 0]
    lines = [json.loads(line) for line in Annotations(tmp_path).path.read_text().splitlines()]
    assert len(lines) == 120
    last = {line["latent"]: line["label"] for line in lines}
    assert Annotations(tmp_path).labels("s") == last and len(last) == 60


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        Annotations(tmp_path / "file").set("s", 1, "label", "x")


def test_equal_features_are_one_key(run, tmp_path):
    a, b = run.layer(0)[3], viewer.open(run.path).site(SITES[0])[3]
    other = viewer.open(fake_run(tmp_path / "else" / "mine").path).layer(0)[3]
    assert {a: 1, b: 2} == {a: 2} and a != run.layer(1)[3] and a != other and a != 3
