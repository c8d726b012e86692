"""Gemma-2's attention for PyTorch: one op for eager and torch.export, and explicit choices.

`torch.ops.sana.gemma_attention` runs the Triton kernel on CUDA tensors where Triton can be imported, and the reference
everywhere else. `torch.ops.sana.gemma_attention_triton` is the Triton path alone, open to torch.compile and
AOTInductor. Neither has gradients: the text encoder is not trained.
"""

from typing import Literal

import torch
from torch import library

from sana_kernels.gemma_attention.reference import gemma_attention_reference

# At import, not on first use: torch.compile cannot trace an import.
try:
    from sana_kernels.gemma_attention import triton as kernels
    from sana_kernels.gemma_attention import triton_ops
except ImportError as error:
    TRITON_PROBLEM: str | None = f"triton cannot be imported ({error})"
else:
    TRITON_PROBLEM = None

Impl = Literal["reference", "triton"]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@library.custom_op("sana::gemma_attention", mutates_args=())
def _gemma_attention(
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    bias: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    heads: int,
    scale: float,
    soft_cap: float | None,
) -> torch.Tensor:
    arguments = (qkv, cosine, sine, bias, past_key, past_value, heads, scale, soft_cap)
    if TRITON_PROBLEM is None and qkv.device.type == "cuda":
        return triton_ops.gemma_attention_triton(*arguments)
    return gemma_attention_reference(*arguments)[0]


@_gemma_attention.register_fake
def _(
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    bias: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    heads: int,
    scale: float,
    soft_cap: float | None,
) -> torch.Tensor:
    return qkv.new_empty(qkv.shape[0], heads * cosine.shape[-1])


def gemma_attention(
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    bias: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    *,
    heads: int,
    scale: float,
    soft_cap: float | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Causal attention of T positions on P kept keys and on their own: packed qkv [T, (heads + 2 G) D] -> [T, heads D].

    Query head h attends to key head h // (heads / G). Queries and own keys are rotated by cosine and sine [T, D], whose
    halves are alike; past_key and past_value [G, P, D] are rotated already. Scores are q k^T * `scale`, then
    `soft_cap` * tanh(scores / `soft_cap`) unless that is None, then plus the key's bias [P + T] float32, 0 or
    `MASKED`. A position that sees no key without `MASKED` gets a mean of some. Softmax in fp32; the other tensors have
    the dtype of qkv, as the result has.

    `impl`: "reference" is eager PyTorch, "triton" the kernel (not for float32; D a power of two from 32 to 256); None
    takes the kernel for CUDA tensors where Triton is installed, the reference otherwise, and is one op to torch.export.
    There are no gradients.

    Raises ValueError for shapes or dtypes that do not fit each other and for tensors the chosen implementation cannot
    run; nothing falls back silently.
    """
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"gemma_attention: impl must be 'reference', 'triton' or None, got {impl!r}")
    _check(qkv, cosine, sine, bias, past_key, past_value, heads)
    arguments = (qkv, cosine, sine, bias, past_key, past_value, heads, scale, soft_cap)
    if impl == "reference":
        return gemma_attention_reference(*arguments)[0]
    if impl == "triton":
        if TRITON_PROBLEM:
            raise ValueError(
                f"gemma_attention: impl='triton', but {TRITON_PROBLEM}. Use impl='reference', or pip install triton."
            )
        kernels.check_support(qkv, cosine.shape[-1])
        return triton_ops.gemma_attention_triton(*arguments)
    return _gemma_attention(*arguments)


def _check(
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    bias: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    heads: int,
) -> None:
    if past_key.ndim != 3 or 0 in past_key.shape or past_value.shape != past_key.shape:
        raise ValueError(
            "gemma_attention: past_key and past_value must be [G, P, D], none of them 0, "
            f"got {tuple(past_key.shape)} and {tuple(past_value.shape)}"
        )
    key_heads, past, head_dim = past_key.shape
    if heads < 1 or heads % key_heads or head_dim % 2:
        raise ValueError(
            f"gemma_attention: heads must be a multiple of G and D even, got heads={heads}, G={key_heads}, D={head_dim}"
        )
    width = (heads + 2 * key_heads) * head_dim
    if qkv.ndim != 2 or qkv.shape[1] != width or qkv.dtype not in _FLOATS:
        raise ValueError(
            f"gemma_attention: qkv must be [T, {width}] float32, bfloat16 or float16, "
            f"got {qkv.dtype} {tuple(qkv.shape)}"
        )
    tokens = qkv.shape[0]
    for name, tensor in (("cosine", cosine), ("sine", sine)):
        if tuple(tensor.shape) != (tokens, head_dim):
            raise ValueError(f"gemma_attention: {name} must be [{tokens}, {head_dim}], got {tuple(tensor.shape)}")
    if tuple(bias.shape) != (past + tokens,) or bias.dtype != torch.float32:
        raise ValueError(
            f"gemma_attention: bias must be float32 [{past + tokens}], got {bias.dtype} {tuple(bias.shape)}"
        )
    for name, tensor in (("cosine", cosine), ("sine", sine), ("past_key", past_key), ("past_value", past_value)):
        if tensor.dtype != qkv.dtype:
            raise ValueError(f"gemma_attention: {name} must be {qkv.dtype} like qkv, got {tensor.dtype}")
