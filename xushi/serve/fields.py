"""What a request may hold that asks for nothing: empty values, and the values that the API takes
anyway where a field is missing.

One rule for every optional field, known or not: null, an empty text, list or object, and what holds
only such values, is as if the field were missing. Not here: the fields that are acted on
(protocol).
"""

from collections.abc import Mapping
from typing import Any

# The fields of OpenAI's requests that this server does not act on, and the values that change
# nothing: the API's own default, or what can have no effect here. Any other value is refused.
# Source: OpenAI's API reference. A field without such a value (`tools`, `suffix`) needs no entry.
SHARED: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    # vLLM's, which its benchmark and clients of such servers write out.
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "min_tokens": (0,),
}
COMPLETIONS = SHARED
CHAT: Mapping[str, tuple[Any, ...]] = {
    **SHARED,
    "store": (False,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("medium",),
    "verbosity": ("medium",),
    # There are no tools to choose from or to call in parallel.
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "prompt_cache_retention": ("in_memory", "24h"),
}
# lm-evaluation-harness marks messages so.
MESSAGE: Mapping[str, tuple[Any, ...]] = {"type": ("text",)}
# Chunks are not padded. The padding hides their lengths from who watches the network.
STREAM_OPTIONS: Mapping[str, tuple[Any, ...]] = {"include_obfuscation": (True, False)}


def is_nothing(value: Any) -> bool:
    """Whether a value of JSON is empty, or holds only empty values."""
    waiting = [value]  # a body may be nested more deeply than calls may be
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif value is not None and value != "":
            return False
    return True


def is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value of JSON equals one of `values`. 0.0 is 0, and false is not."""
    return any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in values
    )
