"""Convert released models and upload them to the Hub.

Each model is uploaded in one commit, to a repository of its own, with its code, its image processor and a model card.
"""

import argparse
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

import convert_focal_to_hf
from download import PUBLIC_COPIES, UnavailableError, add_cache_dir, cached_checkpoint, short_name
from focal_hf import FocalForImageClassification, modeling_focal
from hub import check_login, namespace_name, push_to_hub
from messages import print_progress, printable_line
from original import RELEASED, build_on_meta, config_from_settings
from output_files import MODEL_FILES, run_script, staging_folder

EPILOG = f"""\
Log in first: hf auth login. Each model is downloaded, unless it is in the cache, and converted to a temporary folder
(TMPDIR chooses the disk), as convert_focal_to_hf.py --with-code does. If a model cannot be downloaded, the others are
still published. A second run uploads only changed files.

examples:
  list what would be published, without a network:
    python convert/publish.py --namespace me --dry-run

  publish one model as me/focal-tiny:
    python convert/publish.py --namespace me focal_tiny_patch4_window7_224

names:
  {(chr(10) + "  ").join(PUBLIC_COPIES)}
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", default=list(PUBLIC_COPIES), help="models to publish (default: all)"
    )
    parser.add_argument(
        "--namespace",
        required=True,
        type=namespace_name,
        metavar="ME",
        help="user or organization on the Hub that gets the repositories, such as ME/focal-tiny",
    )
    add_cache_dir(parser)
    parser.add_argument(
        "--private",
        action="store_true",
        default=None,
        help="make new repositories private (default: as set for the user or organization)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only list the repositories and their files")
    return parser.parse_args(arguments)


def print_plan(name: str, repository: str, checkpoint: Path, private: bool | None) -> None:
    """Prints what publishing a model would do. Uses no network and writes nothing."""
    model = build_on_meta(config_from_settings(RELEASED[name]), FocalForImageClassification)
    modules = {modeling_focal.__file__, *get_relative_import_files(modeling_focal.__file__)}
    source, size = f"{PUBLIC_COPIES[name].page}, to be downloaded", f"{4 * model.num_parameters() / 1e6:.0f} MB"
    if checkpoint.is_file():
        source = f"{checkpoint}, {checkpoint.stat().st_size:,} bytes"
    print(f"{repository}{', private if it is new' if private else ''}")
    print(f"  checkpoint: {source}")
    print(f"  model: {', '.join(MODEL_FILES).replace('.safetensors', f'.safetensors ({size})')}")
    code = ", ".join(sorted(Path(module).name for module in modules))
    print(textwrap.fill(code, 100, initial_indent="  code: ", subsequent_indent="    "))


def publish(name: str, repository: str, cache_dir: Path | None, private: bool | None) -> None:
    with staging_folder(Path(tempfile.gettempdir(), short_name(name))) as staging:
        folder = staging / short_name(name)
        arguments = ["--config", name, "--output", str(folder), "--push-to-hub", repository, "--with-code"]
        if cache_dir is not None:
            arguments += ["--cache-dir", str(cache_dir)]
        convert_focal_to_hf.convert(convert_focal_to_hf.parse_arguments(arguments))
        push_to_hub(folder, repository, private, "To try again, run the command again.")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    names = list(dict.fromkeys(options.names))
    checkpoints = [cached_checkpoint(name, options.cache_dir) for name in names]
    repositories = [f"{options.namespace}/{short_name(name)}" for name in names]
    if options.dry_run:
        for name, repository, checkpoint in zip(names, repositories, checkpoints, strict=True):
            print_plan(name, repository, checkpoint, options.private)
        return
    check_login(options.namespace)
    all_published = True
    for number, (name, repository) in enumerate(zip(names, repositories, strict=True), 1):
        print_progress(f"Publishing {repository} ({number} of {len(names)})")
        try:
            publish(name, repository, options.cache_dir, options.private)
        except UnavailableError as error:
            print(f"error: {repository} was not published. {printable_line(str(error))}", file=sys.stderr, flush=True)
            all_published = False
    if not all_published:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
