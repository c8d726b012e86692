"""Device memory and the checks every engine shares."""

import numpy as np
import pytest

from sana_runtime.contract import TensorSpec
from sana_runtime.engine import DeviceTensor, HostMemory, host_dtype
from sana_runtime.errors import BundleError, InputError
from tests.runtime.toys import RecordingEngine, toy_manifest

ROWS = TensorSpec("caption_embeds", "float32", (1, 5, 4))
DTYPES = ["float32", "float16", "bfloat16", "int64", "int32", "uint8"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (1, 5, 4)], ids=str)
def test_upload_and_download_keep_every_bit(dtype: str, shape: tuple[int, ...]) -> None:
    memory = HostMemory()
    spec = TensorSpec("latent", dtype, shape)
    content = np.arange(1, 1 + int(np.prod(shape, dtype=int))).reshape(shape).astype(host_dtype(dtype))
    tensor = memory.tensor(content, spec)
    np.testing.assert_array_equal(tensor.numpy(), content)
    assert tensor.numpy().dtype == host_dtype(dtype)
    assert tensor.nbytes == content.nbytes


def test_new_tensors_are_zero_and_uploads_do_not_alias() -> None:
    memory = HostMemory()
    tensor = memory.allocate(ROWS)
    assert not tensor.numpy().any()
    content = np.ones(ROWS.shape, np.float32)
    memory.upload(content, tensor)
    content[:] = np.nan
    tensor.numpy()[:] = np.nan
    np.testing.assert_array_equal(tensor.numpy(), np.ones(ROWS.shape))


def test_non_contiguous_content_arrives_in_order() -> None:
    memory = HostMemory()
    content = np.arange(20, dtype=np.float64).reshape(4, 5).T[None]
    np.testing.assert_array_equal(memory.tensor(content, ROWS).numpy(), content)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_copy_moves_exactly_the_named_elements(dtype: str) -> None:
    memory = HostMemory()
    source_spec, target_spec = TensorSpec("a", dtype, (1, 5, 4)), TensorSpec("b", dtype, (2, 3, 4))
    content = np.arange(1, 21).reshape(1, 5, 4).astype(host_dtype(dtype))
    source, target = memory.tensor(content, source_spec), memory.allocate(target_spec)
    memory.copy(source, target, count=8, source_start=12, target_start=16)
    expected = np.zeros(24, host_dtype(dtype))
    expected[16:] = np.arange(13, 21)
    np.testing.assert_array_equal(target.numpy().ravel(), expected)


@pytest.mark.parametrize(
    "extent",
    [
        {"count": 21},
        {"count": 1, "source_start": 20},
        {"count": 1, "target_start": -1},
        {"count": -1},
        {"count": 20, "target_start": 5},
    ],
    ids=str,
)
def test_copies_outside_a_tensor_are_refused(extent: dict[str, int]) -> None:
    memory = HostMemory()
    source, target = memory.allocate(ROWS), memory.allocate(TensorSpec("b", "float32", (24,)))
    with pytest.raises(ValueError, match="leaves"):
        memory.copy(source, target, **extent)


def test_copies_between_dtypes_and_uploads_of_other_shapes_are_refused() -> None:
    memory = HostMemory()
    with pytest.raises(ValueError, match="copy of float32 into int64"):
        memory.copy(memory.allocate(ROWS), memory.allocate(TensorSpec("b", "int64", (20,))))
    with pytest.raises(ValueError, match=r"array \(20,\)"):
        memory.upload(np.zeros(20), memory.allocate(ROWS))


def test_unknown_dtype_is_a_bundle_error() -> None:
    with pytest.raises(BundleError, match="float8"):
        HostMemory().allocate(TensorSpec("a", "float8", (1,)))


def decoder_tensors(memory: HostMemory, **changes: TensorSpec) -> tuple[dict[str, DeviceTensor], ...]:
    component = toy_manifest().component("vae_decoder")
    specs = {spec.name: spec for spec in (*component.inputs, *component.outputs)} | changes
    return (
        {"latent": memory.allocate(specs["latent"])},
        {"image": memory.allocate(specs["image"])},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": TensorSpec("latent", "float32", (1, 32, 3, 2))}, r"expected: float32 \[1, 32, 2, 3\]"),
        ({"latent": TensorSpec("latent", "float16", (1, 32, 2, 3))}, r"received: float16 \[1, 32, 2, 3\]"),
        ({"image": TensorSpec("image", "uint8", (1, 96, 64, 3))}, "output tensor 'image' does not fit"),
    ],
    ids=["shape", "dtype", "output"],
)
def test_execute_refuses_tensors_that_do_not_fit(changes: dict[str, TensorSpec], message: str) -> None:
    memory = HostMemory()
    engine = RecordingEngine(toy_manifest().component("vae_decoder"), memory)
    with pytest.raises(InputError, match=message):
        engine.execute(*decoder_tensors(memory, **changes))
    assert not engine.calls


def test_execute_refuses_missing_and_extra_tensors() -> None:
    memory = HostMemory()
    engine = RecordingEngine(toy_manifest().component("vae_decoder"), memory)
    inputs, outputs = decoder_tensors(memory)
    with pytest.raises(InputError, match="wrong input tensors"):
        engine.execute({}, outputs)
    with pytest.raises(InputError, match="wrong output tensors"):
        engine.execute(inputs, {**outputs, "latent": inputs["latent"]})
    engine.execute(inputs, outputs)
    assert len(engine.calls) == 1
