"""The tokenizer's recipe keys."""

import pytest

from xushi.base.config import parse
from xushi.base.errors import XushiError
from xushi.tokenizer import TokenizerConfig
from xushi.tokenizer.config import SMALLEST_VOCABULARY


def test_smallest_vocabulary_is_the_bytes_and_the_special_tokens() -> None:
    assert parse(TokenizerConfig, {"vocab_size": SMALLEST_VOCABULARY}, "recipe").vocab_size == 263
    with pytest.raises(XushiError, match="vocab_size: must be at least 263"):
        parse(TokenizerConfig, {"vocab_size": SMALLEST_VOCABULARY - 1}, "recipe")
