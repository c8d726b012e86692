"""Tokenizer and scheduler settings of a bundle, taken from the checkpoint and the installed diffusers."""

import inspect
from typing import Any

from tokenizers import Tokenizer

from sana_export.weights.checkpoint import Checkpoint
from sana_runtime.contract import CAPTION_LENGTH
from sana_runtime.errors import CheckpointError
from sana_runtime.manifest import SchedulerEntry, TokenizerEntry

# Scheduler class -> our solver, and the settings without which its mathematics is another.
_SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPMSolverMultistepScheduler": (
        "flow_dpm_solver",
        {
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "final_sigmas_type": "zero",
            "lower_order_final": True,
            "euler_at_final": False,
        },
    ),
    "FlowMatchEulerDiscreteScheduler": ("flow_euler", {"use_dynamic_shifting": False}),
    "SCMScheduler": ("trigflow", {"prediction_type": "trigflow"}),
}


def _pipeline_default(pipeline_class: str, parameter: str) -> Any:
    """A default of the diffusers pipeline's __call__: nothing of upstream's text or settings is copied here."""
    import diffusers

    return inspect.signature(getattr(diffusers, pipeline_class).__call__).parameters[parameter].default


def _sampling_default(checkpoint: Checkpoint, parameter: str) -> Any:
    """What the model's own sampling.json says, else the pipeline's default."""
    found = checkpoint.sampling_config.get(parameter)
    return _pipeline_default(checkpoint.pipeline_class, parameter) if found is None else found


def tokenizer_entry(tokenizer_json: bytes, file: str, pipeline_class: str) -> TokenizerEntry:
    """How prompts become tokens: the installed diffusers' instruction, counted with the checkpoint's tokenizer."""
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    instruction = "\n".join(_pipeline_default(pipeline_class, "complex_human_instruction") or ())
    count = len(tokenizer.encode(instruction).ids) if instruction else 0
    pad = tokenizer.token_to_id("<pad>")
    if pad is None:
        raise CheckpointError(
            "the tokenizer has no <pad> token",
            expected="Gemma's tokenizer",
            action="take tokenizer/tokenizer.json of the Sana checkpoint",
        )
    padded = max(CAPTION_LENGTH, count + CAPTION_LENGTH - 2) if instruction else CAPTION_LENGTH
    return TokenizerEntry(file, instruction, count, padded, pad)


def scheduler_entry(checkpoint: Checkpoint) -> SchedulerEntry:
    """Solver settings. Raises `CheckpointError` for a scheduler whose mathematics we do not have."""
    config = checkpoint.scheduler_config
    name = config.get("_class_name", "")
    if name not in _SOLVERS:
        raise _unsupported(checkpoint, "_class_name", name, " or ".join(_SOLVERS))
    kind, required = _SOLVERS[name]
    for field, value in required.items():
        if config.get(field, value) != value:
            raise _unsupported(checkpoint, field, config[field], repr(value))
    return SchedulerEntry(
        kind=kind,  # type: ignore[arg-type]
        flow_shift=float(config.get("flow_shift", config.get("shift", 1.0))),
        num_train_timesteps=int(config.get("num_train_timesteps", 1000)),
        default_num_steps=int(_sampling_default(checkpoint, "num_inference_steps")),
        default_guidance_scale=float(_sampling_default(checkpoint, "guidance_scale")),
        sigma_data=float(config.get("sigma_data", 0.5)),
    )


def _unsupported(checkpoint: Checkpoint, field: str, received: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.source}: scheduler/scheduler_config.json has a {field} that is not supported",
        received=repr(received),
        expected=expected,
        action="use the scheduler folder of a released Sana checkpoint",
    )
