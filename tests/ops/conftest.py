"""The ops under test, once per backend: the plain-torch reference, and each kernel set that runs here."""

from __future__ import annotations

import pytest
from one_request import OneRequest

import pikv_megatron.ops
from pikv_megatron.ops import reference


class _Kernels:
    """The ops as the cache gets them from `pikv_megatron.ops`; helpers that are no ops are the reference's."""

    def __getattr__(self, name):
        return getattr(pikv_megatron.ops if name in pikv_megatron.ops.backend else reference, name)


@pytest.fixture(params=["reference", "scalar", "avx2", "avx512"])
def every(request):
    """The ops, those of decode steps for several requests at once."""
    if request.param == "reference":
        yield reference
        return
    running = pikv_megatron.ops.kernel_set
    if running is None:
        pytest.skip("the compiled ops are not built")
    try:
        pikv_megatron.ops.use_kernels(request.param)
    except RuntimeError:
        pytest.skip(f"this processor has no {request.param}")
    yield _Kernels()
    pikv_megatron.ops.use_kernels(running)


@pytest.fixture
def ops(every):
    """The ops, those of decode steps for one request."""
    return OneRequest(every)
