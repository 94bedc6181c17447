"""Episodes of one turn, sampled through the engine and scored."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from xushi.base.messages import Message
from xushi.engine import SamplingParams, generate_ids
from xushi.envs import Environment, Score, Task
from xushi.evaluate import score_answer
from xushi.model import Deepseek
from xushi.tokenizer import Tokenizer, encode_chat, parse_assistant


@dataclass(frozen=True)
class Branch:
    """One token sequence of an episode.

    `sampled` marks the tokens that the model sampled; `logprobs` and `sampling_logprobs` hold one
    number for each of them, in order. `experts` are [MoE layers, k] for each place but the last.
    """

    ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    sampling_logprobs: list[float]
    experts: list[Tensor] | None


@dataclass(frozen=True)
class Episode:
    """What the model did on a task, as messages and as tokens, with its verdict."""

    task: Task
    transcript: list[Message]
    branches: list[Branch]
    score: Score
    finish_reason: str
    tokens: int  # sampled


def play(
    model: Deepseek,
    tokenizer: Tokenizer,
    environment: Environment,
    tasks: Sequence[Task],
    params: Sequence[SamplingParams],
    *,
    routing: bool = False,
) -> list[Episode]:
    """One episode for each task with its sampling parameters."""
    questions = []
    for task in tasks:
        question = environment.reply(task, ())
        assert question is not None, "an episode begins with its question"
        questions.append(question)
    prompts = [encode_chat(tokenizer, [question]) for question in questions]
    answers = generate_ids(model, prompts, params, eos_id=tokenizer.eos_id, routing=routing)
    episodes = []
    for task, question, answer in zip(tasks, questions, answers, strict=True):
        ids, prompt = answer.token_ids, answer.prompt_ids
        branch = Branch(
            [*prompt, *ids],
            [False] * len(prompt) + [True] * len(ids),
            answer.logprobs,
            answer.sampling_logprobs,
            answer.routed_experts,
        )
        transcript = [question, parse_assistant(tokenizer, ids)[0]]
        score = score_answer(environment, task, tokenizer, ids)
        reason = str(answer.finish_reason)
        episodes.append(Episode(task, transcript, [branch], score, reason, len(ids)))
    return episodes
