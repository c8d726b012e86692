"""The specification of ReLU linear attention: eager PyTorch, fp32 inside."""

import torch

from sana_kernels.mix_ffn_depthwise.quantization import narrow


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last axis, in fp32; the result has the dtype of `x`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def linear_attention_reference(
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """out_n = (sum_m v_m k_m^T) q_n / (sum_m k_m . q_n + eps), with q and k after ReLU.

    qkv [B, N, 3C], packed [q | k | v], each with its heads in order, or [B, 3 heads, N, D], those heads one by one
    -> [B, N, C] in the dtype of `qkv`, or quantised to `out_dtype`.
    With norm weights [C], q and k pass an RMS norm over all C channels first (SANA-1.5, Sprint).
    Source: Sana paper (ReLU linear attention), in the sum form that needs no padding of v.
    """
    query, key, value = packed(qkv).chunk(3, dim=-1)
    if norm_q_weight is not None and norm_k_weight is not None:
        query = rms_norm(query, norm_q_weight, norm_eps)
        key = rms_norm(key, norm_k_weight, norm_eps)
    query, key, value = (_split_heads(x.float(), head_dim) for x in (query.relu(), key.relu(), value))
    state = key.transpose(-1, -2) @ value  # [B, heads, D, D]
    key_sum = key.sum(dim=-2, keepdim=True)  # [B, heads, 1, D]
    denominator = query @ key_sum.transpose(-1, -2) + eps  # [B, heads, N, 1]
    out = (query @ state) / denominator
    return narrow(out.transpose(1, 2).flatten(2), out_scale, out_dtype or qkv.dtype)


def packed(qkv: torch.Tensor) -> torch.Tensor:
    """[B, N, 3C] of either layout."""
    return qkv if qkv.ndim == 3 else qkv.transpose(1, 2).flatten(2)


def _split_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # [B, heads, N, D]


def linear_attention_backward_reference(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of qkv [B, N, 3C] and of both norm weights (empty tensors without them), given grad [B, N, C].

    In the dtypes of what they belong to, fp32 inside. PyTorch's autograd of the forward gives the same.
    """
    raw_query, raw_key, value = qkv.chunk(3, dim=-1)
    pre_query, pre_key = raw_query, raw_key
    if norm_q_weight is not None and norm_k_weight is not None:
        pre_query = rms_norm(raw_query, norm_q_weight, norm_eps)
        pre_key = rms_norm(raw_key, norm_k_weight, norm_eps)
    tensors = (pre_query.relu(), pre_key.relu(), value, grad)
    query, key, value, grad = (_split_heads(x.float(), head_dim) for x in tensors)
    state, key_sum = key.transpose(-1, -2) @ value, key.sum(dim=-2, keepdim=True)
    denominator = query @ key_sum.transpose(-1, -2) + eps
    out = (query @ state) / denominator
    grad_numerator = grad / denominator
    grad_denominator = -(grad * out).sum(-1, keepdim=True) / denominator
    grad_query = grad_numerator @ state.transpose(-1, -2) + grad_denominator * key_sum
    grad_state = query.transpose(-1, -2) @ grad_numerator
    grad_key_sum = (query * grad_denominator).sum(dim=-2, keepdim=True)
    grad_key = value @ grad_state.transpose(-1, -2) + grad_key_sum
    grads = [x.transpose(1, 2).flatten(2) for x in (grad_query, grad_key, key @ grad_state)]
    grads[0] = grads[0] * (pre_query > 0)
    grads[1] = grads[1] * (pre_key > 0)
    grad_weights = [qkv.new_empty(0), qkv.new_empty(0)]
    if norm_q_weight is not None and norm_k_weight is not None:
        grads[0], grad_weights[0] = _rms_norm_backward(grads[0], raw_query, norm_q_weight, norm_eps)
        grads[1], grad_weights[1] = _rms_norm_backward(grads[1], raw_key, norm_k_weight, norm_eps)
    return torch.cat(grads, dim=-1).to(qkv.dtype), grad_weights[0], grad_weights[1]


def _rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (fp32) and of weight (its dtype), given the fp32 gradient of `rms_norm(x, weight, eps)`."""
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    unit = x.float() * scale
    grad_unit = grad * weight.float()
    grad_x = scale * (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True))
    return grad_x, (grad * unit).sum(dim=(0, 1)).to(weight.dtype)
