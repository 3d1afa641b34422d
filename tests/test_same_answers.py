"""Whatever is done to a model between evaluations, it answers as one built anew from its weights.

In inference on a CPU, biases are remembered and attention is an operator of its own. Nobody who copies, saves, trains,
adapts, quantises or compiles a model should have to know.
"""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from focal_hf import FocalForImageClassification, cpu_attention_focal
from focal_hf.layout_focal import head_index
from focal_hf.modeling_focal import FocalAttention
from focal_hf.neighborhood_focal import FocalNeighborhood
from small_models import BOTH, NO_COMPILER, TORCH_2_7, build, one_stage_configs, pixels, randomized, tiny

IMAGES = pixels(2, 3, 40, 52)  # maps of 10 by 13 tokens: no multiples of the window, and not the size in the config
LABELS = torch.tensor([1, 4])
INFERENCE = pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def classifier(attention_type, **changes):
    """Builds a classifier with a small expand_size, at which displaced windows overlap and biases are combined."""
    options = {"drop_path_rate": 0.0, "expand_sizes": (1, 1, 1)}
    return randomized(FocalForImageClassification(tiny(attention_type, **options | changes)))


def fresh(model, implementation="sdpa"):
    """Builds a new model with the weights of another."""
    built = type(model)(copy.deepcopy(model.config)).to(model.dtype)
    built.load_state_dict(model.state_dict())
    built.set_attn_implementation(implementation)
    return built.train(model.training)


def answers(model, inference=torch.no_grad, images=IMAGES):
    with inference():
        return model(images.to(model.dtype)).logits.clone()


def gradients(model, images=IMAGES):
    model.zero_grad()
    model(images.to(model.dtype), labels=LABELS[: len(images)]).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_answers_follow_from_weights(model, inference=torch.no_grad):
    found = answers(model, inference)
    for implementation in ("sdpa", "eager"):
        expected = answers(fresh(model, implementation), inference)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def assert_answers_change_with(model, change, inference=torch.no_grad):
    """Checks the outputs before and after `change` against a new model, and that they differ."""
    assert_answers_follow_from_weights(model, inference)
    before = answers(model, inference)
    change(model)
    assert (answers(model, inference) - before).abs().max() > 1e-3
    assert_answers_follow_from_weights(model, inference)


@torch.no_grad()
def in_place(model):
    for parameter in model.parameters():
        parameter.mul_(1.5)


def in_place_through_data(model):
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 1.5)


def in_place_through_numpy(model):
    """Writing through NumPy does not change the version of the tensor."""
    for parameter in model.parameters():
        parameter.detach().numpy()[...] *= 1.5


def data_replaced(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def parameters_replaced(model):
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.detach() * 1.5))


def half_as_large(model):
    return {name: value / 2 if value.is_floating_point() else value for name, value in model.state_dict().items()}


def loaded(model):
    model.load_state_dict(half_as_large(model))


def loaded_by_assignment(model):
    model.load_state_dict(half_as_large(model), assign=True)


def fused_step(model):
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


def moved_to_float64(model):
    """Edits the weights in float64, and moves the model back to float32."""
    model.to(torch.float64)
    assert_answers_follow_from_weights(model)
    in_place(model)
    assert_answers_follow_from_weights(model)
    model.to(torch.float32)


def moved_to_bfloat16(model):
    """Moves the model to bfloat16 and back, which rounds the weights."""
    model.to(torch.bfloat16)
    answers(model)
    model.to(torch.float32)


CHANGES = [
    in_place,
    in_place_through_data,
    in_place_through_numpy,
    data_replaced,
    parameters_replaced,
    loaded,
    loaded_by_assignment,
    fused_step,
    moved_to_float64,
    moved_to_bfloat16,
]


@BOTH
@INFERENCE
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_answers_follow_changed_weights(attention_type, inference, change):
    assert_answers_change_with(classifier(attention_type), change, inference)


@BOTH
@pytest.mark.parametrize("pool", ["fc", "conv"])
def test_answers_follow_one_number_of_any_parameter(attention_type, pool):
    """In float64, even a small effect is visible. With gradients, nothing is cached."""
    model = classifier(attention_type, focal_pool=pool).double()
    reference = fresh(model, "eager")
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        before = answers(model)
        for weights in (parameter, other):
            weights.data.view(-1)[weights.numel() // 2] += 1
        after, expected = answers(model), reference(IMAGES.double()).logits.detach()
        torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)
        if "relative_position_bias_table" in name:
            assert (after - before).abs().max() > 1e-7, name


@BOTH
def test_answers_follow_weights_given_for_one_call(attention_type):
    model = classifier(attention_type)
    expected = answers(model)
    with torch.no_grad():
        called = torch.func.functional_call(model, half_as_large(model), IMAGES).logits
    other = fresh(model)
    loaded(other)
    torch.testing.assert_close(called, answers(other))
    torch.testing.assert_close(answers(model), expected)


@BOTH
@pytest.mark.parametrize("options", [{"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, {"use_buffers": True}])
def test_answers_follow_averaged_weights(attention_type, options):
    """Exponential and plain averages, the latter with buffers, are evaluated during training."""
    model = classifier(attention_type)
    averaged = AveragedModel(model, **options)
    for _ in range(3):
        averaged.update_parameters(model)
        assert_answers_follow_from_weights(averaged.module)
        assert_answers_change_with(model, fused_step)
    for (name, buffer), other in zip(model.named_buffers(), averaged.module.buffers(), strict=True):
        assert torch.equal(buffer, other), name


@BOTH
@INFERENCE
def test_answers_follow_swapped_weights(attention_type, inference):
    """Callbacks swap weights to evaluate the averaged ones in the trained model."""
    model = classifier(attention_type)
    average = [parameter.detach() * 1.5 for parameter in model.parameters()]

    def swap(model):
        for parameter, other in zip(model.parameters(), average, strict=True):
            parameter.data, other.data = other.data, parameter.data

    before = answers(model, inference)
    assert_answers_change_with(model, swap, inference)
    assert_answers_change_with(model, swap, inference)
    assert torch.equal(answers(model, inference), before)


@BOTH
@INFERENCE
def test_copies_do_not_share_caches(attention_type, inference):
    model = classifier(attention_type)
    before = answers(model, inference)
    twin = copy.deepcopy(model)
    assert torch.equal(answers(twin, inference), before)
    assert_answers_change_with(twin, in_place, inference)
    assert torch.equal(answers(model, inference), before)
    changed = answers(twin, inference)
    assert_answers_change_with(model, loaded, inference)
    assert torch.equal(answers(twin, inference), changed)


def pickled(model):
    return pickle.dumps(model)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


@BOTH
@INFERENCE
@pytest.mark.parametrize(
    ("write", "read"), [(pickled, pickle.loads), (saved, lambda data: torch.load(io.BytesIO(data), weights_only=False))]
)
def test_pickles_hold_no_caches(attention_type, inference, write, read):
    model = classifier(attention_type)
    size, keys = len(write(model)), model.state_dict().keys()
    before = answers(model, inference)
    data = write(model)
    assert len(data) == size
    assert model.state_dict().keys() == keys
    restored = read(data)
    assert torch.equal(answers(restored, inference), before)
    assert_answers_change_with(restored, in_place, inference)
    assert torch.equal(answers(model, inference), before)


@BOTH
@INFERENCE
@pytest.mark.parametrize("training", [True, False])
def test_training_after_evaluation(attention_type, inference, training):
    """Evaluation between the steps does not change the gradients, and sees the weights of the last step."""
    model = classifier(attention_type)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    for _ in range(3):
        assert_answers_follow_from_weights(model.eval(), inference)
        model.train(training)
        torch.testing.assert_close(gradients(model), gradients(fresh(model)))
        optimizer.step()


@BOTH
def test_gradients_add_up(attention_type):
    """Gradients accumulate over a second backward pass through the same graph, and through another graph."""
    model = classifier(attention_type)
    expected = {name: 3 * gradient for name, gradient in gradients(model).items()}
    model.zero_grad()
    loss = model(IMAGES, labels=LABELS).loss
    loss.backward(retain_graph=True)
    loss.backward()
    model(IMAGES, labels=LABELS).loss.backward()
    torch.testing.assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


@BOTH
@pytest.mark.parametrize("memory", ["checkpoint", "reentrant checkpoint", "saved on CPU"])
def test_gradients_with_memory_saved(attention_type, memory):
    model = classifier(attention_type).train()
    expected = gradients(fresh(model, "eager"))
    if memory == "saved on CPU":
        with torch.autograd.graph.save_on_cpu():
            found = gradients(model)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": memory == "reentrant checkpoint"})
        # What a reentrant checkpoint is given must need gradients, or nothing in it gets any.
        found = gradients(model, IMAGES.clone().requires_grad_())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("size", [(32, 32), (40, 52)])
def test_gradients_of_gradients(attention_type, size):
    """A penalty on the gradient of the loss with respect to the pixels needs them."""
    model = classifier(attention_type, use_shift=True).double()
    found = []
    for same_model in (model, fresh(model, "eager")):
        images = pixels(2, 3, *size).double().requires_grad_()
        loss = same_model(images, labels=LABELS).loss
        (of_pixels,) = torch.autograd.grad(loss, images, create_graph=True)
        weights = list(same_model.parameters())
        found.append(torch.autograd.grad(of_pixels.norm(), weights, materialize_grads=True))
    assert max(gradient.abs().max() for gradient in found[0]) > 1e-3
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


@BOTH
def test_per_image_gradients(attention_type):
    """`torch.func` computes them."""
    model = classifier(attention_type, use_pre_norm=True)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights, image, label):
        return torch.func.functional_call(model, weights, image[None], {"labels": label[None]}).loss

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, IMAGES, LABELS)
    for number in range(len(IMAGES)):
        model.zero_grad()
        model(IMAGES[number : number + 1], labels=LABELS[number : number + 1]).loss.backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.testing.assert_close({name: each[number] for name, each in found.items()}, expected)
    with torch.no_grad():
        of_each = torch.func.vmap(lambda image: model(image[None]).logits[0])(IMAGES)
    torch.testing.assert_close(of_each, answers(model))


@BOTH
def test_forward_mode_derivatives(attention_type):
    """Eager attention has them, and PyTorch's attention raises an error. No derivative is silently zero."""
    model = fresh(classifier(attention_type, use_pre_norm=True), "eager").eval().requires_grad_(False)
    direction = IMAGES.flip(0)
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).logits.sum(), images)
    expected = (gradient * direction).sum()
    assert expected.abs() > 1e-3

    def logits(images):
        return model(images).logits.sum()

    torch.testing.assert_close(torch.func.jvp(logits, (IMAGES,), (direction,))[1], expected)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(logits(forward_ad.make_dual(IMAGES, direction))).tangent
    torch.testing.assert_close(found, expected)
    model.set_attn_implementation("sdpa")
    with pytest.raises(NotImplementedError, match="forward AD"), forward_ad.dual_level():
        logits(forward_ad.make_dual(IMAGES, direction))


@settings(max_examples=80, deadline=None)
@given(
    config=one_stage_configs(),
    head_dim=st.integers(1, 9),
    block=st.integers(0, 1),
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    batch=st.sampled_from([1, 3]),
    per_chunk=st.sampled_from([1, 2000, 786432]),
)
def test_attention_in_chunks_equals_eager_attention(config, head_dim, block, height, width, batch, per_chunk):
    """Outputs and gradients are equal for any number of images and of windows per chunk."""
    config.embed_dim = config.num_heads[0] * head_dim
    config._attn_implementation = "sdpa"
    attention = build(config, block)
    maps = torch.randn(batch, height, width, config.embed_dim, dtype=torch.float64, requires_grad=True)
    inputs = [maps, *attention.parameters()]
    probe = torch.randn_like(maps)

    found = {}
    with mock.patch.object(cpu_attention_focal, "KEY_ELEMENTS_PER_CHUNK", per_chunk):
        for implementation in ("sdpa", "eager"):
            config._attn_implementation = implementation
            output = attention(maps)[0]
            found[implementation] = torch.autograd.grad((output * probe).sum(), inputs, materialize_grads=True)
            found[implementation] += (output.detach(),)
        config._attn_implementation = "sdpa"
        with torch.no_grad():
            torch.testing.assert_close(attention(maps)[0], output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["sdpa"], found["eager"], rtol=1e-9, atol=1e-9)


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_custom_operator_passes_opcheck(attention_type, training, monkeypatch):
    """PyTorch checks its schema, its fake implementation and its gradients in a graph."""
    calls = []
    operator = torch.ops.focal_hf.attention_in_chunks.default
    monkeypatch.setattr(cpu_attention_focal, "attention_in_chunks", lambda *args: calls.append(args) or operator(*args))
    config = tiny(attention_type, embed_dim=6, num_heads=(2, 1, 3), use_shift=True)
    config._attn_implementation = "sdpa"
    attention = FocalAttention(config, 0, config.block_geometry(0, 1)).double()
    with torch.set_grad_enabled(training):
        attention(pixels(2, 5, 9, 6).double())
    leaves = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad), calls[0]
    )
    assert len(calls) == 1
    torch.library.opcheck(operator, leaves)


@BOTH
def test_threads_share_a_model(attention_type):
    model = classifier(attention_type)
    sizes = [pixels(1, 3, 32, 32), pixels(1, 3, 40, 52)] * 2
    expected = [answers(fresh(model), images=images) for images in sizes]
    start = threading.Barrier(len(sizes))

    def evaluate(images):
        start.wait()
        return [answers(model, images=images) for _ in range(15)]

    with ThreadPoolExecutor(len(sizes)) as threads:
        for found, value in zip(threads.map(evaluate, sizes), expected, strict=True):
            torch.testing.assert_close(found, [value] * 15)


@BOTH
def test_deterministic_algorithms(attention_type):
    """In this mode, PyTorch fills uninitialized memory with NaN."""
    model = classifier(attention_type)
    before = answers(model), gradients(model)
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        once, again = ((answers(fresh(model)), answers(model), gradients(model)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(enabled)
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    torch.testing.assert_close(once[0], before[0])
    torch.testing.assert_close(once[1:], before)


def adapted(model, targets):
    """Returns a copy with random low-rank adapters."""
    torch.manual_seed(4)
    return get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()


@BOTH
@pytest.mark.parametrize("target", PROJECTIONS)
def test_every_projection_can_be_adapted(attention_type, target):
    model = classifier(attention_type)
    before = answers(model)
    assert (answers(adapted(model, [target])) - before).abs().max() > 1e-5


@BOTH
@INFERENCE
@pytest.mark.parametrize("targets", [PROJECTIONS, "all-linear"], ids=["projections", "all-linear"])
def test_adapters_are_trained_switched_and_merged(attention_type, inference, targets):
    """With topk, the linear layers that compute the biases have adapters too."""
    model = classifier(attention_type)
    before = answers(model, inference)
    low_rank = adapted(model, targets)
    with_adapters = answers(low_rank, inference)
    assert (with_adapters - before).abs().max() > 1e-2

    with low_rank.disable_adapter():
        torch.testing.assert_close(answers(low_rank, inference), before)
    torch.testing.assert_close(answers(low_rank, inference), with_adapters)

    low_rank(IMAGES, labels=LABELS).loss.backward()
    for name, parameter in low_rank.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == ("lora_" in name), name
    torch.optim.AdamW(low_rank.parameters(), lr=0.01, fused=True).step()
    trained = answers(low_rank, inference)
    assert (trained - with_adapters).abs().max() > 1e-3

    merged = low_rank.merge_and_unload()
    torch.testing.assert_close(answers(merged, inference), trained, rtol=1e-5, atol=1e-5)
    assert_answers_follow_from_weights(merged, inference)


@BOTH
@INFERENCE
def test_images_of_a_batch_use_different_adapters(attention_type, inference):
    low_rank = LoraConfig(target_modules=PROJECTIONS, init_lora_weights=False)
    model = get_peft_model(classifier(attention_type), low_rank, "first")
    model.add_adapter("second", low_rank)
    model.eval()
    expected = []
    for name, image in zip(["second", "first"], IMAGES.split(1), strict=True):
        model.set_adapter(name)
        expected.append(answers(model, inference, image))
    with inference():
        found = model(IMAGES, adapter_names=["second", "first"]).logits
    torch.testing.assert_close(found, torch.cat(expected))


@BOTH
@INFERENCE
@pytest.mark.parametrize("pool", ["fc", "conv"])
def test_hooks_of_every_layer_run(attention_type, inference, pool):
    """Hooks see and can change the output of every layer. Layers of the biases run only when biases are computed."""
    model = classifier(attention_type, focal_pool=pool, use_pre_norm=True)
    answers(model, inference)
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm, torch.nn.GroupNorm)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and "coordinate_mlps" not in name
    }
    assert {name.rpartition(".")[2] for name in layers} >= {*PROJECTIONS, "layernorm_before", "pre_norm"}
    assert any("pooling" in name for name in layers)
    before, seen = answers(model, inference), []
    for name, module in layers.items():
        hook = module.register_forward_hook(lambda module, args, output, name=name: seen.append(name) or output.cos())
        assert (answers(model, inference) - before).abs().max() > 1e-5, name
        hook.remove()
    assert set(seen) == set(layers)
    assert torch.equal(answers(model, inference), before)


@BOTH
@INFERENCE
def test_offloaded_layers(attention_type, inference):
    """The weights are in memory only while their module is called."""
    model = classifier(attention_type)
    expected = answers(model, inference)
    offloaded = cpu_offload(model, execution_device="cpu")
    for _ in range(2):
        torch.testing.assert_close(answers(offloaded, inference), expected)


@BOTH
@INFERENCE
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_dynamically_quantized_layers(attention_type, inference):
    """They have no parameters, and keep their weights in another form."""
    model = classifier(attention_type)
    before = answers(model, inference)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is torch.nn.Linear for module in quantized.modules())
    given = answers(quantized, inference)
    assert 0 < (given - before).abs().max() < 0.1 * before.abs().max()
    quantized.set_attn_implementation("eager")
    torch.testing.assert_close(given, answers(quantized, inference), rtol=1e-3, atol=1e-3)


@BOTH
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bfloat16(attention_type, implementation):
    """The difference from float32 with the same weights is that of a few roundings to bfloat16."""
    model = classifier(attention_type).to(torch.bfloat16)
    model.set_attn_implementation(implementation)
    expected = answers(copy.deepcopy(model).float())
    assert answers(model).dtype == torch.bfloat16
    for _ in range(2):
        assert (answers(model) - expected).abs().max() < 2e-2 * expected.abs().max()


@BOTH
@INFERENCE
def test_biases_of_bfloat16_weights_are_rounded_once_at_most(attention_type, inference):
    """Tables are combined in float32. An MLP of the offsets computes in the type of its weights."""
    tolerance = {"focal": 1e-6, "topk": 2e-2}[attention_type]
    model = classifier(attention_type).to(torch.bfloat16)
    neighborhood = model.focal.encoder.layers[0].blocks[0].attention.neighborhood
    exact = copy.deepcopy(neighborhood).double()
    maps = torch.zeros(1, 12, 16, 8)
    with inference():
        expected = exact(maps.double()).bias()
        for _ in range(2):
            bias = neighborhood(maps.bfloat16()).bias()
            torch.testing.assert_close(bias.double(), expected, rtol=tolerance, atol=tolerance)


@BOTH
@pytest.mark.parametrize("shift", [False, True])
def test_attention_weights_belong_to_the_positions_of_the_index(attention_type, shift):
    """The weights of each query sum to 1. The sum of the values at those positions, weighted, is the output."""
    model = classifier(attention_type, use_shift=shift)
    model.set_attn_implementation("eager")
    blocks = [module for module in model.modules() if isinstance(module, FocalAttention)]
    seen = []
    for block in blocks:
        block.neighborhood.register_forward_hook(lambda module, args, output: seen.append([output.index]))
        block.v_proj.register_forward_hook(lambda module, args, output: seen[-1].append(output))
        block.o_proj.register_forward_pre_hook(lambda module, args: seen[-1].append(args[0]))
        block.register_forward_hook(lambda module, args, output: seen[-1].append(output[1]))
    with torch.no_grad():
        attentions = model(IMAGES, output_attentions=True).attentions

    assert len(seen) == len(blocks)
    for block, (index, values, output, weights) in zip(blocks, seen, strict=True):
        rows, cols, keys = index.shape
        heads, side = block.num_heads, block.window_size
        assert weights.shape == (len(IMAGES) * rows * cols, heads, side**2, keys)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        places = values.unflatten(-1, (heads, block.head_dim)).flatten(1, 2)[:, head_index(index, heads)]
        mixed = torch.matmul(weights.unflatten(0, (-1, rows, cols)), places)  # (batch, rows, cols, heads, queries, ...)
        mixed = mixed.transpose(3, 4).flatten(4).unflatten(3, (side, side)).transpose(2, 3).reshape(output.shape)
        torch.testing.assert_close(mixed, output)
    last = [sum(model.config.depths[: stage + 1]) - 1 for stage in range(len(model.config.depths))]
    assert all(torch.equal(given, seen[block][3]) for given, block in zip(attentions, last, strict=True))


@BOTH
@TORCH_2_7
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")]),
    ],
)
def test_compiled_models_give_the_same_outputs_and_gradients(attention_type, backend):
    """The model is one graph, which calls the custom operator."""
    changes = {"embed_dim": 6, "depths": (1,), "num_heads": (2,), "focal_levels": (2,), "focal_windows": (3,)}
    model = classifier(attention_type, **changes, expand_sizes=(1,), mlp_ratio=1.0, encoder_stride=4)
    expected = answers(fresh(model, "eager")), gradients(fresh(model, "eager"))
    answers(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    torch.testing.assert_close(answers(compiled), expected[0], rtol=1e-5, atol=1e-5)
    if backend == "aot_eager":  # the other would need half a minute
        compiled(IMAGES, labels=LABELS).loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.testing.assert_close(found, expected[1], rtol=1e-4, atol=1e-5)


@BOTH
def test_fake_tensors_do_not_enter_the_cache(attention_type):
    """The keys of the cache are sizes, so a run in fake mode must not leave its tensors in the cache."""
    model = classifier(attention_type)
    images = pixels(1, 3, 44, 36)  # a size of its own: nothing is remembered of it yet
    with FakeTensorMode(allow_non_fake_inputs=True):
        answers(model, images=images)
    torch.testing.assert_close(answers(model, images=images), answers(fresh(model, "eager"), images=images))


def test_pruned():
    """A pruned table is an attribute, not a parameter."""

    def tables(model):
        neighborhoods = [module for module in model.modules() if isinstance(module, FocalNeighborhood)]
        names = ["relative_position_bias_table", "relative_position_bias_table_to_neighbors"]
        return [(module, name) for module in neighborhoods for name in names if getattr(module, name) is not None]

    model = classifier("focal", focal_levels=(1, 1, 1))
    before = answers(model)
    for module, name in tables(model):
        prune.random_unstructured(module, name, amount=0.5)
    found = answers(model)
    assert not torch.equal(found, before)
    expected = copy.deepcopy(model)
    for module, name in tables(expected):
        prune.remove(module, name)
    for implementation in ("sdpa", "eager"):
        torch.testing.assert_close(found, answers(fresh(expected, implementation)))


def test_sharded_with_flat_parameters(tmp_path):
    """With the default of FSDP, `use_orig_params=False`, the weights of modules are attributes, not parameters."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = classifier("focal")
        expected, step = answers(model), model(IMAGES, labels=LABELS).loss.detach()
        sharded = FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))
        torch.testing.assert_close(answers(sharded), expected)
        loss = sharded(IMAGES, labels=LABELS).loss
        loss.backward()
        torch.testing.assert_close(loss.detach(), step)
    finally:
        torch.distributed.destroy_process_group()
