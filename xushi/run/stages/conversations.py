"""What fine-tuning learns from: demonstrations, many of them as a later turn of a conversation.

People who chat with a model ask a second question. A model that was trained on single questions
alone has never seen one that follows an answer. Not here: the form in tokens (tokenizer.chat).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from xushi.base.messages import Message
from xushi.base.seeds import derive
from xushi.base.tracking import BatchRecord
from xushi.envs import Environment
from xushi.model import Batch
from xushi.run.stages.lengths import fewest_tokens
from xushi.tokenizer import Tokenizer, chat_examples
from xushi.train import Data, SFTConfig, pack_examples

SAMPLE = 32  # conversations whose mean length stands for all in an estimate

Length = Callable[[Sequence[Message]], int]


def conversation(
    environment: Environment, config: SFTConfig, index: int, length: Length
) -> tuple[list[Message], list[Message]]:
    """Training demonstration `index`, after the messages that come before it: (before, own).

    Before it are the demonstrations of the numbers before `index`. How many is drawn by a hash; as
    many of them are taken as keep `length` of the whole within `sequence_length`. They have no
    reasoning, since a new question drops it.
    """
    own = list(environment.demonstration("train", index, config.thinking_share))
    before: list[Message] = []
    for number in range(1, _earlier(environment, config, index) + 1):
        episode = environment.demonstration("train", index - number, config.thinking_share)
        longer = [*(replace(message, reasoning=None) for message in episode), *before]
        if length([*longer, *own]) > config.sequence_length:
            break
        before = longer
    return before, own


def demonstrations(
    environment: Environment, tokenizer: Tokenizer, config: SFTConfig, first: int = 0
) -> Data:
    """Demonstrations from number `first` on, each after its conversation; an item is one
    demonstration. From what comes before it nothing is learned.
    """
    length = _length(environment, tokenizer)

    def batch(cursor: int, count: int) -> Batch:
        examples = []
        for index in range(first + cursor, first + cursor + count):
            before, own = conversation(environment, config, index, length)
            examples += chat_examples(tokenizer, [*before, *own], environment.tools, len(before))
        return pack_examples(examples, config.sequence_length, tokenizer.pad_id).batch

    return Data(batch, lambda _: config.batch_examples)


def demonstration_spans(
    environment: Environment,
    tokenizer: Tokenizer,
    config: SFTConfig,
    record: BatchRecord,
    first: int = 0,
) -> list[dict[str, Any]]:
    """The conversations of a step as text; `task` is the demonstration that each ends with."""
    length = _length(environment, tokenizer)
    spans = []
    for number in range(record.cursor, record.cursor + record.items):
        before, own = conversation(environment, config, first + number, length)
        text = "\n".join(
            f"{message.role}: {message.reasoning or ''}{message.content}"
            for message in [*before, *own]
        )
        spans.append(
            {
                "sequence": number,
                "source": environment.name,
                "meta": {"task": first + number},
                "first_byte": 0,
                "end_byte": len(text.encode()),
                "text": text,
            }
        )
    return spans


def mean_conversation_tokens(environment: Environment, config: SFTConfig) -> float:
    """The mean of `fewest_tokens` over the first conversations that can be of any length."""
    total = 0
    for index in range(SAMPLE, 2 * SAMPLE):
        before, own = conversation(environment, config, index, fewest_tokens)
        total += fewest_tokens([*before, *own])
    return total / SAMPLE


def _earlier(environment: Environment, config: SFTConfig, index: int) -> int:
    """How many demonstrations come before number `index` in its conversation."""
    count = 0
    while count < index:
        drawn = derive(0, environment.name, environment.version, "follow-up", index, count)
        if drawn >= config.follow_up_share * 2.0**64:
            break
        count += 1
    return count


def _length(environment: Environment, tokenizer: Tokenizer) -> Length:
    """The number of tokens of a conversation's longest example."""

    def length(messages: Sequence[Message]) -> int:
        return max(len(ids) for ids, _ in chat_examples(tokenizer, messages, environment.tools))

    return length
