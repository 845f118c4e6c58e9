"""Files that are whole or absent: written beside, flushed to the disk, renamed."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sae.errors import UserError

_REMEDIES = {
    errno.ENOSPC: ("the disk must have room for the file", "free some space or choose another folder"),
    errno.EDQUOT: ("the disk quota must have room for the file", "free some space or choose another folder"),
    errno.EFBIG: ("files must be allowed to grow that large", "raise the limit (ulimit -f)"),
    errno.EACCES: ("the folder must be writable", "change its permissions or choose another folder"),
    errno.EPERM: ("the folder must be writable", "change its permissions or choose another folder"),
    errno.EROFS: ("the folder must be writable", "choose a folder that is not mounted read-only"),
    errno.ENOTDIR: ("a folder must stand at that path", "choose another folder"),
    errno.EISDIR: (
        "a file must be able to stand at that path",
        "remove the folder there or choose another path",
    ),
    errno.EEXIST: ("a folder must stand at that path", "choose another folder"),
}


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turns the operating system's refusals while writing `path` into a UserError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors wraps the operating system's error in one of its own and keeps only its text
        code = getattr(error, "errno", None) or next(
            (c for c in _REMEDIES if f"os error {c})" in str(error)), None
        )
        if code not in _REMEDIES:
            raise
        must, do = _REMEDIES[code]
        raise UserError(must, f"{os.strerror(code)} while writing {path}", do) from error


def make_folder(path: Path | str) -> Path:
    """Creates a folder and its parents; a refusal is a UserError."""
    path = Path(path)
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def append_whole(path: Path | str, data: bytes) -> None:
    """Appends to a file all of `data`, or nothing when the disk refuses, which is a UserError."""
    path = Path(path)
    # unbuffered, so that nothing is written after the file was cut back
    with disk_errors(path), path.open("ab", buffering=0) as file:
        before, rest = file.tell(), memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            file.truncate(before)
            raise


def atomic_write(path: Path | str, content: bytes | Callable[[Path], object]) -> None:
    """Writes a file so that a reader sees the old one or the whole new one, never a part.

    `content` is the bytes themselves or a function that writes them to the path it is given. On any
    failure the temporary file is removed and what stood at `path` is untouched.
    """
    path = Path(path)
    make_folder(path.parent)
    with disk_errors(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            if isinstance(content, bytes):
                temporary.write_bytes(content)
            else:
                content(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """A folder that appears with everything in it, or not at all: the block fills the folder it is given.

    Raises UserError when something other than an empty folder stands at `path`, and when the disk refuses.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError("--out must be a new or an empty folder", f"{path} is not", "choose another --out")
    parent = make_folder(path.absolute().parent)
    with disk_errors(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                path.rmdir()
            temporary.rename(path)
            sync_folder(parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path | str, value: Any) -> None:
    """Writes JSON atomically; NaN and infinity are refused, since other readers refuse them."""
    atomic_write(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path | str) -> Any:
    """Reads JSON. Raises UserError naming the file when it is missing or is not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.name} must be there", f"no file {path}", "check the path") from error
    except OSError as error:
        raise UserError(
            f"{path} must be a file that can be read", f"{error.strerror}", "check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must hold JSON", str(error), "restore the file or write it again") from error


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last, where the platform lets a folder be flushed."""
    # a rename is durable only once its folder is flushed
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
