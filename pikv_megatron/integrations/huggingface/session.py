"""A forward loop over a Hugging Face model and a cache, PiKV's or transformers' own: a prompt, then token by token.

The counterpart of `megatron.session`, for one batch of equally long sequences where one wants the logits. The model may
be wrapped, by DeepSpeed's engines for one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import logging

from pikv_megatron.config.io import brief
from pikv_megatron.config.parse import read_json
from pikv_megatron.integrations.checkpoint import check_finite, shards
from pikv_megatron.integrations.huggingface.cache import PiKVHFCache
from pikv_megatron.integrations.huggingface.model import attention_layers, find_model
from pikv_megatron.integrations.layer_hooks import after_each
from pikv_megatron.integrations.mixtral_names import WeightsError

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def load_model(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """A checkpoint directory's causal language model, in eval mode, on the GPU where there is one. Looks nowhere else,
    and runs no code that it finds there.

    Raises:
        OSError, ValueError: no such directory, or no checkpoint that transformers reads.
        WeightsError: one of its files cannot be used, or a weight is not finite.
    """
    folder = Path(path)
    _check_files(folder)
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except (StrictDataclassError, AttributeError, TypeError) as error:  # what transformers makes of wrong types
        raise WeightsError(f"{folder / CONFIG_FILE}: not a config that transformers can use: {error}") from error
    finally:
        if shows:
            logging.enable_progress_bar()
    check_finite(model.state_dict().items())
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _check_files(folder: Path) -> None:
    """Checks what transformers would read, or run, without asking. Raises FileNotFoundError or WeightsError."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a Hugging Face checkpoint there")
    config = read_json(path, WeightsError)
    kind, attention = config.get("model_type"), config.get("attn_implementation")
    if config.get("auto_map") and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise WeightsError(
            f"{path}: auto_map asks for the checkpoint's own code, which is never run; expected a model_type that "
            f"transformers knows, got {brief(kind)}"
        )
    if attention is not None and (not isinstance(attention, str) or "/" in attention):
        raise WeightsError(
            f"{path}: attn_implementation asks for code from the Hub, which is never run; expected one that "
            f"transformers has, got {brief(attention)}"
        )
    if (folder / GENERATION_FILE).is_file():
        read_json(folder / GENERATION_FILE, WeightsError)
    for index in INDEX_FILES:
        if (folder / index).is_file():
            shards(folder / index)


class Session:
    """Sequences that grow together in a cache.

    Args:
        model: attached where the cache is PiKV's.
        cache: fresh or reset.
    """

    def __init__(self, model: nn.Module, cache: Cache) -> None:
        self.model, self.cache = model, cache

    @classmethod
    def on_stock_cache(cls, model: nn.Module) -> Session:
        """On transformers' DynamicCache; an attached model runs on its former attention then."""
        return cls(model, DynamicCache(config=find_model(model).config))

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        """Appends tokens [batch, tokens]; returns the logits after the last one, [batch, vocabulary] float32, where the
        model is.
        """
        tokens = tokens.to(next(self.model.parameters()).device)
        out = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float()

    @property
    def bytes_held(self) -> int:
        """Bytes of K and V that the cache holds for its sequences, from their storage."""
        if isinstance(self.cache, PiKVHFCache):
            return int(self.cache.cache.stats()["bytes_held"])
        layers: Any = self.cache.layers
        return sum(x.untyped_storage().nbytes() for layer in layers for x in (layer.keys, layer.values))

    def on_layer_done(self, callback: Callable[[], object]) -> AbstractContextManager[int]:
        """Calls `callback` after each layer's attention in a forward pass, for progress bars; yields how many there
        are.
        """
        return after_each([module for _, module in attention_layers(find_model(self.model))], callback)
