"""Models whose RoPE has other factors for long texts (Phi-3, Phi-MoE): once a text outgrows the length that they were
trained on first, all its keys are rotated otherwise, so transformers' `generate` drops the cache and feeds everything
again, into a DynamicCache of its own. Here the same cache is emptied and filled again.
"""

from __future__ import annotations

import copy
import inspect
import logging
import weakref
from typing import Any

from transformers import PreTrainedModel

from pikv_megatron.integrations.huggingface.current import NAME

log = logging.getLogger(__name__)

METHOD = "prepare_inputs_for_generation"


def keep_cache(model: PreTrainedModel) -> None:
    """Makes `generate` fill a cache of ours anew where it would drop it; does nothing to models that never do."""
    if hasattr(model.config, "original_max_position_embeddings"):
        setattr(model, METHOD, _KeepsCache(model))


def undo(model: PreTrainedModel) -> None:
    """Undoes `keep_cache`."""
    vars(model).pop(METHOD, None)


class _KeepsCache:
    """Stands for a model's method. Its reference to the model is weak: the model's memory goes with the last other."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self.__signature__ = inspect.signature(getattr(model, METHOD))  # generate asks which arguments there are

    def __deepcopy__(self, memo: dict[int, Any]) -> _KeepsCache:
        """It is copied with its model, whose copy is in `memo` by then."""
        return _KeepsCache(copy.deepcopy(self._model(), memo))

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        model = self._model()
        cache: Any = kwargs.get("past_key_values")
        assert model is not None, "a method is called on its model"
        inputs: dict[str, Any] = getattr(type(model), METHOD)(model, *args, **kwargs)
        if getattr(cache, "attention", None) == NAME and inputs.get("past_key_values") is None:
            if cache.get_seq_length():
                log.warning(
                    "%s: the text has outgrown original_max_position_embeddings (%d), where other RoPE factors begin; "
                    "the cache is emptied and filled with all of it again",
                    type(model).__name__,
                    model.config.original_max_position_embeddings,
                )
            cache.reset()
            inputs["past_key_values"] = cache
        return inputs
