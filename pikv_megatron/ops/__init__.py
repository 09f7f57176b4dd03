"""The one seam between the cache and its ops: the compiled `torch.ops.pikv.*`, or the plain-torch reference.

`PIKV_OPS` chooses: `reference`, a kernel set (`scalar`, `avx2`, `avx512`), or `auto`, the widest that this processor
has. `backend` says what each op resolved to, `kernel_set` which kernels run.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from pikv_megatron.ops import kernels, reference
from pikv_megatron.ops.reference import BlockScores, Keys, LowRank, Partial, TokenScores, Values

log = logging.getLogger(__name__)

CHOICES = ("auto", "reference", "scalar", "avx2", "avx512")
choice = os.environ.get("PIKV_OPS", "auto")
if choice not in CHOICES:
    raise ValueError(f"PIKV_OPS: expected one of {', '.join(CHOICES)}, got {choice!r}")


def use_kernels(name: str) -> str:
    """Makes a kernel set run from now on, in every op that has kernels; returns its name.

    Args:
        name: scalar, avx2, avx512, or auto for the widest that this processor has.

    Raises:
        RuntimeError: this processor or build has no such set.
    """
    return str(torch.ops.pikv.use_kernels(name))


def _load() -> str | None:
    """Loads the compiled ops; returns the name of the kernel set that runs, or None for the reference."""
    if choice == "reference":
        return None
    libraries = sorted(Path(__file__).parents[1].glob("_ops*.so"))
    if not libraries:
        if choice != "auto":
            raise ImportError(
                f"PIKV_OPS is {choice!r}, but the compiled ops are not built: README.md, 'Install', says how they are"
            )
        log.warning("the compiled ops are not built: plain torch is used, which is slower (see README.md, 'Install')")
        return None
    for library in libraries:  # the CPU's first: it brings the schemas; then CUDA's kernels, where they were built
        try:
            torch.ops.load_library(library)
        except OSError as error:
            raise ImportError(
                f"PIKV_OPS is {choice!r}, but {library} does not load under torch {torch.__version__}: {error}; "
                "build it again (README.md, 'Install'), or do without: PIKV_OPS=reference"
            ) from error
    kernels.register_fakes()
    try:
        return use_kernels(choice)
    except RuntimeError as error:
        raise ValueError(f"PIKV_OPS: expected a set that this processor has, got {choice!r}: {error}") from error


kernel_set = _load()
backend: dict[str, str] = {}
CUDA_WITHOUT_KERNELS = torch.cuda.is_available() and not list(Path(__file__).parents[1].glob("_ops_cuda*.so"))
if CUDA_WITHOUT_KERNELS and kernel_set is not None:
    log.warning("the CUDA kernels are not built: plain torch is used on the GPU (build with PIKV_CUDA=1)")


def by_device(device: str, compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """An op that takes `plain` where a tensor among its arguments is on such a device, else `compiled`."""

    def there(x: object) -> bool:
        if isinstance(x, torch.Tensor):
            return x.device.type == device
        return isinstance(x, (tuple, list)) and any(there(part) for part in x)

    @functools.wraps(compiled)
    def op(*args: Any, **kwargs: Any) -> Any:
        return (plain if any(there(x) for x in args) else compiled)(*args, **kwargs)

    return op


def _resolve(name: str) -> Callable[..., Any]:
    compiled, plain = None if kernel_set is None else getattr(kernels, name, None), getattr(reference, name)
    backend[name] = "reference" if compiled is None else "kernel"
    if compiled is None:
        return cast(Callable[..., Any], plain)
    return by_device("cuda", compiled, plain) if CUDA_WITHOUT_KERNELS else cast(Callable[..., Any], compiled)


append = _resolve("append")
prefetch = _resolve("prefetch")
quantize_block = _resolve("quantize_block")
dequantize_block = _resolve("dequantize_block")
block_bounds = _resolve("block_bounds")
score_blocks = _resolve("score_blocks")
score_tokens = _resolve("score_tokens")
rank_tokens = _resolve("rank_tokens")
select_topk = _resolve("select_topk")
select_mass = _resolve("select_mass")
unread_mass = _resolve("unread_mass")
attend_blocks = _resolve("attend_blocks")
attend_decode = _resolve("attend_decode")
attend_tokens = _resolve("attend_tokens")
key_logits = _resolve("key_logits")
attend_ragged = _resolve("attend_ragged")
attend_mass = _resolve("attend_mass")
attend_window = _resolve("attend_window")
attend_windows = _resolve("attend_windows")
attend_at = _resolve("attend_at")
attend_sliding = _resolve("attend_sliding")
merge_partials = _resolve("merge_partials")
token_importance = _resolve("token_importance")
window_importance = _resolve("window_importance")
prompt_importance = _resolve("prompt_importance")

__all__ = [
    "BlockScores",
    "Keys",
    "LowRank",
    "Partial",
    "TokenScores",
    "Values",
    "append",
    "attend_at",
    "attend_blocks",
    "attend_decode",
    "attend_mass",
    "attend_ragged",
    "attend_sliding",
    "attend_tokens",
    "attend_window",
    "attend_windows",
    "backend",
    "block_bounds",
    "dequantize_block",
    "kernel_set",
    "key_logits",
    "merge_partials",
    "prefetch",
    "prompt_importance",
    "quantize_block",
    "rank_tokens",
    "score_blocks",
    "score_tokens",
    "select_mass",
    "select_topk",
    "token_importance",
    "unread_mass",
    "use_kernels",
    "window_importance",
]
