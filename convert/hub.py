"""Uploads converted models to the Hub."""

import argparse
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import enable_progress_bars, validate_repo_id

from messages import ConversionError, print_progress, wrap_errors


def repository_name(text: str) -> str:
    """An argparse type: the name of a repository on the Hub."""
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(
            f"expected a repository name such as me/focal-tiny; got {text!r}. {error}"
        ) from None
    return text


def namespace_name(text: str) -> str:
    """An argparse type: the name of a user or an organization on the Hub."""
    try:
        validate_repo_id(f"{text}/focal-tiny")
    except HFValidationError:
        raise argparse.ArgumentTypeError(f"expected the name of a user or an organization; got {text!r}") from None
    return text


def check_login(namespace: str) -> None:
    """Checks that the user is logged in, and is `namespace` or a member of it. An empty namespace is the user's.

    Raises:
        ConversionError: otherwise, or if the Hub cannot be reached.
    """
    if is_offline_mode():
        raise ConversionError("HF_HUB_OFFLINE=1 forbids uploads. Unset HF_HUB_OFFLINE.")
    if get_token() is None:
        raise ConversionError("An upload needs a login. Run `hf auth login`, or set HF_TOKEN.")
    with wrap_errors("Checking the login"):
        user = HfApi().whoami()
        names = [user["name"], *(organization["name"] for organization in user["orgs"])]
    if namespace and namespace.lower() not in map(str.lower, names):
        raise ConversionError(
            f"You may not upload to {namespace}. The login is that of {names[0]}, who may upload to "
            f"{', '.join(names)}. Choose one of these names, or log in as another user with `hf auth login`."
        )


def push_to_hub(folder: Path, repository: str, private: bool | None, advice: str) -> None:
    """Uploads the files in `folder` in one commit. Unchanged files are not uploaded again.

    Args:
        folder: Folder of a converted model.
        repository: Repository on the Hub. It is created if it does not exist.
        private: Whether a new repository is private. None means the default of the user or organization.
        advice: What the user can do after an error.
    """
    if not HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
    with wrap_errors(f"Uploading {repository}", advice):
        # create_repo adds the user's name if it is left out.
        repository = HfApi().create_repo(repository, private=private, exist_ok=True).repo_id
        commit = HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Convert to transformers")
    print_progress(f"On the Hub: {commit.commit_url}")
