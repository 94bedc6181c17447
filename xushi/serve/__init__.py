"""Serve a run's models, or a model directory: an OpenAI-compatible API, a chat page and a terminal
chat.

Not here: how tokens are generated (engine).
"""

from xushi.serve.app import create_app
from xushi.serve.cards import ModelCard, find_models
from xushi.serve.server import serve
from xushi.serve.terminal import chat

__all__ = ["ModelCard", "chat", "create_app", "find_models", "serve"]
