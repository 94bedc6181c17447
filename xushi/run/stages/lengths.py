"""How long an environment's episodes are in tokens.

Before there is a tokenizer these are lower bounds: a recipe is only refused for a length that no
tokenizer could bring below the limit. `check_tokens` measures with the run's tokenizer.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xushi.base.errors import BadInput
from xushi.base.messages import Message
from xushi.envs import Environment
from xushi.tokenizer import Tokenizer, chat_examples

if TYPE_CHECKING:
    from xushi.run.recipe import Recipe

# The tokenizer gives every digit a token of its own; any other run of text has one token at least.
_RUNS = re.compile(r"\d|[^\d]+")


def fewest_tokens(messages: Sequence[Message]) -> int:
    """A lower bound of the tokens of a conversation in the chat form, end of text included."""
    tokens = 1  # the beginning of text
    for message in messages:
        texts = [message.content, message.reasoning or ""]
        texts += [f"{call.name}{call.arguments}" for call in message.tool_calls]
        tokens += sum(len(_RUNS.findall(text)) for text in texts)
        tokens += 1  # the mark of the role
        if message.role == "assistant":
            tokens += 2  # the end of thought and the end of text
            tokens += bool(message.reasoning)  # the begin of thought
    return tokens


def check_episode_length(recipe: "Recipe") -> None:
    """Raise ValueError if an episode that is trained on or evaluated exceeds the model's
    context.
    """
    for environment in recipe.environments():
        tokens = fewest_tokens(environment.longest_transcript())
        limit = recipe.model.max_position_embeddings
        if tokens > limit:
            raise ValueError(
                f"the longest episode of {environment.card().tasks} takes {tokens} tokens, more "
                f"than model.max_position_embeddings={limit}"
            )


def check_tokens(environment: Environment, tokenizer: Tokenizer, context: int) -> None:
    """Raise `BadInput` if the longest episode, with the description of the tools, exceeds the
    model's context.
    """
    transcript = environment.longest_transcript()
    examples = chat_examples(tokenizer, transcript, environment.tools)
    tokens = max(len(ids) for ids, _ in examples)
    if tokens > context:
        raise BadInput(
            f"the longest episode of {environment.card().tasks} takes {tokens} tokens, more than "
            f"model.max_position_embeddings={context}",
            f"set model.max_position_embeddings to {tokens} or more, or shorten the tasks",
        )
