"""ONNX Runtime through CUDA on a real GPU."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from sana_runtime.cuda import cuda_problem
from sana_runtime.onnxruntime_engine import CUDA_PROVIDER, OnnxRuntimeBackend
from sana_runtime.pipeline import Pipeline
from tests.runtime.conftest import MakeBundle
from tests.runtime.test_onnxruntime_engine import load_bfloat16
from tests.runtime.toys import toy_manifest

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_cuda() -> None:
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    if problem := cuda_problem():
        pytest.skip(problem)


@pytest.mark.parametrize("guidance", ["classifier_free", "embedded"])
def test_cuda_paints_the_picture_of_the_cpu(make_bundle: MakeBundle, guidance: str) -> None:
    bundle = make_bundle(guidance=guidance)
    said: list[str] = []
    on_cuda = Pipeline.load(bundle, report=said.append)
    assert said == ["target onnxruntime chosen: ONNX Runtime runs it through CUDA"]
    on_cpu = Pipeline(bundle, toy_manifest(guidance=guidance), "onnxruntime", OnnxRuntimeBackend(threads=1))
    latents: dict[str, list[np.ndarray]] = {"cuda": [], "cpu": []}
    for name, pipeline in (("cuda", on_cuda), ("cpu", on_cpu)):
        for _ in range(2):
            latents[name].clear()
            pipeline.generate("a fox", seed=2, on_step=lambda step, name=name: latents[name].append(step.next_latent))
    assert len(latents["cuda"]) == len(latents["cpu"]) > 1
    # The caption goes through a product of inner dimension 8, in fp32: TF32, which keeps 10 bits, is off. Three bits
    # for the solver's steps.
    np.testing.assert_allclose(latents["cuda"], latents["cpu"], rtol=0, atol=2**-20 * 8 * 4.5)


def test_bfloat16_runs_and_stays_on_the_device(tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend(CUDA_PROVIDER)
    engine = load_bfloat16(tmp_path, "Relu", backend)
    x = backend.memory.tensor(np.array([0x3F80, 0xC000], np.uint16), engine.component.inputs[0])
    y = backend.memory.allocate(engine.component.outputs[0])
    engine.execute({"x": x}, {"y": y})
    np.testing.assert_array_equal(y.numpy(), np.array([0x3F80, 0], np.uint16))
