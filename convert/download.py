"""Downloads released models from PaddleViT's public copies on Google Drive, and computes checksums of checkpoints."""

import argparse
import hashlib
import threading
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from huggingface_hub import constants, is_offline_mode
from transformers.utils.versions import require_version

from checkpoint_files import read_checkpoint
from messages import ConversionError, print_progress, wrap_errors


class UnavailableError(ConversionError):
    """The public copy of this model cannot be downloaded. Those of other models may be available."""


class PublicCopy(NamedTuple):
    """Where PaddleViT published its copy of a released model."""

    drive_id: str
    baidu_share: str
    baidu_password: str

    @property
    def page(self) -> str:
        return f"https://drive.google.com/file/d/{self.drive_id}/view"


# From image_classification/Focal_Transformer/README.md of BR-IDL/PaddleViT.
PUBLIC_COPIES = {
    "focal_tiny_patch4_window7_224": PublicCopy("1HzZJbYH_eIo94h0wLUhqTyJ6AYthNKRh", "1JCr2qIA-SZvTqbTO-m2OwA", "i8c2"),
    "focal_tiny_useconv_patch4_window7_224": PublicCopy(
        "1PS0-gdXHGl95LqH5k5DG62AH6D3i7v0D", "1tVztox4bVJuJEjkD1fLaHQ", "smrk"
    ),
    "focal_small_patch4_window7_224": PublicCopy(
        "1HnVAYsI_hmiomyS4Ax3ccPE7gk4mlTU8", "1b7uugAY9RhrgTkUwYcvvow", "dwd8"
    ),
    "focal_small_useconv_patch4_window7_224": PublicCopy(
        "1vcHjYiGNMayoSTPoM8z39XRH6h89TB9V", "174a2aZzCEt3teLuAnIzMtA", "nr7n"
    ),
    "focal_base_patch4_window7_224": PublicCopy("1bNMegxetWpwZNcmDEC3MHCal6SNXSgWR", "1piBslNhxWR78aQJIdoZjEw", "8akn"),
    "focal_base_useconv_patch4_window7_224": PublicCopy(
        "1-J2gDnKrvZGtasvsAYozrbMXR2LtIJ43", "1GTLfnTlt6I6drPdfSWB1Iw", "5nfi"
    ),
}

# SHA-256 of the public copies, which PaddleViT does not publish. To add one, copy "sha256" from the conversion.json of
# a model whose accuracy you measured:  "focal_tiny_patch4_window7_224": "0123…",
KNOWN_SHA256: dict[str, str] = {}

GDOWN = "gdown>=6.5"  # has `timeout`
TIMEOUT = 60  # seconds without an answer
FILE_TIMEOUT = 120  # seconds until the file begins: gdown follows the links on web pages without a limit


def short_name(name: str) -> str:
    """Returns the name of a released model without its sizes, such as focal-tiny-useconv."""
    return name.removesuffix("_patch4_window7_224").replace("_", "-")


def add_cache_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="folder for downloaded checkpoints (default: focal_hf in Hugging Face's folder for assets)",
    )


def cached_checkpoint(name: str, cache_dir: Path | None) -> Path:
    """Returns the path of the public copy of the released model `name` in `cache_dir`, or in Hugging Face's cache.

    Raises:
        ConversionError: if no public copy is known.
    """
    if name.startswith("focalv2_"):
        raise ConversionError(f"No public copy of {name} is known. {_other_sources(name)}")
    if name not in PUBLIC_COPIES:
        raise ConversionError(
            f"{name} cannot be downloaded; expected one of {', '.join(PUBLIC_COPIES)}. Or give a file to "
            "convert_focal_to_hf.py with --checkpoint."
        )
    # The folder of cached_assets_path, which would create it.
    folder = cache_dir or Path(constants.HF_ASSETS_CACHE).expanduser() / "focal_hf" / "PaddleViT" / "Focal_Transformer"
    return folder / f"{name}.pdparams"


def download_checkpoint(name: str, path: Path, expected_sha256: str | None) -> None:
    """Downloads the public copy of the released model `name` to `path`, unless it is there.

    The file is first written to the folder `unchecked` beside `path`, and moved when it is complete and a checkpoint.
    If the connection fails, the received part stays there, and the next call resumes the download.

    Raises:
        ConversionError: if the file cannot be downloaded, or is not a checkpoint with the hash `expected_sha256`.
    """
    if path.is_file():
        print_progress(f"Found {path}")
        with wrap_errors("Checking the downloaded file", f"To download it again, delete {path}."):
            check_sha256(path, expected_sha256)
            read_checkpoint(path)
        return
    if is_offline_mode():
        raise ConversionError(
            f"{path} does not exist, and HF_HUB_OFFLINE=1 forbids downloads. Unset HF_HUB_OFFLINE, or give a file with "
            "--checkpoint."
        )
    try:
        require_version(GDOWN)
    except ImportError as error:
        raise ConversionError(
            f"To download a model, install gdown: pip install '{GDOWN}' ({error}). Or give a file with --checkpoint."
        ) from None
    unchecked = path.parent / "unchecked" / path.name
    with wrap_errors(f"Creating {unchecked.parent}", "Choose another --cache-dir."):
        unchecked.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(unchecked.with_suffix(".lock")):
        if path.is_file():  # another process downloaded it
            return
        _download(name, unchecked)
        try:
            check_sha256(unchecked, expected_sha256)
            read_checkpoint(unchecked)
        except ConversionError as error:
            unchecked.unlink()
            raise UnavailableError(f"{error} The file was deleted. {_other_sources(name)}") from None
        unchecked.replace(path)


def _download(name: str, path: Path) -> None:
    import gdown
    from requests import RequestException

    copy = PUBLIC_COPIES[name]
    print_progress(f"Downloading {copy.page}")
    no_file = threading.Event()
    timer = threading.Timer(FILE_TIMEOUT, no_file.set)
    timer.start()
    try:
        gdown.download(
            id=copy.drive_id,
            output=str(path),
            resume=True,
            use_cookies=False,  # they would be written to the user's home
            timeout=TIMEOUT,
            progress=lambda *_: timer.cancel(),
            cancel=no_file,
        )
    except gdown.FileURLRetrievalError:
        raise UnavailableError(
            f"Google Drive sent a web page instead of {path.name}: the file was removed, requires a sign-in, or was "
            f"downloaded too often in the last 24 hours. {_other_sources(name)}"
        ) from None
    except Exception as error:
        parts = list(path.parent.glob(f"{path.name}*.part"))
        received = sum(part.stat().st_size for part in parts)
        disk_failed = isinstance(error, OSError) and not isinstance(error, RequestException)
        if disk_failed or not received:
            for part in parts:
                part.unlink()
        if disk_failed:
            raise ConversionError(
                f"Writing to {path.parent} failed: {error}. Free some space, or choose another --cache-dir."
            ) from None
        reason = str(error).partition("\n")[0].rstrip(".")
        if isinstance(error, gdown.DownloadCancelled):
            reason = f"the file did not begin within {FILE_TIMEOUT} seconds"
        advice = (
            f"The received {received:,} bytes are kept. To resume, run the command again. To start again, delete "
            f"{path.parent}."
            if received
            else "Check the network, and run the command again."
        )
        raise ConversionError(f"Downloading {copy.page} failed: {reason}. {advice} {_other_sources(name)}") from None
    finally:
        timer.cancel()


def _other_sources(name: str) -> str:
    """Returns advice on where else to get a released model."""
    private = f"a private copy of the authors' {short_name(name)}-is224-ws7.pth"
    if name not in PUBLIC_COPIES:
        return f"If you have {private}, give it to convert_focal_to_hf.py with --checkpoint."
    copy = PUBLIC_COPIES[name]
    return (
        f"Other sources: {copy.page} in a browser, https://pan.baidu.com/s/{copy.baidu_share} (password "
        f"{copy.baidu_password}), or {private}. Give the file to convert_focal_to_hf.py with --checkpoint."
    )


def check_sha256(path: Path, expected: str | None) -> str:
    """Returns the SHA-256 of a file.

    Raises:
        ConversionError: if it differs from `expected`.
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if expected is not None and sha256 != expected:
        raise ConversionError(f"{path} has the SHA-256 {sha256}; expected {expected}.")
    return sha256
