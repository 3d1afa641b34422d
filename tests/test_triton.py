"""The kernels in Triton: the same answers and gradients, what they refuse, and whom they serve.

Without a GPU they are interpreted (conftest.py says so), far slower than anything else here: shapes are small.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT
from focal_hf import FocalConfig, FocalForImageClassification, FocalModel
from focal_hf.attention_focal import choose_attention
from focal_hf.modeling_focal import FocalAttention
from focal_hf.neighborhood_focal import BiasPart, Neighborhood
from golden_cases import SMALL, errors
from reference import reference_attention
from small_models import BOTH, build, one_stage_configs, pixels, randomized, tiny

CUDA = torch.cuda.is_available()
pytest.importorskip(
    "triton",
    minversion=None if CUDA else "3.7",
    reason="triton is not installed, or so old that its interpreter fails with numpy 2.4",
)

DEVICE = "cuda" if CUDA else "cpu"
needs_gpu = pytest.mark.skipif(not CUDA, reason="no GPU")
BLOCK = {"embed_dim": 8, "depths": (1,), "num_heads": (2,), "focal_levels": (2,), "focal_windows": (3,)}
BLOCK |= {"expand_sizes": (2,), "encoder_stride": 4, "use_shift": True}


@pytest.fixture(autouse=True)
def float32_without_tf32(monkeypatch):
    """In convolutions; in matrix products it is PyTorch's default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def integers_unchecked(monkeypatch):
    """As on a GPU. The interpreter's checks for overflow would take half of its time."""
    if not CUDA:
        from triton.runtime import interpreter

        options = interpreter.InterpreterOptions(sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


class OperatorNames(TorchDispatchMode):
    """Collects the names of what is called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **kwargs or {})

    @property
    def has_triton(self) -> bool:
        return any("triton_attention" in name for name in self.names)


def answers(model, images):
    with torch.no_grad(), OperatorNames() as called:
        logits = model(images).logits
    return logits, called.has_triton


ONE_STAGE = {"image_size": 9, "patch_size": 1, "depths": (2,), "embed_dim": 20, "num_heads": (2,), "out_features": None}
ONE_STAGE |= {"focal_windows": (3,), "expand_sizes": (3,), "topk": 11}
EVERYTHING = FocalConfig(**ONE_STAGE, window_size=4, focal_levels=(3,), use_shift=True)
TOPK = FocalConfig(**ONE_STAGE, window_size=3, focal_levels=(2,), attention_type="topk")


@settings(max_examples=1, deadline=None)
@example(config=EVERYTHING, block=1, height=9, width=8, images=2, seed=0)
@example(config=TOPK, block=0, height=9, width=7, images=2, seed=0)
@given(
    config=one_stage_configs(embed_dims=(8, 20, 48), largest_window=4),
    block=st.integers(0, 1),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    images=st.integers(1, 2),
    seed=st.integers(0, 2**16),
)
def test_equals_the_slow_reference(config, block, height, width, images, seed):
    torch.manual_seed(seed)
    config._attn_implementation = "triton"
    attention = build(config, block)
    maps = torch.randn(images, height, width, config.embed_dim, dtype=torch.float64, requires_grad=True)
    inputs = [maps, *attention.parameters()]
    expected = reference_attention(attention, maps)
    probe = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * probe).sum(), inputs, materialize_grads=True)

    attention, maps = attention.to(DEVICE, torch.float32), maps.detach().to(DEVICE, torch.float32).requires_grad_()
    found = attention(maps)[0]
    inputs = [maps, *attention.parameters()]
    gradients = torch.autograd.grad((found * probe.to(found)).sum(), inputs, materialize_grads=True)
    assert (found.cpu() - expected).abs().max() <= 1e-5 * expected.abs().max()
    scale = max(gradient.abs().max() for gradient in expected_gradients)
    for gradient, of_reference in zip(gradients, expected_gradients, strict=True):
        assert (gradient.cpu() - of_reference).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("name", SMALL if CUDA else ["patch_2", "shift", "trimmed_pooling", "focalv2"])
def test_golden_cases(name):
    assert max(errors(name, "triton", torch.float32, DEVICE)) < (2e-5 if CUDA else 1e-5)


RELEASED = {"embed_dim": 64, "num_heads": (2,), "depths": (2,), "image_size": 112, "focal_windows": (7,)}
RELEASED |= {"expand_sizes": (3,), "focal_levels": (2,), "out_features": None}
KINDS = {"focal": {}, "shift": {"use_shift": True}, "topk": {"attention_type": "topk"}}
PRECISIONS = {"float32": 2e-5, "tf32": 2e-3, "float16": 5e-3, "bfloat16": 2e-2}


@needs_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_as_released(kind, precision):
    """Windows of 7 and heads of 32 channels: outputs and gradients, beside those of the same numbers in float64."""
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    config = FocalConfig(**RELEASED, **KINDS[kind])
    attention = build(config, 1)
    maps = torch.empty(3, 28, 21, 64, dtype=torch.float64)
    with torch.no_grad():
        neighborhood = attention.neighborhood(maps)
    tokens = int(neighborhood.index.max()) + 1
    inputs = [torch.randn(3, length, 64).to(dtype) for length in (28 * 21, tokens, tokens, 28 * 21)]

    def answer(implementation, device, dtype):
        config._attn_implementation = implementation
        of_bias = torch.promote_types(dtype, torch.float32)
        sources = [part.source.float().to(device, of_bias).requires_grad_() for part in neighborhood.parts]
        patterns = [part.pattern.to(device) for part in neighborhood.parts]
        parts = list(map(BiasPart, sources, patterns))
        there = Neighborhood(neighborhood.index.to(device), parts, neighborhood.squares, neighborhood.shift_size)
        *leaves, grad_output = (tensor.detach().to(device, dtype).requires_grad_() for tensor in inputs)
        output = choose_attention(attention, leaves[0], there).attend(attention, *leaves, there)[0]
        gradients = torch.autograd.grad(output, [*leaves, *sources], grad_output)
        return [tensor.detach().cpu() for tensor in (output, *gradients)]

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        found = answer("triton", DEVICE, dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    for tensor, expected in zip(found, answer("eager", "cpu", torch.float64), strict=True):
        assert (tensor.double() - expected).abs().max() <= PRECISIONS[precision] * expected.abs().max()


@BOTH
def test_half_precision(attention_type):
    model = randomized(FocalForImageClassification(tiny(attention_type, **BLOCK))).to(DEVICE)
    images = pixels(1, 3, 30, 20).to(DEVICE)
    expected, _ = answers(model, images)
    model.set_attn_implementation("triton")
    with torch.autocast(DEVICE, torch.float16):
        found, by_triton = answers(model, images)
    assert by_triton
    torch.testing.assert_close(found.float(), expected, rtol=5e-3, atol=5e-3)
    found, _ = answers(model.half(), images.half())
    torch.testing.assert_close(found.float(), expected, rtol=5e-3, atol=5e-3)


@BOTH
def test_the_operator_is_as_torch_wants_it(attention_type):
    from focal_hf.triton_attention_focal import kernel_layout, triton_attention

    config = tiny(attention_type, **BLOCK)
    attention = FocalAttention(config, 0, config.block_geometry(0, 1)).to(DEVICE)
    neighborhood = attention.neighborhood(torch.empty(1, 8, 4, 8, device=DEVICE))
    tokens = neighborhood.index.max().item() + 1
    query = torch.randn(1, 32, 8, device=DEVICE, requires_grad=True)
    key, value = torch.randn(2, 1, tokens, 8, device=DEVICE).unbind()
    inputs = query, key.requires_grad_(), value.requires_grad_()
    torch.library.opcheck(triton_attention, (*inputs, *kernel_layout(neighborhood), 4, 0.5))


@BOTH
def test_compiled_and_exported(attention_type):
    """In one graph, with gradients; an export holds the operator only where it was asked for."""
    config = tiny(attention_type, **BLOCK, problem_type="single_label_classification")
    model = randomized(FocalForImageClassification(config)).to(DEVICE)
    images, labels = pixels(1, 3, 18, 14).to(DEVICE), torch.tensor([1], device=DEVICE)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(images, labels=labels).loss, parameters)
    exported = torch.export.export(model, (images,))
    assert not any("triton" in str(node.target) for node in exported.graph.nodes)

    model.set_attn_implementation("triton")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    found = torch.autograd.grad(compiled(images, labels=labels).loss, parameters)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(model, (images,))
    assert any("triton_attention" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(images).logits, model(images).logits)


def test_what_it_cannot_do_is_refused():
    images = pixels(1, 3, 16, 16).to(DEVICE)

    def refused(config, reason, dtype=torch.float32):
        model = FocalModel(config).to(DEVICE, dtype)
        model.set_attn_implementation("triton")
        with pytest.raises(ValueError, match=rf"'triton' cannot be used here: .*{reason}.*set_attn_implementation"):
            model(images.to(dtype))

    refused(tiny(**BLOCK, attention_probs_dropout_prob=0.1), r"no dropout.*attention_probs_dropout_prob=0\.1")
    refused(tiny(**BLOCK), r"takes torch\.float32, torch\.float16.*got torch\.float64", torch.float64)
    refused(tiny(**BLOCK | {"embed_dim": 600}), "heads of at most 256 channels.*got 300")
    if not CUDA:
        refused(tiny(**BLOCK), r"when interpreted.*got torch\.bfloat16", torch.bfloat16)
    with forward_ad.dual_level():
        refused(tiny(**BLOCK), "no rules for .* forward-mode derivatives")


@needs_gpu
@BOTH
def test_the_same_bits_every_time(attention_type):
    """With as many programs at a time as the GPU has room for."""
    config = tiny(attention_type, **BLOCK | {"image_size": 224, "embed_dim": 32})
    model = randomized(FocalForImageClassification(config)).cuda()
    model.set_attn_implementation("triton")
    images = pixels(8, 3, 224, 224).cuda()
    attention = model.focal.encoder.layers[0].blocks[0].attention
    maps = torch.randn(8, 56, 56, 32, device="cuda", requires_grad=True)
    first = None
    for _ in range(10):
        output = attention(maps)[0]
        gradients = torch.autograd.grad(output.square().sum(), [maps, *attention.neighborhood.parameters()])
        bits = [answers(model, images)[0], output.detach(), *gradients]
        first = first or bits
        assert all(map(torch.equal, bits, first))


def run(script, **environment):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_only_where_it_was_asked_for():
    """A missing or broken Triton does not touch the default, not even on a GPU. Who asks is told what to do."""
    said = run("""
import sys
sys.modules["triton"] = None  # as if it were not installed

import torch
from transformers import logging
from focal_hf import FocalConfig, FocalModel

logging.set_verbosity_info()
images = torch.zeros(1, 3, 32, 32, device="cuda" if torch.cuda.is_available() else "cpu")
model = FocalModel(FocalConfig(image_size=32, embed_dim=12)).to(images.device)
model(images)
assert "focal_hf.triton_attention_focal" not in sys.modules
model.set_attn_implementation("triton")
try:
    model(images)
except ValueError as error:
    assert "needs the package triton: pip install triton" in str(error), error
else:
    raise AssertionError
""")
    assert said == ""


def test_a_neighbourhood_without_squares_is_refused():
    """Which no other implementation needs."""
    config = tiny(**BLOCK)
    attention = FocalAttention(config, 0, config.block_geometry(0, 1)).to(DEVICE)
    attention.neighborhood.register_forward_hook(lambda module, args, output: Neighborhood(output.index, output.parts))
    maps = torch.randn(1, 8, 4, 8, device=DEVICE)
    expected = attention(maps)[0]
    config._attn_implementation = "triton"
    with pytest.raises(ValueError, match=r"'triton' cannot be used here: .*Neighborhood\.squares"):
        attention(maps)
    config._attn_implementation = "eager"
    torch.testing.assert_close(attention(maps)[0], expected)


@BOTH
def test_an_index_in_any_memory_layout(attention_type):
    config = tiny(attention_type, **BLOCK)
    attention = FocalAttention(config, 0, config.block_geometry(0, 0)).to(DEVICE)
    maps = torch.randn(1, 8, 12, 8, device=DEVICE, requires_grad=True)
    config._attn_implementation = "triton"
    expected = torch.autograd.grad(attention(maps)[0].square().sum(), maps)

    def transpose(module, args, neighborhood):
        neighborhood.index = neighborhood.index.transpose(0, 1).contiguous().transpose(0, 1)

    attention.neighborhood.register_forward_hook(transpose)
    torch.testing.assert_close(torch.autograd.grad(attention(maps)[0].square().sum(), maps), expected)


def test_images_whose_offsets_exceed_int32_are_refused():
    from focal_hf.triton_attention_focal import LaunchPlan

    def plan(channels):
        query = key = torch.empty(1, 2**20, channels, dtype=torch.float16, device="meta")
        tokens, source = torch.empty(8, 8, 9, device="meta"), torch.empty(1, 9, 16, device="meta")
        LaunchPlan(query, key, tokens, None, source, squares=[4, 4, 0], shift_size=0, head_dim=32)

    plan(2048)
    with pytest.raises(ValueError, match=r"at most 2147483648 numbers.*1048576 tokens of 2080 channels"):
        plan(2080)


COMPILE = """
import collections, json
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from focal_hf import FocalConfig, triton_attention_focal as kernels
from focal_hf.modeling_focal import FocalAttention

assert not kernels.INTERPRETED
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}
found = {capability: collections.defaultdict(int) for capability in (80, 90)}


class Compiling:
    # In a kernel's place: compiles what is launched for a GPU that is not here.
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, num_warps, num_stages, **constants):
        names = self.kernel.arg_names
        signature, aligned = dict.fromkeys(constants, "constexpr"), {}
        for place, (name, value) in enumerate(zip(names, args)):
            if isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, torch.Tensor) or name == "channels" and value % 16 == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(
            fn=self.kernel,
            signature={name: signature[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs=aligned,
        )
        options = {"num_warps": num_warps, "num_stages": num_stages}
        for capability, shared in found.items():
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            name = self.kernel.__name__
            assert "cubin" in compiled.asm and "mma" in compiled.asm["ptx"], name
            shared[name] = max(shared[name], compiled.metadata.shared)


for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
    setattr(kernels, name, Compiling(getattr(kernels, name)))
for options in ({"use_shift": True, "focal_levels": (2,)}, {"attention_type": "topk", "focal_levels": (1,)}):
    geometry = {"image_size": 56, "focal_windows": (7,), "expand_sizes": (3,), "num_heads": (1,)}
    config = FocalConfig(**geometry, **options, depths=(2,), embed_dim=32, out_features=None)
    attention = FocalAttention(config, 0, config.block_geometry(0, 1))
    neighborhood = attention.neighborhood(torch.empty(1, 14, 14, 32))
    query = torch.empty(1, 196, 32, dtype=torch.bfloat16, requires_grad=True)
    key = torch.empty(1, int(neighborhood.index.max()) + 1, 32, dtype=torch.bfloat16)
    kernels.attend_by_triton(attention, query, key, key, neighborhood)[0].sum().backward()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(CUDA, reason="the other tests compile them")
def test_compiles_for_gpus(tmp_path):
    """Which the interpreter, which takes more, does not tell: with tensor cores, in every GPU's shared memory."""
    found = json.loads(run(COMPILE, TRITON_CACHE_DIR=str(tmp_path)).splitlines()[-1])
    assert found.keys() == {"80", "90"}
    for shared in found.values():
        assert len(shared) == 4
        assert max(shared.values()) <= 99 * 2**10


def test_benchmark(monkeypatch, capsys):
    """On one small window of one small head a stage."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import throughput
    import triton_attention

    small = {"embed_dim": 8, "num_heads": (1,) * 4, "window_size": 4}
    small |= {"focal_windows": (1,) * 4, "expand_sizes": (1,) * 4}
    monkeypatch.setitem(throughput.MODEL_SIZES, "tiny", small)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # for what the benchmark sets to be undone
    options = ["--sizes", "4", "--batch-size", "1", "--dtype", "float32", "--device", DEVICE, "--first-call"]
    monkeypatch.setattr(sys, "argv", ["triton_attention.py", *options])
    triton_attention.main()
    output, notes = capsys.readouterr()
    rows = [line.split(" | ") for line in output.splitlines() if line.startswith("| tiny")]
    assert len(rows) == 10  # two passes of four stages, and of all blocks
    for _, _, _, _, _, triton, sdpa, _, ratio, _ in rows:
        triton, sdpa = (float(number.replace(",", "")) for number in (triton, sdpa))
        # Times are printed to 0.001 ms, which is much of a GPU's; their ratio is of what they were before.
        rounding = sdpa / triton * 5e-4 * (1 / sdpa + 1 / triton)
        assert float(ratio) == pytest.approx(sdpa / triton, abs=1e-3 + 1.1 * rounding)
    assert notes.count("first call") == 4
