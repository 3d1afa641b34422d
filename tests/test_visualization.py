"""focal_hf.visualization: positions computed by hand, attention rebuilt from them, rollout, and the script."""

import copy
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import disk_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from common.models import default_processor
from example_runs import run_example, run_examples_in_turn, tiny_config
from focal_hf import FocalBackbone, FocalConfig, FocalForImageClassification, FocalModel
from focal_hf.attention_figures import LEVEL_COLOURS, PADDING_COLOUR
from focal_hf.modeling_focal import FocalAttention
from focal_hf.visualization import (
    attention_rollout,
    plot_query,
    query_attention,
    record_attention,
    shaded,
    to_pixels,
)

SMALL_VIT = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)


def one_stage(**changes) -> FocalConfig:
    """Returns a config with 8 x 8 tokens of 2 x 2 pixels. Windows of 4 x 4 see only themselves, without `changes`."""
    settings = {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 4,
        "depths": (2,),
        "num_heads": (2,),
        "window_size": 4,
        "focal_levels": (2,),
        "focal_windows": (1,),
        "expand_sizes": (0,),
        "num_labels": 3,
        "initializer_range": 0.5,
    }
    return FocalConfig(**settings | changes)


def all_alike(model: nn.Module) -> nn.Module:
    """Builds a model whose scores are all 0. Each entry in the list of keys then has the same weight."""
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "neighborhood" in name:
            nn.init.zeros_(parameter)
    return model.eval()


def look(config: FocalConfig, query: tuple[int, int], layer: int = 0, size: tuple[int, int] = (16, 16)):
    """Returns what the token `query` (row, column) attends to, in a model whose scores are all 0."""
    record = record_attention(all_alike(FocalModel(config)), torch.randn(1, 3, *size))
    at = ((query[1] + 0.5) * 2 / size[1], (query[0] + 0.5) * 2 / size[0])
    seen = query_attention(record, at, layer=layer)
    assert seen.query == query
    assert sum(level.weights.sum() for level in seen.levels) == pytest.approx(1, abs=1e-6)
    return seen


def listed(level) -> dict[tuple[int, ...], float]:
    """Returns the weight of every box. No box may be listed twice."""
    boxes = {tuple(box): weight for box, weight in zip(level.boxes.tolist(), level.weights.tolist(), strict=True)}
    assert len(boxes) == len(level.boxes)
    return boxes


def tokens(rows, cols) -> set[tuple[int, ...]]:
    return {(row, col, row + 1, col + 1) for row, col in itertools.product(rows, cols)}


def flagged(level, flags: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, level.boxes[flags].tolist()))


def test_corner_window_sees_tokens_across_the_edges_and_existing_cells():
    seen = look(one_stage(expand_sizes=(1,), focal_levels=(3,), focal_windows=(3,)), query=(1, 6))
    fine, coarse, finer = seen.levels
    assert seen.window.tolist() == [[0, 4, 4, 8]]

    # The window's rows 0 to 3 and columns 4 to 7 with one more all around: row -1 is row 7, column 8 is column 0.
    rows, cols = (7, 0, 1, 2, 3, 4), (3, 4, 5, 6, 7, 0)
    assert set(listed(fine)) == tokens(rows, cols)
    assert flagged(fine, fine.wrapped) == tokens([7], cols) | tokens(rows, [0])
    # Of each side of the surroundings, two displaced windows list the middle two tokens.
    twice = tokens([7, 4], [5, 6]) | tokens([1, 2], [3, 0])
    # Windows of 4 tokens, and a square of 3 of them around this one; cells of 2 tokens, and a square of 4 around it.
    assert set(listed(coarse)) == {(0, 0, 4, 4), (0, 4, 4, 8), (4, 0, 8, 4), (4, 4, 8, 8)}
    assert set(listed(finer)) == {(row, col, row + 2, col + 2) for row in (0, 2, 4) for col in (2, 4, 6)}
    assert not any(level.wrapped.any() for level in (coarse, finer))
    assert (fine.cell, coarse.cell, finer.cell) == (1, 4, 2)

    total = 36 + len(twice) + 4 + 9
    for level in seen.levels:
        assert not level.outside.any()
        for box, weight in listed(level).items():
            assert weight == pytest.approx((2 if box in twice else 1) / total)
    assert coarse.plane[0, 0] == pytest.approx(1 / total / 16)
    assert seen.plane([0, 2])[4, 7] == pytest.approx(1 / total + 1 / total / 4)
    assert seen.plane().sum() == pytest.approx(1)


def test_shifted_corner_window_wraps_around_and_masks_other_corners():
    seen = look(one_stage(use_shift=True), query=(0, 1), layer=1)
    fine, cell = seen.levels
    quarters = {(0, 0, 2, 2), (0, 6, 2, 8), (6, 0, 8, 2), (6, 6, 8, 8)}
    assert set(map(tuple, seen.window.tolist())) == quarters
    assert listed(fine) == pytest.approx(dict.fromkeys(tokens([0, 1], [0, 1]), 1 / 5))
    assert not fine.wrapped.any()
    # The pooled token of this window is made of all of it, and not hidden.
    assert listed(cell) == pytest.approx(dict.fromkeys(quarters, 1 / 5 / 4))
    assert flagged(cell, cell.wrapped) == quarters - {(0, 0, 2, 2)}


def test_padding_is_recorded():
    """For 10 x 9 tokens, windows of 4 x 4 need two rows of padding below and three columns on the right."""
    seen = look(one_stage(focal_windows=(3,)), query=(9, 7), size=(20, 17))
    fine, cells = seen.levels
    assert seen.map_size == (10, 9)
    assert fine.plane.shape == (12, 12)
    assert flagged(fine, fine.outside) == tokens([10, 11], [4, 5, 6, 7])
    total, whole = 16 + 6, 1 / (16 + 6)
    assert total * fine.weights.sum() == pytest.approx(16)
    assert listed(cells) == pytest.approx(
        {
            **{(4, 0, 8, 4): whole, (4, 4, 8, 8): whole},
            **{(4, 8, 8, 9): whole / 4, (4, 9, 8, 12): whole * 3 / 4},
            **{
                (8, 0, 10, 4): whole / 2,
                (10, 0, 12, 4): whole / 2,
                (8, 4, 10, 8): whole / 2,
                (10, 4, 12, 8): whole / 2,
            },
            **{(8, 8, 10, 9): whole / 8, (8, 9, 10, 12): whole * 3 / 8},
            **{(10, 8, 12, 9): whole / 8, (10, 9, 12, 12): whole * 3 / 8},
        }
    )
    assert flagged(cells, cells.outside) == {box for box in listed(cells) if box[2] == 12 or box[3] == 12}

    # In pixels, a row of the last token lies beyond the image, and so does the padding.
    pixels = to_pixels(seen.plane(), seen.stride, seen.image_size)
    assert pixels.shape == (20, 17)
    inside = seen.plane()[:10, :9]
    assert pixels.sum() == pytest.approx(inside[:, :8].sum() + inside[:, 8].sum() / 2)
    assert pixels[19, 15] == pytest.approx(seen.plane()[9, 7] / 4)


def test_pooled_cells_are_centred_on_the_map():
    """Windows of 5 tokens are pooled by 2: an axis of 10 tokens has four cells, and loses a token at each end."""
    seen = look(one_stage(image_size=20, window_size=5, focal_levels=(3,)), query=(0, 9), size=(20, 20))
    assert set(listed(seen.levels[2])) == {(row, col, row + 2, col + 2) for row in (1, 3) for col in (5, 7)}


def test_topk_sees_the_tokens_and_cells_nearest_to_the_window_centre():
    config = one_stage(attention_type="topk", topk=5, image_size=24)
    seen = look(config, query=(4, 0), size=(24, 24))  # of 12 x 12 tokens, in the window whose middle is at (6, 2)
    assert seen.window.tolist() == [[4, 0, 8, 4]]
    fine, cells = seen.levels
    assert set(listed(fine)) == {*tokens([6], [1, 2, 3]), *tokens([5, 7], [2])}
    # Of the windows around (1, 0), the four nearest, and the first of those a diagonal away.
    assert set(listed(cells)) == {(4, 0, 8, 4), (0, 0, 4, 4), (4, 4, 8, 8), (8, 0, 12, 4), (0, 4, 4, 8)}
    assert [*listed(fine).values(), *listed(cells).values()] == pytest.approx([1 / 10] * 10)


@st.composite
def blocks(draw) -> tuple[FocalConfig, tuple[int, int], tuple[float, float], int]:
    """Draws the config of a model with one stage, an image size, a point and a layer."""
    window, image_size = draw(st.integers(2, 5)), draw(st.integers(2, 24))
    topk = draw(st.booleans())
    deepest = 2 if topk else min(3, min(window, -(-image_size // 2)).bit_length() + 1)
    config = one_stage(
        attention_type="topk" if topk else "focal",
        image_size=image_size,
        window_size=window,
        focal_levels=(draw(st.integers(1, deepest)),),
        focal_windows=(draw(st.sampled_from([1, 3, 5])),),
        expand_sizes=(draw(st.integers(0, window)),),
        topk=draw(st.integers(1, 20)),
        use_shift=draw(st.booleans()),
        focal_pool="mean",
    )
    fractions = st.floats(0, 1)
    sizes = st.integers(1, 30)
    return config, draw(st.tuples(sizes, sizes)), draw(st.tuples(fractions, fractions)), draw(st.integers(0, 1))


@settings(max_examples=60, deadline=None)
@given(blocks())
def test_output_of_a_query_is_the_map_weighted_by_its_planes(block):
    """This holds for values that equal the tokens, and for mean pooling."""
    config, size, at, layer = block
    torch.manual_seed(0)
    model = FocalModel(config).eval()
    captured = []
    for module in model.modules():
        if isinstance(module, FocalAttention):
            for projection in (module.v_proj, module.o_proj):
                nn.init.eye_(projection.weight)
                nn.init.zeros_(projection.bias)
            module.register_forward_hook(lambda module, args, output: captured.append((args[0], output[0])))
    record = record_attention(model, torch.randn(1, 3, *size))
    maps, output = (tensor[0].double().numpy() for tensor in captured[layer])
    for head in (0, 1):
        seen = query_attention(record, at, layer=layer, head=head)
        plane, channels = seen.plane(), slice(2 * head, 2 * head + 2)
        assert plane.sum() == pytest.approx(1, abs=1e-5)
        rows, cols = seen.map_size
        expected = (plane[:rows, :cols, None] * maps[..., channels]).sum((0, 1))
        np.testing.assert_allclose(output[seen.query][channels], expected, atol=1e-5)
        assert sum(level.weights[level.outside].sum() for level in seen.levels) == pytest.approx(
            1 - plane[:rows, :cols].sum(), abs=1e-5
        )
    mean = query_attention(record, at, layer=layer).plane()
    both = [query_attention(record, at, layer=layer, head=head).plane() for head in (0, 1)]
    np.testing.assert_allclose(mean, np.mean(both, axis=0), atol=1e-7)


def two_stages(**changes) -> FocalForImageClassification:
    torch.manual_seed(0)
    return FocalForImageClassification(tiny_config(num_labels=3, initializer_range=0.5, **changes)).eval()


def by_all_pairs(record, start: np.ndarray) -> np.ndarray:
    """Computes rollout as its authors do, with a matrix of all pairs of tokens for each block."""
    relevance = start.ravel()
    for stage, layers in reversed(list(enumerate(record.stages))):
        rows, cols = layers[0].map_size
        places = list(itertools.product(range(rows), range(cols)))
        if len(places) != len(relevance):
            next_rows, next_cols = record.stages[stage + 1][0].map_size
            merged = np.array(
                [
                    [(r // 2, c // 2) == token for r, c in places]
                    for token in itertools.product(range(next_rows), range(next_cols))
                ]
            )
            relevance = relevance @ (merged / merged.sum(1, keepdims=True))
        pixels = record.patch_size * 2**stage
        height, width = record.image_size
        for layer in reversed(range(len(layers))):
            points = [((col + 0.5) * pixels / width, (row + 0.5) * pixels / height) for row, col in places]
            planes = [query_attention(record, (min(x, 1), min(y, 1)), stage, layer).plane() for x, y in points]
            attention = np.array([plane[:rows, :cols].ravel() for plane in planes])
            relevance = relevance @ (attention + np.eye(len(places))) / 2
    return relevance.reshape(rows, cols)


@pytest.mark.parametrize(
    ("changes", "size", "padded"),
    [
        ({"depths": (2, 1), "use_shift": True}, (16, 16), False),
        ({"depths": (2, 2), "use_shift": True}, (14, 22), True),  # maps of 7 x 11 and 4 x 6 tokens, padded to windows
        ({"attention_type": "topk", "topk": 6}, (17, 16), True),
        ({"drop_remainder": True}, (15, 23), True),  # 7 x 11, of which 6 x 10 go on
        ({"focal_levels": (3, 1), "window_size": 3, "image_size": 24}, (24, 24), False),
    ],
)
def test_rollout_equals_that_with_all_pairs_of_tokens(changes, size, padded):
    # In float64, as two ways to attend are compared.
    model = two_stages(**changes).double()
    pixel_values = torch.randn(1, 3, *size, dtype=torch.float64)
    record = record_attention(model, pixel_values)
    with torch.no_grad():
        logits = model(pixel_values).logits[0].numpy()
        last = model.focal(pixel_values).last_hidden_state[0]
    np.testing.assert_allclose(record.logits, logits, atol=1e-6)

    rows, cols = record.stages[-1][-1].map_size
    votes = model.classifier(last).detach().double().numpy()
    votes = (votes - votes.mean(1, keepdims=True)).clip(0).reshape(rows, cols, 3)
    for label in (None, 0, 1, 2):
        saliency = attention_rollout(record, label)
        start = np.ones((rows, cols)) if label is None else votes[..., label]
        if not start.any():
            assert not saliency.any()
            continue
        np.testing.assert_allclose(saliency, by_all_pairs(record, start / start.sum()), atol=1e-6)
        if padded:
            assert 0 < saliency.sum() < 0.999
        else:
            assert saliency.sum() == pytest.approx(1, abs=1e-6)


def test_rollout_of_one_block_with_full_attention():
    """Each token gets half of its own value, and half of the mean of all tokens."""
    config = one_stage(image_size=8, depths=(1,), focal_levels=(1,))
    model = all_alike(FocalForImageClassification(config))
    nn.init.normal_(model.classifier.weight)
    record = record_attention(model, torch.randn(1, 3, 8, 8))
    votes = (record.token_logits[..., 1] - record.token_logits.mean(2)).clip(0)
    expected = votes / votes.sum() / 2 + 1 / 16 / 2
    np.testing.assert_allclose(attention_rollout(record, 1), expected, rtol=1e-5)
    np.testing.assert_allclose(attention_rollout(record), np.full((4, 4), 1 / 16), rtol=1e-5)


def test_recording_does_not_change_the_model():
    model, pixel_values = two_stages().double(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        before = model(pixel_values).logits
    record = record_attention(model, pixel_values)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, FocalAttention))
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, before)
    np.testing.assert_allclose(record.logits, before[0].numpy(), atol=1e-6)
    assert not any(block.neighborhood.forms for stage in record.stages for block in stage)  # such as the dense bias
    sums = torch.cat([block.weights.sum(-1).flatten() for stage in record.stages for block in stage])
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_recording_works_on_any_device_and_dtype(tmp_path):
    model, pixel_values = two_stages(), torch.randn(1, 3, 16, 16)
    expected = record_attention(model, pixel_values).logits
    half = record_attention(copy.deepcopy(model).bfloat16(), pixel_values).logits
    np.testing.assert_allclose(half, expected, atol=0.1 * np.abs(expected).max())
    offloaded = disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    np.testing.assert_array_equal(record_attention(offloaded, pixel_values).logits, expected)


def test_invalid_requests_are_refused():
    model, pixel_values = two_stages(), torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"one image at a time.*\(2, 3, 16, 16\)"):
        record_attention(model, torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"got ndarray of shape \(1, 3, 16, 16\)"):
        record_attention(model, pixel_values.numpy())
    with pytest.raises(ValueError, match=r"must be floating point, .* got torch\.uint8"):
        record_attention(model, pixel_values.to(torch.uint8))
    with pytest.raises(ValueError, match=r"takes a Focal model.*got ViTModel"):
        record_attention(ViTModel(SMALL_VIT), pixel_values)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        record_attention(model.train(), pixel_values)

    record = record_attention(FocalBackbone(tiny_config()).eval(), pixel_values)
    with pytest.raises(ValueError, match="needs a classifier"):
        attention_rollout(record, 0)
    for match, options in {
        "fractions.*(1.2, 0.5)": {"at": (1.2, 0.5)},
        "no stage 2: .* there are 2": {"stage": 2},
        "no stage 1, layer 1: .* there are 1": {"stage": 1, "layer": 1},
        "no stage 0, head -2": {"head": -2},
    }.items():
        with pytest.raises(ValueError, match=match):
            query_attention(record, **{"at": (0.5, 0.5)} | options)
    record = record_attention(two_stages(), pixel_values)
    with pytest.raises(ValueError, match="no class 3"):
        attention_rollout(record, 3)
    with pytest.raises(ValueError, match=r"\(16, 16, 3\) .*; got \(32, 32, 3\)"):
        shaded(np.zeros((32, 32, 3), np.uint8), query_attention(record, (0, 0)))
    with pytest.raises(ValueError, match=r"type uint8; .* and float64"):
        shaded(np.zeros((16, 16, 3)), query_attention(record, (0, 0)))


def test_shading_dims_the_image_and_draws_finer_levels_on_top():
    seen = look(one_stage(), query=(9, 9), size=(20, 20))  # in the window of rows and columns 8 to 11, of 10
    image = np.full((20, 20, 3), 100, np.uint8)
    pixels = shaded(image, seen)
    dim, fine, cell = np.full(3, 55), np.array(LEVEL_COLOURS[0]), np.array(LEVEL_COLOURS[1])
    assert pixels.shape == (24, 24, 3)
    assert pixels[0, 0].tolist() == [55, 55, 55]
    assert pixels[23, 0].tolist() == list(PADDING_COLOUR)
    np.testing.assert_allclose(pixels[17, 17], 0.05 * dim + 0.95 * fine, atol=1)
    np.testing.assert_allclose(pixels[23, 23], 0.05 * np.array(PADDING_COLOUR) + 0.95 * fine, atol=1)
    np.testing.assert_allclose(shaded(image, seen, [1])[17, 17], 0.05 * dim + 0.95 * cell, atol=1)
    assert np.array_equal(shaded(image, seen, []), shaded(image, seen, ()))

    # A map that leaves out the image's last rows and columns.
    seen = look(one_stage(drop_remainder=True), query=(7, 7), size=(17, 17))
    pixels, weights = shaded(image[:17, :17], seen), to_pixels(seen.plane(), seen.stride, seen.image_size)
    assert pixels.shape == (17, 17, 3)
    assert pixels[16, 16].tolist() == [55, 55, 55]
    assert (pixels[15, 15] != 55).all()
    assert weights.shape == (17, 17)
    assert weights[:16, :16].sum() == pytest.approx(1)
    assert weights[16].sum() == 0

    # Level 1 are cells of 4 x 4 tokens, of all the map; level 2 cells of 2 x 2, from row and column 2.
    seen = look(one_stage(focal_levels=(3,), focal_windows=(3,)), query=(5, 5))
    pixels = shaded(image[:16, :16], seen)
    for token, level in ((0, 1), (2, 2), (4, 0)):
        colour = 0.05 * dim + 0.95 * np.array(LEVEL_COLOURS[level])
        np.testing.assert_allclose(pixels[2 * token, 2 * token], colour, atol=1)


def test_only_figures_need_matplotlib(monkeypatch):
    seen = look(one_stage(), query=(0, 0))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'focal-hf\[visualization\]'"):
        plot_query(np.zeros((16, 16, 3), np.uint8), seen)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Writes a model with maps of 14 x 10 and 7 x 5 tokens, so that some are padded and some windows wrap around."""
    torch.manual_seed(0)
    config = tiny_config(image_size=(28, 20), window_size=4, focal_levels=(3, 2), depths=(2, 1), use_shift=True)
    config.id2label = {0: "cat", 1: "dog"}
    model = FocalForImageClassification(config)
    model.save_pretrained(tmp_path / "model")
    default_processor(model.config, crop=1.0).save_pretrained(tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    return tmp_path / "model"


def test_script_writes_three_pictures(trained, tmp_path):
    run = run_example(
        "visualize_attention.py", "noise.png", "--model", trained, "--at", "0.95,0.9", "--head", 0, folder=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert "seen as 28 x 20 pixels: " in run.stdout
    shares = [float(share) for share in re.findall(r"level \d: ([\d.]+) %", run.stdout)]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(100, abs=0.2)
    files = sorted((tmp_path / "attention").iterdir())
    assert [file.name for file in files] == ["attention.png", "grid.png", "saliency.png"]
    for file in files:
        with Image.open(file) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(10**7)) > 200


def test_errors_of_the_script_are_one_clear_line(trained, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "file").write_text("")
    ViTForImageClassification(SMALL_VIT).save_pretrained(tmp_path / "vit")
    default_processor(SMALL_VIT, crop=1.0).save_pretrained(tmp_path / "vit")
    good = ["noise.png", "--model", trained]
    expected = {
        ("nowhere.png", "--model", trained): r"Not a readable image: nowhere\.png",
        ("broken.png", "--model", trained): r"Not a readable image: broken\.png",
        ("noise.png", "--model", "./nowhere"): r"Cannot load --model \./nowhere",
        ("noise.png", "--model", "./vit"): r"--model \./vit is a vit",
        (*good, "--stage", 2): r"no stage 2: they are counted from 0, and there are 2",
        (*good, "--stage", 1, "--layer", 1): r"no stage 1, layer 1",
        (*good, "--head", 1): r"no stage 0, head 1",
        (*good, "--class", "bird"): r"--class bird is not among the 2 classes of .*: cat, dog\.",
        (*good, "--output", "file"): r"Cannot write to --output file",
        (*good, "--at", "0.5"): r"argument --at: 0\.5 is not X,Y with both from 0 to 1",
        (*good, "--at", "0.5,1.5"): r"argument --at: 0\.5,1\.5 is not X,Y",
    }
    answers = run_examples_in_turn("visualize_attention.py", [list(line) for line in expected], tmp_path)
    for (status, _, errors), (line, message) in zip(answers, expected.items(), strict=True):
        said = errors.splitlines()[-1]
        assert re.search(message, said), (line, status, errors)
        assert status == 2 or (status == 1 and errors == f"{said}\n" and said.startswith("error: ")), (line, errors)
