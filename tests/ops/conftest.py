"""The ops under test, once per backend: the plain-torch reference, and the kernels where the package has some."""

from __future__ import annotations

import pytest

import pikv_megatron.ops
from pikv_megatron.ops import reference


class _Kernels:
    """The ops as the cache gets them from `pikv_megatron.ops`; helpers that are no ops are the reference's."""

    def __getattr__(self, name):
        return getattr(pikv_megatron.ops if name in pikv_megatron.ops.backend else reference, name)


BACKENDS = {"reference": reference}
if "kernel" in pikv_megatron.ops.backend.values():
    BACKENDS["kernel"] = _Kernels()


@pytest.fixture(params=BACKENDS)
def ops(request):
    return BACKENDS[request.param]
