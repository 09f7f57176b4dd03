"""What ptxas makes of the kernels stays within tests/cuda/limits.txt: registers; no stack, no spills."""

from __future__ import annotations

import pytest

from tools import ptxas, simulate


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ptxas.ARCHITECTURES)
def test_kernels_need_no_more_than_allowed(architecture):
    if simulate.nvcc() is None:
        pytest.skip("no nvcc here: the kernels cannot be compiled")
    used, limits = ptxas.usage(architecture), ptxas.read_limits()[architecture]
    assert used.keys() == limits.keys()
    for name, usage in used.items():
        assert usage.registers <= limits[name], name
        assert usage.stack == 0, name
        assert usage.spilled == 0, name


def test_every_kernel_has_limits_that_leave_room_for_its_threads():
    """A thread block's registers fit into a processor's 65,536 twice at least."""
    limits = ptxas.read_limits()
    assert len({frozenset(kernels) for kernels in limits.values()}) == 1
    assert sum(name.startswith("attend_kernel") for name in limits["sm_80"]) == 12
    for kernels in limits.values():
        for name, registers in kernels.items():
            threads = 512 if name == "select_topk_kernel" else 128
            assert 0 < registers * threads * 2 <= 65536, name
