"""Names of published dictionaries as people write them: ORG/REPO/FOLDER, and SAELens's RELEASE:ID."""

import dataclasses
import difflib
import re
from collections.abc import Collection

from sae.dialects.archives import check_name
from sae.errors import UserError

_FIRST = re.compile(r"gemma-scope-(?P<size>2b|9b|27b)-(?P<tuned>pt|it)-(?P<kind>res|mlp|att|transcoders)")
_SECOND = re.compile(r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-(res|mlp|att|transcoders)(-all)?")
_FOLDERS = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out", "transcoders": "transcoder"}
_URL = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)(?:/(?:tree|blob)/main)?")
"""What the address of a repository's page has beside the id."""
_AVERAGE = re.compile(r"average_l0_(\d+)")
_CANONICAL_L0 = 100
"""SAELens's canonical dictionary of a folder is the one whose L0 is nearest to this."""

_PUBLISHED = (
    re.compile(r"(?P<group>)layer_(?P<layer>\d+)/width_(?P<width>\w+?)/average_l0_(?P<l0>\d+)"),
    re.compile(r"(?P<group>\w+)/layer_(?P<layer>\d+)_width_(?P<width>[^_]+)_l0_(?P<l0>\w+)"),
)

REPOSITORIES = (
    *(f"google/gemma-scope-{size}-pt-{kind}" for size in ("2b", "9b") for kind in ("res", "mlp", "att")),
    "google/gemma-scope-2b-pt-transcoders",
    "google/gemma-scope-9b-it-res",
    "google/gemma-scope-27b-pt-res",
    *(f"google/gemma-scope-2-{s}-{t}" for s in ("270m", "1b", "4b", "12b", "27b") for t in ("pt", "it")),
)
"""Gemma Scope's repositories, for hints."""


@dataclasses.dataclass(frozen=True)
class Id:
    """A folder of a repository of the hub; an empty folder means the repository as a whole."""

    repo: str
    folder: str

    def __str__(self) -> str:
        return f"{self.repo}/{self.folder}".rstrip("/")


def parse_id(text: str) -> Id:
    """Reads an id. Raises UserError with the nearest known one when it is of no known form."""
    if text.startswith(("/", ".", "~")):
        # the hub must not be asked for a path that was mistyped
        raise UserError("the path must be there", f"no file or folder {text}", "check the path")
    text = _URL.sub(r"\1", text)
    release, colon, inner = text.partition(":")
    if colon and "/" not in release:
        found = _release(release, inner.strip("/"))
    else:
        words = [word for word in text.strip("/").split("/") if word]
        if len(words) < 2 or colon:
            near = difflib.get_close_matches(f"google/{text}", REPOSITORIES, n=1, cutoff=0.4)
            raise UserError(
                "a dictionary must be a folder, ORG/REPO/FOLDER of the hub, or RELEASE:ID of SAELens",
                repr(text),
                f"{f'Did you mean {near[0]}? ' if near else ''}Check the path or the id",
            )
        if f"google/{words[0]}" in REPOSITORIES:
            do = f"Did you mean google/{'/'.join(words)}?"
            raise UserError("the id must begin with the organisation, ORG/REPO/FOLDER", repr(text), do)
        found = Id("/".join(words[:2]), "/".join(words[2:]))
    check_name(found.folder, "the id")
    check_name(found.repo, "the id")
    return found


def choose_folder(asked: Id, folders: Collection[str]) -> str:
    """The folder of the repository that an id means. Raises UserError with the nearest when there is none.

    `folders` are those that hold weights. `canonical` in place of `average_l0_N` is the one nearest to 100.
    """
    if asked.folder in folders:
        return asked.folder
    parent, _, last = asked.folder.rpartition("/")
    if last == "canonical":
        l0s = {folder: _AVERAGE.fullmatch(folder.removeprefix(f"{parent}/")) for folder in folders}
        known = {folder: int(match[1]) for folder, match in l0s.items() if match}
        if known:
            # of two that are as near, SAELens has the larger
            return min(known, key=lambda folder: (abs(known[folder] - _CANONICAL_L0), -known[folder]))
    # of a folder that is above dictionaries, those within it
    within = sorted(folder for folder in folders if folder.startswith(f"{asked.folder}/"))
    near = within[:3] or difflib.get_close_matches(asked.folder, folders, n=3, cutoff=0.4)
    near = near or sorted(folders)[:3]
    raise UserError(
        f"{asked.repo} must have the folder that is named",
        f"no dictionary {asked.folder!r} among its {len(folders)}",
        f"did you mean {' or '.join(near)}? `jumpscope info {asked.repo}` lists all",
    )


@dataclasses.dataclass(frozen=True)
class Published:
    """What the folder of a Gemma Scope dictionary says of it."""

    group: str
    """The kind of site, in Gemma Scope 2; empty in the first."""
    layer: int
    width: str
    l0: str


def parse_folder(folder: str) -> Published | None:
    """Reads a folder of either Gemma Scope; None for others."""
    match = next((match for match in (form.fullmatch(folder) for form in _PUBLISHED) if match), None)
    return match and Published(match["group"], int(match["layer"]), match["width"], match["l0"])


def nearest_repository(repo: str) -> str:
    """A hint for a repository that is not there: the nearest of Gemma Scope's, or nothing."""
    near = difflib.get_close_matches(repo, REPOSITORIES, n=1, cutoff=0.75)
    return f"did you mean {near[0]}? " if near and near[0] != repo else ""


def _release(release: str, inner: str) -> Id:
    if match := _SECOND.fullmatch(release):
        folder = _FOLDERS[match[2]] + ("_all" if match[3] else "")
        # some of SAELens's ids have the folder in front and some have not
        return Id(
            f"google/{match[1]}", inner if inner.startswith(f"{folder}/") else f"{folder}/{inner}".strip("/")
        )
    plain = release.removesuffix("-canonical")
    if _FIRST.fullmatch(plain):
        return Id(f"google/{plain}", inner)
    names = [repo.removeprefix("google/") for repo in REPOSITORIES]
    near = difflib.get_close_matches(release, names, n=1, cutoff=0.4)
    raise UserError(
        "the release must be one of Gemma Scope's: of others the repository is not known here",
        repr(release),
        f"{f'Did you mean {near[0]}? ' if near else ''}Write ORG/REPO/FOLDER instead",
    )
