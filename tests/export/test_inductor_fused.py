"""A block whose attention output, residual and quantisation are one launch computes what the separate operations do."""

import os
import subprocess
import sys

import pytest
import torch

from sana_export.inductor.linear import FP8, INT8, LinearForm
from sana_export.inductor.transformer import TransformerLayout, plain_forms
from sana_export.reference.transformer import TransformerConfig

# Runs the kernels in Triton's interpreter: one block, fused and not, over the same random tensors.
INTERPRET = """
import json, sys, torch
from dataclasses import replace
from importlib.resources import files
from sana_export.inductor import transformer as dit
from sana_export.inductor.linear import FP8, INT8, LinearForm
from sana_export.reference.transformer import TransformerConfig

calls = []
fused_layer = dit.residual_linear
dit.residual_linear = lambda *arguments: (calls.append(arguments), fused_layer(*arguments))[1]
table = json.loads((files("sana_export.weights") / "random_models.json").read_bytes())
config = TransformerConfig.from_upstream({**table["transformer_common"], **table["transformers"]["tiny"]})
tokens, channels, hidden, keys = 12, config.channels, int(config.mlp_ratio * config.channels), 7
sizes = {"linear_attention.qkv": (3 * channels, channels), "mix_ffn.conv_inverted": (2 * hidden, channels),
         "mix_ffn.conv_point": (channels, hidden)}

def block_tensors(forms, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    values = {
        "x": normal(2, tokens, channels), "branch": normal(2, tokens, channels),
        "table_before": normal(6, channels), "table": normal(6, channels),
        "key_value": normal(2, keys, 2 * channels), "key_bias": torch.zeros(2, keys),
        "key_counts": torch.tensor([keys, 3], dtype=torch.int32),
        "mix_ffn.conv_inverted.bias": normal(2 * hidden),
        "mix_ffn.conv_depth.weight": normal(9, 2 * hidden) / 3, "mix_ffn.conv_depth.bias": normal(2 * hidden),
    }
    for name, form in forms.items():
        rows, columns = sizes.get(name, (channels, channels))
        weight = normal(rows, columns) / columns ** 0.5
        if form.weight_dtype is not None:
            size = 100.0 if form.weight_dtype == INT8 else 300.0
            shape = () if form.weight_dtype == FP8 else (rows,)
            values[name + ".weight_scale"] = torch.full(shape, 1 / size)
            weight = (weight * size).clamp(-127, 127)
            weight = weight.round() if form.weight_dtype == INT8 else weight
            values[name + ".activation_scale"] = torch.tensor(0.04)
            if form.smooth:
                values[name + ".inverse_smooth"] = 1 + 0.2 * normal(columns)
        values[name + ".weight"] = weight.to(form.weight_dtype or torch.float32)
        if form.bias:
            values[name + ".bias"] = normal(rows)
    return values

for label, (forms, clip) in eval(sys.argv[1], {"torch": torch, "LinearForm": LinearForm}).items():
    layout = dit.TransformerLayout(replace(config, attention_clip=clip), torch.float32, 3, 4, 2, "triton")
    values = block_tensors(forms, 1)
    if clip:
        values["linear_attention.to_out.bias"] *= 1e6
    results = []
    for fused in ("none", "all"):
        piece = dit.block_piece(replace(layout, fused_products=fused), forms)
        results.append(piece(*[values[name] for name in piece.inputs]))
        assert len(calls) == (fused == "all"), fused
    calls.clear()
    for name, apart, together in zip(("x", "branch"), *results, strict=True):
        error = float((apart.double() - together.double()).norm() / apart.double().norm())
        print(label, name, error)
"""


def forms_of(codes: torch.dtype, smooth: tuple[str, ...] = ()) -> dict[str, LinearForm]:
    return {name: LinearForm(form.bias, codes, codes, name in smooth) for name, form in plain_forms().items()}


SMOOTH = ("linear_attention.to_out", "cross_attention.to_q")
CASES = {
    "plain-clipped": (plain_forms(), True),
    "fp8": (forms_of(FP8), False),
    "int8-smooth": (forms_of(INT8, SMOOTH), False),
}


def test_a_fused_block_equals_the_separate_operations() -> None:
    """In fp32 the codes are the same, so the two differ by the order of sums of 64 products."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRET, repr(CASES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    errors = {(case, output): float(error) for case, output, error in map(str.split, run.stdout.splitlines())}
    assert set(errors) == {(case, output) for case in CASES for output in ("x", "branch")}
    for found, error in errors.items():
        assert error <= 64 * 2.0**-24, found


def layout(impl: str, fused: str) -> TransformerLayout:
    config = TransformerConfig.__new__(TransformerConfig)
    return TransformerLayout(config, torch.bfloat16, 3, 4, 2, impl, fused_products=fused)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("impl", "fused", "form", "expected"),
    [
        ("triton", "quantised", LinearForm(True, FP8, FP8), True),
        ("triton", "quantised", LinearForm(True), False),
        ("triton", "all", LinearForm(True), True),
        ("triton", "all", LinearForm(True, INT8), False),
        ("triton", "none", LinearForm(True, FP8, FP8), False),
        ("reference", "all", LinearForm(True, FP8, FP8), False),
    ],
)
def test_what_is_fused(impl: str, fused: str, form: LinearForm, expected: bool) -> None:
    assert layout(impl, fused).fuses(form) == expected


# A layer of the text encoder over INT8 weights, by our kernels in Triton's interpreter and by the library.
INTERPRET_TEXT_ENCODER = """
import torch
from dataclasses import replace
from sana_export.inductor import linear as layers
from sana_export.inductor import text_encoder as gemma
from sana_export.inductor.linear import INT8, LinearForm

calls = []

def recorded(kernel):
    return lambda *arguments, **named: (calls.append(named["impl"]), kernel(*arguments, **named))[1]

layers.weight_only_linear = recorded(layers.weight_only_linear)
gemma.gemma_attention = recorded(gemma.gemma_attention)
layout = gemma.TextEncoderLayout(
    channels=64, layers=1, heads=4, key_heads=2, head_dim=32, query_scale=0.25, soft_cap=50.0, norm_eps=1e-6,
    rope_theta=1e4, tokens=12, dtype=torch.bfloat16, impl="triton",
)
generator = torch.Generator().manual_seed(0)
normal = lambda *shape: torch.randn(shape, generator=generator)
shapes = {"self_attn.qkv": (256, 64), "self_attn.o_proj": (64, 128)}
shapes |= {"mlp.gate_up": (192, 64), "mlp.down_proj": (64, 96)}
values = {"x": normal(1, 12, 64).bfloat16(), "bias": torch.zeros(17)}
values |= {name: normal(12, 16).repeat(1, 2).bfloat16() for name in ("cosine", "sine")}
values |= {name: normal(2, 5, 32).bfloat16() for name in ("past_key", "past_value")}
values |= {f"{norm}.weight": 0.1 * normal(64).bfloat16() for norm in gemma.LAYER_NORMS}
for name, shape in shapes.items():
    values[f"{name}.weight"] = torch.randint(-127, 128, shape, generator=generator).to(INT8)
    values[f"{name}.weight_scale"] = (1 + torch.rand(shape[0], generator=generator)) / 127 / shape[1] ** 0.5

def run(layout):
    piece = gemma.layer_piece(layout, dict.fromkeys(shapes, LinearForm(False, INT8)), "layer", "caption")
    return piece(*(values[name] for name in piece.inputs))[0].float()

own = run(layout)
assert calls == ["triton"] * 5, calls
library = run(replace(layout, impl="reference"))
assert len(calls) == 5
# Rounded to bf16 at every product, in another order of sums.
print(float((own - library).norm() / library.norm()) < 10**0.5 * 2.0**-8)
assert not replace(layout, dtype=torch.float32).own_weight_only
assert not replace(layout, head_dim=48).own_attention
"""


def test_text_encoder_layer_by_own_kernels_matches_the_library() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRET_TEXT_ENCODER]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["True"]
