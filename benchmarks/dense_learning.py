"""Trains Focal and transformers' Swin of the same size to detect and to segment, on scenes of digits.

The scenes are those of examples/make_scenes.py: handwritten digits on photographs, 2000 for training and 100 for
validation. Both backbones are first trained to classify the digits (examples/finetune.py). Then, with the same recipe
and a new head, they are trained on the scenes: RT-DETR to detect boxes (finetune_detection.py, strokes in any colour)
and UperNet to segment (finetune_segmentation.py, whole scans).

Writes dense.md into --folder, and detections.png or predictions.png into the folder of each network. Finished runs in
the folder are reused, and interrupted ones are resumed. Each network and task takes about 20 minutes on one idle core.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from learning_runs import EXAMPLES, run_example, table_by_epoch
from transformers import AutoModelForObjectDetection, AutoModelForSemanticSegmentation, RTDetrConfig, SwinConfig

from focal_hf import FocalConfig

sys.path.insert(0, str(EXAMPLES))

from quickstart import write_pictures

CLASSIFYING = ("--batch-size", 32, "--learning-rate", 1.5e-3, "--no-flip", "--crop", 1.0)
# Swin needs maps that are at least as large as its window (3 x 3). The last map is 3 x 3 at 96 pixels with patches of 8
# and at 48 pixels with patches of 4.
TASKS = {
    "detection": {
        "network": {"image_size": 96, "patch_size": 8, "embed_dim": 48, "num_heads": (3, 6, 12), "encoder_stride": 32},
        "scenes": (),
        "classifying": ("--crop-scale", 0.5, "--color-jitter", 0.4, "--rand-augment", 9),
        "script": "finetune_detection.py",
        "options": (
            *("--batch-size", 8, "--learning-rate", 1e-3, "--backbone-rate", 0.3, "--clip", 1),
            *("--image-size", 128, "--smallest-size", 96, "--no-flip", "--crop-scale", 0.5, "--head", "head"),
        ),
        "model": AutoModelForObjectDetection,
        "measure": "AP50",
        "key": "ap50",
        "shown": (1, 5, 10, 15, 20, 25),
    },
    "segmentation": {
        "network": {"image_size": 48, "patch_size": 4, "embed_dim": 32, "num_heads": (2, 4, 8), "encoder_stride": 16},
        "scenes": ("--scans",),
        "classifying": ("--crop-scale", 0.7),
        "script": "finetune_segmentation.py",
        "options": (
            *("--batch-size", 8, "--learning-rate", 1e-3, "--clip", 5, "--drop-path", 0),
            *("--crop-size", 128, "--resize", 0.8, 1.25, "--no-flip", "--no-distortion", "--head-channels", 48),
        ),
        "model": AutoModelForSemanticSegmentation,
        "measure": "mean IoU",
        "key": "mean_iou",
        "shown": (1, 2, 5, 10, 15, 20),
    },
}


def write_configs(folder: Path, network: dict) -> None:
    shared = network | {"depths": (1, 2, 2), "window_size": 3, "drop_path_rate": 0.0, "initializer_range": 0.1}
    levels = {"focal_levels": (2, 2, 2), "focal_windows": (5, 3, 1), "expand_sizes": (2, 2, 2)}
    FocalConfig(**shared, **levels).save_pretrained(folder / "focal")
    SwinConfig(**shared).save_pretrained(folder / "swin")
    RTDetrConfig(
        d_model=64,
        encoder_hidden_dim=64,
        encoder_ffn_dim=128,
        encoder_attention_heads=4,
        decoder_in_channels=[64] * 3,
        decoder_ffn_dim=128,
        decoder_attention_heads=4,
        decoder_layers=2,
        hidden_expansion=0.5,
        num_queries=20,
        num_denoising=20,
        initializer_range=0.1,
    ).save_pretrained(folder / "head")


def learn(task: dict, folder: Path) -> list[str]:
    """Trains both networks on a task, with all files in the folder. Returns the lines of its table."""
    write_pictures(folder / "digits")
    if not (folder / "scenes").is_dir():
        command = [sys.executable, EXAMPLES / "make_scenes.py", folder / "scenes", "--train", "2000", *task["scenes"]]
        subprocess.run(command, check=True)
    write_configs(folder, task["network"])
    rows = {}
    for name in ("focal", "swin"):
        options = ("--config", name, "--data", "digits", *CLASSIFYING, *task["classifying"])
        run_example("finetune.py", folder, f"digits_{name}", 20, *options)
        options = ("--model", f"digits_{name}", "--data", "scenes", *task["options"])
        history = run_example(task["script"], folder, f"scenes_{name}", task["shown"][-1], *options)
        model = task["model"].from_pretrained(folder / f"scenes_{name}")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows[name.capitalize()] = parameters, [{entry["epoch"]: entry[task["key"]] for entry in history}]
    return [
        f"{task['measure']} on unseen scenes in %, by number of epochs.",
        "",
        *table_by_epoch("backbone", rows, task["shown"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("dense"), help="working folder (default: dense)")
    parser.add_argument("--task", choices=TASKS, nargs="+", default=[*TASKS], help="tasks to run (default: both)")
    args = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = "1"  # small networks gain nothing from more threads
    tables = []
    for name in args.task:
        tables += [f"## {name.capitalize()}", "", *learn(TASKS[name], args.folder / name), ""]
    (args.folder / "dense.md").write_text("\n".join(tables))
    print("\n" + "\n".join(tables))


if __name__ == "__main__":
    main()
