"""Make scenes of handwritten digits on photographs, with exact masks and boxes, to try detection and segmentation on.

All that is in them is real and comes with scikit-learn: 1797 scanned digits and two photographs. Digits that are in
training scenes are in no others, and neither is any part of the photographs.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm

from common.options import first_line, seed_option

CONTENTS = """\
what FOLDER then holds, the same for equal options:
  SPLIT/NUMBER.png                   the scenes
  annotations/SPLIT/NUMBER.png       for each pixel its class: 0 is background, 1 the digit "0", ... 10 the digit "9"
  annotations/instances_SPLIT.json   the digits in COCO's format: boxes, and masks as run lengths
  annotations/classes.txt            the eleven names, one a line
"""

NAMES = ["background", *map(str, range(10))]
# The smallest visible share of a digit that other digits cover.
VISIBLE = 0.7


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=CONTENTS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write; a new folder")
    for split, scenes in (("train", 1000), ("validation", 100)):
        parser.add_argument(f"--{split}", type=int, default=scenes, metavar="N", help=f"scenes (default: {scenes})")
    parser.add_argument(
        "--scans",
        action="store_true",
        help="paste whole scans, squares of white ink on black, and make these squares the masks and boxes; otherwise "
        "strokes alone are pasted, in any colour",
    )
    parser.add_argument("--size", type=int, default=128, metavar="N", help="side of a scene (default: 128 pixels)")
    seed_option(parser)
    return parser.parse_args()


def compose(
    size: int,
    scans: bool,
    photographs: list[np.ndarray],
    digits: list[tuple[np.ndarray, int]],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """One scene.

    Returns:
        Its pixels (size, size, 3); for each pixel the digit in front, counted from 1, or 0 (size, size); and the
        digits' values in that order.
    """
    photograph = photographs[rng.integers(len(photographs))]
    top, left = (rng.integers(side - size + 1) for side in photograph.shape[:2])
    pixels = photograph[top : top + size, left : left + size].astype(float)
    front = np.zeros((size, size), int)
    areas, values = [], []
    for choice in rng.choice(len(digits), rng.integers(1, 6), replace=False):
        image, value = digits[choice]
        side = round(size * rng.uniform(0.2, 0.4))
        ink = Image.fromarray((image / 16).astype("float32")).resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(ink).clip(0, 1)
        place = tuple(slice(start, start + side) for start in rng.integers(size - side + 1, size=2))
        after = front.copy()
        after[place][scans | (ink > 0.5)] = len(values) + 1
        if any((after == number).sum() < VISIBLE * area for number, area in enumerate(areas, 1)):
            continue  # the new digit would hide too much of another
        if scans:
            pixels[place] = 255 * ink[..., None]
        else:
            # Bright ink on a dark background and the other way round: a digit's colour says nothing of its value.
            bright = pixels[place].mean() < 128
            colour = rng.uniform(170, 255, 3) if bright else rng.uniform(0, 85, 3)
            pixels[place] += np.minimum(2 * ink, 1)[..., None] * (colour - pixels[place])
        front = after
        areas.append((front == len(values) + 1).sum())
        values.append(value)
    return pixels.round().astype("uint8"), front, values


def write_split(
    folder: Path,
    split: str,
    scenes: int,
    size: int,
    scans: bool,
    photographs: list[np.ndarray],
    digits: list[tuple[np.ndarray, int]],
    rng: np.random.Generator,
) -> None:
    classes = folder / "annotations" / split
    for place in (folder / split, classes):
        place.mkdir(parents=True)
    images, annotations = [], []
    for number in tqdm(range(scenes), desc=split, unit="scene"):
        pixels, front, values = compose(size, scans, photographs, digits, rng)
        name = f"{number:05}.png"
        Image.fromarray(pixels).save(folder / split / name)
        Image.fromarray(np.array([0, *(value + 1 for value in values)], "uint8")[front]).save(classes / name)
        images.append({"id": number, "file_name": name, "height": size, "width": size})
        for place, value in enumerate(values, 1):
            code = coco_mask.encode(np.asfortranarray(front == place, "uint8"))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": value + 1,
                    "bbox": coco_mask.toBbox(code).tolist(),
                    "area": int(coco_mask.area(code)),
                    "iscrowd": 0,
                    "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(NAMES) if index]
    everything = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(everything))


def write_scenes(folder: Path, args: argparse.Namespace, photographs: list[np.ndarray]) -> None:
    digits = load_digits()
    rows = train_test_split(range(len(digits.target)), test_size=0.25, stratify=digits.target, random_state=0)
    width = photographs[0].shape[1]
    cut = min(width * 3 // 4, width - args.size)
    parts = [[photograph[:, part] for photograph in photographs] for part in (slice(cut), slice(cut, None))]
    for number, split in enumerate(("train", "validation")):
        write_split(
            *(folder, split, getattr(args, split), args.size, args.scans, parts[number]),
            [(digits.images[row], int(digits.target[row])) for row in rows[number]],
            np.random.default_rng((args.seed, number)),
        )
    (folder / "annotations" / "classes.txt").write_text("\n".join(NAMES) + "\n")


def main() -> None:
    args = parse_arguments()
    photographs = load_sample_images().images
    largest = photographs[0].shape[1] // 2
    if not 32 <= args.size <= largest or args.train < 1 or args.validation < 1:
        raise SystemExit(f"error: --size must be from 32 to {largest} pixels, --train and --validation above zero.")
    if args.folder.exists():
        raise SystemExit(f"error: {args.folder} exists: name a new folder.")

    temporary = args.folder.with_name(f".{args.folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        write_scenes(temporary, args, photographs)
        temporary.rename(args.folder)
    except OSError as error:
        raise SystemExit(f"error: Cannot write {args.folder}: {first_line(error)}. Name another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main()
