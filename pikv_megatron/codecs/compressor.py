"""Compressor: how a sealed block is stored. It names the fields of a block, encodes raw K/V into them and decodes
them back.

Keys are nested codes (a high and a low bit-plane, per channel within the block), values codes per token (KIVI, arXiv
2402.02750). With codec `none` a field holds the raw keys, and, where selection needs an index, a 2-bit plane of codes
beside them. The low-rank part (GEAR, arXiv 2403.05527) is not in this version. The arithmetic itself is in `ops`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pikv_megatron import ops
from pikv_megatron.codecs import CODECS
from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.tiers.blocks import Field

FP16_MAX = torch.finfo(torch.float16).max
LARGEST = 1e18
"""Largest magnitude of q, k and v: dot products of larger ones may not fit float32, and their softmax would be nan."""


@dataclass(frozen=True)
class Compressor:
    """Encodes and decodes blocks of [blocks, num_query_groups, block_size, channels]."""

    model: ModelConfig
    runtime: RuntimeConfig

    def __post_init__(self) -> None:
        section = self.runtime.codec
        CODECS.check(section.keys, "runtime.codec.keys")
        CODECS.check(section.values, "runtime.codec.values")

    @property
    def format(self) -> str:
        """Name of what is stored: the codecs of keys and values, and whether raw keys have an index."""
        section = self.runtime.codec
        index = "+index" if self.raw_keys and self._planes else ""
        return f"{section.keys}{index}/{section.values}"

    @functools.cached_property
    def key_planes(self) -> tuple[int, int]:
        """Bits of the keys' high and low plane; of raw keys those of the index beside them."""
        return CODECS.pick(self.runtime.codec.keys).key_planes

    @functools.cached_property
    def raw_keys(self) -> bool:
        return CODECS.pick(self.runtime.codec.keys).raw

    @functools.cached_property
    def value_bits(self) -> int:
        """Bits of a value; 0: raw."""
        return CODECS.pick(self.runtime.codec.values).value_bits

    @property
    def _planes(self) -> bool:
        """Whether blocks carry key codes with scales."""
        return not self.raw_keys or self.runtime.needs_index

    @property
    def largest(self) -> float:
        """Largest magnitude of K and V that can be stored: scales and zeros are float16 where there are codes."""
        coded = self._planes or self.value_bits
        return FP16_MAX if coded else min(torch.finfo(self.model.torch_dtype).max, LARGEST)

    def fields(self) -> dict[str, Field]:
        """Name, shape and dtype of each tensor of one block."""
        groups, block = self.model.num_query_groups, self.runtime.block_size
        dim, value_dim = self.model.head_dim, self.model.value_dim
        fields: dict[str, Field] = {}
        if self.raw_keys:
            fields["k"] = Field((groups, block, dim), self.model.torch_dtype)
        if self._planes:
            hi_bits, lo_bits = self.key_planes
            fields["k_high"] = Field((groups, block, dim * hi_bits // 8), torch.uint8)
            if lo_bits:
                fields["k_low"] = Field((groups, block, dim * lo_bits // 8), torch.uint8)
            fields["k_scale"] = fields["k_zero"] = Field((groups, dim), torch.float16)
        if self.value_bits == 0:
            fields["v"] = Field((groups, block, value_dim), self.model.torch_dtype)
        else:
            fields["v_codes"] = Field((groups, block, value_dim * self.value_bits // 8), torch.uint8)
            fields["v_scale"] = fields["v_zero"] = Field((groups, block), torch.float16)
        return fields

    def encode(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Blocks as fields.

        Args:
            k: [blocks, num_query_groups, block_size, head_dim]. v: the same with v_head_dim. Finite, at most
                `largest` in magnitude.

        Returns: the tensors of `fields()`, each with a leading dimension of blocks.
        """
        count, device = k.shape[0], k.device
        encoded = {n: torch.empty(count, *f.shape, dtype=f.dtype, device=device) for n, f in self.fields().items()}
        ops.append(self.keys(encoded), self.values(encoded), torch.arange(count, device=device), k, v)
        return encoded

    def write(self, stored: Mapping[str, Tensor], block_ids: Tensor, k: Tensor, v: Tensor) -> None:
        """Encodes blocks k, v, as `encode` takes them, into the blocks block_ids [n] of a pool's fields, in one pass. A
        pool on another device than k gets them encoded there.
        """
        device = next(iter(stored.values())).device
        if device == k.device:
            ops.append(self.keys(stored), self.values(stored), block_ids, k, v)
        else:
            for name, encoded in self.encode(k, v).items():
                stored[name].index_copy_(0, block_ids, encoded.to(device))

    def decode(self, encoded: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Inverse of `encode`: k, v as [blocks, num_query_groups, block_size, channels] in the model's dtype."""
        keys, values = self.keys(encoded), self.values(encoded)
        if keys.raw is not None:
            k = keys.raw
        else:
            k = ops.dequantize_block(keys.high, keys.low, keys.scale, keys.zero, *self.key_planes, per_channel=True)
        if values.raw is not None:
            v = values.raw
        else:
            v = ops.dequantize_block(values.codes, None, values.scale, values.zero, values.bits, 0, per_channel=False)
        return self._as_model(k), self._as_model(v)

    def _as_model(self, x: Tensor) -> Tensor:
        """x in the model's dtype. Near float16's largest number a code may stand for one above it, by half a step."""
        dtype = self.model.torch_dtype
        return x.clamp(-FP16_MAX, FP16_MAX).to(dtype) if dtype == torch.float16 else x.to(dtype)

    def keys(self, stored: Mapping[str, Tensor]) -> ops.Keys:
        """The stored keys as the ops take them."""
        get = stored.get
        return ops.Keys(get("k"), get("k_high"), get("k_low"), get("k_scale"), get("k_zero"), *self.key_planes)

    def values(self, stored: Mapping[str, Tensor]) -> ops.Values:
        """The stored values as the ops take them."""
        get = stored.get
        return ops.Values(get("v"), get("v_codes"), get("v_scale"), get("v_zero"), self.value_bits)
