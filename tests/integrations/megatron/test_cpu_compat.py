"""The CPU shim: explicit, idempotent, refused where it has no place; and what Megatron-core relies on behind it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from pikv_megatron.integrations import cpu_compat

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")


def test_it_is_refused_where_cuda_exists(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="is_available"):
        cpu_compat.install()


def test_a_second_call_changes_nothing():
    before = {name: getattr(torch.cuda, name) for name in ("current_device", "Stream", "Event", "synchronize")}
    cpu_compat.install()
    assert before == {name: getattr(torch.cuda, name) for name in before}
    assert cpu_compat.is_installed()


def test_it_is_refused_after_megatron_was_imported(monkeypatch):
    import megatron.core  # noqa: F401

    monkeypatch.setattr(cpu_compat, "_installed", False)
    with pytest.raises(RuntimeError, match=r"megatron\.core is already imported"):
        cpu_compat.install()


def test_it_needs_megatron_and_changes_nothing_without(monkeypatch):
    monkeypatch.setattr(cpu_compat, "_installed", False)
    monkeypatch.delitem(sys.modules, "megatron.core")
    monkeypatch.setattr(cpu_compat.importlib.util, "find_spec", lambda name: None)
    before = torch.cuda.current_device
    with pytest.raises(ModuleNotFoundError, match="megatron-core"):
        cpu_compat.install()
    assert torch.cuda.current_device is before


def test_nothing_is_patched_by_an_import():
    script = (
        "import sys, torch\n"
        "before = torch.cuda.current_device\n"
        "import pikv_megatron, pikv_megatron.launch, pikv_megatron.integrations.cpu_compat\n"
        "assert torch.cuda.current_device is before\n"
        "assert not any(name.split('.')[0] in ('megatron', 'transformers', 'deepspeed') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_compilation_is_switched_off_also_for_a_dynamo_that_is_loaded():
    script = (
        "import torch, torch._dynamo\n"
        "from pikv_megatron.integrations import cpu_compat\n"
        "cpu_compat.install()\n"
        "assert torch._dynamo.config.disable\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=environment)


def test_events_measure_time():
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    time.sleep(0.02)
    end.record(torch.cuda.current_stream())
    assert 15 < start.elapsed_time(end) < 5000


def test_recomputed_dropout_repeats_its_mask():
    from megatron.core import tensor_parallel

    x = torch.rand(1000) + 1
    x.requires_grad_()
    queued = len(torch.cuda._queued_calls)
    y = tensor_parallel.checkpoint(lambda t: torch.nn.functional.dropout(t, 0.5), False, x)
    torch.rand(10)  # moves the generator between forward and recomputation
    y.sum().backward()
    assert torch.equal(x.grad, y.detach() / x.detach())
    assert len(torch.cuda._queued_calls) == queued  # nothing waits for a device that never comes


def test_masks_and_pinned_memory_are_made_on_cpu():
    from megatron.core.inference.contexts import dynamic_context
    from megatron.core.transformer import utils

    assert torch.equal(utils.get_default_causal_mask(5), torch.ones(5, 5, dtype=torch.bool).triu(1))
    assert utils.get_sliding_window_causal_mask(4, 4, (1, 0)).shape == (4, 4)
    assert dynamic_context.torch.empty(3, device="cpu", pin_memory=True).shape == (3,)
    with pytest.raises(RuntimeError, match="pin"):  # elsewhere torch answers as always
        torch.empty(3, pin_memory=True)


def test_what_has_no_cpu_form_says_so():
    from megatron.core.transformer import attention
    from megatron.core.transformer.moe.ops.paged_stash import paged_stash_copy_kernel

    if attention.flash_attn_varlen_func.__name__ == "no_flash_attention":
        with pytest.raises(RuntimeError, match="flash-attn"):
            attention.flash_attn_varlen_func()
    if paged_stash_copy_kernel.__name__ == "unavailable":
        with pytest.raises(RuntimeError, match="moe_paged_stash"):
            paged_stash_copy_kernel()
