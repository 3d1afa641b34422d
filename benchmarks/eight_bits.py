"""Compares ways to run Focal with eight bits on this machine: file size, speed and accuracy.

Two models are used:

- A backbone of Focal-Tiny, with one image of 224 x 224 pixels: size of the file, time, and cosine similarity of the map
  of each stage to float32. The weights are random, drawn so that every layer changes the maps. Activations are
  calibrated with crops of one photo of scikit-learn; the maps are those of crops of another photo.
- The classifier that `make quickstart` trains: accuracy on its test pictures. Activations are calibrated with its
  validation pictures.

Each way runs in its own process. The ways take turns of half a second until the time (--seconds) is over. The table has
the medians. The packages onnx, onnxscript, onnxruntime, openvino, nncf and torchao are needed.
"""

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, TorchAoConfig

import focal_hf
from focal_hf import FocalBackbone, FocalConfig, FocalPreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "convert"))

from runtimes import TURN, load, times_of_turn  # noqa: E402

import export_onnx  # noqa: E402

# The runtime, and the folder of the files.
WAYS = {
    "onnxruntime, float32": ("onnxruntime", "float32"),
    "onnxruntime, dynamic (`--int8`)": ("onnxruntime", "dynamic"),
    "onnxruntime, static": ("onnxruntime", "static"),
    "OpenVINO, float32": ("openvino", "float32"),
    "OpenVINO, the graph of `--int8`": ("openvino", "dynamic"),
    "OpenVINO, weights by nncf": ("openvino", "nncf-weights"),
    "OpenVINO, weights and activations by nncf": ("openvino", "nncf"),
    "PyTorch, float32": ("pytorch", "pytorch"),
    "PyTorch, weights by torchao": ("pytorch", "torchao-weights"),
    "PyTorch, weights and activations by torchao": ("pytorch", "torchao"),
}
PACKAGES = (*export_onnx.PACKAGES, "openvino", "nncf", "torchao")


def random_backbone() -> FocalBackbone:
    generator = torch.Generator().manual_seed(0)
    model = FocalBackbone(FocalConfig(drop_path_rate=0, out_features=["stage1", "stage2", "stage3", "stage4"]))
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, std=0.2 if weight.ndim == 1 else 1, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weight.data += 1
        elif weight.ndim > 1 and name.endswith("weight"):
            weight.data /= weight[0].numel() ** 0.5
    return model


def crops(photo: np.ndarray, count: int) -> np.ndarray:
    """Squares of 224 pixels at random positions, normalized."""
    corners = np.random.default_rng(0).integers(0, np.array(photo.shape[:2]) - 224, (count, 2))
    squares = np.stack([photo[top : top + 224, left : left + 224] for top, left in corners])
    return (squares.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)


def digits(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images of the quickstart and the numbers of their classes."""
    files = sorted((folder / "digits" / split).glob("*/*.png"))
    processor = AutoImageProcessor.from_pretrained(folder / "model")
    images = processor([Image.open(file).convert("RGB") for file in files], return_tensors="np")["pixel_values"]
    return images, np.array([int(file.parent.name) for file in files])


def write_models(model: Path, size: int, images: np.ndarray, folder: Path) -> None:
    """Writes the files of all ways, calibrated with the images."""
    import nncf
    import openvino
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    samples = [{"pixel_values": image[None]} for image in images]

    class Reader(CalibrationDataReader):
        remaining = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.remaining, None)

    for name, options in {"float32": [], "dynamic": ["--int8"]}.items():
        arguments = ["--model", str(model), "--output", str(folder / name), "--size", f"{size}x{size}", "--batch", "1"]
        export_onnx.main([*arguments, *options])
    graph = folder / "float32" / "model.onnx"

    (folder / "static").mkdir()
    quantize_static(
        graph,
        folder / "static" / "model.onnx",
        Reader(),
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        extra_options={"MatMulConstBOnly": True},
    )

    network = openvino.Core().read_model(graph)
    compressed = nncf.compress_weights(network.clone(), mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(compressed, folder / "nncf-weights" / "model.xml", compress_to_fp16=False)
    dataset = nncf.Dataset(samples)
    quantized = nncf.quantize(network, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples))
    openvino.save_model(quantized, folder / "nncf" / "model.xml", compress_to_fp16=False)

    load_model(model).save_pretrained(folder / "pytorch")
    for name, kind in {
        "torchao-weights": Int8WeightOnlyConfig,
        "torchao": Int8DynamicActivationInt8WeightConfig,
    }.items():
        load_model(model, quantization_config=TorchAoConfig(kind())).save_pretrained(folder / name)


def load_model(folder: Path, **options: object) -> FocalPreTrainedModel:
    (name,) = AutoConfig.from_pretrained(folder).architectures
    return getattr(focal_hf, name).from_pretrained(folder, **options)


def start(runtime: str, folder: Path, threads: int) -> None:
    """Loads the files of a way into this process."""
    global run
    if runtime == "pytorch":
        torch.set_num_threads(threads)
        model = load_model(folder)

        @torch.no_grad()
        def run(images: np.ndarray) -> Iterable[torch.Tensor]:
            output = model(torch.from_numpy(images))
            return output.feature_maps if "feature_maps" in output else [output.logits]
    else:
        (file,) = [file for file in folder.iterdir() if file.suffix in (".onnx", ".xml")]
        run = load(runtime, file, threads)


def outputs(images: np.ndarray) -> list[np.ndarray]:
    """The logits, or the maps of each stage, of all images."""
    rows = []
    for image in images:
        found = run(image[None])
        tensors = found.values() if isinstance(found, Mapping) else found
        rows.append([np.array(tensor) for tensor in tensors])
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def take_turn(image: np.ndarray) -> list[float]:
    return times_of_turn(partial(run, image))


def measure(
    folder: Path, images: np.ndarray, seconds: float, threads: int
) -> tuple[dict[str, list[np.ndarray]], dict[str, float]]:
    """The outputs of each way, and the median time of its runs with one image."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools, times = {}, {}
        for way, (runtime, name) in WAYS.items():
            pool = ProcessPoolExecutor(1, context, initializer=start, initargs=(runtime, folder / name, threads))
            pools[way] = stack.enter_context(pool)
            times[way] = []
        found = {way: pool.submit(outputs, images).result() for way, pool in pools.items()}
        for _ in range(max(1, round(seconds / TURN))):
            for way, pool in pools.items():
                times[way] += pool.submit(take_turn, images[:1]).result()
    return found, {way: statistics.median(values) for way, values in times.items()}


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.ravel().astype(np.float64), other.ravel().astype(np.float64)
    return one @ other / (np.linalg.norm(one) * np.linalg.norm(other))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=ROOT / "quickstart", help="folder of make quickstart")
    parser.add_argument("--seconds", type=float, default=20, help="time of a way")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if not (options.quickstart / "model").is_dir():
        sys.exit(f"error: {options.quickstart} holds no model of the quickstart. Run make quickstart first.")
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        sys.exit(f"error: the packages {', '.join(missing)} cannot be found. Install them with pip.")

    china, flower = load_sample_images().images
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        random_backbone().save_pretrained(folder / "model")
        write_models(folder / "model", 224, crops(china, 16), folder / "tiny")
        maps, times = measure(folder / "tiny", crops(flower, 8), options.seconds, options.threads)
        model = options.quickstart / "model"
        size = AutoConfig.from_pretrained(model).image_sides[0]
        write_models(model, size, digits(options.quickstart, "validation")[0], folder / "digits")
        images, classes = digits(options.quickstart, "test")
        logits, _ = measure(folder / "digits", images, 0, options.threads)
        print("| | file, MB | ms | speed | cosine of stage 1 | stage 2 | stage 3 | stage 4 | accuracy on digits |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
        first = next(iter(WAYS))
        for way, (_, name) in WAYS.items():
            megabytes = sum(file.stat().st_size for file in (folder / "tiny" / name).iterdir()) / 1e6
            cells = [f"{megabytes:.1f}", f"{times[way] * 1000:.1f}", f"{times[first] / times[way]:.2f}"]
            cells += [f"{cosine(one, other):.4f}" for one, other in zip(maps[way], maps[first], strict=True)]
            accuracy = (logits[way][0].argmax(axis=1) == classes).mean()
            print(f"| {way} | {' | '.join(cells)} | {100 * accuracy:.1f} % |")


if __name__ == "__main__":
    main()
