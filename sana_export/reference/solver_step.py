"""One solver step as one module: what the `transformer` engine computes.

Everything but x0 is known before the loop, so a step of any of the solvers is
next_latent = A latent + B x0 + C previous_x0 with the coefficients of `sana_runtime.scheduler`.
"""

import torch
from torch import nn

from sana_export.reference.transformer import LinearTransformer

StepOutputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _combine(
    step_coefficients: torch.Tensor, latent: torch.Tensor, x0: torch.Tensor, previous_x0: torch.Tensor
) -> torch.Tensor:
    a, b, c = step_coefficients.unbind(0)
    return a * latent + b * x0 + c * previous_x0


class ClassifierFreeStep(nn.Module):
    """A step of a flow-matching model with classifier-free guidance.

    The batch [negative, positive] is made here from one latent [1, 32, h, w]; latent, x0 and the solver stay in
    fp32 while the transformer runs in the dtype of its weights.
    """

    def __init__(self, transformer: LinearTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        latent: torch.Tensor,
        previous_x0: torch.Tensor,
        caption_embeds: torch.Tensor,
        caption_mask: torch.Tensor,
        timestep: torch.Tensor,
        sigma: torch.Tensor,
        step_coefficients: torch.Tensor,
        guidance_scale: torch.Tensor,
    ) -> StepOutputs:
        """Inputs as in `sana_runtime.contract.transformer_io` -> (next_latent, x0, velocity), fp32."""
        dtype = self.transformer.proj_out.weight.dtype
        batch = latent.to(dtype).expand(2, -1, -1, -1)
        both = self.transformer(batch, caption_embeds, caption_mask, timestep.expand(2)).float()
        negative, positive = both.split(1)
        velocity = negative + guidance_scale * (positive - negative)
        x0 = latent - sigma * velocity
        return _combine(step_coefficients, latent, x0, previous_x0), x0, velocity


class TrigFlowStep(nn.Module):
    """A step of a Sprint model (TrigFlow, guidance as an input, no batch of two).

    `timestep` t = sin s / (sin s + cos s) of the angle s, so sin s = t / k and cos s = (1 - t) / k with
    k = sqrt(t^2 + (1 - t)^2). `previous_x0` carries the fresh noise of the step.
    """

    def __init__(self, transformer: LinearTransformer, sigma_data: float) -> None:
        super().__init__()
        self.transformer = transformer
        self.sigma_data = sigma_data

    def forward(
        self,
        latent: torch.Tensor,
        previous_x0: torch.Tensor,
        caption_embeds: torch.Tensor,
        caption_mask: torch.Tensor,
        timestep: torch.Tensor,
        step_coefficients: torch.Tensor,
        guidance_embeds: torch.Tensor,
    ) -> StepOutputs:
        """Inputs as in `sana_runtime.contract.transformer_io` -> (next_latent, x0, velocity), fp32."""
        dtype = self.transformer.proj_out.weight.dtype
        t = timestep
        k = torch.sqrt(t * t + (1 - t) * (1 - t))
        model_latent = latent / self.sigma_data * k
        velocity = self.transformer(
            model_latent.to(dtype), caption_embeds, caption_mask, t.expand(1), guidance_embeds.expand(1)
        ).float()
        trig_velocity = ((1 - 2 * t) * model_latent + (1 - 2 * t + 2 * t * t) * velocity) * (self.sigma_data / k)
        x0 = ((1 - t) * latent - t * trig_velocity) / k
        return _combine(step_coefficients, latent, x0, previous_x0), x0, velocity
