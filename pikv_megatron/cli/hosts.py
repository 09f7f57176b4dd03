"""A checkpoint on a host, its cache PiKV's, ready to be fed: the same for Megatron-core, DeepSpeed and Hugging Face.

Hosts are imported when one is opened, so that the command line starts without them.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pikv_megatron.cache.cache import PiKVCache
from pikv_megatron.cli.common import megatron_model, set_threads
from pikv_megatron.config import ModelConfig, RuntimeConfig, check_same_model
from pikv_megatron.config.io import to_mapping


class Session(Protocol):
    """Sequences that grow together in a host's cache: `megatron.session.Session`, `huggingface.session.Session`."""

    def feed(self, tokens: Tensor) -> Tensor:
        """Appends tokens [1, tokens]; returns the logits after the last one, [1, vocabulary] float32."""

    @property
    def bytes_held(self) -> int:
        """Bytes of K and V that are held, from their storage."""

    def on_layer_done(self, callback: Callable[[], object]) -> AbstractContextManager[int]:
        """Calls `callback` after each layer; yields how many there are."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint on its host: fed through PiKV (`ours`), and, where asked for, through the host's own cache."""

    ours: Session
    cache: PiKVCache
    stock: Session | None


@dataclass(frozen=True)
class Request:
    """What is to be opened. tokens: prompt and answer together; compare: with a session on the host's own cache;
    expert_parallel: ranks that share the experts, for Megatron-core."""

    path: str
    model: ModelConfig | None
    runtime: RuntimeConfig
    tokens: int
    threads: int | None
    compare: bool
    expert_parallel: int = 1


def open_megatron(request: Request) -> Opened:
    """A Mixtral checkpoint under Megatron-core, its static context PiKV's."""
    model = megatron_model(request.path, request.model, request.threads, request.expert_parallel)

    from pikv_megatron.integrations import megatron
    from pikv_megatron.integrations.megatron.session import Session

    context = megatron.attach(model, request.runtime).static_context(1, request.tokens)
    stock = Session.on_stock_cache(model, 1, request.tokens) if request.compare else None
    return Opened(Session(model, context), context.cache, stock)


def open_huggingface(request: Request) -> Opened:
    """Any checkpoint that PiKV serves, under transformers."""
    model = _huggingface_model(request)

    from pikv_megatron.integrations.huggingface import PiKVHFCache, model_config
    from pikv_megatron.integrations.huggingface.session import Session

    if request.model is not None:
        check_same_model(request.model, model_config(model))
    cache = PiKVHFCache(model, request.runtime)
    stock = Session.on_stock_cache(model) if request.compare else None
    return Opened(Session(model, cache), cache.cache, stock)


def open_deepspeed(request: Request) -> Opened:
    """Any checkpoint that PiKV serves, under DeepSpeed's inference engine, AutoTP over all ranks."""
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints, and its logger keeps the stdout that it finds
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        from pikv_megatron.integrations import deepspeed
        from pikv_megatron.integrations.huggingface import PiKVHFCache
        from pikv_megatron.integrations.huggingface.session import Session

        model = _huggingface_model(request)
        deepspeed.init_distributed()
        block: dict[str, Any] = {"runtime": to_mapping(request.runtime)}
        if request.model is not None:
            block["model"] = to_mapping(request.model)
        ranks = torch.distributed.get_world_size()
        config = {"dtype": _dtype(request), "tensor_parallel": {"tp_size": ranks}, "pikv": block}
        engine = deepspeed.init_inference(model, config)
    cache = PiKVHFCache(engine, request.runtime)
    stock = Session.on_stock_cache(engine) if request.compare else None
    return Opened(Session(engine, cache), cache.cache, stock)


HOSTS: dict[str, Callable[[Request], Opened]] = {
    "megatron": open_megatron,
    "deepspeed": open_deepspeed,
    "hf": open_huggingface,
}


def _dtype(request: Request) -> torch.dtype:
    return torch.float32 if request.model is None else request.model.torch_dtype


def _huggingface_model(request: Request) -> nn.Module:
    set_threads(request.threads)
    from pikv_megatron.integrations.huggingface.session import load_model

    return load_model(Path(request.path), _dtype(request))
