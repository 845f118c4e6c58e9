"""Machine code on disk is of the loops as they are now, those of other files too."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sae
import viewer

ASK = """
import numpy as np
from viewer.index.loops import multiply_at
out = np.zeros((1, 1), np.float32)
multiply_at(np.ones((1, 3), np.float32), np.full((1, 3), 0x3F80, np.uint16), np.zeros((1, 1), np.int64), out)
print(out[0, 0], sum(multiply_at.stats.cache_hits.values()))
"""


@pytest.fixture
def copy(tmp_path):
    """The rooms that the loops are in, where they can be changed."""
    for room in (sae, viewer):
        source = Path(room.__path__[0])
        shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def ask(folder):
    """What a loop of the viewer's makes of three ones in bfloat16, and how often a copy served it."""
    command = [sys.executable, "-c", ASK]
    env = {"PYTHONPATH": str(folder), "PATH": "", "NUMBA_CACHE_DIR": str(folder / "copies")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    total, hits = done.stdout.split()
    return float(total), int(hits)


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_changed_loop_is_seen_by_the_loops_of_other_files_that_call_it(copy):
    assert ask(copy) == (3.0, 0)
    assert ask(copy) == (3.0, 1)
    loops = copy / "sae" / "kernels" / "cpu_loops.py"
    # what `widened` does to bfloat16
    change(loops, "types.uint32(value) << types.uint32(16)", "types.uint32(value + 128) << types.uint32(16)")
    assert ask(copy) == (6.0, 0)
    # what loops are made of, though there is none of them in that file
    change(copy / "sae" / "kernels" / "lanes.py", "_SUMS = 4", "_SUMS = 2")
    assert ask(copy) == (6.0, 0)
    # a file without loops leaves the copies as they are
    change(copy / "viewer" / "index" / "words.py", '"""Tokens', '""" Tokens')
    assert ask(copy) == (6.0, 1)


def test_copies_that_name_what_is_no_longer_there_are_made_anew(copy):
    """As after an update in place: the index of copies is read before it is known to be of another."""
    assert ask(copy) == (3.0, 0)
    (index,) = (copy / "copies").rglob("loops.multiply_at*.nbi")
    with index.open("rb") as file:
        version = pickle.load(file)
    # of a class that this module has not
    gone = b"cviewer.index.loops\nGone\n."
    index.write_bytes(pickle.dumps(version) + gone)
    assert ask(copy) == (3.0, 0)
    assert ask(copy) == (3.0, 1)
