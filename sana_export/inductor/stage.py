"""The build stage of the target `inductor`."""

import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

import sana_calibration.quantize as quantize_arithmetic
import sana_export.components as components
import sana_kernels
import sana_runtime.inductor_program as inductor_program
from sana_calibration.rules import LayerRule, rules_digest
from sana_calibration.scales import LayerScales, Scales
from sana_export.build_request import BuildRequest
from sana_export.components import ComponentPlan
from sana_export.inductor.compile import Begun, OnPiece, begin_component, finish_component
from sana_export.inductor.prepare import Prepared, prepare
from sana_export.inductor.toolchain import choose_cxx
from sana_export.inductor.workers import Workers
from sana_export.quantize import QuantizedBuild
from sana_export.weights.checkpoint import Checkpoint
from sana_kernels.modulated_norm.api import Impl
from sana_runtime.contract import PIXELS_PER_LATENT
from sana_runtime.inductor_engine import machine_device

_REFERENCE = Path(__file__).parent.parent / "reference"


@dataclass(frozen=True)
class InductorStage:
    """What the stages of all components share."""

    checkpoint: Checkpoint
    request: BuildRequest
    quantized: QuantizedBuild | None
    scales: Scales | None

    @property
    def device(self) -> str:
        """What is compiled for: this machine's GPU, or its CPU where there is none."""
        return machine_device()

    @property
    def torch_version(self) -> str:
        """The torch that must run it."""
        return str(torch.__version__)

    @property
    def impl(self) -> Impl:
        """Our kernels on a GPU; their references, as part of the compiled code, on the CPU."""
        return "triton" if self.device.startswith("cuda") else "reference"

    def inputs(self, plan: ComponentPlan, weights_digest: str) -> dict[str, str]:
        """Everything that decides the component's files, and nothing else, so that they serve other builds too."""
        configuration = self.checkpoint.config("vae" if plan.name == "vae_decoder" else plan.name)
        inputs = {
            "weights": weights_digest,
            "configuration": hashlib.sha256(msgspec.json.encode(configuration, order="sorted")).hexdigest(),
            "dtype": plan.dtype,
            "I/O": hashlib.sha256(msgspec.json.encode((plan.inputs, plan.outputs))).hexdigest(),
            "attention_clip": str(self.checkpoint.attention_clip),
            "device": self.device,
            "torch": self.torch_version,
            "triton": _version_or_none("triton"),
            "inductor code": _code_digest(),
        }
        if plan.name != "text_encoder":
            inputs["height x width"] = f"{self.request.height} x {self.request.width}"
        rules = self._rules(plan)
        active = {layer: rule for layer, rule in rules.items() if rule.activation_dtype is not None}
        # `prepare` leaves the decoder's other layers in the base dtype, and the text encoder's activations.
        inputs["recipe"] = rules_digest(active if plan.name == "vae_decoder" else rules)
        if plan.name != "text_encoder":
            inputs["calibration"] = self.scales.component_digest(plan.name) if self.scales and active else "none"
        return inputs

    def _rules(self, plan: ComponentPlan) -> Mapping[str, LayerRule]:
        return self.quantized.rules[plan.name] if self.quantized else {}

    def prepare(self, plan: ComponentPlan) -> Prepared:
        """A component's pieces, calls and stored tensors."""
        scales: Mapping[str, LayerScales] = self.scales.component(plan.name) if self.scales else {}
        tokens = plan.inputs[0].shape[-1] if plan.name == "text_encoder" else 0
        height, width = self.request.height // PIXELS_PER_LATENT, self.request.width // PIXELS_PER_LATENT
        return prepare(self.checkpoint, plan, height, width, tokens, self._rules(plan), scales, self.impl)

    def begin(self, plan: ComponentPlan, folder: Path, workers: Workers) -> Begun:
        """Begin to compile a component into `folder`."""
        choose_cxx()
        return begin_component(self.prepare(plan), plan.inputs, folder, workers)

    def finish(self, begun: Begun, folder: Path, on_piece: OnPiece) -> list[Path]:
        """The component's files, the program first."""
        return finish_component(begun, folder, on_piece)


def _code_digest() -> str:
    """Digest of our modules that decide what is computed."""
    folders = (Path(__file__).parent, _REFERENCE, *map(Path, sana_kernels.__path__))
    files = [path for folder in folders for path in folder.rglob("*.py")]
    modules = (components.__file__, quantize_arithmetic.__file__, inductor_program.__file__)
    files += [Path(file) for file in modules if file]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version_or_none(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
