"""CUDA memory and graphs on a real GPU."""

import numpy as np
import pytest

from sana_runtime.contract import TensorSpec
from sana_runtime.cuda import CudaGraph, CudaMemory, compute_capability, cuda_problem
from sana_runtime.engine import host_dtype
from sana_runtime.errors import TargetError
from sana_runtime.tensorrt_engine import TensorRTEngine
from tests.runtime.toys import toy_manifest

pytestmark = pytest.mark.gpu

DTYPES = ["float32", "float16", "bfloat16", "int64", "int32", "uint8"]


@pytest.fixture(scope="module")
def memory() -> CudaMemory:
    if problem := cuda_problem():
        pytest.skip(problem)
    return CudaMemory()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (1, 5, 4), (2, 300, 2304)], ids=str)
def test_upload_and_download_keep_every_bit(memory: CudaMemory, dtype: str, shape: tuple[int, ...]) -> None:
    spec = TensorSpec("latent", dtype, shape)
    content = np.random.default_rng(0).integers(0, 200, shape).astype(host_dtype(dtype))
    np.testing.assert_array_equal(memory.tensor(content, spec).numpy(), content)


def test_new_tensors_are_zero(memory: CudaMemory) -> None:
    spec = TensorSpec("latent", "float32", (1, 32, 32, 32))
    memory.upload(np.full(spec.shape, np.nan), memory.allocate(spec))
    assert not memory.allocate(spec).numpy().any()


def test_uploads_may_reuse_the_array_at_once(memory: CudaMemory) -> None:
    spec = TensorSpec("latent", "float32", (1, 32, 128, 128))
    content = np.ones(spec.shape, np.float32)
    tensors = []
    for value in range(8):
        content[:] = value
        tensors.append(memory.tensor(content, spec))
    for value, tensor in enumerate(tensors):
        np.testing.assert_array_equal(tensor.numpy(), np.full(spec.shape, value, np.float32))


def test_copy_moves_exactly_the_named_elements(memory: CudaMemory) -> None:
    source = memory.tensor(np.arange(20), TensorSpec("a", "float32", (20,)))
    target = memory.allocate(TensorSpec("b", "float32", (24,)))
    memory.copy(source, target, count=8, source_start=12, target_start=16)
    np.testing.assert_array_equal(target.numpy(), [0] * 16 + list(range(12, 20)))


def test_a_captured_graph_replays_its_work(memory: CudaMemory) -> None:
    """Ping-pong as the solver loop does it: the graph copies a to b, the loop changes a in between."""
    spec = TensorSpec("a", "float32", (4,))
    a, b = memory.allocate(spec), memory.allocate(spec)
    memory.upload(np.ones(4), a)
    graph = CudaGraph(memory.stream, lambda: memory.copy(a, b))
    assert not b.numpy().any()
    for value in range(1, 4):
        memory.upload(np.full(4, value), a)
        graph.replay()
        np.testing.assert_array_equal(b.numpy(), np.full(4, value))


def test_device_is_described(memory: CudaMemory) -> None:
    major, minor = compute_capability()
    assert f"(sm_{major}{minor})" in memory.device_name
    used = memory.peak_mib()
    assert used is not None
    assert used > 0


def test_freed_memory_comes_back(memory: CudaMemory) -> None:
    spec = TensorSpec("a", "uint8", (1 << 30,))
    for _ in range(200):
        memory.allocate(spec)
    memory.synchronize()


def test_too_much_memory_is_a_user_s_error(memory: CudaMemory) -> None:
    with pytest.raises(TargetError, match="cudaMalloc failed"):
        memory.allocate(TensorSpec("a", "uint8", (1 << 50,)))


class CopyingContext:
    """Stands in for a TensorRT context: its whole engine is next_latent = latent, queued on the stream."""

    def __init__(self, memory: CudaMemory) -> None:
        self.memory = memory
        self.addresses: dict[str, int] = {}
        self.enqueued = 0

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.memory.stream
        self.enqueued += 1
        count = 4 * 32 * 2 * 3
        self.memory._copy_bytes(self.addresses["latent"], self.addresses["next_latent"], count)
        return True


def test_the_tensorrt_loop_replays_one_graph(memory: CudaMemory) -> None:
    """The engine's capture and replay on a real stream, without TensorRT."""
    component = toy_manifest().component("transformer")
    context = CopyingContext(memory)
    engine = TensorRTEngine(component, None, context, memory)
    inputs = {spec.name: memory.allocate(spec) for spec in component.inputs}
    outputs = {spec.name: memory.allocate(spec) for spec in component.outputs}
    for value in range(1, 6):
        memory.upload(np.full((1, 32, 2, 3), value), inputs["latent"])
        engine.execute(inputs, outputs)
        np.testing.assert_array_equal(outputs["next_latent"].numpy(), np.full((1, 32, 2, 3), value))
    assert context.enqueued == 2
