"""The outputs of the original are reproduced for every golden case, to within 1e-5 in float32 (2e-5 on a GPU)."""

import copy

import pytest
import torch

import golden_cases
import original
from focal_hf import FocalBackbone, FocalForImageClassification
from golden_cases import RELEASED, SMALL, load
from small_models import DEVICE

TOLERANCE = 1e-5 if DEVICE.type == "cpu" else 2e-5

# In millions, as published in the original's repository.
PUBLISHED_PARAMETERS = {
    "focal_tiny_patch4_window7_224": 28.9,
    "focal_tiny_useconv_patch4_window7_224": 30.8,
    "focal_small_patch4_window7_224": 51.1,
    "focal_small_useconv_patch4_window7_224": 53.1,
    "focal_base_patch4_window7_224": 89.8,
    "focal_base_useconv_patch4_window7_224": 93.3,
    "focalv2_tiny_useconv_patch4_window7_224": 30.2,
    "focalv2_small_useconv_patch4_window7_224": 51.5,
    "focalv2_base_useconv_patch4_window7_224": 91.2,
}


def assert_close(answer, expected, scale=None):
    answer = answer.detach().cpu()
    scale = expected.abs().max() if scale is None else scale
    error = ((answer - expected).abs().max() / scale).item()
    assert error < TOLERANCE, error


@pytest.fixture(scope="module", params=[*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in RELEASED)])
def loaded(request):
    """A case, its state dict, its config, and its weights under the names of focal_hf.

    Drawing the weights takes long, so the tests share them.
    """
    case = golden_cases.case(request.param)
    drawn = case.state_dict
    return case, drawn, *load(case, drawn)


@pytest.fixture(scope="module")
def models(loaded):
    """The classifier and the backbone of a case. Building them takes long, so the tests share them."""
    _, _, config, state = loaded
    model = FocalForImageClassification(copy.deepcopy(config)).eval()
    model.load_state_dict(state, assign=True)
    model.to(DEVICE)
    backbone_config = copy.deepcopy(config)
    backbone_config.out_features = config.stage_names
    backbone = FocalBackbone(backbone_config).eval()
    backbone.load_state_dict(state, strict=False, assign=True)
    backbone.to(DEVICE)
    return model, backbone


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_outputs_and_gradients_equal_the_originals(loaded, models, attention):
    case, _, config, state = loaded
    model, backbone = models
    for one in models:
        one.set_attn_implementation(attention)
    images, seen = case.pixel_values.to(DEVICE), {}
    # The golden `stem` is taken before absolute positions are added.
    stem = model.focal.embeddings.norm.register_forward_hook(lambda module, args, output: seen.update(stem=output))
    pooled = model.focal.register_forward_hook(lambda module, args, output: seen.update(pooled=output.pooler_output))
    with torch.no_grad():
        logits = model(images).logits
    assert_close(logits, case.answers["logits"])
    assert_close(seen["pooled"], case.answers["pooled"])
    stem.remove()
    pooled.remove()

    if any(key.startswith("grad/") for key in case.answers):
        model.zero_grad()
        logits = model(images).logits
        assert_close(logits, case.answers["logits"])
        (logits * golden_cases.probe(logits.shape).to(DEVICE)).sum().backward()
        gradients = {key: value.grad for key, value in model.named_parameters()}
        gradients |= {key: value for key, value in state.items() if "nearest_index" in key}
        gradients = golden_cases.to_original(gradients, config)
        expected = {key.removeprefix("grad/"): value for key, value in case.answers.items() if key.startswith("grad/")}
        assert set(expected) == set(case.shapes)
        scale = max(value.abs().max() for value in expected.values())
        for key, value in expected.items():
            assert_close(gradients[key], value, scale)

    with torch.no_grad():
        maps = list(backbone(images, output_hidden_states=True).hidden_states)
    height, width = maps[0].shape[2:]
    maps[0] = seen["stem"].transpose(1, 2).unflatten(2, (height, width))
    assert len(maps) == 1 + sum(key.startswith("stage") for key in case.answers)
    for stage, answer in enumerate(maps):
        answer = answer.permute(0, 2, 3, 1)
        expected = case.answers[f"stage{stage}" if stage else "stem"]
        if case.name in RELEASED:  # these cases hold a part of each map
            answer = answer[:, :: answer.shape[1] // 7, :: answer.shape[2] // 7, :16]
        assert_close(answer, expected)


def test_conversion_to_the_original_returns_the_same_tensors(loaded):
    case, drawn, config, state = loaded
    back = golden_cases.to_original(state, config)
    assert set(back) == set(case.shapes) | set(case.buffers)
    for key, value in drawn.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize("name", RELEASED)
def test_released_architectures(name):
    """The settings equal those of the golden cases, and the number of parameters equals the published one."""
    config = original.config_from_settings(original.RELEASED[name])
    assert config.num_labels == 1000
    golden_config = original.config_from_settings(golden_cases.case(name).config)
    golden_config.drop_path_rate = config.drop_path_rate  # the cases leave it out
    assert config.to_dict() == golden_config.to_dict()
    parameters = sum(parameter.numel() for parameter in original.build_on_meta(config).parameters())
    assert round(parameters / 1e6, 1) == PUBLISHED_PARAMETERS[name]


def test_topk_indices_of_the_checkpoint_break_ties():
    """With the indices that focal_hf computes, the logits of this case would differ."""
    case = golden_cases.case("focalv2_ties")
    config, state = load(case)
    model = FocalForImageClassification(config).eval()
    own = {key: value.cpu() for key, value in model.state_dict().items() if "nearest_index" in key}
    assert any(not torch.equal(value, state[key]) for key, value in own.items())
    model.load_state_dict(state | own)
    with torch.no_grad():
        logits = model(case.pixel_values.to(DEVICE)).logits
    assert (logits.cpu() - case.answers["logits"]).abs().max() > 1e-3
