"""What Megatron-core needs to run on a machine without CUDA: one explicit, process-wide opt-in, `install()`.

Megatron-core (read and run: 0.19.2) asks `torch.cuda` for its device, streams, events and random states, pins host
memory, and imports Triton and flash-attn. This module answers for `torch.cuda` and corrects the few Megatron modules
that need more; each patch names the line that calls for it. It holds nothing of the cache itself: on a CUDA machine it
is neither needed nor allowed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)

_installed = False


def install() -> None:
    """Makes Megatron-core usable on CPU in this process. Call it before anything imports `megatron`; it imports it.

    Calling it again does nothing. It also sets `TORCHDYNAMO_DISABLE=1` (unless the environment says otherwise):
    Megatron decorates small functions with `torch.compile`, and each would call the C++ compiler on its first use.

    Raises:
        RuntimeError: CUDA is available here, or `megatron.core` was imported before the first call.
        ModuleNotFoundError: megatron-core is not installed.
    """
    global _installed
    if torch.cuda.is_available():
        raise RuntimeError(
            "cpu_compat.install(): torch.cuda.is_available() is True, and Megatron-core runs on this machine's GPU as "
            "it is. Do not call it here, or hide the GPU with CUDA_VISIBLE_DEVICES=''"
        )
    if _installed:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "cpu_compat.install(): megatron.core is already imported and holds references to the unpatched torch.cuda; "
            "call install() before the first `import megatron`"
        )
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        raise ModuleNotFoundError(
            "cpu_compat.install(): megatron-core is not installed; README.md, 'Install', says how"
        )
    # jit.py:21 (jit_fuser = torch.compile) and router.py:918.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "torch._dynamo" in sys.modules:  # it reads the variable when it is imported
        sys.modules["torch._dynamo"].config.disable = os.environ["TORCHDYNAMO_DISABLE"] == "1"
    _patch_torch_cuda()
    _stub_triton_module()
    _patch_megatron()
    _installed = True
    log.info("Megatron-core runs on CPU in this process")


def is_installed() -> bool:
    """Whether `install()` has run in this process."""
    return _installed


class _Stream:
    """Stands for a CUDA stream. Work on CPU is done when the call returns, so there is nothing to wait for."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event if event is not None else _Event()
        event.record()
        return event


class _Event:
    """Stands for a CUDA event: remembers when it was recorded, so that `elapsed_time` is true (ms)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded_at = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self._recorded_at = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return (end._recorded_at - self._recorded_at) * 1e3


def _patch_torch_cuda() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()

    # The device of every tensor Megatron makes at run time: attention.py:530, router.py:98, utils.py:715,
    # rotary_pos_embedding.py:162, text_generation_controller.py:251, dynamic_context.py:1213.
    cuda.current_device = lambda: "cpu"
    cuda.set_device = lambda device: None  # static_engine.py:399, asynchronous generation
    # Streams and events: text_generation_controller.py:337-341 and :3520, dynamic_context.py:1301,
    # dynamic_engine.py:364-365, moe/shared_experts.py:192 (overlap), moe_layer.py.
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = lambda device=None: stream
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.synchronize = lambda device=None: None  # dynamic_engine.py, timers.py
    # Named ranges for the profiler: utils.py:2729 (nvtx_range_push and _pop), text_generation_controller.py:747.
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    # tensor_parallel/random.py:118 saves and restores the device's generator around activation recomputation; on CPU
    # the device's generator is the default one. (Its _set_cuda_rng_state is replaced in _patch_megatron.)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)

    # Moves to the device, which is where the tensor already is: text_generation_controller.py:3428, rope_utils.py:64,
    # tensor_parallel/data.py:84.
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self


def _stub_triton_module() -> None:
    """Stands in for moe/ops/paged_stash.py, the one module on Megatron's import path with an unguarded Triton import.

    Its kernels serve `moe_paged_stash`, a CUDA-only option; using one here raises.
    """
    if importlib.util.find_spec("triton") is not None:
        return

    def unavailable(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("moe_paged_stash needs Triton kernels on a GPU; switch it off on CPU")

    stub: Any = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
    stub.GLOBAL_BLOCK_SIZE = 1024
    stub.paged_stash_copy_kernel = stub.paged_stash_pop_kernel = unavailable
    sys.modules[stub.__name__] = stub


class _TorchOnCpu:
    """`torch` as one Megatron module sees it: factories ignore `pin_memory` and the literal device "cuda"."""

    def __init__(self) -> None:
        for name in ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return call


def _patch_megatron() -> None:
    def module(name: str) -> Any:
        return importlib.import_module(f"megatron.core.{name}")

    # Pinned host memory and device="cuda" written as a literal: transformer/utils.py:39 and :44 (masks),
    # dynamic_context.py:974-1123, text_generation_controller.py:328-417, rope_utils.py:63 (context parallel).
    for name in (
        "transformer.utils",
        "inference.contexts.dynamic_context",
        "inference.text_generation_controllers.text_generation_controller",
        "models.common.embeddings.rope_utils",
    ):
        module(name).torch = _TorchOnCpu()

    # random.py:125 restores the device's generator in a callback that torch.cuda would queue until CUDA is initialised.
    module("tensor_parallel.random")._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: (
        torch.set_rng_state(state)
    )

    # token_dispatcher.py:927-943 passes split sizes through this function, which leaves a CPU tensor as it is; then
    # all_to_all_single, which takes a list or an array of sizes but no tensor, refuses it.
    dispatcher = module("transformer.moe.token_dispatcher")
    stock_move = dispatcher.maybe_move_tensor_to_cpu

    def move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return stock_move(tensor, as_numpy=as_numpy, record_stream=record_stream)

    dispatcher.maybe_move_tensor_to_cpu = move_tensor_to_cpu

    # dynamic_context.py:1612 prefers a Triton kernel; None selects its plain-torch branch.
    module("inference.contexts.dynamic_context").triton_append_key_value_cache = None

    # attention.py:1330 asserts flash-attn for every dynamic context, also for one that never calls it (ours). The
    # assert is satisfied here, and the kernels that the stock attention would call say what is missing.
    attention = module("transformer.attention")
    if attention.flash_attn_varlen_func is None:

        def no_flash_attention(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(
                "stock dynamic attention needs flash-attn, which has no CPU build; on CPU use a hooked model "
                "(pikv_megatron.integrations.megatron) with PiKVDynamicInferenceContext, or a static context"
            )

        attention.is_fa_min_version = lambda version, *args, **kwargs: True
        attention.flash_attn_varlen_func = attention.flash_attn_with_kvcache = no_flash_attention
