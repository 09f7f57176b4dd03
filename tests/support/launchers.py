"""The CUDA launchers of a library that the simulators have built, called by ctypes under the names of the ops."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from pikv_megatron.ops.reference import BlockScores, Keys, LowRank, Partial, TokenScores, Values
from tools import simulate

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _LowRank(ctypes.Structure):
    """`struct LowRank` of kernels.h."""

    _fields_ = (
        *[(name, c_void_p) for name in ("codes", "scale", "zero", "basis", "basis_of", "projected")],
        *[(name, c_int64) for name in ("rank", "bases")],
    )


class _Keys(ctypes.Structure):
    """`struct Keys` of kernels.h."""

    _fields_ = (
        *[(name, c_void_p) for name in ("raw", "high", "low", "scale", "zero")],
        *[(name, c_int) for name in ("dtype", "hi_bits", "lo_bits")],
        *[(name, c_int64) for name in ("groups", "block_size", "dim")],
        ("low_rank", c_void_p),
    )


class _Values(ctypes.Structure):
    """`struct Values` of kernels.h."""

    _fields_ = (
        *[(name, c_void_p) for name in ("raw", "codes", "scale", "zero")],
        *[(name, c_int) for name in ("dtype", "bits")],
        *[(name, c_int64) for name in ("groups", "block_size", "dim")],
        ("low_rank", c_void_p),
    )


class _Runs(ctypes.Structure):
    """`struct Runs` of cuda.h."""

    _fields_ = (("first", c_void_p), ("requests", c_int64), ("count", c_int64))


class _Windows(ctypes.Structure):
    """`struct Windows` of cuda.h."""

    _fields_ = (
        *[(name, c_void_p) for name in ("slots", "first", "last")],
        ("slot_rows", c_int64),
        ("head_rows", c_int64),
    )


class _Places(ctypes.Structure):
    """`struct Places` of cuda.h."""

    _fields_ = (
        ("ids", c_void_p),
        ("count", c_int64),
        *[(name, c_void_p) for name in ("first", "offsets", "read", "key_positions", "query_positions")],
    )


class _Blocks(ctypes.Structure):
    """`struct Blocks` of cuda.h."""

    _fields_ = (("x", c_void_p), ("block_bytes", c_int64), ("head_bytes", c_int64))


def _blocks(x: Tensor) -> _Blocks:
    size = x.element_size()
    return _Blocks(x.data_ptr(), x.stride(0) * size, x.stride(1) * size)


def _pointer(x: Tensor | None) -> c_void_p:
    assert x is None or x.is_contiguous()
    return c_void_p(None if x is None else x.data_ptr())


def _keys(keys: Keys) -> _Keys:
    sample = keys.raw if keys.raw is not None else keys.high
    if sample is None:  # score_blocks reads bounds alone
        groups, dim, block_size = keys.scale.shape[1], keys.scale.shape[2], 0
    else:
        groups, block_size = sample.shape[1:3]
        dim = sample.shape[3] if keys.raw is not None else sample.shape[3] * 8 // keys.hi_bits
    dtype = 0 if keys.raw is None else DTYPES[keys.raw.dtype]
    return _Keys(*map(_pointer, keys[:5]), dtype, keys.hi_bits, keys.lo_bits, groups, block_size, dim)


def _value_dim(values: Values) -> int:
    return values.raw.shape[3] if values.raw is not None else values.codes.shape[3] * 8 // values.bits


def _values(values: Values) -> _Values:
    sample = values.raw if values.raw is not None else values.codes
    groups, block_size = sample.shape[1:3]
    dtype = 0 if values.raw is None else DTYPES[values.raw.dtype]
    return _Values(*map(_pointer, values[:4]), dtype, values.bits, groups, block_size, _value_dim(values))


def _raw_keys(k: Tensor) -> _Keys:
    """Raw keys [G, S, D] outside pools, or [slots, G, C, D]."""
    return _Keys(k.data_ptr(), None, None, None, None, DTYPES[k.dtype], 0, 0, *k.shape[-3:])


def _raw_values(v: Tensor) -> _Values:
    return _Values(v.data_ptr(), None, None, None, DTYPES[v.dtype], 0, *v.shape[-3:])


def _runs(first: Tensor, count: int) -> _Runs:
    return _Runs(_pointer(first), len(first) - 1, count)


def _windows(k: Tensor, slots: Tensor, first: Tensor, last: Tensor) -> _Windows:
    """Raw tokens of a buffer k [slots, G, C, channels]."""
    return _Windows(*map(_pointer, (slots, first, last)), *(x // k.stride(2) for x in k.stride()[:2]))


def _part(part: LowRank, projected: Tensor | None = None) -> _LowRank:
    bases, _, rank, _ = part.basis.shape
    return _LowRank(*map(_pointer, part), _pointer(projected), rank, bases)


class Launchers:
    """The ops' names and signatures over one library. Results are filled with what no kernel writes before it runs.

    splits: thread blocks per KV head in attention.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.splits = 3

    def set_seed(self, seed: int) -> None:
        """The order of threads: 0 as they come, else at random."""
        self.library.pikv_sim_set_seed(seed)

    def _call(self, name: str, *arguments: object) -> None:
        simulate.check(self.library, getattr(self.library, f"pikv_cuda_{name}")(*arguments, c_void_p(None)))

    def quantize_block(self, x, hi_bits, lo_bits, per_channel):
        *lead, rows, cols = x.shape
        high = torch.full((*lead, rows, cols * hi_bits // 8), 0xA5, dtype=torch.uint8)
        low = torch.full((*lead, rows, cols * lo_bits // 8), 0xA5, dtype=torch.uint8) if lo_bits else None
        scale = torch.full((*lead, cols if per_channel else rows), torch.nan, dtype=torch.float16)
        zero = scale.clone()
        sizes = (c_int64(x.numel() // max(1, rows * cols)), c_int64(rows), c_int64(cols), hi_bits, lo_bits)
        planes = map(_pointer, (high, low, scale, zero))
        self._call("quantize_block", _pointer(x), DTYPES[x.dtype], *sizes, c_bool(per_channel), *planes)
        return high, low, scale, zero

    def dequantize_block(self, high, low, scale, zero, hi_bits, lo_bits, per_channel):
        *lead, rows, packed = high.shape
        cols = packed * 8 // hi_bits
        y = torch.full((*lead, rows, cols), torch.nan)
        sizes = (c_int64(high.numel() // max(1, rows * packed)), c_int64(rows), c_int64(cols), hi_bits, lo_bits)
        planes = map(_pointer, (high, low, scale, zero))
        self._call("dequantize_block", *planes, *sizes, c_bool(per_channel), _pointer(y))
        return y

    def append(self, keys, values, block_ids, new_k, new_v):
        self._call(
            "append",
            ctypes.byref(_blocks(new_k)),
            ctypes.byref(_blocks(new_v)),
            DTYPES[new_k.dtype],
            ctypes.byref(_keys(keys)),
            ctypes.byref(_values(values)),
            _pointer(block_ids),
            c_int64(block_ids.numel()),
        )

    def _attention(self, q, keys, values, softmax_scale):
        *lead, rows, _ = q.shape
        dim = values.dim
        out, lse = torch.full((*lead, rows, dim), torch.nan), torch.full((*lead, rows), torch.nan)
        workspace = torch.full((self.splits * lse.numel() * (dim + 1),), torch.nan)
        q = q.float().contiguous()
        stored = (ctypes.byref(keys), ctypes.byref(values))
        front = (_pointer(q), c_int64(rows), c_float(softmax_scale), *stored)
        back = (self.splits, _pointer(workspace), _pointer(out), _pointer(lse))
        return front, back, Partial(out, lse), (q, workspace)

    def _projected(self, q, part, softmax_scale):
        """A keys' part with the queries in its bases, and what must live as long."""
        bases, groups, rank, dim = part.basis.shape
        requests, rows = q.numel() // (groups * q.shape[-2] * dim), q.shape[-2]
        projected = torch.full((bases, groups, requests * rows, rank), torch.nan)
        stored, q = _part(part, projected), q.float().contiguous()
        sizes = (c_int64(requests), c_int64(rows), c_float(softmax_scale), c_int64(groups), c_int64(dim))
        self._call("project_queries", _pointer(q), *sizes, ctypes.byref(stored), _pointer(projected))
        return stored, projected

    def _attend_low_rank(self, q, keys, values, softmax_scale, block_ids, **places):
        """attend_blocks, attend_ragged and attend_tokens where there is a low-rank part."""
        of_keys, of_values = _keys(keys), _values(values)
        if keys.low_rank is not None:
            part, _projected = self._projected(q, keys.low_rank, softmax_scale)
            of_keys.low_rank = ctypes.addressof(part)
        if values.low_rank is not None:
            its = _part(values.low_rank)
            of_values.low_rank = ctypes.addressof(its)
        front, back, partial, _held = self._attention(q, of_keys, of_values, softmax_scale)
        front = (front[0], c_int64(len(q) if q.dim() == 4 else 1), *front[1:])
        where = _Places(_pointer(block_ids), block_ids.shape[-1], **{k: _pointer(x) for k, x in places.items()})
        self._call("attend_low_rank", *front, ctypes.byref(where), *back)
        return partial

    def attend_blocks(self, q, keys, values, block_ids, softmax_scale, key_positions=None, query_positions=None):
        if keys.low_rank or values.low_rank:
            both = {"key_positions": key_positions, "query_positions": query_positions}
            return self._attend_low_rank(q, keys, values, softmax_scale, block_ids, **both)
        front, back, partial, _held = self._attention(q, _keys(keys), _values(values), softmax_scale)
        positions = map(_pointer, (key_positions, query_positions))
        self._call("attend_blocks", *front, _pointer(block_ids), c_int64(block_ids.numel()), *positions, *back)
        return partial

    def attend_ragged(self, q, keys, values, block_ids, first_blocks, softmax_scale):
        if keys.low_rank or values.low_rank:
            return self._attend_low_rank(q, keys, values, softmax_scale, block_ids, first=first_blocks)
        front, back, partial, _held = self._attention(q, _keys(keys), _values(values), softmax_scale)
        runs = _runs(first_blocks, block_ids.numel())
        self._call("attend_ragged", *front, _pointer(block_ids), ctypes.byref(runs), *back)
        return partial

    def attend_windows(self, q, raw_k, raw_v, slots, raw_first, raw_last, softmax_scale):
        front, back, partial, _held = self._attention(q, _raw_keys(raw_k), _raw_values(raw_v), softmax_scale)
        windows = _windows(raw_k, slots, raw_first, raw_last)
        self._call("attend_windows", front[0], c_int64(len(q)), *front[1:], ctypes.byref(windows), *back)
        return partial

    def attend_at(self, q, k, v, key_positions, query_positions, softmax_scale):
        keys, values, head_rows = _raw_keys(k), _raw_values(v), k.stride(0) // k.stride(1)
        assert head_rows == v.stride(0) // v.stride(1)
        front, back, partial, _held = self._attention(q, keys, values, softmax_scale)
        positions = map(_pointer, (key_positions, query_positions))
        self._call("attend_at", *front, c_int64(head_rows), *positions, *back)
        return partial

    def attend_tokens(self, q, keys, values, block_ids, offsets, first_tokens, softmax_scale, read=None):
        if keys.low_rank or values.low_rank:
            where = {"offsets": offsets, "read": read, "first": first_tokens}
            return self._attend_low_rank(q, keys, values, softmax_scale, block_ids, **where)
        front, back, partial, _held = self._attention(q, _keys(keys), _values(values), softmax_scale)
        tokens, runs = map(_pointer, (block_ids, offsets, read)), _runs(first_tokens, block_ids.shape[1])
        self._call("attend_tokens", *front, *tokens, ctypes.byref(runs), *back)
        return partial

    def merge_partials(self, partials):
        outs, lses = torch.stack([p.out for p in partials]), torch.stack([p.lse for p in partials])
        merged = Partial(torch.full_like(outs[0], torch.nan), torch.full_like(lses[0], torch.nan))
        sizes = (c_int64(len(partials)), c_int64(lses[0].numel()), c_int64(outs.shape[-1]))
        self._call("merge_partials", _pointer(outs), _pointer(lses), *sizes, *map(_pointer, merged))
        return merged

    def score_tokens(self, q, keys, block_ids, first_blocks, softmax_scale):
        count = block_ids.shape[-1]
        coarse = torch.full((*q.shape[1:3], count, keys.high.shape[2]), torch.nan)
        radius = torch.full((*q.shape[1:3], count), torch.nan)
        scores = TokenScores(coarse, radius, radius.clone())
        front = (_pointer(q), c_int64(q.shape[2]), c_float(softmax_scale), ctypes.byref(_keys(keys)))
        ids = (_pointer(block_ids), c_bool(block_ids.dim() == 2), ctypes.byref(_runs(first_blocks, count)))
        self._call("score_tokens", *front, *ids, *map(_pointer, scores))
        return scores

    def score_blocks(self, q, keys, block_ids, first_blocks, softmax_scale):
        count = block_ids.numel()
        scores = BlockScores(*(torch.full((*q.shape[1:3], count), torch.nan) for _ in range(3)))
        front = (_pointer(q), c_int64(q.shape[2]), c_float(softmax_scale), ctypes.byref(_keys(keys)))
        blocks = (_pointer(block_ids), ctypes.byref(_runs(first_blocks, count)))
        self._call("score_blocks", *front, *blocks, *map(_pointer, scores))
        return scores

    def token_importance(self, q, lse, keys, block_ids, first_blocks, softmax_scale):
        sample = keys.raw if keys.raw is not None else keys.high
        importance = torch.full((block_ids.numel(), sample.shape[2]), torch.nan)
        runs = ctypes.byref(_runs(first_blocks, block_ids.numel()))
        if keys.low_rank is not None:
            logits = self.key_logits(q, keys, block_ids, first_blocks, softmax_scale)
            sizes = (c_int64(lse[0].numel()), runs, c_int64(sample.shape[2]))
            self._call("logits_importance", _pointer(logits), _pointer(lse), *sizes, _pointer(importance))
            return importance
        front = (_pointer(q), _pointer(lse), c_int64(q.shape[2]), c_float(softmax_scale), ctypes.byref(_keys(keys)))
        self._call("token_importance", *front, _pointer(block_ids), runs, _pointer(importance))
        return importance

    def window_importance(self, q, lse, raw_k, slots, raw_first, raw_last, softmax_scale):
        importance = torch.full((len(q), raw_k.shape[2]), torch.nan)
        sizes = (c_int64(len(q)), c_int64(q.shape[2]), c_float(softmax_scale), ctypes.byref(_raw_keys(raw_k)))
        windows = ctypes.byref(_windows(raw_k, slots, raw_first, raw_last))
        self._call("window_importance", _pointer(q), _pointer(lse), *sizes, windows, _pointer(importance))
        return importance

    def prompt_importance(self, q, lse, k, query_tokens, softmax_scale):
        importance = torch.full((k.shape[1],), torch.nan)
        front = (_pointer(q), _pointer(lse), c_int64(q.shape[1]), c_float(softmax_scale), ctypes.byref(_raw_keys(k)))
        sizes = (c_int64(k.stride(0) // k.stride(1)), c_int64(query_tokens))
        self._call("prompt_importance", *front, *sizes, _pointer(importance))
        return importance

    def key_logits(self, q, keys, block_ids, first_blocks, softmax_scale):
        sample = keys.raw if keys.raw is not None else keys.high
        logits = torch.full((*q.shape[1:3], block_ids.numel() * sample.shape[2]), torch.nan)
        stored, rows = _keys(keys), c_int64(q.shape[2])
        front = (_pointer(q), rows, c_float(softmax_scale), ctypes.byref(stored))
        blocks = (_pointer(block_ids), ctypes.byref(_runs(first_blocks, block_ids.numel())))
        self._call("key_logits", *front, *blocks, _pointer(logits))
        if keys.low_rank is not None:
            part, _projected = self._projected(q, keys.low_rank, softmax_scale)
            stored.low_rank = ctypes.addressof(part)
            self._call("low_rank_logits", rows, ctypes.byref(stored), *blocks, _pointer(logits))
        return logits

    def rank_tokens(self, coarse, raw_lse, first_tokens):
        groups, rows, count = coarse.shape
        rank, workspace = torch.full((groups, count), torch.nan), torch.full((raw_lse.numel(),), torch.nan)
        sizes = (c_int64(groups), c_int64(rows), ctypes.byref(_runs(first_tokens, count)))
        self._call("rank_tokens", _pointer(coarse), _pointer(raw_lse), *sizes, _pointer(workspace), _pointer(rank))
        return rank

    def unread_mass(self, scores, slope, read, first_blocks):
        groups, rows, count, size = scores.coarse.shape
        found = tuple(torch.full((len(first_blocks) - 1, groups, rows), torch.nan) for _ in range(2))
        fields = map(_pointer, (scores.spread, scores.radius, read))
        sizes = (c_int64(groups), c_int64(rows), ctypes.byref(_runs(first_blocks, count)), c_int64(size))
        front = (_pointer(scores.coarse), c_float(slope), *fields)
        self._call("unread_mass", *front, *sizes, *map(_pointer, found))
        return found

    def select_topk(self, scores, first_tokens, first_chosen, total_chosen):
        groups, count = scores.shape
        indices = torch.full((groups, total_chosen), -1)
        lists = (ctypes.byref(_runs(first_tokens, count)), ctypes.byref(_runs(first_chosen, total_chosen)))
        self._call("select_topk", _pointer(scores), c_int64(groups), *lists, _pointer(indices))
        return indices

    def select_mass(self, order, if_unread, if_read, raw_lse, first_tokens, epsilon):
        groups, rows, count = if_read.shape
        read = torch.full((groups, count), 0xA5, dtype=torch.uint8)
        workspace = torch.full((raw_lse.numel(),), 1 << 30, dtype=torch.int32)
        logits = map(_pointer, (order, if_unread, if_read, raw_lse))
        sizes = (c_int64(groups), c_int64(rows), ctypes.byref(_runs(first_tokens, count)), c_float(epsilon))
        self._call("select_mass", *logits, *sizes, _pointer(workspace), _pointer(read))
        assert (read < 2).all()
        return read.bool()

    def prefetch(self, rows, block_ids):
        row_bytes = rows[0].numel() * rows.element_size()
        self._call("prefetch", _pointer(rows), c_int64(row_bytes), _pointer(block_ids), c_int64(block_ids.numel()))
