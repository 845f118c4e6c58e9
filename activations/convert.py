"""A .gguf file becomes a transformers folder: written beside, flushed, renamed, and checked when read."""

import functools
import importlib.metadata
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from activations.gguf_file import check_whole
from sae.errors import UserError
from sae.files import disk_errors, make_folder, read_json, sha256_file, write_json

CONVERTER_VERSION = 1
"""Counts changes to what a conversion writes; older copies are then converted again."""

_MANIFEST = "jumpscope.json"
_VOCABULARY = "tokenizer.ggml.tokens"
# tokens from which on another process for the tokenizer pays for its start
_LARGE_VOCABULARY = 65_536
_ASIDE = (
    "import sys; from pathlib import Path; from activations.convert import convert_tokenizer; "
    "convert_tokenizer(Path(sys.argv[1]), Path(sys.argv[2]))"
)
logger = logging.getLogger("jumpscope")


def converted_folder(folder: Path, fetch: Callable[[Path], Path], *, note: str, progress: bool) -> Path:
    """`folder` with the converted model in it, converting only when it is not there or is torn.

    `fetch` is given a scratch folder and returns the path of the .gguf file. Processes that want the same
    folder wait for the first of them. Raises UserError for a file that cannot be converted and for a disk
    that refuses.
    """
    if folder.is_dir() and _damage(folder) is None:
        return folder
    make_folder(folder.parent)
    with disk_errors(folder.parent), FileLock(folder.parent / f".{folder.name}.lock"):
        damage = _damage(folder) if folder.is_dir() else "absent"
        if damage is None:  # another process converted it meanwhile
            return folder
        if damage != "absent":
            logger.warning("The converted copy %s is torn (%s): it is converted again.", folder, damage)
        if note:
            logger.info(note)
        for left_over in folder.parent.glob(
            f".{folder.name}.*.tmp"
        ):  # whoever left it no longer holds the lock
            shutil.rmtree(left_over, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            ready = scratch / "model"
            convert(fetch(scratch), ready, progress=progress)
            if folder.exists():
                folder.rename(scratch / "torn")
            ready.rename(folder)
            _flush(folder.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def convert(gguf: Path, folder: Path, *, progress: bool) -> None:
    """Writes model and tokenizer of a .gguf file to a new folder, with a manifest, flushed to the disk."""
    import torch
    from transformers import AutoModelForCausalLM

    head = check_whole(gguf)
    # bf16 holds whatever precision a quantised file has; 16 and 32 bit floats keep their own
    dtype = torch.float32 if head.exact else torch.bfloat16
    logger.info("Converting %s (once; this takes about a minute for 270M parameters).", gguf.name)
    folder.mkdir()
    large = (head.metadata.get(_VOCABULARY) or 0) >= _LARGE_VOCABULARY
    with nullcontext() if progress else quiet(), _head_read_once(), _aside(large, gguf, folder) as converted:
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=dtype, local_files_only=True, **_dequantize()
            )
            if not converted():
                _save_tokenizer(gguf, folder)
        except (ValueError, KeyError, NotImplementedError) as error:
            architecture = head.metadata.get("general.architecture")
            found = f"architecture {architecture!r} ({error})"
            must = "transformers must be able to read the .gguf file"
            raise UserError(
                must, found, "choose the model's transformers folder or hub id instead"
            ) from error
        # save_pretrained would otherwise believe that the weights are still quantised
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
    _write_manifest(folder, source=gguf.name)


def convert_tokenizer(gguf: Path, folder: Path) -> None:
    """Writes the tokenizer of a .gguf file to a folder."""
    with _head_read_once():
        _save_tokenizer(gguf, folder)


def _save_tokenizer(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    tokenizer.save_pretrained(folder)


@contextmanager
def _aside(large: bool, gguf: Path, folder: Path) -> Iterator[Callable[[], bool]]:
    """Converts the tokenizer in another process meanwhile, where that is long; yields what waits for it and
    says whether it was done.

    Weights and tokenizer take a core about equally long, in Python that holds its lock. Whatever hinders the
    other process, the tokenizer is then converted here, and errors are raised here.
    """
    if not large:
        yield lambda: False
        return
    words = [sys.executable, "-c", _ASIDE, str(gguf), str(folder)]
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield lambda: process.wait() == 0
    finally:
        process.kill()
        process.wait()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars off the terminal."""
    from transformers.utils import logging as theirs

    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the bar of the .gguf reader knows no other way
            yield
    finally:
        if shown:
            theirs.enable_progress_bar()


@contextmanager
def _head_read_once() -> Iterator[None]:
    """Within it the .gguf reader that transformers asks for is made once for a file, and reads plain memory.

    Otherwise it is made three times, and each takes a vocabulary apart through numpy.memmap, number by
    number: half of the time that a conversion takes.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, *args: Any, **kwargs: Any) -> Any:
            self.data = self.data.view(np.ndarray)  # pyright: ignore[reportAttributeAccessIssue]
            return super()._get(*args, **kwargs)

    theirs = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(Reader)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        gguf.GGUFReader = theirs


def _dequantize() -> dict[str, Any]:
    try:
        from transformers import GgufConfig
    except ImportError:  # transformers before 5.2x always dequantises
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _write_manifest(folder: Path, *, source: str) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)  # safetensors writes for its owner alone, but a cache may be shared
        _flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf")}
    manifest = {"converter": CONVERTER_VERSION, "source": source, "versions": versions, "files": files}
    write_json(folder / _MANIFEST, manifest)
    _flush(folder)


def _damage(folder: Path) -> str | None:
    """What is wrong with a converted copy, or None."""
    try:
        manifest = read_json(folder / _MANIFEST)
        for name, facts in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size:,} of {facts['bytes']:,} bytes"
        # sizes first, since they cost nothing
        for name, facts in manifest["files"].items():
            if sha256_file(folder / name) != facts["sha256"]:
                return f"the checksum of {name} differs"
    except (UserError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read: {error}"
    return None


def _flush(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # not every platform lets a folder be opened
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
