"""Measures extract_features.py and evaluate.py on a stream of tar files: images per second, and memory over the run.

Draws JPEG images into WebDataset files, builds a small Focal, and runs both scripts with --streaming. The rate excludes
the start of the scripts. Memory is that of a script and its workers, without pages that they share (USS), at four times
of the run. The last line estimates from the rate how long 100 million images take on machines like this one.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from transformers import BitImageProcessorPil

from focal_hf import FocalConfig, FocalForImageClassification

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CLASSES = 10
SMALL = {"image_size": 64, "embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}


def write_shards(folder: Path, shards: int, images: int, side: int) -> None:
    """Writes FOLDER/test-NUMBER.tar, each with `images` JPEG images and the number of the class of each."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"test-{shard:05}.tar", "w") as tar:
            for number in range(images):
                coarse = Image.fromarray(draw.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
                jpeg = io.BytesIO()
                coarse.resize((side, side), Image.Resampling.BICUBIC).save(jpeg, "JPEG")
                for suffix, content in (("jpg", jpeg.getvalue()), ("cls", str(draw.integers(CLASSES)).encode())):
                    member = tarfile.TarInfo(f"{shard:05}-{number:05}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    labels = {number: str(number) for number in range(CLASSES)}
    model = FocalForImageClassification(FocalConfig(**SMALL, id2label=labels))
    model.save_pretrained(folder)
    side = SMALL["image_size"]
    size, crop_size = {"shortest_edge": side}, {"height": side, "width": side}
    BitImageProcessorPil(size=size, crop_size=crop_size).save_pretrained(folder)


def run(folder: Path, script: str, *options: object) -> list[float]:
    """Runs examples/SCRIPT in `folder`. Returns its memory in MiB, every half second."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, options)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    script_run = psutil.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    samples = []
    while script_run.poll() is None:
        memory = 0
        for process in (script_run, *script_run.children(recursive=True)):
            try:
                memory += process.memory_full_info().uss
            except psutil.Error:  # it has just ended
                continue
        samples.append(memory / 2**20)
        time.sleep(0.5)
    if script_run.returncode:
        sys.exit(f"error: {script} ended with status {script_run.returncode}")
    return samples


def row(script: str, images_per_s: float, samples: list[float]) -> str:
    quantities = [f"{samples[len(samples) * tenth // 10]:,.0f}" for tenth in (3, 5, 7, 9)]
    return f"| `{script}` | {images_per_s:,.0f} | {' | '.join(quantities)} | {max(samples):,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=200, metavar="N", help="tar files (default: 200)")
    parser.add_argument("--images", type=int, default=100, metavar="N", help="images in each of them (default: 100)")
    parser.add_argument("--side", type=int, default=64, metavar="PIXELS", help="side of an image (default: 64)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read images (default: 1)")
    arguments = parser.parse_args()
    if arguments.shards < 2:
        parser.error("--shards must be at least 2, since the rate is that from the first file of features to the last.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shards(folder / "tars", arguments.shards, arguments.images, arguments.side)
        write_model(folder / "model")
        options = [
            "--model",
            "model",
            "--data",
            "tars",
            "--streaming",
            "--image-column",
            "jpg",
            "--label-column",
            "cls",
        ]
        options += ["--batch-size", arguments.batch_size, "--workers", arguments.workers]

        samples = run(folder, "extract_features.py", *options, "--output", "features")
        written = sorted(file.stat().st_mtime for file in (folder / "features").glob("*.parquet"))
        rate = arguments.images * (len(written) - 1) / (written[-1] - written[0])
        rows = [row("extract_features.py", rate, samples)]

        samples = run(folder, "evaluate.py", *options, "--report", "report")
        results = json.loads((folder / "report" / "results.json").read_text())
        rows.append(row("evaluate.py", results["images_per_second"], samples))
    print("| script | images/s | MiB at 30 % of the run | at 50 % | at 70 % | at 90 % | peak |")
    print("|---|---:|---:|---:|---:|---:|---:|", *rows, sep="\n")
    hours = 100e6 / rate / 3600
    print(
        f"\n100 million images with extract_features.py: about {hours:,.0f} hours / number of machines (an estimate)."
    )


if __name__ == "__main__":
    main()
