"""Text to token ids and back, and the form of a conversation in token ids."""

from xushi.tokenizer.chat import chat_examples, encode_chat, encode_outputs
from xushi.tokenizer.config import TokenizerConfig
from xushi.tokenizer.reply import parse_assistant, parse_tool_calls
from xushi.tokenizer.streaming import StreamDecoder
from xushi.tokenizer.tokenizer import Tokenizer, TooFewMerges

__all__ = [
    "StreamDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "TooFewMerges",
    "chat_examples",
    "encode_chat",
    "encode_outputs",
    "parse_assistant",
    "parse_tool_calls",
]
