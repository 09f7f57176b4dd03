"""append and prefetch: a pool's blocks get exactly what quantize_block gives, the others keep what they had."""

from __future__ import annotations

import pytest
import torch

from pikv_megatron.codecs import CODECS
from pikv_megatron.ops import reference
from pikv_megatron.ops.reference import Keys, Values

BLOCKS, GROUPS = 11, 3


def _pool(
    codec: str, size: int, dim: int, value_dim: int, dtype: torch.dtype, index: bool = True
) -> tuple[Keys, Values]:
    """A pool full of rubbish; codec none has raw fields and, with `index`, an index plane."""
    hi, lo = CODECS.pick(codec).key_planes

    def rubbish(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.full((BLOCKS, GROUPS, *shape), 77, dtype=dtype)

    raw = codec == "none"
    planes: list[torch.Tensor | None] = [None] * 4
    if index:
        planes = [rubbish(size, dim * hi // 8), rubbish(size, dim * lo // 8) if lo else None]
        planes += [rubbish(dim, dtype=torch.float16), rubbish(dim, dtype=torch.float16)]
    keys = Keys(rubbish(size, dim, dtype=dtype) if raw else None, *planes, hi, lo)
    if raw:
        return keys, Values(rubbish(size, value_dim, dtype=dtype), None, None, None, 0)
    bits = CODECS.pick(codec).value_bits
    scales = [rubbish(size, dtype=torch.float16) for _ in range(2)]
    return keys, Values(None, rubbish(size, value_dim * bits // 8), *scales, bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", ["none", "int8", "int4", "int2"])
@pytest.mark.parametrize(("size", "dim", "value_dim"), [(16, 32, 32), (8, 80, 48), (32, 128, 64)])
def test_append_writes_what_quantising_gives(ops, codec, dtype, size, dim, value_dim):
    rng = torch.Generator().manual_seed(1)
    new_k = torch.randn(4, GROUPS, size, dim, generator=rng).to(dtype)
    new_v = torch.randn(4, GROUPS, size, value_dim, generator=rng).to(dtype)
    ids = torch.tensor([7, 0, 10, 3])
    keys, values = _pool(codec, size, dim, value_dim, dtype)
    ops.append(keys, values, ids, new_k, new_v)
    expected: list[torch.Tensor | None] = [new_k if codec == "none" else None]
    expected += reference.quantize_block(new_k, keys.hi_bits, keys.lo_bits, per_channel=True)
    if codec == "none":
        expected += [new_v, None, None, None]
    else:
        codes, _, scale, zero = reference.quantize_block(new_v, values.bits, 0, per_channel=False)
        expected += [None, codes, scale, zero]
    others = [i for i in range(BLOCKS) if i not in ids]
    for field, new in zip([*keys[:5], *values[:4]], expected, strict=True):
        assert (field is None) == (new is None)
        if field is not None:
            assert torch.equal(field[ids], new)
            assert (field[others] == 77).all()


def test_append_of_rows_from_a_longer_buffer(ops):
    """As the window gives them: blocks are slices of a buffer of all tokens."""
    buffer = torch.randn(GROUPS, 100, 32, generator=torch.Generator().manual_seed(2))
    new = buffer[:, 4:68].unflatten(1, (4, 16)).transpose(0, 1)
    assert not new.is_contiguous()
    keys, values = _pool("int8", 16, 32, 32, torch.float32)
    plain_keys, plain_values = _pool("int8", 16, 32, 32, torch.float32)
    ids = torch.tensor([1, 2, 3, 5])
    ops.append(keys, values, ids, new, new)
    ops.append(plain_keys, plain_values, ids, new.contiguous(), new.contiguous())
    for mine, plain in zip((*keys[1:5], *values[1:4]), (*plain_keys[1:5], *plain_values[1:4]), strict=True):
        assert torch.equal(mine, plain)


def test_append_to_a_pool_without_index(ops):
    keys, values = _pool("none", 8, 16, 16, torch.float32, index=False)
    new = torch.randn(2, GROUPS, 8, 16)
    ops.append(keys, values, torch.tensor([4, 9]), new, 2 * new)
    assert torch.equal(keys.raw[[4, 9]], new)
    assert torch.equal(values.raw[[4, 9]], 2 * new)


def test_strides_of_a_single_row_say_nothing(ops):
    keys, values = _pool("int8", 1, 16, 16, torch.float32)
    new = torch.randn(2, GROUPS, 16, 1).transpose(2, 3)
    assert new.is_contiguous()
    assert new.stride(2) == 1
    ops.append(keys, values, torch.tensor([4, 9]), new, new)
    assert torch.equal(keys.zero[[4, 9]], reference.quantize_block(new, 4, 4, per_channel=True)[3])


def test_nothing_is_appended(ops):
    keys, values = _pool("int8", 8, 16, 16, torch.float32)
    none = torch.empty(0, GROUPS, 8, 16)
    ops.append(keys, values, torch.empty(0, dtype=torch.int64), none, none)
    assert (keys.high == 77).all()


def test_prefetch_changes_nothing(ops):
    field = torch.arange(BLOCKS * 300).view(BLOCKS, 300)
    ops.prefetch(field, torch.tensor([3, 3, 10]))
    assert torch.equal(field, torch.arange(BLOCKS * 300).view(BLOCKS, 300))


def test_ids_outside_the_pool_are_refused(ops):
    if ops.ops is reference:
        pytest.skip("plain torch has its own errors")
    keys, values = _pool("int8", 8, 16, 16, torch.float32)
    new = torch.randn(1, GROUPS, 8, 16)
    for wrong in (-1, BLOCKS):
        with pytest.raises(RuntimeError, match=r"block_ids: expected 0 \.\. 10"):
            ops.append(keys, values, torch.tensor([wrong]), new, new)
        with pytest.raises(RuntimeError, match=r"block_ids: expected 0 \.\. 10"):
            ops.prefetch(keys.high, torch.tensor([wrong]))
    assert (keys.high == 77).all()
