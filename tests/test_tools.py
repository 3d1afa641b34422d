"""What people do with a Swin of transformers, done with Focal: loading, offloading, adapting, training, pipelines.

And every example in docs/tools.md.
"""

import json
import re
from functools import partial

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from conftest import ROOT
from extra_packages import run_tests_with
from focal_hf import FocalBackbone, FocalForImageClassification, FocalForMaskedImageModeling, FocalModel, freeze
from small_models import BOTH, pixels, prepare, randomized, tiny

ALL_CLASSES = [FocalModel, FocalForImageClassification, FocalForMaskedImageModeling, FocalBackbone]
SHARDS = {"max_shard_size": "20KB"}
DISK_ALONE = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.13"),
    reason="up to transformers 5.12, no model runs with all its weights on the disk",
)
# What the examples need: transformers' exporters, and its image processors without torchvision.
RUNS_EXAMPLES = torch.__version__ >= "2.11" and Version(transformers.__version__) >= Version("5.18")


def logits(model, images):
    with torch.no_grad():
        return model(images.to(model.dtype)).logits


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_shards_load_through_the_meta_device_with_every_buffer(model_class, attention_type, dtype, tmp_path):
    model = randomized(model_class(tiny(attention_type)))
    model.save_pretrained(tmp_path, **SHARDS)
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) > 1
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = model_class.from_pretrained(tmp_path, dtype=dtype)
    expected = dict(model.named_buffers())
    assert bool(expected) == (attention_type == "topk")
    for (name, buffer), other in zip(loaded.named_buffers(), expected.values(), strict=True):
        assert buffer.device.type == "cpu", name
        assert buffer.dtype == torch.int64, name
        assert torch.equal(buffer, other), name
    for (name, parameter), other in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, other.to(dtype)), name


@BOTH
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("place", ["auto", "memory and disk", pytest.param("disk", marks=DISK_ALONE)])
def test_device_map(attention_type, attention, place, tmp_path):
    model = randomized(FocalForImageClassification(tiny(attention_type)))
    model.set_attn_implementation(attention)
    model.save_pretrained(tmp_path / "model")
    everything = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    options = {
        "auto": {"device_map": "auto"},
        "memory and disk": {"device_map": "auto", "max_memory": {"cpu": int(0.9 * everything)}},
        "disk": {"device_map": "auto", "max_memory": {"cpu": 1}},
    }[place]
    loaded = AutoModelForImageClassification.from_pretrained(
        tmp_path / "model", offload_folder=tmp_path / "offloaded", attn_implementation=attention, **options
    )
    places = {parameter.device.type for parameter in loaded.parameters()}
    assert places == {"auto": {"cpu"}, "memory and disk": {"cpu", "meta"}, "disk": {"meta"}}[place]
    for size in ((32, 32), (40, 52)):
        images = pixels(2, 3, *size)
        torch.testing.assert_close(logits(loaded, images), logits(model, images))


@BOTH
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_saves_loads_and_merges(attention_type, checkpointing, tmp_path):
    randomized(FocalForImageClassification(tiny(attention_type))).save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if checkpointing:
        base.gradient_checkpointing_enable()
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"])).train()
    images, labels = pixels(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(15):
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    trained = logits(model.eval(), images)

    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, images), trained)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = FocalForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, images), trained, rtol=1e-5, atol=1e-5)


NEEDS_TORCHAO = "test_with_torchao_installed runs this"


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.11", reason="torchao 0.18 needs torch 2.11")
def test_with_torchao_installed(tmp_path):
    """In a process in which torchao can be imported. In others it is not installed, for it prints when it is."""
    tests = "int8_weights_by_torchao or examples_of_the_documentation"
    run = run_tests_with(["torchao"], __file__, tests, tmp_path)
    assert f" {3 if RUNS_EXAMPLES else 2} passed" in run.stdout, run.stdout + run.stderr


@BOTH
def test_int8_weights_by_torchao(attention_type, tmp_path):
    pytest.importorskip("torchao", reason=NEEDS_TORCHAO)
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = randomized(FocalForImageClassification(tiny(attention_type)))
    model.save_pretrained(tmp_path / "model")
    quantized = AutoModelForImageClassification.from_pretrained(
        tmp_path / "model", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    for name, module in quantized.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert type(module.weight.data).__name__ == "Int8Tensor", name
    images = pixels(2, 3, 40, 52)
    found, expected = logits(quantized, images), logits(model, images)
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()
    with pytest.raises(ValueError, match=r"neither quantized, sharded nor offloaded; \S*weight is Int8Tensor"):
        freeze(quantized, (40, 52))
    quantized.save_pretrained(tmp_path / "quantized")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(again, images), found)


@BOTH
def test_linear_layers_are_given_no_more_dimensions_than_bitsandbytes_takes(attention_type):
    model = randomized(FocalForImageClassification(tiny(attention_type)))
    dimensions = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, args, name=name: dimensions.update({name: args[0].ndim}))
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        logits(model, pixels(2, 3, 40, 52))
    assert len(dimensions) > 20
    assert max(dimensions.values()) <= 3, dimensions


def digits(first, last):
    """Some of scikit-learn's, as a plain dataset of pictures of 32 by 32 pixels."""
    data = load_digits()
    images = torch.tensor(data.images[first:last], dtype=torch.float32)[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(images, scale_factor=4).expand(-1, 3, -1, -1)
    return [
        {"pixel_values": image, "labels": int(label)}
        for image, label in zip(images, data.target[first:last], strict=True)
    ]


@BOTH
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(attention_type, checkpointing, tmp_path):
    torch.manual_seed(0)
    model = FocalForImageClassification(tiny(attention_type, num_labels=10, initializer_range=0.2))
    arguments = TrainingArguments(
        output_dir=tmp_path / "run",
        num_train_epochs=3,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=1e-2,
        gradient_checkpointing=checkpointing,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    held_out = digits(128, 192)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=digits(0, 128),
        eval_dataset=held_out,
        compute_metrics=lambda answer: {"accuracy": (answer.predictions.argmax(-1) == answer.label_ids).mean()},
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    scores = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    assert trainer.evaluate()["eval_accuracy"] == max(scores[1:])  # the best is loaded

    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    images = torch.stack([row["pixel_values"] for row in held_out])
    predictions = torch.from_numpy(trainer.predict(held_out).predictions)
    torch.testing.assert_close(logits(loaded, images), predictions)


@BOTH
@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels_and_other_classes(attention_type, channels, tmp_path):
    model = randomized(FocalForImageClassification(tiny(attention_type, num_channels=channels)))
    model.save_pretrained(tmp_path / "model")
    images = pixels(2, channels, 40, 52)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(loaded, images), logits(model, images))
    assert loaded.get_input_embeddings() is loaded.focal.embeddings.patch_embeddings.projection
    assert loaded.get_input_embeddings().in_channels == channels

    changes = {"num_channels": 3, "num_labels": 2, "ignore_mismatched_sizes": True}
    changed, info = AutoModelForImageClassification.from_pretrained(
        tmp_path / "model", output_loading_info=True, **changes
    )
    renewed = {key for key, *_ in info["mismatched_keys"]}
    projection = "focal.embeddings.patch_embeddings.projection.weight"
    assert renewed == {projection, "classifier.weight", "classifier.bias"}
    for name, value in changed.state_dict().items():
        if name not in renewed:
            assert torch.equal(value, model.state_dict()[name]), name
    assert changed.get_parameter(projection).abs().max() > 0
    assert logits(changed, pixels(2, 3, 40, 52)).shape == (2, 2)


@BOTH
def test_pipelines_in_batches(attention_type, tmp_path):
    """A batch gives what its pictures give one by one, as files, grey, and with transparency."""
    prepare(tmp_path, attention_type)
    picture = Image.open(tmp_path / "cat.jpg")
    pictures = [str(tmp_path / "cat.jpg"), picture, picture.convert("L"), picture.convert("RGBA"), picture.rotate(90)]
    for task, options in (("image-classification", {"top_k": 5}), ("image-feature-extraction", {})):
        answer = pipeline(task, model=str(tmp_path / "focal-tiny"))
        together, alone = answer(pictures, batch_size=3, **options), [answer(one, **options) for one in pictures]
        if task == "image-classification":
            assert [[one["label"] for one in row] for row in together] == [[one["label"] for one in r] for r in alone]
            together, alone = ([[one["score"] for one in row] for row in rows] for rows in (together, alone))
        torch.testing.assert_close(torch.tensor(together), torch.tensor(alone))
        assert len(together) == len(pictures)


@pytest.mark.skipif(not RUNS_EXAMPLES, reason="the examples need torch 2.11 and transformers 5.18")
def test_examples_of_the_documentation_run(tmp_path, monkeypatch, capsys):
    """One after another, as they are printed.

    The compiled example generates no code, which takes most of a minute; test_same_answers.py uses inductor.
    """
    pytest.importorskip("torchao", reason=NEEDS_TORCHAO)
    pytest.importorskip("onnxruntime")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tools.md").read_text(), re.DOTALL)
    assert len(blocks) == 10
    prepare(tmp_path, "focal")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    exec("\n".join(blocks), {})
    assert "torch.Size([1, 2])" in capsys.readouterr().out
    assert (tmp_path / "focal-finetuned" / "model.safetensors").exists()
