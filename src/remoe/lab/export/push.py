"""Upload of an exported folder to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from remoe.errors import ConfigError, HubError, check


def check_repository(name: str) -> None:
    """Raises ConfigError unless this can be the name of a repository, with its owner."""
    check(name.count("/") == 1, f"--push needs OWNER/NAME, but is {name!r}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push {name!r}: {_line(error)}") from None


def push_folder(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Uploads all files of a folder to a model repository, which is created if it does not exist.

    The token is the one of `hf auth login` or HF_TOKEN, and the Hub that of HF_ENDPOINT, as for all of huggingface_hub.

    Args:
        folder: the exported folder.
        repository: OWNER/NAME.
        private: whether only its owner sees the repository.

    Returns:
        The repository's address.

    Raises:
        ConfigError: when this is no name of a repository.
        HubError: when there is no token, the Hub cannot be reached or refuses, or the repository is there already and
            public although it shall be private.
    """
    check_repository(repository)
    api = HfApi(token=True)  # without a token nothing is sent
    address = f"{api.endpoint}/{repository}"
    try:
        address = str(api.create_repo(repository, private=True if private else None, exist_ok=True))
        if private and not api.repo_info(repository).private:  # one that exists keeps its visibility
            raise HubError(f"{address} exists and is public: make it private there, or push without --private")
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Upload a model exported by remoe")
    except LocalTokenNotFoundError:
        raise HubError("no token of the Hugging Face Hub: log in by `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set, so that nothing is sent to the Hugging Face Hub") from None
    except HfHubHTTPError as error:
        said = f"{error.response.status_code}, {_line(error.server_message or error)}"
        raise HubError(f"the Hugging Face Hub refused {repository}: {said}") from None
    except ValueError as error:  # the Hub's opinion of the model card
        raise HubError(f"the Hugging Face Hub refused {repository}: {_line(error)}") from None
    except HTTPError as error:
        raise HubError(f"the Hugging Face Hub at {api.endpoint} cannot be reached: {_line(error)}") from None
    except (OSError, RuntimeError) as error:  # of hf_xet, which transfers large files
        raise HubError(f"the upload to {address} failed: {_line(error)}") from None
    return address


def _line(said: object) -> str:
    return " ".join(str(said).split())
