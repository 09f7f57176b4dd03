"""Set-up of tests that run Megatron-core: the CPU shim before the first import, and one process as its own group."""

from __future__ import annotations

import importlib.util

import pytest
import torch

HAS_MEGATRON = importlib.util.find_spec("megatron") is not None
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None

if HAS_MEGATRON and not torch.cuda.is_available():
    from pikv_megatron.integrations import cpu_compat

    cpu_compat.install()


@pytest.fixture(scope="session", autouse=HAS_MEGATRON)
def megatron_process():
    if not HAS_MEGATRON:
        return
    from pikv_megatron.launch import init_megatron

    torch.set_num_threads(1)
    init_megatron()
