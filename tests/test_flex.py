"""flex_attention, the third implementation: the same answers in inference, and clear words where torch has no more."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from focal_hf import FocalBackbone, FocalForImageClassification, FocalForMaskedImageModeling, FocalModel
from focal_hf.modeling_focal import eager_attention_forward, flex_attention_forward
from test_model import BOTH, NO_COMPILER, pixels, randomized, tiny

# On a CPU it is not compiled, which torch advises against.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def answers(model, implementation, images):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(images.to(model.dtype))[0]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_answers_are_those_of_eager_attention(attention_type, dtype):
    """For more sizes than torch keeps code for, and with tokens hidden by a shift and beyond the map's edge."""
    model = randomized(FocalForImageClassification(tiny(attention_type, use_shift=True))).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 2e-2}[dtype]
    for batch, height, width in [(1, 32, 32), (2, 40, 52), (3, 36, 36), (1, 50, 70), (2, 64, 33), (4, 20, 90)]:
        images = pixels(batch, 3, height, width)
        expected = answers(model, "eager", images)
        found = answers(model, "flex_attention", images)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@BOTH
def test_it_is_chosen_where_a_model_is_made(attention_type, tmp_path):
    model = randomized(FocalForImageClassification(tiny(attention_type)))
    expected = answers(model, "eager", pixels(2, 3, 40, 52))
    model.save_pretrained(tmp_path)
    made = AutoModelForImageClassification.from_config(tiny(attention_type), attn_implementation="flex_attention")
    assert made.config._attn_implementation == "flex_attention"
    loaded = FocalForImageClassification.from_pretrained(tmp_path, attn_implementation="flex_attention")
    assert loaded.config._attn_implementation == "flex_attention"
    with torch.inference_mode():
        torch.testing.assert_close(loaded(pixels(2, 3, 40, 52)).logits, expected, rtol=1e-5, atol=1e-5)


def test_every_class_has_it():
    for model_class in (FocalModel, FocalForImageClassification, FocalForMaskedImageModeling, FocalBackbone):
        model = randomized(model_class(tiny()))
        options = {"output_hidden_states": True}
        with torch.no_grad():
            model.set_attn_implementation("eager")
            expected = model(pixels(1, 3, 36, 44), **options).hidden_states
            model.set_attn_implementation("flex_attention")
            torch.testing.assert_close(model(pixels(1, 3, 36, 44), **options).hidden_states, expected)


@pytest.mark.parametrize("hidden", [slice(0, 300), slice(300, 700), slice(1, 700)])
def test_hidden_tokens_have_no_part(hidden):
    """However many in a row, and with a bias of its own for every window and head."""
    torch.manual_seed(0)
    module = torch.nn.Module().eval()
    module.num_heads = 4
    query, bias = torch.randn(3, 4, 49, 8), torch.randn(1, 4, 49, 700)
    key, value = torch.randn(2, 3, 4, 700, 8)
    bias[..., hidden] = -torch.inf
    expected, _ = eager_attention_forward(module, query, key, value, bias, scaling=0.3)
    value[:, :, hidden] = 1e6
    found, weights = flex_attention_forward(module, query, key, value, bias, scaling=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert weights is None


@BOTH
def test_training_on_a_cpu_is_refused(attention_type):
    """Whichever of the weights it would train; in inference the same model answers."""
    model = FocalForImageClassification(tiny(attention_type))
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"for inference only.*require gradients.*set_attn_implementation\('sdpa'\)"):
        model(pixels(1, 3, 32, 32))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("neighborhood" in name)
    with pytest.raises(ValueError, match="for inference only"):
        model(pixels(1, 3, 32, 32))
    model.requires_grad_(False)
    assert model(pixels(1, 3, 32, 32)).logits.isfinite().all()


def test_dropout_of_weights_is_refused():
    model = FocalModel(tiny(attention_probs_dropout_prob=0.1)).train()
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"no dropout.*got attention_probs_dropout_prob=0.1.*Set it to 0"):
            model(pixels(1, 3, 32, 32))
        assert model.eval()(pixels(1, 3, 32, 32))[0].isfinite().all()


@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
@BOTH
def test_compiled(attention_type):
    changes = {"depths": (1,), "num_heads": (2,), "focal_levels": (2,), "focal_windows": (3,), "expand_sizes": (1,)}
    model = randomized(FocalModel(tiny(attention_type, **changes, encoder_stride=4)))
    expected = answers(model, "eager", pixels(2, 3, 40, 52))
    model.set_attn_implementation("flex_attention")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels(2, 3, 40, 52))[0], expected, rtol=1e-5, atol=1e-5)
