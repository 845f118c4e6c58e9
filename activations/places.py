"""A folder on this machine or behind any URL that fsspec knows: listed, read in ranges, written whole."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from sae.errors import UserError
from sae.files import atomic_write, make_folder

T = TypeVar("T")
ReadAt = Callable[[int, memoryview], int]
"""Fills a buffer with a file's bytes from an offset on; returns how many there were."""
Append = Callable[[bytes | memoryview], object]

# a single put there shows the old object or the whole new one; elsewhere a file is put beside and moved
_WHOLE_PUTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}
_FETCH_BYTES = 32 * 2**20


class Place:
    """A folder by path or URL (``stores/all``, ``s3://bucket/all``, ``memory://all``).

    `folder` is its path when it is local, else None. Raises UserError when the URL's kind is unknown or its
    driver is not installed; what goes wrong behind a URL later is a UserError too, apart from a file that
    is not there (FileNotFoundError).
    """

    def __init__(self, url: Path | str) -> None:
        self.url = str(url).rstrip("/") or "/"
        try:
            found = url_to_fs(self.url)
        except ImportError as error:
            driver = str(error).partition("stall ")[2].split(" ")[0] or "the package that it names"
            raise UserError(
                f"{self.url} needs a driver of fsspec", str(error), f"run: pip install {driver}"
            ) from error
        except ValueError as error:
            raise UserError(
                "the folder must be a path or a URL that fsspec knows", str(error), "check the URL"
            ) from error
        self._fs, self._path = cast(Any, found[0]), str(found[1])
        self.folder = Path(self._path) if isinstance(self._fs, LocalFileSystem) else None

    def __str__(self) -> str:
        return self.url

    def of(self, name: str) -> str:
        """The path or URL of a file in the folder, for messages."""
        return f"{self.url}/{name}"

    def make(self) -> None:
        """Creates the folder; where folders are only names there is nothing to do."""
        if self.folder is not None:
            make_folder(self.folder)
        else:
            with self._reached():
                self._fs.makedirs(self._path, exist_ok=True)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file in the folder, by name; empty when there is no folder."""
        if self.folder is not None:
            if not self.folder.is_dir():
                return {}
            sizes = {}
            for path in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # a writer's temporary file comes and goes
                    sizes[path.name] = path.stat().st_size
            return sizes
        with self._reached():
            self._fs.invalidate_cache(self._path)
            try:
                entries = self._fs.ls(self._path, detail=True)
            except FileNotFoundError:
                return {}
        # an object store may list the folder itself, as an empty object
        names = {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] or 0 for entry in entries}
        return {name: size for name, size in names.items() if not self._path.endswith(f"/{name}")}

    def read(self, name: str) -> bytes:
        """The whole of a small file."""
        if self.folder is not None:
            return (self.folder / name).read_bytes()
        with self._reached():
            return self._fs.cat_file(self._file(name))

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[ReadAt]:
        """Within it a file can be read in ranges, straight into buffers, never past its end.

        Not mapped: a mapped file that is cut short under a running job kills it with SIGBUS.
        """
        if self.folder is None:
            yield lambda offset, view: self._fetch(name, offset, view)
            return
        with (self.folder / name).open("rb", buffering=0) as file:

            def read_at(offset: int, view: memoryview) -> int:
                file.seek(offset)
                done = 0
                while done < len(view) and (count := file.readinto(view[done:])):
                    done += count
                return done

            yield read_at

    def write(self, name: str, write: Callable[[Append], T]) -> T:
        """Writes a new file by handing `write` what appends to it, and returns what that returns.

        A local one is whole or absent. Behind a URL a failure may leave a part, so nobody may read such a
        file before another one, written later, names it.
        """
        if self.folder is None:
            with self._reached(), self._fs.open(self._file(name), "wb") as file:
                return write(file.write)
        result: list[T] = []

        def fill(path: Path) -> None:
            with path.open("wb") as file:
                result.append(write(file.write))

        atomic_write(self.folder / name, fill)
        return result[0]

    def replace(self, name: str, content: bytes) -> None:
        """Puts a small file in place of an older one: a reader sees the one or the other."""
        if self.folder is not None:
            atomic_write(self.folder / name, content)
            return
        protocols = (self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol
        with self._reached():
            if _WHOLE_PUTS.intersection(protocols):
                self._fs.pipe_file(self._file(name), content)
            else:
                beside = self._file(f".{name}.tmp")
                self._fs.pipe_file(beside, content)
                self._fs.mv(beside, self._file(name))

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        if self.folder is not None:
            (self.folder / name).unlink(missing_ok=True)
            return
        with self._reached(), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._file(name))

    def _file(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _fetch(self, name: str, offset: int, view: memoryview) -> int:
        done = 0
        while done < len(view):
            end = min(len(view), done + _FETCH_BYTES)
            with self._reached():
                content = self._fs.cat_file(self._file(name), start=offset + done, end=offset + end)
            view[done : done + len(content)] = content
            done += len(content)
            if done < end:
                break
        return done

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # each driver has its own types
            raise UserError(
                f"{self.url} must be within reach",
                f"{type(error).__name__}: {error}",
                "check the URL, the network and your rights there",
            ) from error
