"""What a high plane tells of the keys that it stands for, measured once on normal channels.

A plane's end levels stand for values further in, a block's least and largest keys lie at the ends of their intervals,
and channels are not flat. How much that matters depends on the bits and on how many tokens share a scale.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from pikv_megatron import ops
from pikv_megatron.torch_mode import keeps_tensors

_TOKENS, _CHANNELS = 12800, 64


class PlaneError(NamedTuple):
    """slope: of a key's distance from its block's middle upon its plane's. variance: around that, as a share of what
    low bits would have that are uniform (with raw keys beside the plane: what rounding would have that is).
    """

    slope: float
    variance: float


@functools.cache
@keeps_tensors
def plane_error(raw: bool, hi_bits: int, lo_bits: int, block_size: int) -> PlaneError:
    """Of keys in blocks of block_size tokens, quantised with hi_bits + lo_bits per channel; raw: the keys are kept
    beside the plane.

    Measured on channels of a normal distribution; those of a uniform one, and real keys, are within a few per cent.
    """
    if not raw and not lo_bits:
        return PlaneError(1.0, 1.0)  # the plane is the key
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(-(-_TOKENS // block_size), 1, block_size, _CHANNELS, generator=rng)
    high, low, scale, zero = ops.quantize_block(x, hi_bits, lo_bits, True)
    plane = ops.dequantize_block(high, None, scale, zero, hi_bits, lo_bits, True)
    keys = x if raw else ops.dequantize_block(high, low, scale, zero, hi_bits, lo_bits, True)
    step = scale.float().unsqueeze(2)
    middle = zero.float().unsqueeze(2) + step * (2 ** (hi_bits + lo_bits) - 1) / 2
    off, plane_off = (keys - middle) / step, (plane - middle) / step
    slope = (off * plane_off).mean() / plane_off.square().mean()
    uniform = 1 / 12 if raw else (4**lo_bits - 1) / 12
    variance = (off - slope * plane_off).square().mean() / uniform
    return PlaneError(float(slope.numpy()), float(variance.numpy()))
