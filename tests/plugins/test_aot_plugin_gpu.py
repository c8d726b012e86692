"""On a GPU: exactly the PTX and the launches that the quick plugins hand to TensorRT, through the driver alone.

What TensorRT does with a quick plugin: load the PTX, evaluate the declared expressions, and launch with the pointers of
the inputs, the int32 scalars and the pointer of the output. This does the same, with ctypes and the CUDA driver.
`test_quick_plugins` holds the declarations equal to those that the vendor's own module computes.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
import torch

from sana_kernels.linear_attention.testing import (
    EPS,
    NORM_EPS,
    Case,
    Inputs,
    compare,
    dtype_name,
    make_inputs,
    oracle,
    reference_results,
)
from sana_runtime.plugins import KernelFolder
from sana_runtime.quick_plugins import float_bits, quick_ops
from tests.plugins.quick_stand_ins import Launch, Tensor, declared
from tests.plugins.test_linear_attention_plugin import UGLY, VARIANTS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TRT_NAMES = {torch.float32: "FLOAT", torch.bfloat16: "BF16", torch.float16: "HALF"}
DTYPES = {name: dtype for dtype, name in TRT_NAMES.items()}


@dataclass
class Driver:
    """Kernels loaded from PTX by libcuda into the current context."""

    functions: dict[bytes, ctypes.c_void_p] = field(default_factory=dict)

    @cached_property
    def _library(self) -> Any:
        torch.zeros(1, device="cuda")  # makes the context current
        return ctypes.CDLL("libcuda.so.1")

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._library, name)(*arguments)
        assert result == 0, f"{name}: CUDA error {result}"

    def function(self, launch: Launch) -> ctypes.c_void_p:
        """The kernel, compiled by the driver from the PTX once."""
        if launch.code not in self.functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(launch.code))
            self._call("cuModuleGetFunction", ctypes.byref(function), module, launch.symbol.encode())
            self.functions[launch.code] = function
        return self.functions[launch.code]

    def run(self, launch: Launch, inputs: Sequence[torch.Tensor], output: torch.Tensor, stream: int) -> None:
        """Launch with inputs, scalars, output, and nothing else."""
        values = [
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in inputs),
            *(ctypes.c_int32(scalar) for scalar in launch.scalars),
            ctypes.c_void_p(output.data_ptr()),
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self._call(
            "cuLaunchKernel",
            self.function(launch),
            *launch.grid,
            *launch.block,
            launch.shared_bytes,
            ctypes.c_void_p(stream),
            pointers,
            None,
        )


@pytest.fixture(scope="session")
def driver() -> Driver:
    return Driver()


@pytest.fixture(scope="session")
def device_kernels(quick_kernels_for: Callable[[int], KernelFolder]) -> KernelFolder:
    return quick_kernels_for(capability())


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@dataclass
class Chain:
    """The plugins of one linear-attention node with their tensors; outputs start as NaN."""

    driver: Driver
    kernels: KernelFolder
    case: Case
    inputs: Inputs

    def __post_init__(self) -> None:
        self.tensors = {"qkv": self.inputs.qkv}
        if self.inputs.norm_q_weight is not None and self.inputs.norm_k_weight is not None:
            self.tensors |= {
                "norm_q_weight": self.inputs.norm_q_weight,
                "norm_k_weight": self.inputs.norm_k_weight,
            }
        values = {
            "head_dim": self.case.head_dim,
            "eps_bits": float_bits(EPS),
            "norm_eps_bits": float_bits(NORM_EPS),
        }
        self.steps: list[tuple[Launch, list[str], str]] = []
        for role, op in quick_ops(self.case.qk_norm).items():
            described = [Tensor(tuple(self.tensors[name].shape), self._name(name)) for name in op.inputs]
            attributes = {name: values[name] for name in op.attributes}
            launch = declared(op, self.kernels, capability(), described, attributes)
            name = {"key_rms": "key_scale", "state": "parts", "apply": "out"}[role]
            dtype = DTYPES[launch.output.dtype]
            self.tensors[name] = torch.full(launch.output.shape, torch.nan, dtype=dtype, device="cuda")
            self.steps.append((launch, [*op.inputs], name))

    def _name(self, tensor: str) -> str:
        return TRT_NAMES[self.tensors[tensor].dtype]

    def run(self, stream: int = 0) -> None:
        for launch, inputs, output in self.steps:
            self.driver.run(launch, [self.tensors[name] for name in inputs], self.tensors[output], stream)

    def check(self) -> None:
        torch.cuda.synchronize()
        assert self.tensors["out"].shape == (self.case.batch, self.case.tokens, self.case.channels)
        assert self.tensors["parts"].isfinite().all(), "a part that nobody wrote"
        exact = {"out": oracle(self.inputs, self.case.head_dim)["out"]}
        reference = {"out": reference_results(self.inputs, self.case.head_dim)["out"]}
        assert len(compare({"out": self.tensors["out"]}, reference, exact)) == 1


@pytest.mark.parametrize("case", VARIANTS + [case for case in UGLY if case.head_dim == 32], ids=str)
def test_chain_matches_the_oracle(case: Case, driver: Driver, device_kernels: KernelFolder) -> None:
    chain = Chain(driver, device_kernels, case, make_inputs(case, "cuda", seed=case.tokens))
    torch.cuda.synchronize()
    chain.run()
    chain.check()


def test_dtypes_are_all_there() -> None:
    assert {dtype_name(case.dtype) for case in VARIANTS} == {"float32", "bfloat16", "float16"}
    assert {case.tokens for case in VARIANTS} >= {64, 16384}


@pytest.mark.parametrize("case", [Case(2, 1024, 1152), Case(2, 1000, 2240, qk_norm=True)], ids=str)
def test_captured_graph_replays_on_new_inputs(case: Case, driver: Driver, device_kernels: KernelFolder) -> None:
    chain = Chain(driver, device_kernels, case, make_inputs(case, "cuda"))
    for launch, _, _ in chain.steps:
        driver.function(launch)  # a module cannot be loaded during a capture; TensorRT loads it with the plan
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        chain.run(stream.cuda_stream)
    torch.cuda.synchronize()
    assert chain.tensors["out"].isnan().all(), "a capture runs nothing"
    for seed in (11, 12):
        chain.inputs.qkv.copy_(make_inputs(case, "cuda", seed).qkv)
        for name in ("parts", "out"):
            chain.tensors[name].fill_(torch.nan)
        graph.replay()
        chain.check()
