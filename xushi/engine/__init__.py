"""Generation: sampling, continuous batching over the latent cache, and `LLM`, which loads an
export.

Not here: HTTP (serve), rewards (rl), the model itself (model).
"""

from xushi.engine.batch import generate_ids
from xushi.engine.engine import Engine
from xushi.engine.llm import LLM, ChatCompletion, Completion
from xushi.engine.params import SamplingParams
from xushi.engine.request import ContextLengthError, Request
from xushi.engine.sampling import Alternatives, Sampled, sample
from xushi.engine.scores import PromptScores
from xushi.engine.text import Delta, TextStream

__all__ = [
    "LLM",
    "Alternatives",
    "ChatCompletion",
    "Completion",
    "ContextLengthError",
    "Delta",
    "Engine",
    "PromptScores",
    "Request",
    "Sampled",
    "SamplingParams",
    "TextStream",
    "generate_ids",
    "sample",
]
