"""Does it learn to detect? Focal beside transformers' Swin of the same size under RT-DETR, on scenes of digits.

Scenes are those of examples/make_scenes.py: handwritten digits on photographs, 2000 to train on and 100 others to
validate on. Both backbones are first trained to classify the digits alone (examples/finetune.py), then, with a small
RT-DETR that starts anew, to find them (examples/finetune_detection.py), by the same recipe.

Writes detection.md and each network's detections.png into --folder. Runs that are there are not repeated; one that was
stopped goes on. Takes about half an hour a network on one core.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForObjectDetection, RTDetrConfig, SwinConfig

from focal_hf import FocalConfig

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from quickstart import write_pictures  # noqa: E402

SHOWN = 1, 5, 10, 15, 20, 25  # epochs
CLASSIFYING = [
    *("--epochs", 20, "--batch-size", 32, "--learning-rate", 1.5e-3, "--crop-scale", 0.5, "--no-flip", "--crop", 1.0),
    *("--color-jitter", 0.4, "--rand-augment", 9),
]
DETECTING = [
    *("--epochs", 25, "--batch-size", 8, "--learning-rate", 1e-3, "--backbone-rate", 0.3, "--clip", 1),
    *("--image-size", 128, "--smallest-size", 96, "--no-flip", "--crop-scale", 0.5),
]


def write_configs(folder: Path) -> None:
    shared = {"image_size": 48, "patch_size": 8, "embed_dim": 48, "depths": (1, 2, 2), "num_heads": (3, 6, 12)}
    shared |= {"window_size": 4, "drop_path_rate": 0.0, "encoder_stride": 32, "initializer_range": 0.1}
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


def run(script: str, folder: Path, output: str, *options: object) -> None:
    command = [sys.executable, EXAMPLES / script, "--output", output, "--workers", 0, *options]
    if (folder / output / "checkpoints").is_dir() or (folder / output / "last").is_dir():
        command.append("--resume")
    print(f"{script} {output}", flush=True)
    # In the folder: paths are among the settings that a run which goes on must share.
    if subprocess.run([*map(str, command)], cwd=folder, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"error: {script} failed; its own message is above.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("detection"), help="where to work (default: detection)")
    folder = parser.parse_args().folder

    os.environ["OMP_NUM_THREADS"] = "1"  # networks so small gain nothing from more
    if not (folder / "digits").is_dir():
        write_pictures(folder / "digits")
    if not (folder / "scenes").is_dir():
        command = [sys.executable, EXAMPLES / "make_scenes.py", folder / "scenes", "--train", "2000"]
        subprocess.run(command, check=True)
    write_configs(folder)
    lines = [
        "AP50 (and AP) on unseen scenes in %, after so many epochs.",
        "",
        f"| backbone | parameters | {' | '.join(map(str, SHOWN))} |",
        f"|---|---:|{'---:|' * len(SHOWN)}",
    ]
    for name in ("focal", "swin"):
        run("finetune.py", folder, f"digits_{name}", "--config", name, "--data", "digits", *CLASSIFYING)
        started = "--model", f"digits_{name}", "--head", "head"
        run("finetune_detection.py", folder, f"scenes_{name}", *started, "--data", "scenes", *DETECTING)
        model = AutoModelForObjectDetection.from_pretrained(folder / f"scenes_{name}")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        history = json.loads((folder / f"scenes_{name}" / "results.json").read_text())["history"]
        cells = [f"{100 * history[epoch - 1]['ap50']:.1f} ({100 * history[epoch - 1]['ap']:.1f})" for epoch in SHOWN]
        lines.append(f"| {name.capitalize()} | {parameters:,} | {' | '.join(cells)} |")
    (folder / "detection.md").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
