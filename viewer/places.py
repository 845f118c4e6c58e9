"""Where a run or an index lies. Needs no torch: whoever mistypes a path is told at once."""

from pathlib import Path
from typing import NamedTuple

from sae.errors import UserError
from train.run_folder import RUN, RunFolder

MANIFEST, TEXTS = "manifest.json", "texts"


class Place(NamedTuple):
    """What `viewer.open` opens."""

    home: Path
    """The run's folder, or where labels are kept when there is no run."""
    index: Path
    """The folder of its index, which need not be there."""
    folder: RunFolder | None
    """None where there is an index and no run."""


def find_place(path: Path | str) -> Place:
    """A run folder, or an index without a run, or one site of it. Raises UserError for others."""
    path = Path(path)
    if not (path / RUN).is_file():
        # a dictionary's folder with its index, the index, or one site of it
        for index, home in ((path / "index", path), (path, path), (path.parent, path.parent)):
            if (index.parent / RUN).is_file() and index.name == "index":
                path = index.parent
                break
            if (index / TEXTS / MANIFEST).is_file():
                return Place(home, index, None)
        else:
            raise UserError(
                f"a run must hold {RUN}, and an index {TEXTS}/{MANIFEST}",
                f"neither in {path}",
                "give the folder that `jumpscope train` or `jumpscope index` made; what was cut off goes on "
                "with the same command",
            )
    folder = RunFolder.open(path)
    return Place(folder.path, folder.path / "index", folder)
