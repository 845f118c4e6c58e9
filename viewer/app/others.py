"""What a run is compared with: another run of the viewer, or a dictionary of the hub.

What a visitor types is never taken for a path, nothing is fetched for an address alone, which a link on any
page of the web could hold, and nothing at all when the viewer can be reached from other machines. What was
fetched, and what was compared, is kept by the server for all sessions.
"""

import dataclasses
import os

import streamlit as st

import sae
from sae.dialects.ids import parse_id
from sae.dialects.saelens import WEIGHTS
from sae.errors import UserError
from viewer.app.launch import reach
from viewer.compare import Comparison
from viewer.index.storage import MANIFEST
from viewer.once import Kept
from viewer.runs import Run

_COMPARED: Kept[Comparison] = Kept()
_FETCHED: dict[str, sae.Dictionary] = {}


@dataclasses.dataclass(frozen=True)
class Other:
    """What a run is compared with: another run of this viewer, or a dictionary of the hub."""

    name: str
    run: Run | None
    dictionary: sae.Dictionary | None

    def parameters(self) -> dict[str, str]:
        """How the address names it."""
        return {"with": self.name} if self.run else {"hub": self.name}


def may_fetch() -> bool:
    """Whether who is asking is at this machine."""
    forwarded = any(name.lower() in ("x-forwarded-for", "forwarded") for name in st.context.headers)
    return reach(st.get_option("server.address") or "0.0.0.0") == "this machine" and not forwarded


def fetched(name: str) -> sae.Dictionary | None:
    """The dictionary of an id that was fetched since the server started."""
    return _FETCHED.get(name)


def fetch(text: str) -> str:
    """Fetches a dictionary, or opens the copy in the hub's cache; returns the id that it is known by.

    Raises UserError when the viewer is not this machine's alone, for a path, and as `sae.load` does.
    """
    if not may_fetch():
        raise UserError(
            "dictionaries are fetched for people at the viewer's own machine",
            "a viewer that other machines can reach",
            "name the dictionary's folder on the command line, with an index beside it",
        )
    name = str(parse_id(text.strip()))
    # sae.load takes a path before an id
    if os.path.exists(name):
        do = "name it on the command line: `jumpscope index` makes what `jumpscope view` opens"
        raise UserError("an id of the hub must be given", "a path", do)
    if name not in _FETCHED:
        _FETCHED[name] = sae.load(name)
    return name


def compared(run: Run, other: Other, site: str, cosine: float, *, names: tuple[str, str]) -> Comparison:
    """As `Run.compare` says, kept until one of the two is written anew. `names` tell the two apart here."""
    stamps = (_stamp(run, site), _stamp(other.run, site) if other.run else ())
    return _at(run, other, *names, site, cosine, stamps)


@st.cache_resource(max_entries=64, show_spinner=False)
def _at(
    _run: Run, _other: Other, ours: str, theirs: str, site: str, cosine: float, stamps: tuple
) -> Comparison:
    """Another cosine is another view of the same comparison."""
    against = _other.run or _other.dictionary
    assert against is not None
    found = _COMPARED.get((ours, theirs, site), stamps, lambda: _run.compare(against, site=site))
    return dataclasses.replace(found.at(cosine), names=(ours, theirs))


def _stamp(run: Run, site: str) -> tuple[int, ...]:
    files = (run.path / "sites" / site / WEIGHTS, run.path / WEIGHTS, run.index.root / site / MANIFEST)
    return tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files)
