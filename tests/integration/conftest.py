"""Set-up of the Megatron-core tests: the CPU shim before the first import, and one process as its own group."""

from __future__ import annotations

import importlib.util

import pytest
import torch

collect_ignore_glob = []
if importlib.util.find_spec("transformers") is None:
    collect_ignore_glob += ["test_hf_*.py"]
if importlib.util.find_spec("megatron") is None:
    collect_ignore_glob += ["test_megatron_*.py", "test_cpu_compat.py"]
else:
    if not torch.cuda.is_available():
        from pikv_megatron.integrations import cpu_compat

        cpu_compat.install()

    @pytest.fixture(scope="session", autouse=True)
    def megatron_process():
        from pikv_megatron.launch import init_megatron

        torch.set_num_threads(1)
        init_megatron()
