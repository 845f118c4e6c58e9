"""Dictionaries at the hub: what a repository holds, and one folder of it in the local cache."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from sae.dialects.archives import check_name
from sae.dialects.ids import Id, choose_folder, nearest_repository
from sae.errors import UserError

_WEIGHTS = (".npz", ".safetensors", ".pt")
_BESIDE = (*_WEIGHTS, ".json")
_LARGE = "sparsity.safetensors"
"""Lies beside SAELens's weights, and no dialect needs it."""


def list_files(repo: str) -> list[str] | None:
    """Every file of a repository; None when the hub does not answer.

    Raises UserError when it answers that the repository cannot be had, and for names that lead out of it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        names = HfApi().list_repo_files(repo)
    except GatedRepoError as error:
        do = "accept its licence on its page at the hub, then log in with `hf auth login` or set HF_TOKEN"
        raise UserError(f"you must have access to {repo}", "the hub keeps it behind a licence", do) from error
    except RepositoryNotFoundError as error:
        do = f"{nearest_repository(repo)}Check the spelling; for a private repository set HF_TOKEN"
        raise UserError("the hub must have the repository", f"no repository {repo}", do) from error
    except HFValidationError as error:
        raise UserError("a hub id must be written ORG/REPO", repr(repo), "check the spelling") from error
    except Exception:  # whatever a missing network looks like: the local copy decides
        return None
    for name in names:
        check_name(name, repo)
    return names


def dictionary_folders(names: Iterable[str]) -> list[str]:
    """The folders that hold weights, sorted."""
    folders = {
        str(PurePosixPath(name).parent)
        for name in names
        if name.endswith(_WEIGHTS) and PurePosixPath(name).name != _LARGE
    }
    return sorted("" if folder == "." else folder for folder in folders)


def list_folders(repo: str) -> list[str]:
    """The dictionaries of a repository. Raises UserError when the hub does not answer, or it has none."""
    names = list_files(repo)
    if names is None:
        do = "connect to the network; a dictionary that was downloaded opens without it"
        raise UserError(f"{repo} must be a local path, or the hub must answer", "neither", do)
    if not (folders := dictionary_folders(names)):
        must = f"{repo} must hold dictionaries"
        raise UserError(must, f"no weights among its {len(names)} files", "check the repository")
    return folders


def fetch(asked: Id) -> tuple[Path, str]:
    """One dictionary's folder in the hub's cache, and its full id.

    Raises UserError when it is not there, or there is neither a network nor a local copy.
    """
    names = list_files(asked.repo)
    if names is None:
        return _cached(asked)
    folder = choose_folder(asked, dictionary_folders(names))
    above = str(PurePosixPath(folder).parent / "config.json") if folder else ""
    wanted = [
        name
        for name in names
        if name == above
        or (_parent(name) == folder and name.endswith(_BESIDE) and not name.endswith(f"/{_LARGE}"))
    ]
    paths = {name: Path(_download(asked.repo, name)) for name in wanted}
    found = next(path for name, path in paths.items() if _parent(name) == folder)
    return found.parent, str(Id(asked.repo, folder))


def _download(repo: str, name: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repo, name)
    except Exception as error:  # the network, the disk, or an answer that is no file
        do = "try again; what has arrived is kept"
        raise UserError(
            f"{name} of {repo} must be downloaded whole", f"{type(error).__name__}: {error}", do
        ) from error


def _cached(asked: Id) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    try:
        root = Path(snapshot_download(asked.repo, local_files_only=True))
        names = [str(path.relative_to(root).as_posix()) for path in root.rglob("*") if path.is_file()]
    except Exception as error:  # no such repository in the cache, or no cache
        must = f"{asked.repo} must be reachable at the hub or downloaded before"
        do = "connect to the network, or give a local folder"
        raise UserError(must, "no answer from the hub and no local copy", do) from error
    folder = choose_folder(asked, dictionary_folders(names))
    return root / folder, str(Id(asked.repo, folder))


def _parent(name: str) -> str:
    parent = str(PurePosixPath(name).parent)
    return "" if parent == "." else parent
