"""Floor 2: what a DeepSeek is: config, blocks, weights in and out. The mathematics is defined here and only here."""

from xushi.model.cache import FlatTokens, LatentCache
from xushi.model.config import ModelConfig, RopeScaling
from xushi.model.deepseek import Decoded, Deepseek, Logits
from xushi.model.objective import LossParts, next_token_loss, pretraining_loss
from xushi.model.weights import load_pretrained, save_pretrained

__all__ = ["Decoded", "Deepseek", "FlatTokens", "LatentCache", "Logits", "LossParts", "ModelConfig", "RopeScaling",
           "load_pretrained", "next_token_loss", "pretraining_loss", "save_pretrained"]
