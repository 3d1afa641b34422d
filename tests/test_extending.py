"""What docs/layout.md promises to those who extend the package, and to those who run it for long.

Another attention and another neighbourhood work without a change of the package. Caches are bounded and shared.
"""

import gc
import itertools
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from focal_hf import FocalConfig, FocalForImageClassification, FocalModel, cpu_attention_focal, run_state_focal
from focal_hf.attention_focal import attend_gathered, attend_in_chunks, choose_attention
from focal_hf.modeling_focal import FocalAttention
from focal_hf.neighborhood_focal import BiasPart, Neighborhood
from focal_hf.visualization import query_attention, record_attention
from reference import pooled_map

CALLS = []


def einsum_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """An attention as a third party writes it, in the signature of transformers."""
    CALLS.append(module)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling + attention_mask
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), value), None


AttentionInterface.register("test_extending_einsum", einsum_attention)


def settings(**changes) -> dict:
    small = {"image_size": 24, "patch_size": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 4), "window_size": 3}
    small |= {"focal_levels": (2, 2), "focal_windows": (3, 3), "expand_sizes": (1, 1), "topk": 7, "out_features": None}
    return small | {"initializer_range": 0.3, "num_labels": 5} | changes


# --- Another attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention_type", ["focal", "topk"])
def test_registered_attention_gives_the_answers_of_eager_attention(attention_type, tmp_path):
    torch.manual_seed(0)
    eager = FocalForImageClassification(FocalConfig(**settings(attention_type=attention_type, use_shift=True))).eval()
    eager.set_attn_implementation("eager")
    eager.save_pretrained(tmp_path)
    loaded = FocalForImageClassification.from_pretrained(tmp_path, attn_implementation="test_extending_einsum")
    switched = FocalForImageClassification.from_pretrained(tmp_path)
    switched.set_attn_implementation("test_extending_einsum")
    pixel_values = torch.randn(2, 3, 22, 30)
    expected = eager(pixel_values).logits
    expected.square().sum().backward()
    for model in (loaded, switched):
        CALLS.clear()
        with torch.inference_mode():
            torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-5, atol=1e-5)
        logits = model(pixel_values).logits
        logits.square().sum().backward()
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        for (name, parameter), other in zip(model.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)
        blocks = [module for module in model.modules() if isinstance(module, FocalAttention)]
        assert len(CALLS) == 2 * len(blocks)


# --- Another neighbourhood --------------------------------------------------------------------------------------------


class DilatedNeighborhood(nn.Module):
    """Every second token in and around a window, no further than `REACH` from the query, and maybe all pooled tokens.

    The bias is learnt: of each query and fine token, and by the distance between the query's window and a pooled token.
    """

    DILATION, REACH = 2, 4

    def __init__(self, heads: int, window_size: int, pooled: bool):
        super().__init__()
        self.window_size = window_size
        offsets = range(-self.DILATION, window_size + self.DILATION, self.DILATION)
        self.fine = list(itertools.product(offsets, offsets))
        self.queries = list(itertools.product(range(window_size), range(window_size)))
        self.fine_bias = nn.Parameter(torch.randn(heads, window_size**2, len(self.fine)))
        self.pooled_bias = nn.Parameter(torch.randn(20, heads, window_size**2)) if pooled else None

    def forward(self, maps: torch.Tensor) -> Neighborhood:
        height, width = maps.shape[1:3]
        rows, cols = height // self.window_size, width // self.window_size
        index, hidden, distances = [], [], []
        for i, j in itertools.product(range(rows), range(cols)):
            places = [(i * self.window_size + down, j * self.window_size + right) for down, right in self.fine]
            inside = [0 <= row < height and 0 <= col < width for row, col in places]
            numbers = [row * width + col if seen else -1 for (row, col), seen in zip(places, inside, strict=True)]
            index.append([*numbers, *range(height * width, height * width + rows * cols)])
            hidden.append(
                [
                    [not seen or abs(down - a) + abs(right - b) > self.REACH
                     for (down, right), seen in zip(self.fine, inside, strict=True)]
                    for a, b in self.queries
                ]
            )  # fmt: skip
            distances.append([abs(i - m) + abs(j - n) for m, n in itertools.product(range(rows), range(cols))])
        index, hidden, distances = (
            torch.tensor(table).unflatten(0, (rows, cols)) for table in (index, hidden, distances)
        )
        if self.pooled_bias is None:
            return Neighborhood(index[..., : len(self.fine)].int(), [BiasPart(self.fine_bias, hidden)])
        return Neighborhood(index.int(), [BiasPart(self.fine_bias, hidden), BiasPart(self.pooled_bias, distances)])


def slow_attention(attention: FocalAttention, maps: torch.Tensor) -> torch.Tensor:
    """`attention(maps)[0]` of one image (1, height, width, channels), token by token, from the definition above."""
    near, side, heads = attention.neighborhood, attention.window_size, attention.num_heads
    height, width, channels = maps.shape[1:]
    padded = maps.new_zeros(-(-height // side) * side, -(-width // side) * side, channels)
    padded[:height, :width] = maps[0]
    pooled = maps.new_zeros(0, 0, channels) if attention.pooling is None else pooled_map(attention, padded, 0)

    def of_heads(projection: nn.Linear, token: torch.Tensor) -> torch.Tensor:
        return projection(token).unflatten(0, (heads, -1))

    output = []
    for row, col in itertools.product(range(height), range(width)):
        (i, a), (j, b) = divmod(row, side), divmod(col, side)
        keys = []
        for number, (down, right) in enumerate(near.fine):
            r, c = i * side + down, j * side + right
            if 0 <= r < len(padded) and 0 <= c < padded.shape[1] and abs(r - row) + abs(c - col) <= near.REACH:
                keys.append((padded[r, c], near.fine_bias[:, a * side + b, number]))
        for m, n in itertools.product(range(pooled.shape[0]), range(pooled.shape[1])):
            keys.append((pooled[m, n], near.pooled_bias[abs(i - m) + abs(j - n), :, a * side + b]))
        query = of_heads(attention.q_proj, padded[row, col])
        scores = [(query * of_heads(attention.k_proj, key)).sum(1) * attention.scaling + bias for key, bias in keys]
        values = torch.stack([of_heads(attention.v_proj, key) for key, _ in keys])
        mixed = torch.einsum("kh,khd->hd", torch.stack(scores).softmax(0), values)
        output.append(attention.o_proj(mixed.flatten()))
    return torch.stack(output).view(maps.shape)


@pytest.mark.parametrize("pooled", [False, True])
def test_another_neighborhood_agrees_with_a_loop_over_tokens(pooled):
    """In every implementation that needs no more than its index and bias."""
    torch.manual_seed(0)
    one_stage = {"depths": (1,), "num_heads": (2,), "focal_levels": (1 + pooled,), "focal_windows": (1,)}
    config = FocalConfig(**settings(**one_stage, expand_sizes=(0,)))
    attention = FocalAttention(config, 0, config.block_geometry(0, 0))
    attention.neighborhood = DilatedNeighborhood(2, 3, pooled)
    attention = attention.double().eval()
    maps = torch.randn(2, 7, 9, 8, dtype=torch.float64, requires_grad=True)  # padded to 9 by 9
    inputs = [maps, *attention.parameters()]
    expected = torch.cat([slow_attention(attention, image) for image in maps.split(1)])
    probe = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * probe).sum(), inputs)

    chosen = {"eager": attend_gathered, "sdpa": attend_in_chunks, "test_extending_einsum": attend_gathered}
    for implementation, attend in chosen.items():
        config._attn_implementation = implementation
        padded = torch.empty(1, 9, 9, 8)
        with torch.no_grad():
            assert choose_attention(attention, padded.flatten(1, 2), attention.neighborhood(padded)).attend is attend
        for per_chunk in (1, 500, cpu_attention_focal.KEY_ELEMENTS_PER_CHUNK) if implementation == "sdpa" else (1,):
            with mock.patch.object(cpu_attention_focal, "KEY_ELEMENTS_PER_CHUNK", per_chunk):
                output = attention(maps)[0]
                gradients = torch.autograd.grad((output * probe).sum(), inputs)
                with torch.inference_mode():
                    inferred = attention(maps)[0]
            torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(inferred, expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-9)


def test_another_neighborhood_in_a_model_can_be_visualized():
    torch.manual_seed(0)
    model = FocalModel(FocalConfig(**settings())).eval()
    for module in model.modules():
        if isinstance(module, FocalAttention):
            module.neighborhood = DilatedNeighborhood(module.num_heads, module.window_size, pooled=True)
    record = record_attention(model, torch.randn(1, 3, 24, 24))  # 12 by 12 tokens
    seen = query_attention(record, at=(0, 0.3))
    assert seen.query == (3, 0)
    # The window is in rows 3 to 5 and columns 0 to 2, at the map's edge.
    expected = {(row, col) for row in (1, 3, 5, 7) for col in (0, 2, 4) if abs(row - 3) + col <= 4}
    assert {tuple(box[:2]) for box in seen.levels[0].boxes.tolist()} == expected
    assert len(seen.levels[1].boxes) == 16
    assert seen.plane().sum() == pytest.approx(1)


# --- Caches -----------------------------------------------------------------------------------------------------------


def tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    tensors = [candidate for candidate in gc.get_objects() if type(candidate) in (torch.Tensor, nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("attention_type", ["focal", "topk"])
def test_memory_stays_flat_over_many_sizes(attention_type, monkeypatch):
    """500 forward passes of images of 50 sizes, whose index tables exceed the bound several times."""
    bound = 128 * 1024
    torch.manual_seed(0)
    one_stage = {"depths": (2,), "num_heads": (2,), "focal_levels": (2,), "focal_windows": (3,), "expand_sizes": (1,)}
    model = FocalModel(FocalConfig(**settings(attention_type=attention_type, use_shift=True, **one_stage))).eval()
    sizes = [(24 + 6 * (number % 5), 24 + 6 * (number // 5)) for number in range(50)]

    @torch.no_grad()
    def passes() -> run_state_focal._TableCache:
        for size in sizes:
            model(torch.zeros(1, 3, *size))
            assert run_state_focal._tables.bytes <= run_state_focal.TABLE_CACHE_BYTES
        return run_state_focal._tables

    monkeypatch.setattr(run_state_focal, "_tables", run_state_focal._TableCache())
    assert passes().bytes > 4 * bound

    monkeypatch.setattr(run_state_focal, "_tables", run_state_focal._TableCache())
    monkeypatch.setattr(run_state_focal, "TABLE_CACHE_BYTES", bound)
    for _ in range(2):
        passes()
    before = tensor_bytes()
    for _ in range(8):
        cache = passes()
    assert tensor_bytes() <= before
    assert bound / 2 < cache.bytes == sum(size for _, size in cache.entries.values())


@pytest.mark.parametrize("attention_type", ["focal", "topk"])
def test_blocks_share_tables_and_biases_are_freed_with_the_model(attention_type):
    model = FocalModel(FocalConfig(**settings(attention_type=attention_type, depths=(2, 1)))).eval()
    blocks = [block.attention for block in model.encoder.layers[0].blocks]
    with torch.no_grad():
        model(torch.zeros(1, 3, 30, 36))
        first, second = (block.neighborhood(torch.empty(1, 15, 18, 8)) for block in blocks)
    assert first.index is second.index
    assert [part.pattern is other.pattern for part, other in zip(first.parts, second.parts, strict=True)] == [True] * 2
    sources = [weakref.ref(part.source) for part in first.parts]
    del model, blocks, first, second
    gc.collect()
    assert not any(source() is not None for source in sources)
