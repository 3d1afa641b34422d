"""Draws what one point of a picture attends to in a Focal Transformer, and the evidence for a predicted class.

Writes three pictures into a folder: attention.png, one token with its window, its fine surroundings and its coarse
cells, shaded by weight; grid.png, the same in every stage and head; saliency.png, the evidence for a class
in the picture.
See `--help` and docs/visualization.md.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from common.models import load_focal, prepare, resize_views
from common.options import Problem, first_line, image_size_option, script_parser
from common.pictures import UnreadablePicture, load_picture
from focal_hf.visualization import (
    attention_rollout,
    plot_grid,
    plot_query,
    plot_saliency,
    query_attention,
    record_attention,
)

EXAMPLES = """\
examples:
  a point a little left of and below the middle, in the first stage, where maps are largest:
    python examples/visualize_attention.py cat.jpg --model focal-tiny --at 0.4,0.6

  the fifth head of the first block of the third stage (all are counted from 0):
    python examples/visualize_attention.py cat.jpg --model focal-tiny --at 0.4,0.6 --stage 2 --layer 0 --head 4

  the evidence for another class than the predicted one:
    python examples/visualize_attention.py cat.jpg --model focal-tiny --class "tabby, tabby cat"

  the model of `make quickstart`:
    python examples/visualize_attention.py quickstart/digits/test/3/0045.png --model quickstart/model
"""


def point(text: str) -> tuple[float, float]:
    """An argparse type: X,Y with both from 0 to 1."""
    try:
        across, down = map(float, text.split(","))
    except ValueError:
        across = down = -1.0
    if not (0 <= across <= 1 and 0 <= down <= 1):
        raise argparse.ArgumentTypeError(f"{text} is not X,Y with both from 0 to 1, as in 0.4,0.6")
    return across, down


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(__doc__, EXAMPLES)
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a picture")
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="a Focal classifier: a folder or a name on the Hub"
    )
    image_size_option(parser)
    parser.add_argument(
        "--at",
        type=point,
        default=(0.5, 0.5),
        metavar="X,Y",
        help="the point that looks: fractions of the width, from the left, and of the height, from the top, of what "
        "the model sees of the picture (default: 0.5,0.5)",
    )
    parser.add_argument("--stage", type=int, default=0, metavar="N", help="stage of attention.png, from 0 (default: 0)")
    parser.add_argument(
        "--layer",
        type=int,
        default=-1,
        metavar="N",
        help="layer of that stage, from 0, or -1 for the last (default: -1)",
    )
    parser.add_argument(
        "--head", type=int, metavar="N", help="head of that layer, from 0 (default: the mean of all heads)"
    )
    parser.add_argument(
        "--class", dest="label", metavar="NAME", help="class of saliency.png (default: the model's answer)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("attention"),
        metavar="FOLDER",
        help="folder for attention.png, grid.png (every stage and head) and saliency.png (default: attention)",
    )
    return parser.parse_args()


def visualize(args: argparse.Namespace) -> None:
    model, processor = load_focal(args.model)
    try:
        image = load_picture({"path": str(args.image), "bytes": None})
    except UnreadablePicture as error:
        raise Problem(f"Not a readable image: {error}.") from error
    if args.image_size:
        resize_views(processor, args.image_size)
    pixel_values, shown = prepare(processor, image)

    record = record_attention(model, pixel_values)
    labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
    scores = torch.from_numpy(record.logits).softmax(0)
    if args.label is not None and args.label not in labels:
        raise Problem(
            f"--class {args.label} is not among the {len(labels)} classes of --model {args.model}: "
            f"{', '.join(labels[:5])}{', ...' * (len(labels) > 5)}."
        )
    label = int(scores.argmax()) if args.label is None else labels.index(args.label)
    try:
        seen = query_attention(record, args.at, args.stage, args.layer, args.head)
    except ValueError as error:
        raise Problem(f"--model {args.model}: {error}") from error
    saliency = attention_rollout(record, label)
    if not saliency.any():
        print(f"No region of {args.image} supports {labels[label]}: saliency.png is empty.")

    title = f"Evidence for {labels[label]!r} ({scores[label]:.0%})"
    figures = {
        "attention.png": plot_query(shown, seen),
        "grid.png": plot_grid(shown, record, args.at),
        "saliency.png": plot_saliency(shown, saliency, record.patch_size, title),
    }
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(args.output / name, dpi=130)
    except OSError as error:
        raise Problem(f"Cannot write to --output {args.output}: {first_line(error)}") from error

    best = scores.topk(min(3, len(labels)))
    answers = (f"{labels[number]} {score:.0%}" for score, number in zip(*map(torch.Tensor.tolist, best), strict=True))
    print(f"{args.image}, seen as {shown.shape[0]} x {shown.shape[1]} pixels: {', '.join(answers)}.")
    for level in seen.levels:
        what = "tokens" if level.level == 0 else f"cells of {level.cell} x {level.cell} tokens"
        print(f"  level {level.level}: {100 * level.weights.sum():.1f} % of the weight on {what}")
    print(f"Look at {', '.join(str(args.output / name) for name in figures)}.")


if __name__ == "__main__":
    args = parse_arguments()
    logging.disable_progress_bar()
    try:
        visualize(args)
    except Problem as problem:
        sys.exit(f"error: {problem}")
