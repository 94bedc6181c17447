"""Serve the models of a run: an OpenAI-compatible API, a chat page and a terminal chat.

Not here: how tokens are generated (engine).
"""

from xushi.serve.app import create_app
from xushi.serve.cards import ModelCard, find_exports
from xushi.serve.server import serve
from xushi.serve.terminal import chat

__all__ = ["ModelCard", "chat", "create_app", "find_exports", "serve"]
