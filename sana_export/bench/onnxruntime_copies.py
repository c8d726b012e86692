"""Whether ONNX Runtime keeps a call on its device: the copies and the CPU operators of every component's session."""

import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime as ort

from sana_runtime.bundle import engine_entry
from sana_runtime.contract import COMPONENTS, ComponentName
from sana_runtime.engine import Backend, HostMemory
from sana_runtime.manifest import Manifest
from sana_runtime.onnxruntime_engine import CPU_PROVIDER, CUDA_PROVIDER, OnnxRuntimeEngine

_COPIES = ("MemcpyToHost", "MemcpyFromHost")
# The rewriters that the engine turns off, too: the graph must be the one that is timed.
_QDQ_REWRITERS = ["QDQSelectorActionTransformer", "QDQPropagationTransformer"]


def describe_copies(bundle: Path, manifest: Manifest, backend: Backend) -> str:
    """One sentence per component: copies between host and device inside a call, and operators on the CPU."""
    parts = []
    for name in COMPONENTS:
        operators = count_operators(bundle, manifest, name, backend)
        copies = sum(count for (operator, _), count in operators.items() if operator in _COPIES)
        host = sum(count for (_, provider), count in operators.items() if provider == CPU_PROVIDER)
        parts.append(f"{name}: {copies} copies, {host} of {sum(operators.values())} operators on the CPU")
    return "; ".join(parts)


def count_operators(
    bundle: Path, manifest: Manifest, name: ComponentName, backend: Backend
) -> "Counter[tuple[str, str]]":
    """How often a call runs each (operator, provider), as ONNX Runtime's own profile says."""
    component = manifest.component(name)
    entry = engine_entry(manifest, name, "onnxruntime")
    on_host = isinstance(backend.memory, HostMemory)
    with TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(
            str(bundle / entry.files[0]),
            options,
            providers=[CPU_PROVIDER if on_host else CUDA_PROVIDER],
            disabled_optimizers=_QDQ_REWRITERS,
        )
        engine = OnnxRuntimeEngine(component, session, "cpu" if on_host else "cuda")
        inputs = {spec.name: backend.memory.allocate(spec) for spec in component.inputs}
        outputs = {spec.name: backend.memory.allocate(spec) for spec in component.outputs}
        engine.execute(inputs, outputs)
        backend.memory.synchronize()
        events = json.loads(Path(session.end_profiling()).read_bytes())
    nodes = [event["args"] for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]
    return Counter((node["op_name"], node["provider"]) for node in nodes)
