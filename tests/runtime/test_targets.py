"""Which target is chosen, and what is said about the others."""

import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

import msgspec
import pytest

from sana_runtime import cuda, targets
from sana_runtime.errors import TargetError
from sana_runtime.manifest import QuantizationEntry
from sana_runtime.targets import choose_target, examine_targets, rtx_supports
from tests.runtime.toys import toy_manifest


class Machine:
    """A pretended machine: which modules it has, its GPU, and ONNX Runtime's providers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._find_spec = importlib.util.find_spec
        self._modules: dict[str, bool] = {"tensorrt": False, "tensorrt_rtx": False}
        monkeypatch.setattr(importlib.util, "find_spec", self._spec)
        self.gpu(None)

    def _spec(self, name: str, package: str | None = None) -> Any:
        if name in self._modules:
            return importlib.machinery.ModuleSpec(name, None) if self._modules[name] else None
        return self._find_spec(name, package)

    def install(self, name: str, *, broken: bool = False) -> None:
        self._modules[name] = True
        module = ModuleType(name)
        if not broken:
            module.__version__ = "1.7.1"  # type: ignore[attr-defined]
        self._patch.setitem(sys.modules, name, module)

    def uninstall(self, name: str) -> None:
        self._modules[name] = False

    def gpu(self, capability: tuple[int, int] | None) -> None:
        problem = None if capability else "there is no CUDA device"
        self._patch.setattr(cuda, "cuda_problem", lambda: problem)
        self._patch.setattr(cuda, "compute_capability", lambda: capability)

    def providers(self, *names: str) -> None:
        import onnxruntime

        self._patch.setattr(onnxruntime, "get_available_providers", lambda: list(names))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(monkeypatch)
    machine.providers("CPUExecutionProvider")
    return machine


ALL = ("tensorrt-rtx", "tensorrt", "onnxruntime")


def test_the_first_usable_target_is_chosen_and_the_skipped_ones_have_reasons(machine: Machine) -> None:
    verdicts = choose_target(toy_manifest(targets=ALL))
    assert [(verdict.target, verdict.usable) for verdict in verdicts] == [
        ("tensorrt-rtx", False),
        ("tensorrt", False),
        ("onnxruntime", True),
    ]
    assert "pip install 'sana-runtime[tensorrt-rtx]'" in verdicts[0].reason
    assert "on the CPU" in verdicts[2].reason
    assert all("\n" not in verdict.reason for verdict in verdicts)


def test_targets_after_the_chosen_one_are_not_looked_at(machine: Machine) -> None:
    machine.install("tensorrt_rtx")
    machine.gpu((8, 9))
    (verdict,) = choose_target(toy_manifest(targets=ALL))[:1]
    assert (verdict.target, verdict.usable) == ("tensorrt-rtx", True)
    assert verdict.reason == "tensorrt_rtx 1.7.1 on sm_89"


def test_the_bundle_s_order_decides(machine: Machine) -> None:
    machine.install("tensorrt")
    machine.gpu((8, 7))
    order = ("onnxruntime", "tensorrt")
    assert choose_target(toy_manifest(targets=order))[-1].target == "onnxruntime"
    assert choose_target(toy_manifest(targets=order[::-1]))[-1].target == "tensorrt"


@pytest.mark.parametrize(
    ("capability", "supported"),
    [
        *(((major, minor), True) for major, minor in ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1), (13, 0))),
        *(((major, minor), False) for major, minor in ((7, 5), (8, 7), (9, 0), (10, 0), (11, 0))),
    ],
    ids=str,
)
def test_tensorrt_rtx_capabilities(machine: Machine, capability: tuple[int, int], supported: bool) -> None:
    machine.install("tensorrt_rtx")
    machine.gpu(capability)
    (verdict,) = examine_targets(toy_manifest(targets=("tensorrt-rtx",)))
    assert verdict.usable == supported == rtx_supports(capability)
    assert f"sm_{capability[0]}{capability[1]}" in verdict.reason


def test_an_installed_module_without_a_gpu_or_that_does_not_import(machine: Machine) -> None:
    machine.install("tensorrt", broken=True)
    (verdict,) = examine_targets(toy_manifest(targets=("tensorrt",)))
    assert (verdict.usable, verdict.reason) == (False, "there is no CUDA device")
    machine.gpu((8, 7))
    (verdict,) = examine_targets(toy_manifest(targets=("tensorrt",)))
    assert not verdict.usable
    assert verdict.reason.startswith("tensorrt cannot be imported")


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16"])
def test_bfloat16_needs_cuda_under_onnxruntime(machine: Machine, dtype: str) -> None:
    manifest = toy_manifest(dtype=dtype)
    (verdict,) = examine_targets(manifest)
    assert not verdict.usable
    assert "text_encoder, transformer, vae_decoder compute in bfloat16" in verdict.reason
    assert "fp32 bundle" in verdict.reason
    machine.providers("CUDAExecutionProvider", "CPUExecutionProvider")
    assert "there is no CUDA device" in examine_targets(manifest)[0].reason
    machine.gpu((9, 0))
    assert examine_targets(manifest)[0] == targets.TargetVerdict(
        "onnxruntime", True, "ONNX Runtime runs it through CUDA"
    )


def test_bfloat16_beside_quantised_layers_runs_nowhere_under_onnxruntime(machine: Machine) -> None:
    entry = QuantizationEntry("fp8", "quantization/recipe.yaml", "0" * 64, None, None, 8.0, 25.0, 0.9, None)
    machine.providers("CUDAExecutionProvider", "CPUExecutionProvider")
    machine.gpu((9, 0))
    quantised = msgspec.structs.replace(toy_manifest(dtype="bfloat16"), quantization=entry)
    (verdict,) = examine_targets(quantised)
    assert not verdict.usable
    assert "no QuantizeLinear" in verdict.reason
    assert "--base-precision fp32" in verdict.reason
    in_fp32 = msgspec.structs.replace(toy_manifest(dtype="float32"), quantization=entry)
    assert examine_targets(in_fp32)[0].usable


def test_no_usable_target_lists_every_reason(machine: Machine) -> None:
    with pytest.raises(TargetError) as caught:
        choose_target(toy_manifest(targets=("tensorrt-rtx", "onnxruntime"), dtype="bfloat16"))
    assert "tensorrt-rtx: tensorrt_rtx is not installed" in str(caught.value)
    assert "onnxruntime: text_encoder" in str(caught.value)


def test_an_override_that_cannot_run_gives_the_reason(machine: Machine) -> None:
    manifest = toy_manifest(targets=ALL)
    with pytest.raises(TargetError, match="received: tensorrt is not installed"):
        choose_target(manifest, "tensorrt")
    assert choose_target(manifest, "onnxruntime")[0].usable


@pytest.mark.parametrize("requested", ["tensorrt", "cuda", ""])
def test_an_override_the_bundle_lacks(machine: Machine, requested: str) -> None:
    with pytest.raises(TargetError, match="expected: one of onnxruntime"):
        choose_target(toy_manifest(), requested)


def test_without_onnxruntime_the_reason_is_what_to_install(machine: Machine) -> None:
    machine.uninstall("onnxruntime")
    (verdict,) = examine_targets(toy_manifest())
    assert "pip install 'sana-runtime[onnxruntime]'" in verdict.reason
