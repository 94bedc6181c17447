"""The tokenizer's table of a recipe, and the special tokens, which are the same in every run.

Not here: the form of a conversation (chat).
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
"""In the order of their ids, from 0. Spelled as in DeepSeek-V3.1's published tokenizer."""

TOOL_TOKENS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
"""The further special tokens of a vocabulary with tools, from id 7 on; in the published order."""

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""Every byte and every special token: a tokenizer without merges and without tool tokens."""


def smallest_vocabulary(tools: bool) -> int:
    """The size of a vocabulary without merges, with or without tool tokens."""
    return SMALLEST_VOCABULARY + (len(TOOL_TOKENS) if tools else 0)


class TokenizerConfig(StrictConfig):
    """`vocab_size` counts special tokens, the 256 bytes and merges."""

    vocab_size: int = Field(ge=SMALLEST_VOCABULARY, le=10_000_000)
