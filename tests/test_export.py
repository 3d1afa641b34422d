"""torch.compile, torch.export and ONNX give the same outputs, in few graphs."""

import random

import pytest
import torch
from packaging.version import Version
from torch._dynamo.utils import counters
from transformers import __version__ as transformers_version

from focal_hf import FocalBackbone, FocalForImageClassification, FocalForMaskedImageModeling, cpu_attention_focal
from focal_hf.modeling_focal import FocalDownsample
from small_models import BOTH, DEVICE, NO_COMPILER, TORCH_2_7, pixels, randomized, tiny

BATCH = {"pixel_values": {0: torch.export.Dim.AUTO}}
BLOCK = {"embed_dim": 8, "depths": (1,), "num_heads": (2,), "focal_levels": (2,), "focal_windows": (3,)}
BLOCK |= {"expand_sizes": (2,), "encoder_stride": 4}
SIZES = [(36, 40), (40, 52), (64, 33), (50, 70), (100, 100), (33, 65), (128, 64), (72, 45), (90, 91), (40, 41)]

try:
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
except ModuleNotFoundError:
    DynamoExporter = OnnxExporter = None

needs_exporters = pytest.mark.skipif(
    torch.__version__ < "2.11" or OnnxExporter is None, reason="exporters need transformers 5.13 and torch 2.11"
)


def values(outputs):
    """Returns all tensors of a model output, in order."""
    return [value for value in torch.utils._pytree.tree_leaves(tuple(outputs.values())) if value is not None]


@pytest.fixture
def graphs(without_default_device):
    """A function that returns the number of compiled graphs. A graph break fails the test."""
    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    torch.compiler.reset()


# Each class occurs with both attention types and with both implementations. Its head is independent of them.
HEADS = {
    ("focal", "sdpa"): [FocalForImageClassification, FocalBackbone],
    ("focal", "eager"): [FocalForMaskedImageModeling],
    ("topk", "sdpa"): [FocalForMaskedImageModeling],
    ("topk", "eager"): [FocalForImageClassification, FocalBackbone],
}


@TORCH_2_7
@pytest.mark.parametrize(("attention_type", "implementation"), HEADS)
def test_one_graph_for_batches_of_one_shape(attention_type, implementation, graphs, monkeypatch):
    """The eager call before compilation is needed, because transformers installs hooks in it."""
    monkeypatch.setattr(cpu_attention_focal, "TOKENS_PER_CHUNK", 10)
    classes = HEADS[attention_type, implementation]
    for model_class in classes:
        model = randomized(model_class(tiny(attention_type, **BLOCK)))
        model.set_attn_implementation(implementation)
        options = {"output_hidden_states": True, "output_attentions": implementation == "eager"}
        with torch.no_grad():
            model(pixels(2, 3, 36, 40), **options)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            found = values(compiled(pixels(2, 3, 36, 40), **options))
            before = graphs()
            again = values(compiled(pixels(2, 3, 36, 40) + 1, **options))
            assert graphs() == before
            torch.testing.assert_close(found, values(model(pixels(2, 3, 36, 40), **options)), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(again, values(model(pixels(2, 3, 36, 40) + 1, **options)), rtol=1e-5, atol=1e-5)
    assert graphs() == len(classes)


@TORCH_2_7
@BOTH
def test_training_steps_of_one_shape_share_a_graph(attention_type, graphs):
    """The optimizer changes the weights between the steps."""
    # Unless it is told, transformers' loss writes into the config what problem this is, and compiles again.
    config = tiny(attention_type, **BLOCK, problem_type="single_label_classification")
    model, twin = (randomized(FocalForImageClassification(config)).train() for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    labels = torch.tensor([1, 4], device=DEVICE)
    for trained, called in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            called(pixels(2, 3, 36, 40) + step, labels=labels).loss.backward()
            optimizer.step()
    assert graphs() == 1
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-4, atol=1e-5)


@TORCH_2_7
@BOTH
def test_few_graphs_for_images_of_many_sizes(attention_type, graphs, monkeypatch):
    """There are more sizes than PyTorch keeps graphs. Some do not divide into patches or windows."""
    monkeypatch.setattr(cpu_attention_focal, "TOKENS_PER_CHUNK", 100)
    model = randomized(FocalForImageClassification(tiny(attention_type, **BLOCK)))
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    assert len(SIZES) > torch._dynamo.config.recompile_limit
    with torch.no_grad():
        for height, width in SIZES:
            images = pixels(2, 3, height, width)
            torch.testing.assert_close(compiled(images).logits, model(images).logits, rtol=1e-5, atol=1e-5)
    assert graphs() <= {"focal": 1, "topk": 4}[attention_type]


@TORCH_2_7
@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
def test_inductor_trains_on_images_of_changing_size(graphs):
    """With dynamic sizes and convolutions, inductor fails on saved maps that are views."""
    # A model of two stages takes longer than one stage and the downsampling after it.
    stages = BLOCK | {"embed_dim": 4, "num_heads": (1,), "expand_sizes": (1,), "mlp_ratio": 1.0}
    config = tiny("focal", **stages, problem_type="single_label_classification")
    model, downsample = randomized(FocalForImageClassification(config)).train(), randomized(FocalDownsample(config, 4))
    labels = torch.tensor([1, 4], device=DEVICE)

    def model_loss(images):
        return model(images, labels=labels).loss

    def downsampled(maps):
        return downsample(maps.flatten(1, 2), maps.shape[1:3]).square().sum()

    for module, function, inputs, sides in (
        (model, model_loss, pixels(2, 3, 40, 52), (2, 3)),
        (downsample, downsampled, pixels(2, 10, 13, 4), (1, 2)),
    ):
        for side in sides:  # instead of inputs of another size before, for which there would be another graph
            torch._dynamo.maybe_mark_dynamic(inputs, side)
        found, expected = (
            torch.autograd.grad(called(inputs), list(module.parameters()))
            for called in (torch.compile(function, fullgraph=True), function)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert graphs() == 2


def called(exported, images):
    """Runs an exported model: a callable since transformers 5.23, an ExportedProgram before."""
    if hasattr(exported, "components"):
        return values(exported(pixel_values=images))
    program = exported.module() if isinstance(exported, torch.export.ExportedProgram) else exported
    outputs = program(pixel_values=images)
    return list(outputs) if isinstance(outputs, tuple | list) else values(outputs)


def skip_without_onnxruntime():
    if DEVICE.type != "cpu":
        pytest.skip("onnxruntime runs on the CPU here")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


# Half of all combinations. Any three of the four arguments occur in all their combinations.
EXPORTS = [
    (exporter, model_class, implementation, "focal" if (i + j + k) % 2 == 0 else "topk")
    for i, exporter in enumerate(["dynamo", "onnx"])
    for j, model_class in enumerate([FocalForImageClassification, FocalBackbone])
    for k, implementation in enumerate(["sdpa", "eager"])
]


@needs_exporters
@pytest.mark.parametrize(("format", "model_class", "implementation", "attention_type"), EXPORTS)
def test_exports_serve_any_batch(format, model_class, implementation, attention_type, tmp_path):
    exporter = OnnxExporter if format == "onnx" else DynamoExporter
    if exporter is OnnxExporter:
        skip_without_onnxruntime()
    model = randomized(model_class(tiny(attention_type, **BLOCK)))
    model.set_attn_implementation(implementation)
    # It is padded, and not the size of the config.
    sample = {"pixel_values": pixels(2, 3, 36, 45)}
    exported = exporter().export(model, sample, exporter_config(exporter)(dynamic_shapes=BATCH))
    if Version(transformers_version) >= Version("5.23"):
        from transformers.exporters.base import ExportedModel

        exported.save_pretrained(tmp_path)
        # Programs of torch.export are pickled, and from transformers 5.24 on have to be trusted as remote code has.
        exported = ExportedModel.from_pretrained(tmp_path, trust_remote_code=exporter is DynamoExporter)
    for batch in (2, 5, 1):
        images = pixels(batch, 3, 36, 45)
        with torch.no_grad():
            torch.testing.assert_close(called(exported, images), values(model(images)), rtol=1e-4, atol=1e-4)


@needs_exporters
@pytest.mark.parametrize(
    ("attention_type", "model_class"), [("focal", FocalForImageClassification), ("topk", FocalBackbone)]
)
def test_one_onnx_graph_serves_all_sizes(attention_type, model_class, tmp_path):
    """From one pixel on, in batches from one image on; with maps of the size whose indices a topk model saves."""
    skip_without_onnxruntime()
    import onnxruntime

    # A single block, because symbolic sizes take seconds for each.
    model = randomized(model_class(tiny(attention_type, **BLOCK, image_size=24)))
    with torch.no_grad():
        for name, index in model.named_buffers():
            if "nearest_index" in name:
                index[:, -1] = index[:, 0]
    any_size = {"pixel_values": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
    sample = {"pixel_values": pixels(2, 3, 36, 45)}
    torch.onnx.export(model, kwargs=sample, dynamo=True, dynamic_shapes=any_size, verbose=False).save(tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx")
    sizes = random.Random(0)
    shapes = [(sizes.randint(1, 4), 3, sizes.randint(1, 90), sizes.randint(1, 90)) for _ in range(20)]
    for shape in [(1, 3, 1, 1), (2, 3, 24, 24), *shapes]:
        with torch.no_grad():
            expected = values(model(pixels(*shape)))
        found = session.run(None, {"pixel_values": pixels(*shape).numpy()})
        torch.testing.assert_close([torch.from_numpy(array) for array in found], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_type": "topk", "focal_levels": (2, 2)},
        {"swin_compatible": True, "downsample_type": "patch_merging", "focal_levels": (0, 0), "focal_pool": "none"},
    ],
    ids=["topk", "Swin"],
)
@TORCH_2_7
def test_exported_blocks_shift_as_the_model_does(settings):
    """At 16 x 24 pixels, the map of the second stage is no larger than a window, and Swin does not shift it."""
    stages = BLOCK | {"depths": (2, 2), "num_heads": (2, 2), "focal_windows": (1, 1), "expand_sizes": (0, 0)}
    model = randomized(FocalForImageClassification(tiny(**stages | {"use_shift": True} | settings)))
    images = pixels(2, 3, 16, 24)
    exported = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(images).logits, model(images).logits, rtol=1e-5, atol=1e-5)


def exporter_config(exporter):
    return OnnxConfig if exporter is OnnxExporter else DynamoConfig
