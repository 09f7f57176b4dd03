"""A kernel that breaks a rule ends with an error that says which thread did what."""

from __future__ import annotations

import re

import numpy as np
import pytest
from test_sim_kernels import pointer

from tools import ptx2cpp, simulate

BLOCK = r"kernel .*: block \([01], 0, 0\), "
THREAD = r"thread \(\d+, 0, 0\)"
BROKEN = [
    (
        "divergent_barrier",
        [],
        rf"divergent barrier: {THREAD} waits at __syncthreads .*, but {THREAD} waits at __syncth",
    ),
    ("early_exit", [], rf"divergent barrier: {THREAD} waits at __syncthreads .* after {THREAD} has exited"),
    ("deadlock", [], rf"lanes missing .*: {THREAD} waits at __syncwarp .* 0xffffffff for lane \d+, but {THREAD} waits"),
    ("missing_lanes", [], rf"lanes missing .*: {THREAD} waits at a shuffle .* for lane 2\d, but {THREAD} has exited"),
    ("outside_mask", [], rf"{THREAD}: lane [123]\d is not in its own mask 0x0000ffff"),
    ("read_outside_mask", [], rf"{THREAD}: a shuffle with mask 0x0000ffff reads lane 16, which is not in it"),
    ("shared_write", [1, 1], rf"{THREAD}: .* byte 256.* outside shared memory|byte 256 of shared memory was written"),
    ("shared_write", [-1, 1], rf"{THREAD}: .* byte .* outside shared memory|byte -\d+ of shared memory was written"),
    ("shared_write", [0, 100], rf"{THREAD}: .* byte \d+.* outside shared memory|byte \d+ of shared memory was written"),
    ("misaligned_copy", [pointer], rf"{THREAD}: cp.async of 16 bytes is misaligned"),
    ("copy_outside", [pointer], r"thread \(63, 0, 0\): cp.async writes 4 bytes outside shared memory"),
]


def call(kernels, name, arguments, y):
    x = np.arange(100, dtype=np.int32)
    before = [argument(x) for argument in arguments if callable(argument)]
    after = [argument for argument in arguments if not callable(argument)]
    simulate.check(kernels, getattr(kernels, f"broken_{name}")(*before, pointer(y), *after))


@pytest.mark.parametrize(("name", "arguments", "message"), BROKEN)
def test_broken_rules_are_errors(kernels, seed, name, arguments, message):
    with pytest.raises(simulate.SimulationError, match=BLOCK + f"(?:{message})"):
        call(kernels, name, arguments, np.zeros(128, np.int32))


def test_a_kernel_can_run_after_another_failed(kernels, seed):
    y = np.zeros(128, np.int32)
    with pytest.raises(simulate.SimulationError):
        call(kernels, "early_exit", [], y)
    call(kernels, "timely_read", [pointer], y)
    np.testing.assert_array_equal(y[:64], np.arange(64))


@pytest.mark.parametrize("first", [2000, -2000])
def test_reading_far_outside_shared_memory_is_an_error(kernels, seed, first):
    with pytest.raises(simulate.SimulationError, match=BLOCK + rf"{THREAD}: .*outside shared memory"):
        call(kernels, "shared_read", [first], np.zeros(64, np.int32))


def test_unwritten_shared_memory_is_poison(kernels, seed):
    y = np.zeros(64, np.int32)
    call(kernels, "shared_read", [0], y)
    assert np.isnan(y.view(np.float32)).all()


def test_reading_before_the_copy_has_come_is_seen(kernels, simulator):
    """Translated PTX names the read; the other simulator gives poison to it, unless the copy was early."""
    y = np.zeros(64, np.int32)
    kernels.pikv_sim_set_seed(0)
    if simulator == "ptx":
        with pytest.raises(simulate.SimulationError, match=rf"{THREAD}: ld.shared.* which cp.async has not filled yet"):
            call(kernels, "early_read", [pointer], y)
    else:
        call(kernels, "early_read", [pointer], y)
        assert (y == -1).all()
        kernels.pikv_sim_set_seed(1)
        call(kernels, "early_read", [pointer], y)
        assert 0 < (y == -1).sum() < 64
        np.testing.assert_array_equal(y[y != -1], np.arange(64)[y != -1])


def test_a_launch_too_large_is_refused(kernels):
    with pytest.raises(simulate.SimulationError, match="error 9"):
        call(kernels, "configuration", [], np.zeros(1, np.int32))


def test_a_seed_repeats_itself(kernels):
    """Which thread runs into the error first is chance, and the same chance for the same seed."""
    messages = {}
    for seed in [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]:
        kernels.pikv_sim_set_seed(seed)
        with pytest.raises(simulate.SimulationError) as error:
            call(kernels, "outside_mask", [], np.zeros(128, np.int32))
        messages.setdefault(seed, set()).add(str(error.value))
    assert all(len(of_seed) == 1 for of_seed in messages.values())
    assert len(set.union(*messages.values())) > 1


PTX = """
.version 9.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 mine[];
.visible .entry f(.param .u64 f_param_0)
{{
\t.reg .b32 %r<4>;
\t.reg .f32 %f<4>;
\t.reg .b64 %rd<4>;
\t{}
\tret;
}}
"""


def test_ptx_that_is_known_is_translated():
    code = ptx2cpp.translate(PTX.format("add.s32 %r1, %r2, 4;"))
    assert re.search(r"v_r1 = .*v_r2 \+", code)


@pytest.mark.parametrize(
    ("instruction", "names"),
    [
        ("mma.sync.aligned.m16n8k16 %r1, %r2, %r3, %r1;", "mma.sync.aligned.m16n8k16"),
        ("add.sat.s32 %r1, %r2, %r3;", "add.sat.s32"),
        ("fma.rz.f32 %f1, %f2, %f3, %f1;", "fma.rz.f32"),
        ("ld.local.u32 %r1, [%rd1];", "ld.local.u32"),
        ("bar.sync 1;", "bar.sync"),
        ("bar.sync 0, 64;", "bar.sync"),
        ("atom.global.max.u32 %r1, [%rd1], %r2;", "atom.global.max.u32"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 16, 8;", "cp.async.cg.shared.global"),
        ("add.s32 %r1, %x2, 4;", "%x2 is not declared"),
        ("mov.u32 %r1, elsewhere;", "elsewhere"),
        (".local .align 4 .b8 stack[16];", "stack"),
    ],
)
def test_ptx_that_is_not_known_is_an_error_that_names_it(instruction, names):
    with pytest.raises(ptx2cpp.TranslationError, match=re.escape(names)) as error:
        ptx2cpp.translate(PTX.format(instruction))
    assert "line 11" in str(error.value)


def test_static_shared_memory_and_functions_are_refused():
    with pytest.raises(ptx2cpp.TranslationError, match="dynamic only"):
        ptx2cpp.translate(".shared .align 4 .b8 table[64];")
    with pytest.raises(ptx2cpp.TranslationError, match="func"):
        ptx2cpp.translate(".visible .func f()\n{\n}\n")
