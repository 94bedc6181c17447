"""Floor 6: the models of a run for people and programs: an OpenAI-compatible API, a chat page, a
terminal chat.

Not here: how tokens are made (engine).
"""

from xushi.serve.app import create_app
from xushi.serve.exports import ModelCard, find_exports
from xushi.serve.server import serve
from xushi.serve.terminal import chat

__all__ = ["ModelCard", "chat", "create_app", "find_exports", "serve"]
