"""BlockPool, BlockTable and ImportanceRows: ids are handed out once, contents land where they were meant to, bytes are
storages', and what the host keeps as lists the device has as tensors.
"""

from __future__ import annotations

import random
import tracemalloc

import pytest
import torch

from pikv_megatron.tiers.blocks import BlockPool, BlockTable, Field, ImportanceRows, Place, PoolFullError

FIELDS = {"a": Field((2, 4), torch.uint8), "b": Field((3,), torch.float16)}
CPU = torch.device("cpu")


def _pool(blocks=10, kind="device"):
    return BlockPool(Place(0, kind, "a/b"), blocks, 4, FIELDS, CPU)


def _contents(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    encoded = {
        "a": torch.randint(0, 255, (count, 2, 4), generator=rng, dtype=torch.uint8),
        "b": torch.randn(count, 3, generator=rng).half(),
    }
    start = torch.randint(0, 1000, (count,), generator=rng)
    label = torch.randint(0, 8, (count,), generator=rng)
    return encoded, start, label


def _write(pool, ids, encoded, start, label):
    for name, tensor in pool.fields.items():
        tensor[ids] = encoded[name]
    pool.describe(ids, start, label)


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


def test_claims_keep_as_many_blocks_free_as_there_are_other_owners():
    """Of a block with three owners two may ask for others; the third has it alone then."""
    pool = _pool(6)
    ids = pool.allocate(2)
    for _ in range(2):
        pool.share(ids[:1])
    pool.claims = 1
    with pytest.raises(PoolFullError, match=r"x: needs 4 blocks .*, 3 of 6 are free"):
        pool.check_free(4, "x")
    pool.claims = 5
    assert (pool.shared_blocks, pool.more_owners) == (1, 2)
    with pytest.raises(PoolFullError, match=r"x: needs 3 blocks .*, 2 of 6 are free"):
        pool.check_free(3, "x")
    with pytest.raises(PoolFullError, match=r"x: needs 3 blocks .*, 2 of 6 are free"):
        pool.check_free(1, "x", owners=2)
    pool.check_free(1, "x", claims=99, owners=1)
    pool.check_free(4, "x", claims=-4, owners=-2)
    pool.allocate(2)
    for _ in range(2):
        pool.free(ids[:1])
        pool.claims -= 1
        pool.allocate(1)
    assert (pool.free_blocks, pool.more_owners, pool.is_shared(ids[0])) == (0, 0, False)


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
    encoded, start, label = _contents(3)
    _write(pool, torch.tensor([5, 1, 8]), encoded, start, label)
    for place, i in ((5, 0), (1, 1), (8, 2)):
        assert torch.equal(pool.fields["a"][place], encoded["a"][i])
        assert torch.equal(pool.fields["b"][place], encoded["b"][i])
        assert (pool.start[place], pool.label[place]) == (start[i], label[i])
    untouched = [i for i in range(10) if i not in (5, 1, 8)]
    assert all((t[untouched] == 0).all() for t in pool.tensors.values())


def test_blocks_are_copied_whole_from_pool_to_pool():
    pool, other = _pool(), _pool(6, "host")
    _write(other, torch.arange(4), *_contents(4))
    pool.copy_from(torch.tensor([9, 2]), other, torch.tensor([3, 0]))
    for name, tensor in pool.tensors.items():
        assert torch.equal(tensor[9], other.tensors[name][3])
        assert torch.equal(tensor[2], other.tensors[name][0])


def test_bytes_are_those_of_the_tensors():
    pool = _pool()
    per_block = 2 * 4 + 3 * 2 + 8 + 8
    assert pool.block_bytes == per_block
    held = [x for value in vars(pool).values() for x in (value.values() if isinstance(value, dict) else [value])]
    storages = [t.untyped_storage().nbytes() for t in held if isinstance(t, torch.Tensor)]
    assert pool.allocated_bytes == sum(storages) == 10 * per_block


def test_what_another_device_reads_is_copied():
    """Memory of the device's own type is read in place."""
    pool = _pool()
    _write(pool, torch.arange(3), *_contents(3))
    fields, ids = pool.get(torch.tensor([2, 0]), CPU).wait()
    assert fields is pool.fields
    assert ids.tolist() == [2, 0]
    fields, ids = pool.get(torch.tensor([2, 0]), torch.device("meta")).wait()
    assert {name: (t.device.type, t.shape) for name, t in fields.items()} == {
        "a": ("meta", (2, 2, 4)),
        "b": ("meta", (2, 3)),
    }
    assert ids.is_meta


@pytest.mark.parametrize("budget", [False, True])
def test_a_table_keeps_lists_and_tensors_alike(budget):
    """Whatever is added, taken out and written over, and whenever the tensors are asked for."""
    pool, chance = _pool(4000), random.Random(2)
    importance = ImportanceRows(4000, 4, CPU) if budget else None
    table, expected = BlockTable(pool, importance), list[int]()
    rows = dict[int, int]()  # of each block
    for count in (0, 1, 3, 70, 1, 1, 300, 1, 900):  # across several growths
        ids = pool.allocate(count)
        rows |= dict(zip(ids, table.extend(ids), strict=budget))
        expected += ids
        gone = sorted(chance.sample(range(len(expected)), len(expected) // 3))
        removed = [expected[entry] for entry in gone]
        if chance.random() < 0.7:  # the tensors need not be asked for in between
            assert table.ids == table.tensor.tolist() == expected
        assert table.remove(chance.sample(gone, len(gone))) == removed
        pool.free(removed)
        expected = [i for i in expected if i not in removed]
        if expected:
            entry, (new,) = chance.randrange(len(expected)), pool.allocate(1)
            table.replace(entry, new)
            pool.free([expected[entry]])
            if budget:
                rows[new] = rows[expected[entry]]
            expected[entry] = new
        assert table.ids == table.tensor.tolist() == expected
        assert table.rows == table.row_tensor.tolist() == ([rows[i] for i in expected] if budget else [])
        assert len(table) == len(expected)
        if importance is not None:
            assert importance.used == len(expected)
    assert table.clear() == expected
    assert len(table) == table.tensor.numel() == table.row_tensor.numel() == 0
    assert importance is None or importance.used == 0


def test_a_tables_tensor_is_copied_from_where_it_changed(monkeypatch):
    """Once a step and layer: what is at the end, what was written over, and no more."""
    pool = _pool(200)
    table, copied = BlockTable(pool), list[int]()
    make = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda values, **kwargs: copied.append(len(values)) or make(values, **kwargs))
    table.extend(range(100))
    for change, count in (
        (lambda: None, [100]),
        (lambda: None, []),
        (lambda: table.extend([100]), [1]),
        (lambda: table.replace(99, 150), [2]),
        (lambda: table.remove([98]), [2]),
        (lambda: table.remove([99]), []),
    ):
        copied.clear()
        change()
        assert table.tensor.tolist() == table.ids
        assert copied == count


def test_rows_of_importance_have_one_owner_and_keep_what_they_hold():
    """More than there are may be asked for: then there are more, and none moves."""
    rows, chance, taken = ImportanceRows(10, 4, CPU), random.Random(3), dict[int, float]()
    for number in range(300):
        if chance.random() < 0.6:
            new = rows.allocate(chance.choice([0, 1, 1, 5]))
            assert taken.keys().isdisjoint(new)
            assert len(new) == len(set(new))
            for row in new:
                rows.tensor[row] = taken[row] = float(number)
        else:
            back = chance.sample(sorted(taken), min(len(taken), chance.choice([1, 3, 20])))
            rows.free(back)
            for row in back:
                del taken[row]
        assert rows.used == len(taken)
        assert rows.tensor[sorted(taken)].tolist() == [[taken[row]] * 4 for row in sorted(taken)]
    assert rows.tensor.shape[0] > 20
    assert ImportanceRows(10, 4, CPU).allocate(10) == list(range(10))


def test_asking_for_few_blocks_does_not_copy_the_free_list():
    """Every append asks, mostly for none."""
    pool = _pool(200_000)
    tracemalloc.start()
    pool.allocate(0)
    assert pool.allocate(2) == [0, 1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000
