"""The real TensorRT-RTX builder makes one plugin layer per linear-attention node, and inlines without kernels."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from sana_export.graph.export import run_passes, to_graph
from sana_kernels.linear_attention import linear_attention
from sana_runtime.contract import TensorSpec
from sana_runtime.environment import child_environment
from sana_runtime.errors import BuildError, BundleError, TargetError
from sana_runtime.plan_builder import build_plan
from sana_runtime.plugins import KERNEL_INDEX, KernelFolder
from sana_runtime.tensorrt_library import TensorrtLibrary, find_tensorrt

pytestmark = pytest.mark.tensorrt

KernelsFor = Callable[[int], KernelFolder]
NODES = 3
EPS, NORM_EPS = 1.2345e-9, 3.2145e-6


@pytest.fixture(scope="module")
def rtx() -> TensorrtLibrary:
    try:
        return find_tensorrt("tensorrt-rtx")
    except TargetError as error:
        pytest.skip(" ".join(str(error).split()))


class Blocks(nn.Module):
    """Linear attention, several times over, in one dtype."""

    def __init__(self, dtype: torch.dtype, qk_norm: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192, bias=False, dtype=dtype)
        self.weights = nn.ParameterList([nn.Parameter(torch.rand(64, dtype=dtype)) for _ in range(2 * qk_norm)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(NODES):
            qkv = self.qkv(x.to(self.qkv.weight.dtype))
            x = linear_attention(qkv, *self.weights, head_dim=32, eps=EPS, norm_eps=NORM_EPS).float()
        return x


def write_onnx(path: Path, dtype: torch.dtype, qk_norm: bool) -> Path:
    specs = [[TensorSpec(name, "float32", (2, 65, 64))] for name in ("x", "y")]
    model = to_graph(Blocks(dtype, qk_norm), *specs)
    assert run_passes(model)["linear_attention_function"] == NODES
    ir.save(model, path)
    return path


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qknorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_plugin_layer_per_node(dtype: torch.dtype, qk_norm: bool, kernels_for: KernelsFor, tmp_path: Path) -> None:
    onnx = write_onnx(tmp_path / "blocks.onnx", dtype, qk_norm)
    inlined = build_plan(onnx, tmp_path / "inlined.plan", "tensorrt-rtx")
    with_plugin = build_plan(onnx, tmp_path / "plugin.plan", "tensorrt-rtx", plugins=kernels_for(89).path)
    assert (inlined.plugin_layers, with_plugin.plugin_layers) == (0, NODES)
    assert with_plugin.layers < inlined.layers
    plan = (tmp_path / "plugin.plan").read_bytes()
    for value in (EPS, NORM_EPS) if qk_norm else (EPS,):
        assert plan.count(np.float32(value).tobytes()) >= NODES


@pytest.mark.usefixtures("rtx")
def test_kernels_of_another_dtype_end_the_build(kernels_for: KernelsFor, tmp_path: Path) -> None:
    from sana_plugins.aot import compile_kernels

    kernels_for(89)  # skips without triton
    compile_kernels(tmp_path / "kernels", capabilities=(89,), dtypes=("bfloat16",), forms=(False,))
    onnx = write_onnx(tmp_path / "blocks.onnx", torch.float16, False)
    with pytest.raises(BuildError, match="no ReluLinearAttention state kernel for float16"):
        build_plan(onnx, tmp_path / "blocks.plan", "tensorrt-rtx", plugins=tmp_path / "kernels")
    assert not (tmp_path / "blocks.plan").exists()


def test_a_folder_without_kernels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "blocks.onnx").write_bytes(b"never read")
    with pytest.raises(BundleError, match=KERNEL_INDEX):
        build_plan(tmp_path / "blocks.onnx", tmp_path / "blocks.plan", "tensorrt-rtx", plugins=tmp_path)


ROUND_TRIP = """
import importlib, os, sys
from pathlib import Path
from sana_runtime import plugins
trt = importlib.import_module(sys.argv[1])
logger = trt.Logger(trt.Logger.ERROR)
kernels = plugins.register_plugins(trt, Path(sys.argv[2]))
assert plugins.register_plugins(trt, Path(sys.argv[2])) is kernels
creator = trt.get_plugin_registry().get_creator("ReluLinearAttention", "1", "sana")
operation = plugins.LinearAttention(kernels, head_dim=32, eps=1e-8, norm_eps=1e-6)
plugin = plugins.plugin_class(trt)(trt, operation)
fields = plugin._fields[1]  # TensorRT converts what it gets into this form for the creator
made = creator.create_plugin("again", fields, trt.TensorRTPhase.RUNTIME)
found = made._operation
assert (found.head_dim, round(found.eps, 12), round(found.norm_eps, 12)) == (32, 1e-8, 1e-6), found
print("equal", flush=True)
os._exit(0)
"""


def test_fields_survive_the_real_classes(rtx: TensorrtLibrary, kernels_for: KernelsFor) -> None:
    command = [sys.executable, "-c", ROUND_TRIP, rtx.module, str(kernels_for(89).path)]
    environment = child_environment(rtx.environment)
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["equal"], run.stderr
