"""What PiKV relies on in DeepSpeed: its process groups without the shared-memory all-reduce, and checks of the
functions that are hooked or patched, so that a version that is unknown fails by name.

Every patch is a context manager and is gone when it ends.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from torch import Tensor, nn

from pikv_megatron.launch import init_process_group


def check_parameters(name: str, function: Callable[..., Any], expected: Sequence[str]) -> None:
    """Checks that a function of DeepSpeed (or transformers) takes the parameters that PiKV knows.

    Raises:
        RuntimeError: it takes others; the message names the function, both lists and DeepSpeed's version.
    """
    found = list(inspect.signature(function).parameters)
    if found != list(expected):
        raise RuntimeError(
            f"{name} of DeepSpeed {deepspeed.__version__} takes ({', '.join(found)}), expected "
            f"({', '.join(expected)}): PiKV does not know this version"
        )


def init_distributed() -> None:
    """DeepSpeed's communication over the process groups of `launch.init_process_group`; done already: does nothing.

    On CPU, DeepSpeed would first compile an all-reduce through shared memory, for minutes, and end in a segmentation
    fault where LOCAL_SIZE is not the world size (which torchrun never sets). Here it is left out: gloo reduces. Who
    wants it calls `deepspeed.init_distributed()` first, under the `deepspeed` launcher.

    Raises:
        RuntimeError: incomplete rank variables, or a DeepSpeed that builds that op in a way that is not known.
    """
    if comm.is_initialized():
        return
    init_process_group()
    with without_shared_memory():
        deepspeed.init_distributed(verbose=False)


@contextmanager
def without_shared_memory() -> Iterator[None]:
    """While it lasts, DeepSpeed does not build its shared-memory all-reduce."""
    backend: Any = importlib.import_module("deepspeed.comm.torch")  # the attribute deepspeed.comm.torch is torch itself
    built = getattr(backend, "build_shm_op", None)
    if built is None:
        raise RuntimeError(
            f"deepspeed.comm.torch.build_shm_op is not in DeepSpeed {deepspeed.__version__}: PiKV does not know this "
            "version"
        )
    check_parameters("deepspeed.comm.torch.build_shm_op", built, [])
    backend.build_shm_op = lambda: None
    try:
        yield
    finally:
        backend.build_shm_op = built


@contextmanager
def local_rank() -> Iterator[None]:
    """While it lasts, LOCAL_RANK is set, without which DeepSpeed's training engine does not start: a process that no
    launcher has started is 0.
    """
    if "LOCAL_RANK" in os.environ:
        yield
        return
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]


@contextmanager
def registry_by_name() -> Iterator[None]:
    """While it lasts, transformers' registry of recorded outputs takes a class's name as key, which AutoEP gives it.

    transformers 5.23 made it a dict that is asked for a model and turns it into the key itself. An older registry, a
    plain dict, is left as it is.

    Raises:
        RuntimeError: a registry of a kind that is not known.
    """
    from transformers.utils import output_capturing

    registry = getattr(output_capturing, "_CAN_RECORD_REGISTRY", None)
    if type(registry) is dict:
        yield
        return
    host: Any = type(registry)
    if not issubclass(host, dict):
        raise RuntimeError(
            f"transformers.utils.output_capturing._CAN_RECORD_REGISTRY is a {host.__name__}, expected a dict: PiKV "
            "does not know this version of transformers, AutoEP would neither"
        )
    check_parameters(f"{host.__name__}.get", host.get, ["self", "model"])
    check_parameters(f"{host.__name__}.__setitem__", host.__setitem__, ["self", "model", "can_record_outputs"])

    class ByName(host):
        def get(self, key: Any, default: Any = None) -> Any:
            return dict.get(self, key, default) if isinstance(key, str) else super().get(key)

        def __setitem__(self, key: Any, recorded: Any) -> None:
            if isinstance(key, str):
                dict.__setitem__(self, key, recorded)
            else:
                super().__setitem__(key, recorded)

    registry.__class__ = ByName
    try:
        yield
    finally:
        registry.__class__ = host


@contextmanager
def float32_kept(model: Any) -> Iterator[None]:
    """While it lasts, DeepSpeed may cast a transformers model; what the model is to keep in float32 is so again at its
    end, with the values from before: the routers' correction biases of DeepSeek-V3, GLM-4-MoE and others choose other
    experts once they are rounded.
    """
    keys = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    kept = {
        name: tensor.detach().clone()
        for name, tensor in _tensors(model)
        if tensor.dtype == torch.float32 and not tensor.is_meta and any(f".{key}." in f".{name}." for key in keys)
    }
    yield
    for name, tensor in _tensors(model):
        if name in kept:
            tensor.data = kept[name].to(tensor.device)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
