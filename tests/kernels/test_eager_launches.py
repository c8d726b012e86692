"""What an eager call of the ops leaves behind in PyTorch."""

from collections.abc import Callable

import pytest
import torch

from sana_kernels.cross_attention import testing as cross_attention
from sana_kernels.linear_attention import testing as linear_attention
from sana_kernels.mix_ffn_depthwise import testing as mix_ffn_depthwise
from sana_kernels.modulated_norm import testing as modulated_norm
from sana_kernels.scaled_linear import testing as scaled_linear

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CALLS: dict[str, Callable[[str], object]] = {
    "linear_attention": lambda device: linear_attention.verify(linear_attention.Case(1, 64, 64), device, None),
    "mix_ffn_depthwise": lambda device: mix_ffn_depthwise.verify(mix_ffn_depthwise.Case(1, 4, 4, 64), device, None),
    "modulated_norm": lambda device: modulated_norm.verify(modulated_norm.Case(1, 16, 64), device, None),
    "channel_rms_norm": lambda device: modulated_norm.verify_rms(modulated_norm.RmsCase(16, 64), device, None),
    "cross_attention": lambda device: cross_attention.verify(cross_attention.Case(1, 16, 8, 5, 2, 32), device, None),
    "scaled_linear": lambda device: scaled_linear.verify(scaled_linear.Case(1, 16, 64, 64), device, None),
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", list(CALLS))
def test_an_eager_call_is_not_kept(name: str) -> None:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    # torch keeps what is put into this table, and reads all of it for every graph that it compiles.
    before = len(kernel_side_table.id_to_kernel), len(kernel_side_table.constant_args)
    CALLS[name]("cuda")
    assert (len(kernel_side_table.id_to_kernel), len(kernel_side_table.constant_args)) == before
