"""Models of the hub: downloaded once into its own cache, weights as safetensors only."""

from pathlib import Path

from sae.errors import UserError

_TIMEOUT = 10.0
"""Seconds to wait for the hub before taking the network for absent."""

_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]
"""Other formats' folders, and second copies of the weights."""


def snapshot_folder(hub_id: str, *, progress: bool = True) -> Path:
    """A model of the hub as a local folder; what was downloaded before is found without a network.

    Raises UserError, after seconds at most, when there is neither a network nor a local copy, when the hub
    does not have the model or keeps it behind a licence, and when its weights are pickles.
    """
    online = _check_online(hub_id)
    return _download(hub_id, _WANTED, online=online, progress=progress)


def config_folder(hub_id: str) -> Path:
    """A folder with config.json alone, for questions about shapes."""
    online = _check_online(hub_id)
    return _download(hub_id, ["config.json"], online=online, progress=False)


def _check_online(hub_id: str) -> bool:
    """Whether the hub can be asked; raises UserError when it answers that the model cannot be had."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(hub_id, timeout=_TIMEOUT)
    except GatedRepoError as error:
        do = "accept its licence on its page at the hub, then log in with `hf auth login` or set HF_TOKEN"
        raise UserError(
            f"you must have access to {hub_id}", "the hub keeps it behind a licence", do
        ) from error
    except RepositoryNotFoundError as error:
        do = "check the spelling; for a private model set HF_TOKEN"
        raise UserError("the hub must have the model", f"no model {hub_id}", do) from error
    except HFValidationError as error:
        raise UserError("a hub id must be written org/name", repr(hub_id), "check the spelling") from error
    except Exception:  # whatever a missing network looks like: the local copy decides
        return False
    names = [file.rfilename for file in info.siblings or []]
    if names and not any(name.endswith(".safetensors") for name in names):
        must = "a model's weights must be .safetensors: pickles can run code"
        raise UserError(must, f"{hub_id} has none", "choose another repository, or convert it yourself")
    return True


def _download(hub_id: str, patterns: list[str], *, online: bool, progress: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if not progress:
        disable_progress_bars()
    try:
        return Path(
            snapshot_download(
                hub_id, allow_patterns=patterns, ignore_patterns=_UNWANTED, local_files_only=not online
            )
        )
    except Exception as error:
        if online:
            do = "try again; what has arrived is kept"
            raise UserError(
                f"{hub_id} must be downloaded whole", f"{type(error).__name__}: {error}", do
            ) from error
        must = f"{hub_id} must be reachable at the hub or downloaded before"
        do = "connect to the network, or choose a model that `jumpscope models` shows as available"
        raise UserError(must, "no answer from the hub and no local copy", do) from error
    finally:
        if shown:
            enable_progress_bars()
