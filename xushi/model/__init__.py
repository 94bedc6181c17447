"""The DeepSeek models: config, blocks, weights in and out. This is the only definition of their
mathematics: training, sampling, serving and export all use it.

Names are imported when they are first used, so that code which needs only the config does not wait
for torch to load.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xushi.model.config import ModelConfig, RopeScaling
from xushi.model.presets import PRESETS, preset
from xushi.model.published import from_published, read_config, to_published

if TYPE_CHECKING:
    from xushi.model.batch import Batch
    from xushi.model.building import allocate, model_without_memory
    from xushi.model.cache import FlatTokens, LatentCache
    from xushi.model.deepseek import Decoded, Deepseek, Hidden, Logits
    from xushi.model.objective import (
        LossCounts,
        LossParts,
        LossWeights,
        next_token_loss,
        pretraining_loss,
    )
    from xushi.model.saving import save_pretrained
    from xushi.model.weights import load_pretrained

__all__ = [
    "PRESETS",
    "Batch",
    "Decoded",
    "Deepseek",
    "FlatTokens",
    "Hidden",
    "LatentCache",
    "Logits",
    "LossCounts",
    "LossParts",
    "LossWeights",
    "ModelConfig",
    "RopeScaling",
    "allocate",
    "from_published",
    "load_pretrained",
    "model_without_memory",
    "next_token_loss",
    "preset",
    "pretraining_loss",
    "read_config",
    "save_pretrained",
    "to_published",
]

_PLACES = {
    "Batch": "batch",
    "FlatTokens": "cache",
    "LatentCache": "cache",
    "Decoded": "deepseek",
    "Deepseek": "deepseek",
    "Hidden": "deepseek",
    "Logits": "deepseek",
    "LossCounts": "objective",
    "LossParts": "objective",
    "LossWeights": "objective",
    "next_token_loss": "objective",
    "pretraining_loss": "objective",
    "allocate": "building",
    "model_without_memory": "building",
    "load_pretrained": "weights",
    "save_pretrained": "saving",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"xushi.model.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
