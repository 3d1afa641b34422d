"""Detectors of torchvision on a Focal feature pyramid, and the messages if torchvision does not run."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import SwinBackbone, SwinConfig
from transformers.utils import is_torchvision_available

from conftest import ROOT
from focal_hf import FocalBackbone
from small_models import BOTH, SWIN, pixels, prepare, tiny

if is_torchvision_available():
    from torchvision.models.detection import FCOS, MaskRCNN, RetinaNet
    from torchvision.ops import box_iou
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    from focal_hf.torchvision_focal import BackboneWithFPN

with_torchvision = pytest.mark.skipif(
    not is_torchvision_available(), reason="torchvision is not installed; it must be built for this PyTorch"
)
STAGES = ["stage1", "stage2", "stage3", "stage4"]
FOUR = {"image_size": 64, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)}
FOUR_FOCAL = FOUR | {"focal_levels": (2,) * 4, "focal_windows": (3,) * 4, "expand_sizes": (2,) * 4}


def mask_rcnn(attention_type):
    backbone = FocalBackbone(tiny(attention_type, **FOUR_FOCAL, out_features=STAGES))
    few = {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 50, "box_detections_per_img": 5}
    return MaskRCNN(
        BackboneWithFPN(backbone, 32), num_classes=3, min_size=96, max_size=160, box_score_thresh=0.0, **few
    )


def with_two_coarse_levels(detector, attention_type, **options):
    backbone = FocalBackbone(tiny(attention_type, **FOUR_FOCAL, out_features=STAGES[1:]))
    pyramid = BackboneWithFPN(backbone, 32, LastLevelP6P7(backbone.channels[-1], 32))
    return detector(pyramid, num_classes=3, min_size=96, max_size=160, **options)


def retinanet(attention_type):
    return with_two_coarse_levels(RetinaNet, attention_type, score_thresh=0.0)


def fcos(attention_type):
    return with_two_coarse_levels(FCOS, attention_type, score_thresh=0.0)


def scene(seed, height, width):
    """A dim image with a red and a green rectangle, classes 1 and 2."""
    generator = torch.Generator().manual_seed(seed)
    image = 0.3 * torch.rand(3, height, width, generator=generator)
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    boxes = torch.empty(2, 4)
    for number in range(2):
        left = int(torch.randint(4, width // 2 - 30, (), generator=generator)) + number * (width // 2)
        top = int(torch.randint(4, height - 36, (), generator=generator))
        image[number, top : top + 30, left : left + 24] = 1
        masks[number, top : top + 30, left : left + 24] = 1
        boxes[number] = torch.tensor([left, top, left + 24, top + 30])
    return image, {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}


@with_torchvision
@BOTH
@pytest.mark.parametrize("size", [(128, 192), (130, 201), (255, 97)])
def test_pyramid_has_the_levels_of_swin(attention_type, size):
    pyramids = [
        BackboneWithFPN(backbone, 24)
        for backbone in (
            FocalBackbone(tiny(attention_type, **FOUR_FOCAL, out_features=STAGES)),
            SwinBackbone(SwinConfig(**SWIN | FOUR, out_features=STAGES)),
        )
    ]
    with torch.no_grad():
        ours, swins = ({name: maps.shape for name, maps in of(pixels(2, 3, *size)).items()} for of in pyramids)
    assert ours == swins
    expected = {str(level): (2, 24, *(-(-side // 2 ** (level + 2)) for side in size)) for level in range(4)}
    assert {name: shape for name, shape in ours.items() if name != "pool"} == expected
    assert pyramids[0].out_channels == 24


@with_torchvision
@BOTH
@pytest.mark.parametrize("build", [mask_rcnn, retinanet, fcos])
def test_detectors_train_predict_save_and_load(build, attention_type, tmp_path):
    torch.manual_seed(0)
    model = build(attention_type)
    images, targets = zip(scene(0, 70, 100), scene(1, 120, 90), strict=True)  # padded to one size that is neither's
    calls = []
    block = model.backbone.body.focal.encoder.layers[0].blocks[0]
    block.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))

    def gradients():
        model.zero_grad()
        torch.manual_seed(1)  # for the samples that the losses are of
        sum(model(images, targets).values()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain = gradients()
    assert all(gradient is not None and gradient.isfinite().all() for gradient in plain.values())
    assert all(gradient.any() for name, gradient in plain.items() if name.startswith("backbone.body"))
    assert len(calls) == 1
    model.backbone.body.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert len(calls) > 2  # once more, and again in the backward pass
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")

    torch.save(model.state_dict(), tmp_path / "detector.pt")
    torch.manual_seed(2)
    loaded = build(attention_type)
    loaded.load_state_dict(torch.load(tmp_path / "detector.pt", weights_only=True))
    with torch.no_grad():
        found, again = model.eval()(images), loaded.eval()(images)
    for image, ours, others in zip(images, found, again, strict=True):
        assert len(ours["boxes"]) > 0
        assert {"boxes", "labels", "scores"} <= set(ours)
        if build is mask_rcnn:
            assert ours["masks"].shape == (len(ours["boxes"]), 1, *image.shape[1:])
        for name, values in ours.items():
            assert torch.equal(values, others[name]), name


@with_torchvision
@BOTH
def test_fcos_learns_boxes(attention_type):
    torch.manual_seed(0)
    model = fcos(attention_type)
    images, targets = zip(scene(0, 96, 128), scene(1, 96, 110), strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(30):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(images)
    for answer, target in zip(found, targets, strict=True):
        for label, box in zip(target["labels"], target["boxes"], strict=True):
            best = answer["boxes"][answer["labels"] == label][0]  # they are sorted by score
            assert box_iou(best[None], box[None]).item() > 0.6


@with_torchvision
@pytest.mark.slow
def test_examples_of_the_documentation_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "torchvision.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    prepare(tmp_path, "focal")
    script = tmp_path / "examples.py"
    script.write_text("\n".join(blocks))
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "'masks': [" in run.stdout


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_message_without_torchvision():
    with pytest.raises(ImportError, match=re.escape("pip install 'focal-hf[torchvision]'")):
        importlib.import_module("focal_hf.torchvision_focal")


def test_message_where_torchvision_does_not_run(tmp_path):
    """torchvision from PyPI does not run with the CPU build of PyTorch. transformers then fails, and Focal says why."""
    package = tmp_path / "torchvision" / "__init__.py"
    package.parent.mkdir()
    package.write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", "import focal_hf"]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode != 0
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: torchvision is installed but does not run with PyTorch")
    assert "(operator torchvision::nms does not exist)" in message
