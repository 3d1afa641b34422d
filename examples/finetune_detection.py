"""Fine-tune a detector with a Focal, Swin or other backbone on images with boxes or masks, as COCO has them or the Hub.

Any detector of transformers, such as RT-DETR, D-FINE or Deformable DETR; Mask2Former or MaskFormer for masks. See
`--help` and docs/detection.md.
"""

import argparse
import functools
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from common.coco import clipped_boxes, read_objects
from common.data import report_unreadable
from common.dense_evaluation import BOX_METRICS, average_precision, ground_truth, predict
from common.dense_losses import detection_loss
from common.dense_models import build_detector, finds_masks, inputs_of, rate_groups, stride_of
from common.dense_reports import detection_card, draw_detections
from common.detection_views import ObjectImages, View, sides, smallest_batch, training_sizes
from common.engine import NEEDS_WHOLE_MODEL, refuse_sharding
from common.loading import row_fetcher, shuffled
from common.models import apply_speed_options
from common.options import (
    Problem,
    data_options,
    fraction,
    image_size_option,
    model_options,
    positive,
    result_options,
    script_parser,
    speed_options,
    training_options,
    view_options,
)
from common.recipe import default_help_of, fill_defaults
from common.runs import (
    begin,
    check_training,
    make_loaders,
    needs_training,
    result_settings,
    run_training,
    train_and_keep,
    upload,
)

EXAMPLES = """\
examples:
  a classifier, or a model pre-trained by pretrain_mim.py, becomes the backbone of a new RT-DETR:
    accelerate launch examples/finetune_detection.py --model focal-tiny --data my_scenes --output my_detector

  continue a run that was stopped, with the same result:
    accelerate launch examples/finetune_detection.py --model focal-tiny --data my_scenes --output my_detector --resume

  COCO itself, with another head:
    accelerate launch examples/finetune_detection.py --model focal-tiny --head deformable_detr --data coco \\
        --train-split train2017 --validation-split val2017 --output my_detector --epochs 50

  masks, from the same data if its annotations have a segmentation:
    accelerate launch examples/finetune_detection.py --model focal-tiny --head mask2former --data my_scenes \\
        --output my_segmenter

  train a small detector from scratch, as a config.json describes it, on small images:
    accelerate launch examples/finetune_detection.py --config my_config.json --data my_scenes --output my_detector \\
        --image-size 128 --smallest-size 96

  a data set from the Hub:
    accelerate launch examples/finetune_detection.py --model focal-tiny --data cppe-5 --validation-split test \\
        --output my_detector
"""

# The recipe of DETR and its successors, except for the epochs: on COCO they train for 50 to 72.
DETECTION = {
    "epochs": 50,
    "learning_rate": 1e-4,
    "min_learning_rate": 0.0,
    "warmup_epochs": None,
    "weight_decay": 1e-4,
    "clip": 0.1,
    "crop_scale": 0.3,
}


def parse_arguments() -> argparse.Namespace:
    default_help = default_help_of(DETECTION)
    parser = script_parser(__doc__, EXAMPLES)
    model_options(parser)
    parser.add_argument(
        "--head",
        default="rt_detr",
        metavar="NAME",
        help="if --model is not a detector: type of the new head, or a config.json of a detector, whose backbone is "
        "replaced (default: rt_detr); mask2former and maskformer predict masks, the others boxes",
    )
    pictures = "with FOLDER/annotations/instances_SPLIT.json in COCO's format and FOLDER/SPLIT/*.png"
    group = data_options(parser, pictures, streaming=False)
    group.add_argument(
        "--objects-column", default="objects", metavar="NAME", help="column of the objects (default: objects)"
    )
    group.add_argument("--train-split", default="train", metavar="NAME", help="split to train on (default: train)")
    result_options(parser)

    group = parser.add_argument_group("training")
    training_options(group, default_help, batch_size=8)
    group.add_argument(
        "--backbone-rate",
        type=fraction,
        metavar="F",
        help="learning rate of the backbone relative to that of the head (default: 0.1; 1 with --config)",
    )

    group = parser.add_argument_group("images")
    image_size_option(group)
    group.add_argument(
        "--smallest-size",
        type=positive(int),
        metavar="N",
        help="in training, the shorter side is drawn from N to --image-size (default: 0.6 of --image-size)",
    )
    view_options(group, default_help)
    speed_options(parser)
    return parser.parse_args()


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    log = accelerator.print
    refuse_sharding(accelerator, NEEDS_WHOLE_MODEL)
    fill_defaults(args, DETECTION, args.batch_size * args.accumulate * accelerator.num_processes)
    if args.backbone_rate is None:
        args.backbone_rate = 0.1 if args.model else 1.0
    check_training(args)
    if not needs_training(args, accelerator):
        return

    with accelerator.local_main_process_first():  # the other processes use its downloaded files
        masks = finds_masks(args)
        train_data, validation_data, names = read_objects(args, log, masks)
    if accelerator.is_local_main_process:
        report_unreadable(args, (train_data, validation_data), log)
    images = len(train_data["labels"])

    set_seed(args.seed)
    with accelerator.local_main_process_first():
        model, processor = build_detector(args, names, log)
    config, inputs = model.config, inputs_of(model)
    apply_speed_options(args, model)

    side = min(sides(processor).values())
    smallest = args.smallest_size or round(0.6 * side)
    if smallest > side:
        raise Problem(f"--smallest-size {smallest} is above the {side} pixels of --image-size.")
    step = stride_of(model)
    sizes = training_sizes(processor, smallest, step)
    views = (
        View(processor, config.label2id, sizes, args),
        View(processor, config.label2id, [sides(processor)]),
    )
    train_batches, train_loader, validation_loader = make_loaders(
        *(args, accelerator, shuffled(images, args.seed), images),
        functools.partial(range, len(validation_data["labels"])),
        [row_fetcher(data["rows"], data["labels"], args.image_column) for data in (train_data, validation_data)],
        views,
        functools.partial(ObjectImages, step=step),
    )
    objects = sum(int(clipped_boxes(image)[1].sum()) for image in train_data["labels"])
    settings = result_settings(args, accelerator, images, (train_data, validation_data))
    training = begin(
        *(args, accelerator, model, train_batches, train_loader, settings),
        about=f"{len(names)} classes, {objects} objects",
        size=smallest_batch(sizes, step),
        groups=rate_groups(model, args),
        pixels=f"{smallest} to {side}" if smallest < side else str(side),
        unsharded=NEEDS_WHOLE_MODEL,
    )
    truth, predictions = ground_truth(validation_data["labels"], config.label2id), None

    def measure(model: torch.nn.Module) -> dict:
        nonlocal predictions
        predictions = predict(accelerator, model, inputs, processor, validation_loader)
        if not predictions:
            raise Problem("None of the validation images can be read.")
        if not masks:
            return average_precision(truth, predictions, config.id2label)
        boxes = average_precision(truth, predictions, config.id2label)
        measured = average_precision(truth, predictions, config.id2label, "segm")
        return measured | {name: boxes[key] for name, key in BOX_METRICS.items()}

    def draw_figures(folder: Path) -> None:
        draw_detections(folder / "detections.png", validation_data, args.image_column, predictions, config.id2label)

    results = train_and_keep(
        *(args, accelerator, training),
        detection_loss(model, objects / images),
        measure,
        merit=lambda entry: (entry["ap"] or 0, entry["ap50"] or 0),
        describe=lambda measured: f"AP {measured['ap'] or 0:.4f}  AP50 {measured['ap50'] or 0:.4f}",
        processor=processor,
        draw_figures=draw_figures,
        card=functools.partial(detection_card, config.model_type),
    )
    best = results["best"]
    log(
        f"Best: epoch {best['epoch']}, AP {best['ap'] or 0:.4f}, AP50 {best['ap50'] or 0:.4f}. "
        f"The model is in {args.output}."
    )
    upload(args, accelerator)


if __name__ == "__main__":
    run_training(parse_arguments(), train)
