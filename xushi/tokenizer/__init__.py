"""Floor 2: text to token ids and back, and how a conversation is written in them."""

from xushi.tokenizer.chat import Message
from xushi.tokenizer.config import TokenizerConfig
from xushi.tokenizer.streaming import StreamDecoder
from xushi.tokenizer.tokenizer import Tokenizer

__all__ = ["Message", "StreamDecoder", "Tokenizer", "TokenizerConfig"]
