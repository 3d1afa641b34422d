"""`from_pretrained(..., window_size=…, image_size=…)`: weights of one size load into a model of another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, UperNetConfig, UperNetForSemanticSegmentation
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.testing_utils import CaptureLogger, LoggingLevel
from transformers.utils import logging

from focal_hf import FocalBackbone, FocalConfig, FocalForImageClassification, FocalModel
from small_models import BOTH, randomized

FIRST = "encoder.layers.0.blocks.0.attention.neighborhood"


def config(attention_type="focal", **changes):
    options = {"image_size": 64, "embed_dim": 8, "depths": (1, 2), "num_heads": (2, 2), "window_size": 4, "topk": 9}
    options |= {"focal_levels": (2, 2), "focal_windows": (3, 3), "expand_sizes": (2, 2), "encoder_stride": 8}
    return FocalConfig(attention_type=attention_type, num_labels=5, **options | changes)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def attention_of(model):
    return model.encoder.layers[0].blocks[0].attention


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_fits_is_loaded_bit_for_bit(attention_type, dtype, tmp_path):
    model = randomized(FocalForImageClassification(config(attention_type, use_absolute_embeddings=True))).to(dtype)
    loaded = FocalForImageClassification.from_pretrained(saved(model, tmp_path), window_size=4, image_size=64)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@settings(max_examples=25, deadline=None)
@given(
    attention_type=st.sampled_from(["focal", "topk"]),
    pool=st.sampled_from(["fc", "conv", "mean"]),
    old=st.tuples(st.integers(2, 9), st.integers(8, 80)),
    new=st.tuples(st.integers(2, 9), st.integers(8, 80)),
    expand=st.integers(0, 2),
)
def test_any_size_loads_into_any_other_and_is_saved_as_it_is(attention_type, pool, old, new, expand, tmp_path_factory):
    """Only tables that the checkpoint has not may be missing, and only those that the model has not be left over."""
    folder = tmp_path_factory.mktemp("model")
    options = {"attention_type": attention_type, "focal_pool": pool, "use_absolute_embeddings": True}
    model = randomized(FocalModel(config(window_size=old[0], image_size=old[1], **options)))
    changes = {"window_size": new[0], "image_size": new[1], "expand_sizes": (expand, expand)}
    loaded, info = FocalModel.from_pretrained(saved(model, folder), output_loading_info=True, **changes)
    assert not info["mismatched_keys"]
    assert not info["error_msgs"]
    assert all(name.endswith("_to_neighbors") for name in info["missing_keys"] | info["unexpected_keys"])
    fresh = FocalModel(loaded.config).state_dict()
    for name, value in loaded.state_dict().items():
        assert value.shape == fresh[name].shape, name
        assert value.isfinite().all(), name
        if "nearest_index" in name:
            assert torch.equal(value, fresh[name]), name
    again = FocalModel.from_pretrained(saved(loaded, folder)).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in loaded.state_dict().items())
    assert loaded.eval()(torch.randn(1, 3, new[1], 40)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("levels", [1, 2])
def test_attends_on_upsampled_maps_as_before_on_the_maps(levels, tmp_path):
    """Tables are waves over offsets, known at any resolution; maps are smooth."""
    old, new = {"window_size": 7, "image_size": 112}, {"window_size": 12, "image_size": 192}
    one_stage = {"depths": (1,), "num_heads": (4,), "focal_levels": (levels,), "focal_windows": (3,)}
    one_stage |= {"embed_dim": 32, "expand_sizes": (3,), "encoder_stride": 4}
    torch.manual_seed(0)
    model = FocalModel(config(**one_stage | old)).eval()
    attention = attention_of(model)
    waves = torch.randn(4, 2)  # of each head

    def wave(row, col):  # of offsets in old tokens, to (*offsets, heads)
        return 3 * torch.cos(0.6 * (row[..., None] * waves[:, 0] + col[..., None] * waves[:, 1]))

    def square(first, last):
        return torch.meshgrid(torch.arange(first, last + 1.0), torch.arange(first, last + 1.0), indexing="ij")

    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.normal_(std=0.3)
        neighborhood = attention.neighborhood
        neighborhood.relative_position_bias_table.copy_(wave(*square(-6, 6)).flatten(0, 1))
        query, key, slots = (
            torch.cartesian_prod(*[torch.arange(7)] * 2),
            [],
            torch.cartesian_prod(*[torch.arange(7)] * 2),
        )
        for displacement in ((3, 3), (3, -3), (-3, 3), (-3, -3)):
            place = slots + torch.tensor(displacement)
            key.append(place[((place < 0) | (place > 6)).any(1)])
        offset = (query[:, None] - torch.cat(key)).float()
        neighborhood.relative_position_bias_table_to_neighbors.copy_(wave(*offset.unbind(-1)).permute(2, 0, 1))
        for table in neighborhood.pooled_tables():
            table.copy_(wave(*square(-4, 4)).flatten(0, 1).T)
            attention.pooling.layers[0].weight.fill_(1 / 49)

    def attend(model, maps):
        return attention_of(model)(maps.permute(0, 2, 3, 1))[0].permute(0, 3, 1, 2)

    def resize(maps, side):
        return torch.nn.functional.interpolate(maps, size=(side, side), mode="bicubic")

    larger = FocalModel.from_pretrained(saved(model, tmp_path), expand_sizes=(5,), **new).eval()
    maps = resize(torch.randn(2, 32, 7, 7), 28)
    with torch.no_grad():
        expected = resize(attend(model, maps), 48)
        scale = (expected - expected.mean((2, 3), keepdim=True)).norm()
        assert (attend(larger, resize(maps, 48)) - expected).norm() / scale < 0.17
        # What it takes: the same maps with the windows as they were, and with fresh tables.
        assert (attend(model, resize(maps, 48)) - expected).norm() / scale > 0.8
        for parameter in attention_of(larger).neighborhood.parameters():
            parameter.zero_()
        assert (attend(larger, resize(maps, 48)) - expected).norm() / scale > 0.4


def test_directions_of_neighbours_are_kept_apart(tmp_path):
    model = FocalModel(config())
    table = attention_of(model).neighborhood.relative_position_bias_table_to_neighbors
    with torch.no_grad():
        table.copy_(torch.arange(4.0).repeat_interleave(table.shape[-1] // 4).expand_as(table))
    for changes in ({"window_size": 7}, {"window_size": 3}, {"expand_sizes": (3, 1)}):
        loaded = FocalModel.from_pretrained(saved(model, tmp_path), **changes)
        table = attention_of(loaded).neighborhood.relative_position_bias_table_to_neighbors
        expected = torch.arange(4.0).repeat_interleave(table.shape[-1] // 4).expand_as(table)
        torch.testing.assert_close(table.detach(), expected, atol=1e-5, rtol=0)


def test_pooling_keeps_the_sum_of_its_weights(tmp_path):
    for pool in ("fc", "conv"):
        model = FocalModel(config(focal_pool=pool))
        for parameter in attention_of(model).pooling.parameters():
            torch.nn.init.constant_(parameter, 0.25)
        loaded = FocalModel.from_pretrained(saved(model, tmp_path), window_size=8)
        weight, bias = attention_of(loaded).pooling.parameters()
        torch.testing.assert_close(weight.detach(), torch.full(weight.shape, 0.25 * 4**2 / 8**2))
        assert (bias == 0.25).all()


def test_neighbours_that_the_checkpoint_lacks_start_from_the_window(tmp_path):
    """The last stage's map was one window; twice as large, it is four, which look around them."""
    model = randomized(FocalForImageClassification(config(image_size=32)))
    with CaptureLogger(logging.get_logger()) as log:
        loaded, info = FocalForImageClassification.from_pretrained(
            saved(model, tmp_path), image_size=64, output_loading_info=True
        )
    names = {f"layers.1.blocks.{block}.attention.neighborhood.relative_position_bias_table" for block in (0, 1)}
    assert info["missing_keys"] == {f"focal.encoder.{name}_to_neighbors" for name in names}
    assert all(f"{name}_to_neighbors is not in the checkpoint" in log.out for name in names)
    with LoggingLevel(logging.ERROR), CaptureLogger(logging.get_logger()) as log:
        FocalForImageClassification.from_pretrained(tmp_path, image_size=64)
    assert log.out == ""

    neighborhood = loaded.focal.encoder.layers[1].blocks[1].attention.neighborhood
    own = neighborhood.relative_position_bias_table.unflatten(0, (7, 7))
    table = neighborhood.relative_position_bias_table_to_neighbors
    assert torch.equal(own.flatten(0, 1), model.state_dict()[f"focal.encoder.{min(names).replace('.0.', '.1.')}"])
    # The window displaced by (2, 2) has no slots for its first two rows' first two tokens, so that its first slot is
    # its token (0, 2), which is (2, 4) from the window; its last is (3, 3), which is (5, 5).
    for query, slot, offset in ((0, 0, (-2, -3)), (15, 0, (1, -1)), (0, 11, (-3, -3)), (13, 11, (-2, -3))):
        expected = own[offset[0] + 3, offset[1] + 3]
        assert torch.equal(table[0, :, query, slot], expected), (query, slot)


def test_pooled_tables_that_the_checkpoint_lacks_start_from_the_window(tmp_path):
    model = randomized(FocalModel(config(focal_levels=(1, 1), focal_pool="mean")))
    with CaptureLogger(logging.get_logger()) as log:
        loaded = FocalModel.from_pretrained(saved(model, tmp_path), focal_levels=(2, 2))
    assert "relative_position_bias_table_to_windows_0 is not in the checkpoint" in log.out
    neighborhood = attention_of(loaded).neighborhood
    own = neighborhood.relative_position_bias_table.unflatten(0, (7, 7))
    (table,) = neighborhood.pooled_tables()
    assert torch.equal(table.unflatten(1, (6, 6)), own[1:, 1:].permute(2, 0, 1))  # a side of 4 + 3 - 1
    loaded = FocalModel.from_pretrained(saved(model, tmp_path), focal_levels=(2, 2), focal_windows=(7, 7))
    (table,) = attention_of(loaded).neighborhood.pooled_tables()
    table = table.unflatten(1, (10, 10))
    assert torch.equal(table[:, 1:8, 1:8], own.permute(2, 0, 1))
    assert torch.equal(table[:, 0, 0], own[0, 0])
    assert torch.equal(table[:, 9, 4], own[6, 3])


def test_topk_takes_no_index_of_another_map(tmp_path):
    """Of the same shape: as many windows of another size, or height and width swapped."""
    for old, new in (({}, {"image_size": 128, "window_size": 8}), ({"image_size": (32, 64)}, {"image_size": (64, 32)})):
        model = FocalModel(config("topk", topk=5, **old))
        loaded = FocalModel.from_pretrained(saved(model, tmp_path), **new)
        fresh = attention_of(FocalModel(loaded.config)).neighborhood
        for name in ("nearest_index_0", "nearest_index_1"):
            of_model, of_loaded = (getattr(attention_of(of).neighborhood, name) for of in (model, loaded))
            assert of_model.shape == of_loaded.shape
            assert torch.equal(of_loaded, getattr(fresh, name))
            # Windows lie to one another as before where there are as many, either way.
            assert torch.equal(of_loaded, of_model) == (name == "nearest_index_1" and "window_size" in new)


def test_topk_keeps_an_index_that_breaks_ties_otherwise(tmp_path):
    model = FocalModel(config("topk", topk=5))
    neighborhood = attention_of(model).neighborhood
    for name, side, step, middle in (("nearest_index_0", 16, 4, 2), ("nearest_index_1", 4, 1, 0)):
        tokens = torch.cartesian_prod(*[torch.arange(side)] * 2)
        centers = torch.cartesian_prod(*[torch.arange(4) * step + middle] * 2)
        distance = (tokens - centers[:, None]).square().sum(-1)
        last_first = (distance * side**2 - torch.arange(side**2)).argsort(dim=1)[:, :5]
        assert not torch.equal(last_first, getattr(neighborhood, name))
        setattr(neighborhood, name, last_first)
    loaded = attention_of(FocalModel.from_pretrained(saved(model, tmp_path))).neighborhood
    assert torch.equal(loaded.nearest_index_0, neighborhood.nearest_index_0)
    assert torch.equal(loaded.nearest_index_1, neighborhood.nearest_index_1)


def test_absolute_positions_are_those_of_the_model_at_that_size(tmp_path):
    model = randomized(FocalModel(config(use_absolute_embeddings=True)))
    loaded = FocalModel.from_pretrained(saved(model, tmp_path), image_size=(96, 80)).eval()
    pixel_values = torch.randn(1, 3, 96, 80)
    torch.testing.assert_close(loaded(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)


def test_inside_another_model_and_in_bfloat16(tmp_path):
    names = ["stage1", "stage2"]
    backbone_config = config(out_features=names)
    uper = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=backbone_config, num_labels=3, use_auxiliary_head=False, hidden_size=8)
    )
    uper.save_pretrained(tmp_path / "uper")
    backbone_config = config(out_features=names, window_size=7)
    loaded, info = UperNetForSemanticSegmentation.from_pretrained(
        tmp_path / "uper", backbone_config=backbone_config, output_loading_info=True, dtype=torch.bfloat16
    )
    assert not any(info.values())
    expected = FocalBackbone.from_pretrained(
        saved(uper.backbone, tmp_path / "backbone"), window_size=7, dtype=torch.bfloat16
    )
    assert type(expected) is type(AutoBackbone.from_config(backbone_config))
    for name, value in expected.state_dict().items():
        assert torch.equal(value, loaded.backbone.state_dict()[name]), name


@BOTH
def test_a_checkpoint_of_another_model_is_refused(attention_type, tmp_path):
    folder = saved(FocalModel(config(attention_type, use_absolute_embeddings=True)), tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        FocalModel.from_pretrained(folder, num_heads=(4, 4), window_size=5)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        FocalModel.from_pretrained(folder, embed_dim=16)
    weights = load_file(folder / "model.safetensors")
    table = "embeddings.position_embeddings" if attention_type == "topk" else f"{FIRST}.relative_position_bias_table"
    weights[table] = torch.zeros(1, 170, 8) if attention_type == "topk" else torch.zeros(170, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        FocalModel.from_pretrained(folder)


@BOTH
def test_what_quantised_layers_are_saved_as_is_left_to_their_quantiser(attention_type):
    """A tensor gets one conversion only. (torchao's own test runs where it is installed: see test_tools.py.)"""
    model = FocalForImageClassification(config(attention_type))
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert any("pooling" in name for name in linear)
    for conversion in get_model_conversion_mapping(model, add_legacy=False):
        for name in (f"{path}.{part}" for path in linear for part in ("_weight_qdata", "_weight_scale", "SCB")):
            assert conversion.rename_source_key(name) == (name, None)


def test_layers_of_another_width_are_made_anew_where_that_is_asked_for(tmp_path):
    """Biases, too, whose shapes differ without being those of another window."""
    folder = saved(randomized(FocalModel(config(focal_pool="conv"))), tmp_path)
    for changes in ({"embed_dim": 16}, {"embed_dim": 16, "window_size": 7}, {"focal_pool": "fc"}):
        loaded = FocalModel.from_pretrained(folder, ignore_mismatched_sizes=True, **changes)
        assert loaded.eval()(torch.randn(1, 3, 40, 40)).last_hidden_state.isfinite().all()
