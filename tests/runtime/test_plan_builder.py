"""Plans are whole or absent, whatever happens to the compiler; the real one builds without a GPU."""

import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sana_runtime import plan_builder
from sana_runtime.errors import BuildError, InputError, TargetError
from sana_runtime.plan_builder import PlanProgress, build_plan
from sana_runtime.plan_worker import Phase
from sana_runtime.tensorrt_library import TensorrtLibrary, examine_tensorrt

# --- A writer of tiny ONNX files: the runtime's tests have no onnx package. ---


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | str | bytes) -> bytes:
    """One protobuf field: an int as varint, anything else length-delimited."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def value_info(name: str, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(field(1, field(1, size)) for size in shape)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))


def weight(name: str, size: int, external: str | None) -> bytes:
    """A square fp32 initializer, all 0.5, or all zero in a file of its own."""
    head = field(1, size) + field(1, size) + field(2, 1) + field(8, name)
    if external is None:
        return head + field(9, struct.pack("<f", 0.5) * size * size)
    entries = {"location": external, "offset": "0", "length": str(size * size * 4)}
    return head + b"".join(field(13, field(1, k) + field(2, v)) for k, v in entries.items()) + field(14, 1)


def write_onnx(path: Path, *, size: int = 16, op_type: str = "MatMul", external: bool = False) -> Path:
    """`path`: a graph of one node 'the_node' with input x [4, size] and a square weight."""
    location = f"{path.name}.data" if external else None
    if location:
        with (path.parent / location).open("wb") as data:
            data.truncate(size * size * 4)
    node = b"".join(field(1, name) for name in ("x", "w")) + field(2, "y") + field(3, "the_node")
    graph = field(1, node + field(4, op_type)) + field(2, "graph") + field(5, weight("w", size, location))
    graph += field(11, value_info("x", (4, size))) + field(12, value_info("y", (4, size)))
    path.write_bytes(field(1, 10) + field(7, graph) + field(8, field(1, "") + field(2, 21)))
    return path


# --- Fixtures ---


@pytest.fixture
def rtx() -> TensorrtLibrary:
    last = examine_tensorrt("tensorrt-rtx")[-1]
    if last.builder is None:
        pytest.skip(f"no TensorRT-RTX builder: {last.reason}")
    return last.builder


@pytest.fixture
def fake_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Append Python statements: they run in place of the worker, with `events` open and `output` as path."""
    statements: list[str] = []
    library = TensorrtLibrary("tensorrt-rtx", "vendor", "none", "9.9", "9.9", "a fake")
    monkeypatch.setattr(plan_builder, "find_tensorrt", lambda target: library)
    monkeypatch.setattr(
        plan_builder,
        "worker_command",
        lambda module, *arguments: (fake_command(statements, arguments), tmp_path),
    )
    return statements


def fake_command(statements: list[str], arguments: tuple[str, ...]) -> list[str]:
    prelude = (
        "import ctypes, json, os, signal, sys, time\n"
        "events = os.fdopen(int(sys.argv[1]), 'wb', buffering=0)\n"
        "output = json.loads(sys.argv[2])['output']\n"
    )
    return [sys.executable, "-c", prelude + "\n".join(statements), *arguments]


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "tiny.onnx")


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def child_pids() -> list[int]:
    children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children")
    return [int(pid) for pid in children.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


# --- The real compiler ---


@pytest.mark.tensorrt
@pytest.mark.parametrize("external", [False, True], ids=["inline", "external-data"])
def test_real_build_gives_a_plan(rtx: TensorrtLibrary, tmp_path: Path, external: bool) -> None:
    onnx = write_onnx(tmp_path / "model.onnx", external=external)
    seen: list[PlanProgress] = []
    result = build_plan(onnx, tmp_path / "model.plan", "tensorrt-rtx", on_progress=seen.append)
    assert result.size == (tmp_path / "model.plan").stat().st_size > 1000
    assert (result.builder, result.builder_version) == ("TensorRT-RTX", rtx.version)
    assert result.layers >= 1
    assert result.seconds > 0
    assert 10 < result.peak_memory_mib < 4096
    # A product of 4 rows; what it takes beside them is the compiler's to choose.
    assert result.activation_bytes is not None
    assert 0 <= result.activation_bytes < 1 << 24
    assert seen
    assert all(0 <= progress.fraction <= 1 and progress.phase for progress in seen)
    assert files_of(tmp_path) - {"model.onnx.data"} == {"model.onnx", "model.plan"}


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_workspace_limit_is_accepted(onnx: Path, tmp_path: Path) -> None:
    assert build_plan(onnx, tmp_path / "p.plan", "tensorrt-rtx", workspace_mib=64).size > 0


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_peak_memory_is_the_childs_own(onnx: Path, tmp_path: Path) -> None:
    # The kernel's ru_maxrss of a child starts at its parent's size.
    before = build_plan(onnx, tmp_path / "a.plan", "tensorrt-rtx").peak_memory_mib
    ballast = bytearray(os.urandom(1 << 20)) * 1024
    after = build_plan(onnx, tmp_path / "b.plan", "tensorrt-rtx").peak_memory_mib
    assert abs(after - before) < 256
    del ballast


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "parse"),
        ("junk", "holds no graph"),
        ("empty", "holds no graph"),
        ("unknown_operator", "node 'the_node' (NoSuchOperator)"),
        ("missing_data", "Failed to open file"),
        ("short_data", "out of range"),
    ],
)
def test_unreadable_onnx_is_one_error(tmp_path: Path, damage: str, message: str) -> None:
    onnx = damaged_onnx(tmp_path, damage)
    before = files_of(tmp_path)
    with pytest.raises(BuildError) as caught:
        build_plan(onnx, tmp_path / "p.plan", "tensorrt-rtx")
    assert message in str(caught.value)
    assert str(onnx) in str(caught.value)
    assert files_of(tmp_path) == before


def damaged_onnx(folder: Path, damage: str) -> Path:
    path = folder / "model.onnx"
    operator = "NoSuchOperator" if damage == "unknown_operator" else "MatMul"
    write_onnx(path, op_type=operator, external=damage.endswith("data"))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "junk":
        path.write_bytes(b"hello world" * 10)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing_data":
        (folder / "model.onnx.data").unlink()
    elif damage == "short_data":
        os.truncate(folder / "model.onnx.data", 100)
    return path


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_cancel_stops_the_compiler(onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cancelled"):
        build_plan(onnx, tmp_path / "p.plan", "tensorrt-rtx", on_progress=lambda progress: False)
    assert files_of(tmp_path) == {"tiny.onnx"}
    assert child_pids() == []


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGKILL, "memory is full"), (signal.SIGSEGV, "SIGSEGV, in phase")]
)
def test_killed_compiler_is_one_error(onnx: Path, tmp_path: Path, number: signal.Signals, message: str) -> None:
    def kill(progress: PlanProgress) -> None:
        os.kill(child_pids()[0], number)

    with pytest.raises(BuildError, match=message):
        build_plan(onnx, tmp_path / "p.plan", "tensorrt-rtx", on_progress=kill)
    assert files_of(tmp_path) == {"tiny.onnx"}


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_full_disk_is_one_error(onnx: Path, tmp_path: Path) -> None:
    # What the worker opens leads to a device that is always full.
    (tmp_path / f".p.plan.{os.getpid()}-{threading.get_ident()}.partial").symlink_to("/dev/full")
    with pytest.raises(BuildError, match="no space left"):
        build_plan(onnx, tmp_path / "p.plan", "tensorrt-rtx")
    assert files_of(tmp_path) == {"tiny.onnx"}


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_file_size_limit_is_one_error(tmp_path: Path) -> None:
    onnx = write_onnx(tmp_path / "tiny.onnx", size=128)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(BuildError, match="could not write the plan"):
            build_plan(onnx, tmp_path / "p.plan", "tensorrt-rtx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(tmp_path) == {"tiny.onnx"}


BUILD_SCRIPT = """
import sys
from pathlib import Path
from sana_runtime.plan_builder import build_plan
print(build_plan(Path(sys.argv[1]), Path(sys.argv[2]), "tensorrt-rtx").size)
"""


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_two_builds_of_one_plan_at_once(onnx: Path, tmp_path: Path) -> None:
    plan = tmp_path / "p.plan"
    command = [sys.executable, "-c", BUILD_SCRIPT, str(onnx), str(plan)]
    builds = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sizes = [int(build.communicate(timeout=120)[0]) for build in builds]
    assert [build.returncode for build in builds] == [0, 0]
    assert sizes == [plan.stat().st_size] * 2
    assert files_of(tmp_path) == {"tiny.onnx", "p.plan"}


WRITE_SCRIPT = """
import importlib, sys
from sana_runtime import plan_worker, tensorrt_compat
module, onnx, output, stream = sys.argv[1:]
if stream == "no":
    tensorrt_compat._stream_function = lambda trt, builder: None
trt = importlib.import_module(module)
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = tensorrt_compat.create_network(trt, builder)
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(onnx)
plan_worker._parent_cancelled = lambda: False
monitor = plan_worker._progress_monitor(trt, plan_worker._Reporter(open("/dev/null", "wb")))
config = tensorrt_compat.create_config(trt, builder, monitor, None)
with open(output, "wb") as file:
    assert tensorrt_compat.write_plan(trt, builder, network, config, file)
print(plan_worker.peak_memory_mib())
"""


@pytest.mark.tensorrt
def test_streamed_plan_is_the_same_and_needs_less_memory(rtx: TensorrtLibrary, tmp_path: Path) -> None:
    onnx = write_onnx(tmp_path / "wide.onnx", size=10240, external=True)  # 400 MiB of weights
    peaks, plans = {}, {}
    for stream in ("yes", "no"):
        plans[stream] = tmp_path / f"{stream}.plan"
        command = [sys.executable, "-c", WRITE_SCRIPT, rtx.module, str(onnx), str(plans[stream]), stream]
        environment = os.environ | rtx.environment
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks[stream] = int(run.stdout)
    assert plans["yes"].stat().st_size > 400 << 20
    assert subprocess.run(["cmp", plans["yes"], plans["no"]], check=False).returncode == 0
    assert peaks["no"] - peaks["yes"] > 200, peaks  # pieces are 64 MiB, copied once
    for plan in plans.values():  # pytest keeps its folders
        plan.unlink()


# --- A fake compiler: what a real one can do at its worst ---


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "os.kill(os.getpid(), signal.SIGSEGV)",
            "crashed\n  received: SIGSEGV, before the first phase",
        ),
        ("ctypes.string_at(0)", "received: SIGSEGV"),
        ("os.abort()", "received: SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 1)", "received: signal 35"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "memory is full"),
        ("print('[E] last words', file=sys.stderr); sys.exit(3)", "exit code 3"),
        ("print('[E] last words', file=sys.stderr); sys.exit(3)", "last words"),
        ("pass", "exit code 0"),
        ('events.write(b\'{"type":"bui\')', "crashed"),
        ('events.write(b\'{"type":"failed","kind":"no_memory","detail":"x"}\\n\')', "ran out of memory"),
        (
            'events.write(b\'{"type":"built","layers":1,"peak_memory_mib":1}\\n\'); os.abort()',
            "SIGABRT, after the build",
        ),
    ],
)
def test_every_end_of_the_worker_is_one_error(
    fake_worker: list[str], onnx: Path, tmp_path: Path, statement: str, message: str
) -> None:
    fake_worker += ["open(output, 'wb').write(b'half a plan')", statement]
    with pytest.raises(BuildError) as caught:
        build_plan(onnx, tmp_path / "p.plan", "tensorrt-rtx")
    assert message in str(caught.value)
    assert files_of(tmp_path) == {"tiny.onnx"}
    assert child_pids() == []


@pytest.mark.parametrize(
    ("said", "activation_bytes"),
    [("[I] Total Activation Memory: 20132663296 bytes", 20132663296), ("[I] Total Weights Memory: 4 bytes", None)],
)
def test_the_activation_memory_is_read_off_the_log(
    fake_worker: list[str], onnx: Path, tmp_path: Path, said: str, activation_bytes: int | None
) -> None:
    fake_worker += [
        "open(output, 'wb').write(b'a plan')",
        f"print('[11/29/2026-19:30:23] [TRT] {said}', file=sys.stderr, flush=True)",
        'events.write(b\'{"type":"built","layers":1,"peak_memory_mib":1}\\n\')',
    ]
    assert build_plan(onnx, tmp_path / "p.plan", "tensorrt-rtx").activation_bytes == activation_bytes


def test_a_failed_build_keeps_the_old_plan(fake_worker: list[str], onnx: Path, tmp_path: Path) -> None:
    plan = tmp_path / "p.plan"
    plan.write_bytes(b"the old plan")
    fake_worker += ["open(output, 'wb').write(b'half')", "os.abort()"]
    with pytest.raises(BuildError):
        build_plan(onnx, plan, "tensorrt-rtx")
    assert plan.read_bytes() == b"the old plan"


def test_an_error_of_the_caller_kills_the_worker(fake_worker: list[str], onnx: Path, tmp_path: Path) -> None:
    fake_worker += [PROGRESS, "time.sleep(60)"]

    def fail(progress: PlanProgress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build_plan(onnx, tmp_path / "p.plan", "tensorrt-rtx", on_progress=fail)
    assert child_pids() == []
    assert files_of(tmp_path) == {"tiny.onnx"}


def test_a_worker_that_ignores_cancel_is_killed(
    fake_worker: list[str], onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_builder, "_CANCEL_SECONDS", 0.2)
    fake_worker += [PROGRESS, "time.sleep(60)"]
    started = time.monotonic()
    with pytest.raises(BuildError, match="cancelled"):
        build_plan(onnx, tmp_path / "p.plan", "tensorrt-rtx", on_progress=lambda progress: False)
    assert time.monotonic() - started < 30


PROGRESS = 'events.write(b\'{"type":"progress","phases":[{"name":"p","step":0,"steps":1}],"peak_memory_mib":1}\\n\')'

PARENT_SCRIPT = f'''
import signal, sys
from pathlib import Path
from sana_runtime import plan_builder
from sana_runtime.tensorrt_library import TensorrtLibrary
worker = r"""import os, sys, time
from sana_runtime.plan_worker import _die_with_parent
_die_with_parent(os.getppid())
events = os.fdopen(int(sys.argv[1]), "wb", buffering=0)
print(os.getpid(), file=open(sys.argv[3], "w"), flush=True)
{PROGRESS}
time.sleep(60)"""
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in the background
library = TensorrtLibrary("tensorrt-rtx", "vendor", "none", "9.9", "9.9", "a fake")
plan_builder.find_tensorrt = lambda target: library
onnx, plan, pid_file = sys.argv[1:]
plan_builder.worker_command = lambda module, *a: ([sys.executable, "-c", worker, *a, pid_file], Path("/"))
started = lambda progress: print("started", flush=True)
plan_builder.build_plan(Path(onnx), Path(plan), "tensorrt-rtx", on_progress=started)
'''


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_parent_ends_the_worker(onnx: Path, tmp_path: Path, number: signal.Signals) -> None:
    pid_file = tmp_path / "pid"
    command = [sys.executable, "-c", PARENT_SCRIPT, str(onnx), str(tmp_path / "p.plan"), str(pid_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        parent.send_signal(number)
        _, errors = parent.communicate(timeout=30)
    assert wait_until_gone(int(pid_file.read_text()))
    assert files_of(tmp_path) == {"tiny.onnx", "pid"}
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)


# --- Arguments and arithmetic ---


def test_missing_onnx_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no such ONNX file"):
        build_plan(tmp_path / "none.onnx", tmp_path / "p.plan", "tensorrt-rtx")
    assert files_of(tmp_path) == set()


def test_workspace_of_nothing_is_refused(onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 MiB"):
        build_plan(onnx, tmp_path / "p.plan", "tensorrt-rtx", workspace_mib=0)


def test_onnxruntime_has_no_plans(onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no plans"):
        build_plan(onnx, tmp_path / "p.plan", "onnxruntime")


@pytest.mark.parametrize(
    ("phases", "fraction"),
    [
        ((), 0.0),
        ((Phase("a", 0, 0),), 0.0),
        ((Phase("a", 1, 4),), 0.25),
        ((Phase("a", 1, 4), Phase("b", 1, 2)), 0.375),
        ((Phase("a", 1, 4), Phase("unknown", 3, 0), Phase("b", 1, 2)), 0.375),
        ((Phase("a", 4, 4), Phase("b", 2, 2)), 1.0),
    ],
)
def test_fraction_counts_nested_phases(phases: tuple[Phase, ...], fraction: float) -> None:
    assert PlanProgress(phases, 0).fraction == pytest.approx(fraction)
