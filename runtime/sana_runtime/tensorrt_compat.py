"""The differences between TensorRT 10, TensorRT 11 and TensorRT-RTX, all in one place.

`trt` is the imported module. Only calls that all of them share appear outside this file.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

from sana_runtime import two_wheels


def create_network(trt: Any, builder: Any) -> Any:
    """An empty strongly typed network: the graph alone decides every dtype.

    10.x needs the flag, 11.x and RTX are always strongly typed and accept it; it may go some day.
    """
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))


def create_config(trt: Any, builder: Any, monitor: Any, workspace_mib: int | None) -> Any:
    """A builder config that reports to `monitor`.

    TF32 is off: fp32 in the graph stays fp32, as in the reference. No timing cache is set: it would make RTX
    look for a GPU.
    """
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    config.clear_flag(trt.BuilderFlag.TF32)
    if workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    return config


def write_plan(trt: Any, builder: Any, network: Any, config: Any, output: BinaryIO) -> bool:
    """Compile and write the plan. Returns False when the compiler gave none; its log says why.

    Where the API can, the plan goes to the file in pieces of some MiB and is never whole in memory. Raises
    OSError when the file cannot be written.
    """
    if build := _stream_function(trt, builder):
        return _stream_plan(trt, build, network, config, output)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        return False
    output.write(serialized)
    return True


def _stream_function(trt: Any, builder: Any) -> Callable[[Any, Any, Any], bool] | None:
    """The call that builds (network, config, writer) into a stream; None before TensorRT 10.13 or so."""
    if trt.__name__ == two_wheels.BINDINGS_MODULE:
        return partial(two_wheels.build_to_stream, builder) if two_wheels.can_stream() else None
    return getattr(builder, "build_serialized_network_to_stream", None)


def _stream_plan(trt: Any, build: Callable[[Any, Any, Any], bool], network: Any, config: Any, output: BinaryIO) -> bool:
    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return output.write(data)
            except OSError as error:
                self.error = self.error or error
                return 0

    writer = Writer()
    finished = build(network, config, writer)
    if writer.error is not None:
        raise writer.error
    return bool(finished) and output.tell() > 0
