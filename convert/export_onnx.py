"""Export an image classifier or a backbone to ONNX, for onnxruntime, OpenVINO and other runtimes."""

import argparse
import importlib.util
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from focal_hf import FocalBackbone, freeze
from focal_hf.compatibility_focal import AutoImageProcessor
from messages import ConversionError, print_progress, wrap_errors
from output_files import check_output_folder, move_into_place, run_script, staging_folder
from saved_models import load_focal, local_files

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSETS = range(18, 24)
# Largest difference of the outputs, as a share of the largest output.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.5}
TIMED_RUNS = 5

EPILOG = """\
DIR holds model.onnx, config.json and preprocessor_config.json. The graph has the input pixel_values, and the output
logits or, of a backbone, feature_maps.0, feature_maps.1, ... Before the folder appears, the outputs of the graph in
onnxruntime are compared with those of PyTorch, for several batches and sizes.

A graph for one size is faster than a graph for any size: its indices and biases are constants.

examples:
  a graph for images of 224 x 224 pixels, and one for images of any size:
    python convert/export_onnx.py --model focal-tiny --output focal-tiny-onnx --size 224x224
    python convert/export_onnx.py --model focal-tiny --output focal-tiny-any --size any

  with linear layers of eight bits, a third of the size:
    python convert/export_onnx.py --model focal-tiny --output focal-tiny-int8 --int8
"""


def image_size(text: str) -> tuple[int, int] | None:
    """An argparse type: height and width, or None for any."""
    if text == "any":
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels, such as 224x224, or any; got {text!r}")
    return int(match[1]), int(match[2])


def batch_size(text: str) -> int | None:
    """An argparse type: a number of images, or None for any."""
    if text == "any":
        return None
    if not re.fullmatch(r"[1-9]\d{0,4}", text):
        raise argparse.ArgumentTypeError(f"expected a number of images, or any; got {text!r}")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="folder of a model, or its name on the Hub")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--size", type=image_size, default=(), metavar="HxW|any", help="size of the images (default: the config's)"
    )
    parser.add_argument("--batch", type=batch_size, metavar="N|any", help="number of images in a batch (default: any)")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--dtype", choices=["fp32", "fp16"], default="fp32", help="dtype of the graph")
    precision.add_argument(
        "--int8", action="store_true", help="linear layers of eight bits; activations are quantized when the graph runs"
    )
    parser.add_argument("--opset", type=int, default=20, help=f"{OPSETS[0]} to {OPSETS[-1]} (default: 20)")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it holds a model")
    return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    """Raises ConversionError for what needs no model to be seen."""
    if missing := [package for package in PACKAGES if importlib.util.find_spec(package) is None]:
        raise ConversionError(
            f"Exporting needs the packages {', '.join(PACKAGES)}, and {', '.join(missing)} cannot be found. Install "
            "them with pip install '.[onnx]'."
        )
    if options.opset not in OPSETS:
        raise ConversionError(
            f"--opset must be from {OPSETS[0]} to {OPSETS[-1]}; got {options.opset}. Older operator sets lack the "
            "operators of the graph."
        )


def check_size(size: tuple[int, int] | None, model: nn.Module, name: str) -> None:
    if size is None and model.config.swin_compatible:
        raise ConversionError(
            f"--size any cannot be used with --model {name}, which computes what a Swin computes: its blocks shift a "
            "map only if it is larger than a window, and one graph cannot do both. Give one size."
        )
    least = model.config.least_side
    if size is not None and min(size) < least:
        raise ConversionError(
            f"--size {size[0]}x{size[1]} is too small for --model {name}, which drops incomplete patches and needs at "
            f"least {least} pixels per side. Give a larger size."
        )


def export(model: nn.Module, options: argparse.Namespace, size: tuple[int, int] | None, file: Path) -> None:
    """Writes the graph, in float32."""
    if size is not None:
        model = freeze(model, size)
    # A sample of one image or one window may fix what it leaves variable.
    height, width = size or (model.config.patch_size * 20 + 1, model.config.patch_size * 24 + 2)
    sample = torch.zeros(options.batch or 2, model.config.num_channels, height, width)
    variable = [*([] if options.batch else [0]), *([] if size else [2, 3])]
    shapes = dict.fromkeys(variable, torch.export.Dim.DYNAMIC)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            kwargs={"pixel_values": sample},
            dynamo=True,
            dynamic_shapes={"pixel_values": shapes} if variable else None,
            opset_version=options.opset,
            external_data=False,
            verbose=False,
        )
    for value, name in zip(program.model.graph.outputs, output_names(model), strict=True):
        value.name = name
    program.save(file, external_data=False)


def output_names(model: nn.Module) -> list[str]:
    if isinstance(model, FocalBackbone):
        return [f"feature_maps.{level}" for level in range(len(model.out_features))]
    return ["logits"]


def compress(file: Path, options: argparse.Namespace) -> None:
    """Rewrites the graph with float16 or with weights of eight bits, by onnxruntime's tools."""
    if options.int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        full = file.with_name("float32.onnx")
        file.rename(full)
        # Products of activations with each other, as in attention, stay in float32. So do convolutions, because
        # onnxruntime's are slower with integers.
        quantize_dynamic(
            full,
            file,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        full.unlink()
    elif options.dtype == "fp16":
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(file), keep_io_types=True), file)


def check_shapes(model: nn.Module, options: argparse.Namespace, size: tuple[int, int] | None) -> list[tuple[int, ...]]:
    """Shapes of the images with which the graph is compared with the model."""
    least, largest = model.config.least_side, max(model.config.image_sides)
    sizes = [size] if size else [(least, least), (largest, largest), (largest // 2 + 1, largest + 3)]
    batches = [options.batch] if options.batch else [1, 3]
    return [(batch, model.config.num_channels, *sides) for sides in sizes for batch in batches]


def compare(model: nn.Module, file: Path, shapes: list[tuple[int, ...]], precision: str) -> None:
    """Compares the outputs of the graph with those of the model, and prints the time that both take."""
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, session_options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        images = torch.randn(shape, generator=generator)
        inputs = {"pixel_values": images.numpy()}
        with torch.no_grad():
            expected = model(images)
        expected = list(expected.feature_maps if isinstance(model, FocalBackbone) else [expected.logits])
        found = session.run(None, inputs)
        pairs = zip(map(torch.from_numpy, found), expected, strict=True)
        # A maximum of tensors, because Python's `max` can miss a NaN.
        share = float(torch.stack([(one - other).abs().max() / other.abs().max() for one, other in pairs]).max())
        print_progress(f"{shape}: the largest difference from PyTorch is {share:.1e} of the largest output")
        if not share <= TOLERANCES[precision]:
            remedy = "Export without --int8" if precision == "int8" else "Try another --opset or --dtype"
            if not all(output.isfinite().all() for output in expected):
                remedy = "The model's own outputs are not finite: check its weights"
            raise ConversionError(
                f"The outputs of the graph differ from the model's by {share:.1e} of the largest output, for images of "
                f"shape {shape}. Nothing was kept. {remedy}."
            )

    def milliseconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(TIMED_RUNS):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1000

    with torch.no_grad():
        pytorch = milliseconds(lambda: model(images))
    runtime = milliseconds(lambda: session.run(None, inputs))
    print_progress(
        f"{file.stat().st_size / 1e6:.1f} MB. {shape}: onnxruntime takes {runtime:.1f} ms, PyTorch {pytorch:.1f} ms "
        f"(medians of {TIMED_RUNS})"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    check_options(options)
    output, inputs = options.output.resolve(), local_files(options.model)
    check_output_folder(output, options.overwrite, inputs)

    print_progress(f"Reading {options.model}")
    model = load_focal(options.model).float().eval()
    size = model.config.image_sides if options.size == () else options.size
    check_size(size, model, options.model)
    try:
        processor = AutoImageProcessor.from_pretrained(options.model, trust_remote_code=False)
    except Exception:  # transformers raises exceptions of almost any type
        if not isinstance(model, FocalBackbone):  # a detector or segmenter prepares the images of its backbone
            raise ConversionError(
                f"--model {options.model} has no image processor that can be loaded (preprocessor_config.json), so "
                "users of the graph could not prepare images. Save one in the model's folder with "
                "processor.save_pretrained(folder)."
            ) from None
        processor = None

    with staging_folder(output) as staging:
        folder = staging / output.name
        folder.mkdir()
        file = folder / "model.onnx"
        print_progress(f"Exporting for images of {'any size' if size is None else f'{size[0]} x {size[1]} pixels'}")
        with wrap_errors(f"Exporting --model {options.model} to {options.output}"):
            export(model, options, size, file)
            compress(file, options)
            model.config.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(folder)
        compare(model, file, check_shapes(model, options, size), "int8" if options.int8 else options.dtype)
        check_output_folder(output, options.overwrite, inputs)
        move_into_place(staging, output)
    print_progress(f"Done: {options.output}")


if __name__ == "__main__":
    run_script(main)
