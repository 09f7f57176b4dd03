"""The ops under test, once per backend: the plain-torch reference, and whatever kernels are built."""

from __future__ import annotations

import pytest
import torch

from pikv_megatron.ops import reference


class _Kernels:
    """torch.ops.pikv with the reference's names; what has no kernel falls back as it does in `pikv_megatron.ops`."""

    def __getattr__(self, name):
        return getattr(torch.ops.pikv, name, None) or getattr(reference, name)


BACKENDS = {"reference": reference}
if any(hasattr(torch.ops.pikv, name) for name in reference.__all__):
    BACKENDS["kernel"] = _Kernels()


@pytest.fixture(params=BACKENDS)
def ops(request):
    return BACKENDS[request.param]
