"""FocalAttention gives the same as the slow reference, for random shapes and settings."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focal_hf import FocalConfig, cpu_attention_focal
from focal_hf.attention_focal import attend_densely, attend_in_chunks, choose_attention
from focal_hf.modeling_focal import FocalAttention
from reference import reference_attention
from small_models import DEVICE, build, one_stage_configs

needs_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="dense attention is for CPUs")


@settings(max_examples=60, deadline=None)
@given(
    config=one_stage_configs(),
    block=st.integers(0, 1),
    height=st.integers(1, 11),  # up to three of the largest windows
    width=st.integers(1, 11),
    implementation=st.sampled_from(["eager", "sdpa"]),
    images=st.integers(1, 3),
    per_chunk=st.sampled_from([1, 300, 3000]),
    seed=st.integers(0, 2**16),
)
def test_attention_equals_the_slow_reference(config, block, height, width, implementation, images, per_chunk, seed):
    torch.manual_seed(seed)
    config._attn_implementation = implementation
    attention = build(config, block)
    maps = torch.randn(images, height, width, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([reference_attention(attention, image) for image in maps.split(1)])
    inputs = [maps, *attention.parameters()]
    with mock.patch.object(cpu_attention_focal, "KEY_ELEMENTS_PER_CHUNK", per_chunk):
        output = attention(maps)[0]
        probe = torch.randn_like(output)
        gradients = torch.autograd.grad((output * probe).sum(), inputs, materialize_grads=True)
        with torch.inference_mode():
            inferred = [attention(maps)[0] for _ in range(2)]  # the second call uses the cache
    for result in (output, *inferred):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad((expected * probe).sum(), inputs, materialize_grads=True)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(config=one_stage_configs(), block=st.integers(0, 1), height=st.integers(1, 14), width=st.integers(1, 14))
def test_images_are_independent_and_weights_sum_to_one(config, block, height, width):
    config._attn_implementation = "eager"
    attention = build(config, block)
    maps = torch.randn(3, height, width, 4, dtype=torch.float64)
    with torch.no_grad():
        output, weights = attention(maps)
        alone, _ = attention(maps[1:2])
    torch.testing.assert_close(output[1:2], alone)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    window = attention.window_size
    assert weights.shape[0] == 3 * -(-height // window) * -(-width // window)
    assert weights.shape[2] == window**2


@pytest.mark.parametrize("attention_type", ["focal", "topk"])
def test_index_tables_cached_in_inference_work_in_training(attention_type):
    """A cached index table must not be an inference tensor."""
    config = FocalConfig(image_size=44, patch_size=1, depths=(1,), embed_dim=8, num_heads=(2,), focal_levels=(2,),
                         focal_windows=(3,), expand_sizes=(3,), attention_type=attention_type, topk=13)  # fmt: skip
    config._attn_implementation = "sdpa"
    attention = FocalAttention(config, 0, config.block_geometry(0, 0))
    maps = torch.randn(1, 37, 41, 8)
    with torch.inference_mode():
        attention(maps)
    attention(maps)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in attention.parameters())


@needs_cpu
def test_cached_bias_of_one_size_is_not_used_for_another():
    """Small maps use dense attention, others attention in chunks."""
    config = FocalConfig(patch_size=1, depths=(2,), embed_dim=8, num_heads=(2,), focal_levels=(2,), focal_windows=(3,),
                         expand_sizes=(2,), window_size=5)  # fmt: skip
    config._attn_implementation = "sdpa"
    attention = build(config, block=1)
    sizes = [(10, 10), (20, 15), (9, 10), (10, 15), (10, 10), (5, 10)]
    with torch.inference_mode():
        chosen = []
        for width in (10, 15):
            maps = torch.empty(1, 10, width, 8)
            chosen.append(choose_attention(attention, maps.flatten(1, 2), attention.neighborhood(maps)).attend)
        assert chosen == [attend_densely, attend_in_chunks]
        for size in sizes:
            maps = torch.randn(2, *size, 8, dtype=torch.float64)
            expected = torch.cat([reference_attention(attention, image) for image in maps.split(1)])
            torch.testing.assert_close(attention(maps)[0], expected, rtol=1e-9, atol=1e-9)


@needs_cpu
@pytest.mark.skipif(torch.__version__ < "2.8", reason="torch before 2.8 cannot tell for which sizes it compiles")
@pytest.mark.parametrize("shift", [False, True])
def test_compiled_small_maps_use_dense_attention(shift, without_default_device):
    config = FocalConfig(patch_size=1, depths=(2,), embed_dim=8, num_heads=(2,), focal_levels=(2,), focal_windows=(3,),
                         expand_sizes=(2,), window_size=5, use_shift=shift)  # fmt: skip
    config._attn_implementation = "sdpa"
    attention = build(config, block=1)
    maps = torch.randn(2, 9, 10, 8, dtype=torch.float64)
    expected = torch.cat([reference_attention(attention, image) for image in maps.split(1)])
    torch.compiler.reset()
    calls = []

    def backend(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.inference_mode():
        found = torch.compile(attention, fullgraph=True, dynamic=False, backend=backend)(maps)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert any("attention_in_chunks" in call for call in calls) == shift
