"""Compare our reference modules with diffusers' and transformers' at real size, and append rows to
benchmarks/results/real_size_parity.csv.

    python scripts/verify_real_size.py random:0.6b random:1.6b

fp32 on the CPU (or --device cuda), random weights, one module in memory at a time. Exit code 1 if a component is
further away than fp32 rounding explains.
"""

import argparse
import csv
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from torch import nn

from sana_export.components import loaded_module, plan_components
from sana_export.parity.metrics import measure
from sana_export.parity.tolerance import relative_rms_bound
from sana_export.upstream import upstream_autoencoder, upstream_text_encoder, upstream_transformer
from sana_export.weights.checkpoint import Checkpoint, open_checkpoint

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "real_size_parity.csv"
COLUMNS = [
    "commit",
    "device",
    "model",
    "component",
    "tensor",
    "shape",
    "max_abs",
    "relative_rms",
    "bound",
    "cosine",
    "versions",
]
SIDE, TOKENS = 512, 300
Call = Callable[[nn.Module], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Our module and its call, upstream's module and its call, and the number of blocks in a row."""

    make: Callable[[], nn.Module]
    call: Call
    make_upstream: Callable[[], nn.Module]
    call_upstream: Call
    blocks: int


def text_encoder(checkpoint: Checkpoint, device: str) -> Case:
    """One padded prompt."""
    tokens = torch.randint(4, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(1)).to(device)
    mask = (torch.arange(TOKENS) < 250).long()[None].to(device)
    plan = plan_components(checkpoint, "fp32", SIDE, SIDE, TOKENS)[0]
    return Case(
        lambda: loaded_module(plan, checkpoint),
        lambda module: module(tokens, mask),
        lambda: upstream_text_encoder(checkpoint),
        lambda module: module(tokens, attention_mask=mask).last_hidden_state,
        checkpoint.text_encoder_config["num_hidden_layers"],
    )


def transformer(checkpoint: Checkpoint, device: str) -> Case:
    """Batch 2, captions of different length."""
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(2, 32, SIDE // 32, SIDE // 32, generator=generator).to(device)
    channels = checkpoint.transformer_config["caption_channels"]
    caption = torch.randn(2, 300, channels, generator=generator).to(device)
    mask = (torch.arange(300)[None] < torch.tensor([[1], [47]])).long().to(device)
    embedded = checkpoint.guidance == "embedded"
    timestep = torch.tensor([0.7, 0.2] if embedded else [999.0, 428.0]).to(device)
    guidance = torch.tensor([4.5, 4.5]).to(device) if embedded else None
    scaled = None if guidance is None else guidance * checkpoint.transformer_config["guidance_embeds_scale"]
    plan = plan_components(checkpoint, "fp32", SIDE, SIDE, TOKENS)[1]
    return Case(
        lambda: loaded_module(plan, checkpoint).transformer,
        lambda module: module(latent, caption, mask, timestep, guidance),
        lambda: upstream_transformer(checkpoint),
        lambda module: module(latent, caption, timestep, guidance=scaled, encoder_attention_mask=mask).sample,
        checkpoint.transformer_config["num_layers"],
    )


def vae_decoder(checkpoint: Checkpoint, device: str) -> Case:
    """The decoder without scaling, clamp and cast."""
    latent = torch.randn(1, 32, SIDE // 32, SIDE // 32, generator=torch.Generator().manual_seed(3)).to(device)
    plan = plan_components(checkpoint, "fp32", SIDE, SIDE, TOKENS)[2]
    return Case(
        lambda: loaded_module(plan, checkpoint).decoder,
        lambda module: module(latent),
        lambda: upstream_autoencoder(checkpoint),
        lambda module: module.decode(latent).sample,
        sum(checkpoint.vae_config["decoder_layers_per_block"]),
    )


CASES = {
    "text_encoder": (text_encoder, "caption_embeds"),
    "transformer": (transformer, "velocity"),
    "vae_decoder": (vae_decoder, "pixels"),
}


def rows(model: str, components: list[str], device: str) -> Iterator[dict[str, object]]:
    """One row per component of a model."""
    checkpoint = open_checkpoint(model)
    for name in components:
        case, tensor = CASES[name]
        pair = case(checkpoint, device)
        candidate = evaluate(pair.make, pair.call, device)
        reference = evaluate(pair.make_upstream, pair.call_upstream, device)
        found = measure(name, tensor, candidate.numpy(), reference.numpy())
        yield {
            "commit": commit(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "model": model,
            "component": name,
            "tensor": tensor,
            "shape": "x".join(map(str, reference.shape)),
            "max_abs": f"{found.max_abs:.3g}",
            "relative_rms": f"{found.relative_rms:.3g}",
            "bound": f"{relative_rms_bound('float32', pair.blocks):.3g}",
            "cosine": f"{found.cosine:.9f}",
            "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}, "
            f"transformers {transformers.__version__}",
        }


def evaluate(make: Callable[[], nn.Module], call: Call, device: str) -> torch.Tensor:
    """Load a module, run it once, free it."""
    module = make().to(device)
    with torch.inference_mode():
        result = call(module).float().cpu()
    del module
    gc.collect()
    return result


def commit() -> str:
    """The commit measured."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=RESULTS.parents[2]).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--components", default=",".join(CASES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    good = True
    for model in arguments.models:
        for row in rows(model, arguments.components.split(","), arguments.device):
            print(row, flush=True)
            good &= float(row["relative_rms"]) <= float(row["bound"])
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            new = not RESULTS.exists()
            with RESULTS.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerow(row)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
