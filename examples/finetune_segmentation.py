"""Train UperNet with Focal, or another backbone of transformers, to predict the class of every pixel.

Plain Accelerate and PyTorch, the same file on a laptop, one GPU or several. See `--help` and docs/segmentation.md.
"""

import argparse
import functools
import math
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex
from transformers import AutoModelForSemanticSegmentation, BaseImageProcessor

from common.dense_evaluation import probabilities
from common.dense_losses import segmentation_loss
from common.dense_models import build_segmenter, freeze_unused_parameters, segmentation_processor, set_size
from common.dense_reports import draw_scenes, segmentation_card
from common.engine import NEEDS_WHOLE_MODEL, refuse_sharding
from common.files import check_new, write_results
from common.loading import EvaluationBatches, Loader, TrainingBatches, shuffled
from common.models import apply_speed_options, load_trained
from common.options import (
    Problem,
    data_options,
    flip_option,
    image_size_option,
    model_options,
    positive,
    result_options,
    script_parser,
    speed_options,
    training_options,
)
from common.recipe import default_help_of, fill_defaults, linear_schedule
from common.runs import (
    begin,
    check_training,
    needs_training,
    result_settings,
    run_training,
    train_and_keep,
    upload,
)
from common.segmentation_data import (
    NO_CLASS,
    Scenes,
    check_scenes,
    choose_splits,
    read_pairs,
    training_view,
    whole_view,
)

EXAMPLES = """\
examples:
  start from a checkpoint (a classifier, a pre-trained or a segmentation model; a folder or a name on the Hub):
    accelerate launch examples/finetune_segmentation.py --model focal-tiny --data my_images --output my_model

  continue a run that was stopped, with the same result:
    accelerate launch examples/finetune_segmentation.py --model focal-tiny --data my_images --output my_model --resume

  ADE20K with the paper's recipe, on eight GPUs:
    accelerate launch --num_processes 8 examples/finetune_segmentation.py --model focal-tiny \\
        --data ADEChallengeData2016 --reduce-labels --output my_model --batch-size 2

  a small network on small images, here those of make_scenes.py --scans:
    accelerate launch examples/finetune_segmentation.py --model my_classifier --data scenes --output my_model \\
        --crop-size 128 --resize 0.8 1.25 --no-flip --no-distortion --head-channels 48 --drop-path 0 \\
        --epochs 20 --batch-size 8 --learning-rate 1e-3 --clip 5

  evaluate a finished model with sliding windows on images of several sizes, each also mirrored:
    accelerate launch examples/finetune_segmentation.py --evaluate-only --model my_model --data my_images \\
        --output report --window 512 --stride 341 --scales 0.5 0.75 1.0 1.25 1.5 1.75 --flip-test
"""

# The recipe of the paper, Swin's in mmsegmentation: 160,000 steps of 16 images are 127 epochs of ADE20K's 20,210.
SEGMENTATION = {
    "epochs": 127,
    "learning_rate": 6e-5,
    "min_learning_rate": 0.0,
    "warmup_epochs": None,
    "weight_decay": 0.01,
    "clip": math.inf,
}
WARMUP = 1500 / 160_000  # share of all epochs
SHOWN = 6  # validation images that are drawn


def parse_arguments() -> argparse.Namespace:
    default_help = default_help_of(SEGMENTATION, warmup="1500 of 160,000 parts of --epochs")
    parser = script_parser(__doc__, EXAMPLES)
    not_negative, above_zero = positive(float, or_zero=True), positive(float)

    model_options(parser)
    pictures = "FOLDER/train/*.jpg with maps FOLDER/annotations/train/*.png, and the same of FOLDER/validation"
    group = data_options(parser, pictures, streaming=False)
    group.add_argument(
        "--map-column",
        default="annotation",
        metavar="NAME",
        help="column of the maps, in a data set that is not a folder of images (default: annotation)",
    )
    group.add_argument(
        "--classes",
        metavar="FILE",
        help="the classes' names, one a line, in the order of their numbers (default: FOLDER/annotations/classes.txt)",
    )
    group.add_argument(
        "--reduce-labels",
        action="store_true",
        help="ignore 0 in maps, and let 1 be the first class, as in ADE20K; 255 is always ignored",
    )
    result_options(parser)

    group = parser.add_argument_group("training")
    training_options(group, default_help, batch_size=16)
    group.add_argument(
        "--drop-path",
        type=not_negative,
        metavar="P",
        help="stochastic depth of the backbone's last block (default: 0.2, 0.3 or 0.5, by its size)",
    )
    group.add_argument(
        "--head-channels",
        type=positive(int),
        default=512,
        metavar="N",
        help="channels of a new UperNet head; its auxiliary head has half as many (default: 512)",
    )

    group = parser.add_argument_group("images in training")
    group.add_argument(
        "--crop-size", type=positive(int), default=512, metavar="N", help="side of a crop in pixels (default: 512)"
    )
    group.add_argument(
        "--resize",
        nargs=2,
        type=above_zero,
        default=[0.5, 2.0],
        metavar="F",
        help="smallest and largest shorter side before cropping, relative to --crop-size (default: 0.5 2)",
    )
    flip_option(group)
    group.add_argument(
        "--distortion",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="change brightness, contrast, saturation and hue (default: on)",
    )

    group = parser.add_argument_group("images in evaluation")
    image_size_option(group, "--crop-size, or that of a finished model")
    group.add_argument(
        "--window", type=positive(int), metavar="N", help="side of sliding windows in pixels (default: whole images)"
    )
    group.add_argument(
        "--stride",
        type=positive(int),
        metavar="N",
        help="step from window to window in pixels (default: two thirds of --window)",
    )
    group.add_argument(
        "--scales",
        nargs="+",
        type=above_zero,
        default=[1.0],
        metavar="F",
        help="average over images resized by these factors (default: 1)",
    )
    group.add_argument("--flip-test", action="store_true", help="average over mirrored images, too")
    group.add_argument(
        "--evaluate-only",
        action="store_true",
        help="evaluate the finished --model on the validation images, and write results and pictures to --output",
    )
    speed_options(parser)
    return parser.parse_args()


def check_options(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Raise an error if options contradict each other, before anything is read."""
    if args.evaluate_only and not args.model:
        raise Problem("--evaluate-only measures a finished model: add --model.")
    if args.resize[0] > args.resize[1]:
        raise Problem(f"--resize {args.resize[0]:g} {args.resize[1]:g}: the smaller factor comes first.")
    if args.drop_path is not None and args.drop_path >= 1:
        raise Problem(f"--drop-path {args.drop_path:g} is too large: it must be below 1.")
    if args.stride and not args.window:
        raise Problem("--stride is for --window: leave out --stride, or add --window.")
    if args.stride and args.stride > args.window:
        raise Problem(f"--stride {args.stride} leaves gaps between windows of {args.window} pixels: reduce it.")
    refuse_sharding(accelerator, NEEDS_WHOLE_MODEL)


# ---------------------------------------------------------------------------------------------------------------- data


def training_loader(
    args: argparse.Namespace, accelerator: Accelerator, rows: datasets.Dataset, processor: BaseImageProcessor
) -> tuple[TrainingBatches, Loader]:
    """The training loader. An epoch has only whole steps, since batch normalization needs many images in a batch."""
    place = accelerator.num_processes, accelerator.process_index
    step_size = args.batch_size * args.accumulate * accelerator.num_processes
    images = max(len(rows) // step_size * step_size, min(len(rows), step_size))
    train_batches = TrainingBatches(
        shuffled(len(rows), args.seed), images, args.batch_size, args.accumulate, *place, args.seed
    )
    if args.batch_size == 1 or train_batches.share(0) % args.batch_size == 1:
        raise Problem(
            f"Batch normalization needs two images, and with --batch-size {args.batch_size} and {len(rows)} training "
            "images a batch would have one: change --batch-size."
        )
    scenes = Scenes(rows, args, functools.partial(training_view, args, processor))
    return train_batches, Loader(scenes, train_batches, args.workers, accelerator.device, args.strict)


def validation_loader(
    args: argparse.Namespace, accelerator: Accelerator, rows: datasets.Dataset, processor: BaseImageProcessor
) -> Loader:
    """The loader of validation, with one image in a batch, since image sizes differ."""
    place = accelerator.num_processes, accelerator.process_index
    batches = EvaluationBatches(functools.partial(range, len(rows)), 1, *place)
    scenes = Scenes(rows, args, functools.partial(whole_view, args.scales, processor))
    return Loader(scenes, batches, args.workers, accelerator.device, args.strict)


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()  # not inference_mode: tensors that a model caches there could not be used in training later
def evaluate(
    args: argparse.Namespace, accelerator: Accelerator, model: torch.nn.Module, loader: Loader, names: list[str]
) -> tuple[dict, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """The measures over all pixels of all images, each image counted once.

    Returns:
        The measures; and the pixel values, true classes and predicted classes of some images of this process.
    """
    # Processes have different numbers of windows, so their forward passes must not wait for each other.
    model = accelerator.unwrap_model(model)
    for statistics in model.buffers():
        broadcast(statistics)
    model.eval()
    options = {"num_classes": len(names), "ignore_index": NO_CLASS}
    metrics = MetricCollection(
        {
            "iou": MulticlassJaccardIndex(average="none", **options),
            "mean_iou": MulticlassJaccardIndex(average="macro", **options),
            "confusion": MulticlassConfusionMatrix(**options),
        }
    ).to(accelerator.device)
    sums, shown = torch.zeros(2, dtype=torch.double, device=accelerator.device), []
    for batch in loader:
        truth = batch["labels"].long()
        counts = truth != NO_CLASS
        views = [batch[f"view{number}"] for number in range(len(args.scales))]
        with accelerator.autocast():
            answer = probabilities(
                *(model, views, truth.shape[-2:]),
                window=args.window,
                stride=args.stride or max(1, 2 * (args.window or 0) // 3),
                flip=args.flip_test,
                batch_size=args.batch_size,
            )
        predicted = answer.argmax(0, keepdim=True)
        metrics.update(predicted, truth)
        of_truth = answer.gather(0, truth.where(counts, 0))[counts]
        sums += torch.stack([-of_truth.clamp(min=1e-12).log().sum(), counts.any()])
        if len(shown) < SHOWN and counts.any():
            shown.append((views[len(views) // 2][0].cpu(), truth[0].cpu(), predicted[0].cpu()))
    loss, images = accelerator.reduce(sums, "sum").tolist()
    if not images:
        raise Problem("None of the validation images can be read, or all their pixels are ignored.")
    result = metrics.compute()
    of_class = result["confusion"].sum(1)
    pixels = of_class.sum().item()
    right = result["confusion"].diag()
    occurs = (of_class + result["confusion"].sum(0)) > 0
    measured = {
        "mean_iou": result["mean_iou"].item(),
        "mean_accuracy": (right / of_class)[of_class > 0].mean().item(),
        "pixel_accuracy": right.sum().item() / pixels,
        "loss": loss / pixels,
        "images": int(images),
        "iou": {
            name: value.item() if known else None
            for name, value, known in zip(names, result["iou"], occurs, strict=True)
        },
    }
    return measured, shown


def describe(measured: dict) -> str:
    return (
        f"validation loss {measured['loss']:.3f}  mean IoU {measured['mean_iou']:.4f}  "
        f"pixel accuracy {measured['pixel_accuracy']:.4f}"
    )


def measure_finished(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Evaluate a finished model, for --evaluate-only."""
    check_new("--output", args.output, args.data)
    model, processor = load_trained(args.model, AutoModelForSemanticSegmentation)
    splits, names = read_pairs(args)
    if args.validation_split not in splits:
        raise Problem(f"--data {args.data} has no split {args.validation_split}, only {', '.join(splits)}.")
    known = list(model.config.id2label.values())
    if len(known) != len(names):
        raise Problem(f"--model {args.model} has {len(known)} classes, but --data {args.data} has {len(names)}.")
    if known != names:
        accelerator.print(f"--model {args.model} has other names for the classes: classes are matched by number.")
    rows = splits[args.validation_split]
    if accelerator.is_local_main_process:
        check_scenes(args, rows, names, accelerator.print, show=True)
    if args.image_size:
        set_size(processor, args.image_size)
    loader = validation_loader(args, accelerator, rows, processor)
    measured, shown = evaluate(args, accelerator, model.to(accelerator.device), loader, names)
    if accelerator.is_main_process:
        args.output.mkdir(parents=True, exist_ok=True)
        draw_scenes(args.output / "predictions.png", shown, processor, names)
        write_results(args.output, measured)
    for name, value in measured["iou"].items():
        accelerator.print(f"{name:30} {'does not occur' if value is None else f'{value:.4f}'}")
    accelerator.print(f"{measured['images']} images: {describe(measured)}. The report is in {args.output}.")


# ------------------------------------------------------------------------------------------------------------ training


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    log = accelerator.print
    check_options(args, accelerator)
    if args.evaluate_only:
        return measure_finished(args, accelerator)
    warmup = {"warmup_epochs": (args.epochs or SEGMENTATION["epochs"]) * WARMUP}
    fill_defaults(args, SEGMENTATION | warmup, args.batch_size * args.accumulate * accelerator.num_processes)
    check_training(args)
    if not needs_training(args, accelerator):
        return None

    with accelerator.local_main_process_first():  # the other processes use its downloaded files
        splits, names = read_pairs(args)
        train_rows, validation_rows = choose_splits(args, splits, log)
    if accelerator.is_local_main_process:
        for rows in (train_rows, validation_rows):
            check_scenes(args, rows, names, log, show=True)

    set_seed(args.seed)
    with accelerator.local_main_process_first():
        model = build_segmenter(args, names, log)
        processor = segmentation_processor(args, log)
    freeze_unused_parameters(model, args.crop_size)
    if (
        accelerator.num_processes > 1 and accelerator.device.type != "cpu"
    ):  # PyTorch has no synchronized batch norm for CPUs
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    apply_speed_options(args, model, model.backbone)

    train_batches, train_loader = training_loader(args, accelerator, train_rows, processor)
    loader = validation_loader(args, accelerator, validation_rows, processor)
    settings = result_settings(args, accelerator, len(train_rows), (train_rows, validation_rows))
    backbone = model.config.backbone_config.model_type
    training = begin(
        *(args, accelerator, model, train_batches, train_loader, settings),
        about=f"on {backbone}, {len(names)} classes",
        size=(args.crop_size, args.crop_size),
        decay=linear_schedule,
        unsharded=NEEDS_WHOLE_MODEL,
    )
    shown = None

    def measure(model: torch.nn.Module) -> dict:
        nonlocal shown
        measured, shown = evaluate(args, accelerator, model, loader, names)
        return measured

    def draw_figures(folder: Path) -> None:
        draw_scenes(folder / "predictions.png", shown, processor, names)

    results = train_and_keep(
        *(args, accelerator, training),
        segmentation_loss(processor, args.distortion),
        measure,
        merit=lambda entry: (entry["mean_iou"], -entry["loss"]),
        describe=describe,
        processor=processor,
        draw_figures=draw_figures,
        card=functools.partial(segmentation_card, backbone),
    )
    best = results["best"]
    log(f"Best: epoch {best['epoch']}, mean IoU {best['mean_iou']:.4f}. The model is in {args.output}.")
    return upload(args, accelerator)


if __name__ == "__main__":
    run_training(parse_arguments(), train)
