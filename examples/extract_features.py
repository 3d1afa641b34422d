"""Write a feature vector for each picture to Parquet files: for search, clustering, or a small classifier.

Plain PyTorch with Accelerate, for Focal or any other image model of transformers. Run the same command again after an
interruption: it writes only the missing files. See `--help` and examples/README.md.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput, logging

from common.batches import Batches, load_batches, load_split, run_inference
from common.data import check_columns
from common.files import check_place
from common.models import load_trained, resize_views, run_on_plain_images
from common.options import (
    Problem,
    batch_size_option,
    first_line,
    image_size_option,
    no_readable_images,
    positive,
    printable,
    script_parser,
    workers_option,
)

EXAMPLES = """\
examples:
  one vector a picture, of a folder of pictures:
    accelerate launch examples/extract_features.py --model focal-tiny --data my_images --output features

  the mean of the maps of two stages, by two GPUs in bfloat16:
    accelerate launch --num_processes 2 --mixed_precision bf16 examples/extract_features.py --model focal-tiny \\
        --data my_images --output features --features stage2 stage4

  WebDataset files, without a copy on the disk, and a file of features for each of them:
    accelerate launch examples/extract_features.py --model focal-tiny --data my_tars --streaming --output features \\
        --image-column jpg --label-column cls
"""

IMAGES_PER_SHARD = 2000
MOST_SHARDS = 1000  # for a stream; a stream of an image folder has a source file for each picture
SETTINGS = b"extract_features"  # the metadata key of a shard's settings


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(__doc__, EXAMPLES)

    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="NAME", help="a folder or a name on the Hub")
    group.add_argument(
        "--features",
        nargs="+",
        default=["pooled"],
        metavar="NAME",
        help="pooled: the input of the model's classifier (default); or stages such as stage2 stage4: the mean of the "
        "backbone's feature map of each stage",
    )
    image_size_option(group)

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        metavar="NAME",
        help="a folder of images, with or without a folder for each class, a folder of Parquet or WebDataset files, or "
        "the name of a data set on the Hub",
    )
    group.add_argument("--split", metavar="NAME", help="default: all of a folder of images, or the only split")
    group.add_argument("--image-column", default="image", metavar="NAME", help="default: image")
    group.add_argument(
        "--label-column", metavar="NAME", help="copied to the features (default: label, if there is one)"
    )
    group.add_argument(
        "--streaming", action="store_true", help="read the data during extraction, without a copy on this disk"
    )
    group.add_argument(
        "--strict",
        action="store_true",
        help="stop at a picture that cannot be read (default: skip the picture and print its name)",
    )

    group = parser.add_argument_group("result")
    group.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder for the Parquet files")
    group.add_argument(
        "--shards",
        type=positive(int),
        metavar="N",
        help=f"number of files (default: one for every {IMAGES_PER_SHARD} images; of a stream one for each of its own "
        f"files, at most {MOST_SHARDS})",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="remove files of features in FOLDER that were written with other settings",
    )

    group = parser.add_argument_group("speed")
    batch_size_option(group)
    workers_option(group)
    args = parser.parse_args()
    if "pooled" in args.features and len(args.features) > 1:
        parser.error("argument --features: either pooled or stages, not both")
    return args


# --------------------------------------------------------------------------------------------------------------- model


def load_model(args: argparse.Namespace) -> tuple:
    """The model that gives the features, and its image processor."""
    if args.features == ["pooled"]:
        return load_trained(args.model, AutoModel)
    try:
        config = AutoConfig.from_pretrained(args.model)
    except Exception as error:
        raise Problem(f"Cannot load --model {args.model}: {first_line(error)}") from error
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise Problem(f"--model {args.model}, a {config.model_type}, has no stages: use --features pooled.")
    unknown = [name for name in args.features if name not in config.stage_names]
    if unknown:
        raise Problem(f"--model {args.model} has no {', '.join(unknown)}: it has {', '.join(config.stage_names)}.")
    args.features = [name for name in config.stage_names if name in args.features]  # in the order of the maps
    # Not AutoBackbone, which does not look into folders.
    return load_trained(args.model, MODEL_FOR_BACKBONE_MAPPING[type(config)], out_features=args.features)


def vectors_of(args: argparse.Namespace, output: ModelOutput) -> dict[str, torch.Tensor]:
    """One vector an image for each of --features."""
    if args.features != ["pooled"]:
        means = (feature_map.float().mean((2, 3)).cpu() for feature_map in output.feature_maps)
        return dict(zip(args.features, means, strict=True))
    if output.get("pooler_output") is None:
        raise Problem(f"--model {args.model} gives no pooled features.")
    return {"pooled": output.pooler_output.flatten(1).float().cpu()}


def fingerprint(model: PreTrainedModel) -> str:
    """A checksum of the weights, so that other weights in the same folder are noticed."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- shards


def shard_file(folder: Path, number: int, count: int) -> Path:
    return folder / f"features-{number:05}-of-{count:05}.parquet"


def check_shards(args: argparse.Namespace, settings: dict) -> list[Path]:
    """Shards in the output folder with other settings. Without --overwrite, such shards raise an error."""
    folder, others = args.output, {}
    for file in sorted(folder.glob("features-*-of-*.parquet")):
        try:
            made_with = json.loads((pq.read_schema(file).metadata or {}).get(SETTINGS, b"{}"))
        except (OSError, pa.ArrowException) as error:
            raise Problem(f"Not a readable Parquet file: {file}. Remove it. ({first_line(error)})") from error
        if made_with != settings:
            others[file] = sorted(key for key in settings if made_with.get(key) != settings[key])
    if others and not args.overwrite:
        file, differing = next(iter(others.items()))
        raise Problem(
            f"{file} was made with other settings ({', '.join(differing)}): name another --output, or add --overwrite "
            f"to remove the {len(others)} file(s) like it."
        )
    return list(others)


def check_shared(path: Path) -> None:
    """Raise an error if a file or folder of another process is missing here."""
    if not path.exists():
        raise Problem(f"{path}, from another machine, is missing: name an --output that all machines share.")


def write_shard(file: Path, rows: dict[str, list], schema: pa.Schema) -> None:
    """Write a shard to a temporary file and rename it, so that every shard is complete."""
    columns = []
    for field in schema:
        if pa.types.is_fixed_size_list(field.type):
            values = torch.cat([torch.empty(0, field.type.list_size), *rows[field.name]])
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values.flatten().numpy()), type=field.type))
        else:
            columns.append(pa.array(rows[field.name], type=field.type))
    temporary = file.with_name(f".{file.name}.part")
    try:
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), temporary)
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Problem(f"Cannot write {file}: {first_line(error)}. Run the same command again to continue.") from error


# ---------------------------------------------------------------------------------------------------------- extraction


@torch.no_grad()
def extract(args: argparse.Namespace, accelerator: Accelerator) -> None:
    check_place("--output", args.output, args.data)
    with accelerator.local_main_process_first():  # the other processes use its downloads and caches
        model, processor = load_model(args)
        data = load_split(args.data, args.split, streaming=args.streaming, drop_labels=None)
    check_columns(args, data.features, others=("label",))
    label_column = args.label_column or ("label" if "label" in data.features else None)
    if args.image_size:
        resize_views(processor, args.image_size)

    size, unit = (data.num_shards, "source file(s)") if args.streaming else (len(data), "image(s)")
    if (args.shards or 1) > size:
        raise Problem(f"--data {args.data} has {size} {unit}, which cannot be cut into {args.shards or 1} shard(s).")
    count = args.shards or (min(size, MOST_SHARDS) if args.streaming else math.ceil(size / IMAGES_PER_SHARD))
    settings = {
        "model": args.model,
        "weights": fingerprint(model),
        "image processor": json.loads(processor.to_json_string()),
        "features": args.features,
        "precision": accelerator.mixed_precision,
        "data": args.data,
        "split": args.split,
        "columns": [args.image_column, label_column],
        "size": f"{size} {unit}",
        "shards": count,
    }
    others = check_shards(args, settings)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    output, _ = run_on_plain_images(model, processor, args.model)
    widths = {name: vectors.shape[1] for name, vectors in vectors_of(args, output).items()}
    number = datasets.Value("float32")
    # The schema of `datasets`, so that the names of the classes are known when the files are read.
    schema = datasets.Features(
        {"path": datasets.Value("string")}
        | ({"label": data.features[label_column]} if label_column else {})
        | {name: datasets.List(number, length=width) for name, width in widths.items()}
    ).arrow_schema
    schema = schema.with_metadata(schema.metadata | {SETTINGS: json.dumps(settings)})

    missing = [
        shard
        for shard in range(count)
        if (file := shard_file(args.output, shard, count)) in others or not file.exists()
    ]
    accelerator.wait_for_everyone()  # no process changes the files before all have listed them
    if accelerator.is_main_process:
        args.output.mkdir(parents=True, exist_ok=True)
        for file in (*others, *args.output.glob(".features-*.part")):
            file.unlink()
    accelerator.wait_for_everyone()
    check_shared(args.output)
    accelerator.print(f"{count} shard(s), {count - len(missing)} already there; {', '.join(settings['features'])}.")

    batches = Batches(
        data,
        (args.image_column, label_column),
        processor,
        args.batch_size,
        count,
        missing[accelerator.process_index :: accelerator.num_processes],
        args.data,
    )
    unreadable: list[str] = []
    shards: dict[int, dict[str, list]] = {}  # several at a time if several workers read a stream
    with tqdm(
        total=None if args.streaming else sum(end - start for start, end in map(batches.bounds, batches.pieces)),
        unit="image",
        desc="main process" if accelerator.num_processes > 1 else None,
        disable=not accelerator.is_main_process,
    ) as bar:
        for batch in load_batches(args, accelerator, batches, unreadable):
            rows = shards.setdefault(batch["piece"], {name: [] for name in schema.names})
            if batch["names"]:
                output = model(pixel_values=batch["pixel_values"].to(accelerator.device, non_blocking=True))
                for name, vectors in vectors_of(args, output).items():
                    rows[name].append(vectors)
                rows["path"] += batch["names"]
                if label_column:
                    rows["label"] += batch["labels"]
                bar.update(len(batch["names"]))
            if batch["last"]:
                write_shard(shard_file(args.output, batch["piece"], count), shards.pop(batch["piece"]), schema)
    unreadable = sorted(gather_object(unreadable))
    for item in unreadable:
        accelerator.print(f"Not a readable image, left out: {printable(item)}")
    files = [shard_file(args.output, shard, count) for shard in range(count)]
    for file in files:
        check_shared(file)
    images = sum(pq.read_metadata(file).num_rows for file in files)
    if not images:
        accelerator.wait_for_everyone()  # no process removes files before all have counted the images
        if accelerator.is_main_process:
            for file in files:
                file.unlink()
        raise no_readable_images(args.data, unreadable)
    left_out = f"; {len(unreadable)} left out" if unreadable else ""
    accelerator.print(f"Features of {images} images are in {args.output}{left_out}.")


if __name__ == "__main__":
    logging.set_verbosity_error()  # no warning about the unused classifier; missing weights raise an error
    run_inference(parse_arguments(), extract)
