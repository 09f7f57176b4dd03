"""BlockPool and BlockTable: ids are handed out once, contents land where they were meant to, bytes are storages'."""

from __future__ import annotations

import random
import tracemalloc

import pytest
import torch

from pikv_megatron.codecs.compressor import Field
from pikv_megatron.tiers.blocks import BlockPool, BlockTable, PoolFullError

FIELDS = {"a": Field((2, 4), torch.uint8), "b": Field((3,), torch.float16)}
CPU = torch.device("cpu")


def _pool(blocks=10, importance=True):
    return BlockPool("device", blocks, 4, FIELDS, CPU, importance)


def _contents(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    encoded = {
        "a": torch.randint(0, 255, (count, 2, 4), generator=rng, dtype=torch.uint8),
        "b": torch.randn(count, 3, generator=rng).half(),
    }
    start = torch.randint(0, 1000, (count,), generator=rng)
    label = torch.randint(0, 8, (count,), generator=rng)
    return encoded, start, label, torch.rand(count, 4, generator=rng)


def _write(pool, ids, encoded, start, label, importance):
    for name, tensor in pool.fields.items():
        tensor[ids] = encoded[name]
    pool.describe(ids, start, label, importance)


def test_ids_are_handed_out_lowest_first_and_once():
    pool = _pool()
    assert pool.allocate(4) == [0, 1, 2, 3]
    assert (pool.free_blocks, pool.used_blocks) == (6, 4)
    pool.free([2, 0])
    assert pool.allocate(3) == [0, 2, 4]
    assert pool.allocate(0) == []


def test_random_allocation_against_a_set():
    pool, chance, taken = _pool(50), random.Random(1), set()
    for _ in range(500):
        if chance.random() < 0.5 and len(taken) < 50:
            ids = pool.allocate(chance.randint(1, 50 - len(taken)))
            assert taken.isdisjoint(ids)
            assert all(0 <= i < 50 for i in ids)
            taken.update(ids)
        elif taken:
            back = chance.sample(sorted(taken), chance.randint(1, len(taken)))
            pool.free(back)
            taken.difference_update(back)
        assert pool.used_blocks == len(taken)
    pool.free(taken)
    assert pool.allocate(50) == list(range(50))


def test_a_full_pool_says_so_and_gives_nothing():
    pool = _pool(3)
    pool.allocate(2)
    with pytest.raises(PoolFullError, match=r"request 7: needs 2 blocks of 4 .* device tier, 1 of 3 are free"):
        pool.check_free(2, "request 7")
    with pytest.raises(PoolFullError):
        pool.allocate(2)
    assert pool.free_blocks == 1


@pytest.mark.parametrize("wrong", [0, 3, -1, 10, 99])
def test_a_block_that_is_not_taken_cannot_be_freed(wrong):
    pool = _pool()
    pool.allocate(3)
    pool.free([0])
    with pytest.raises(ValueError, match=f"block {wrong} of the device tier is not allocated"):
        pool.free([wrong])
    assert pool.free_blocks == 8


def test_no_block_is_counted_from_the_end():
    pool = _pool(3)
    pool.allocate(3)
    with pytest.raises(ValueError, match="block -1 "):
        pool.free([-1])
    assert pool.free_blocks == 0


def test_what_is_written_is_what_is_there():
    pool = _pool()
    encoded, start, label, importance = _contents(3)
    _write(pool, torch.tensor([5, 1, 8]), encoded, start, label, importance)
    for place, i in ((5, 0), (1, 1), (8, 2)):
        assert torch.equal(pool.fields["a"][place], encoded["a"][i])
        assert torch.equal(pool.fields["b"][place], encoded["b"][i])
        assert (pool.start[place], pool.label[place]) == (start[i], label[i])
        assert torch.equal(pool.importance[place], importance[i])
    untouched = [i for i in range(10) if i not in (5, 1, 8)]
    assert all((t[untouched] == 0).all() for t in pool.tensors.values())


def test_blocks_are_copied_whole_from_pool_to_pool():
    pool, other = _pool(), BlockPool("host", 6, 4, FIELDS, CPU, True)
    _write(other, torch.arange(4), *_contents(4))
    pool.copy_from(torch.tensor([9, 2]), other, torch.tensor([3, 0]))
    for name, tensor in pool.tensors.items():
        assert torch.equal(tensor[9], other.tensors[name][3])
        assert torch.equal(tensor[2], other.tensors[name][0])


@pytest.mark.parametrize("importance", [True, False])
def test_bytes_are_those_of_the_tensors(importance):
    pool = _pool(importance=importance)
    per_block = 2 * 4 + 3 * 2 + 8 + 8 + (4 * 4 if importance else 0)
    assert pool.block_bytes == per_block
    held = [x for value in vars(pool).values() for x in (value.values() if isinstance(value, dict) else [value])]
    storages = [t.untyped_storage().nbytes() for t in held if isinstance(t, torch.Tensor)]
    assert pool.allocated_bytes == sum(storages) == 10 * per_block


def test_a_table_keeps_list_and_tensor_alike():
    pool, chance = _pool(4000), random.Random(2)
    table, expected = BlockTable(pool), []
    for count in (0, 1, 3, 70, 1, 1, 300, 1, 900):  # across several growths
        ids = pool.allocate(count)
        table.extend(ids)
        expected += ids
        assert table.ids == table.tensor.tolist() == expected
        gone = set(chance.sample(expected, len(expected) // 3))
        table.remove(gone)
        pool.free(gone)
        expected = [i for i in expected if i not in gone]
        assert table.ids == table.tensor.tolist() == expected
        assert len(table) == len(expected)
    assert table.clear() == expected
    assert len(table) == table.tensor.numel() == 0


def test_asking_for_few_blocks_does_not_copy_the_free_list():
    """Every append asks, mostly for none."""
    pool = _pool(blocks=200_000, importance=False)
    tracemalloc.start()
    pool.allocate(0)
    assert pool.allocate(2) == [0, 1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000
