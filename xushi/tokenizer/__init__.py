"""Text to token ids and back, and the form of a conversation in token ids."""

from xushi.tokenizer.chat import chat_examples, encode_chat, encode_outputs
from xushi.tokenizer.config import TokenizerConfig
from xushi.tokenizer.conversation import Conversations
from xushi.tokenizer.reply import parse_assistant, parse_tool_calls
from xushi.tokenizer.streaming import StreamDecoder
from xushi.tokenizer.tokenizer import Tokenizer, TooFewMerges
from xushi.tokenizer.vocabulary import Vocabulary

__all__ = [
    "Conversations",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "TooFewMerges",
    "Vocabulary",
    "chat_examples",
    "encode_chat",
    "encode_outputs",
    "parse_assistant",
    "parse_tool_calls",
]
