"""The tokenizer's part of a recipe. Not here: special tokens and the chat form, which are the same
in every run.
"""

from pydantic import Field

from xushi.base.config import StrictConfig

SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
)
"""In the order of their ids, which begin at 0. Spelled as in DeepSeek-V3.1's published tokenizer."""

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""Every byte and every special token: a tokenizer without merges."""


class TokenizerConfig(StrictConfig):
    """`vocab_size` counts special tokens, the 256 bytes and merges."""

    vocab_size: int = Field(ge=SMALLEST_VOCABULARY, le=10_000_000)
