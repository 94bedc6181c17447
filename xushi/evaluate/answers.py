"""How well a model answers an environment's tasks: greedy accuracy, avg@k, pass@k, length."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from xushi.base.messages import Message
from xushi.base.seeds import derive
from xushi.engine import SamplingParams, generate_ids
from xushi.envs import Environment, Score, Task
from xushi.model import Deepseek
from xushi.tokenizer import Tokenizer, encode_chat, parse_assistant


@dataclass(frozen=True)
class Answer:
    """One answer to one task, as text, with its verdict and its length in tokens."""

    task: Task
    reasoning: str | None
    content: str
    score: Score
    tokens: int

    @property
    def right(self) -> bool:
        """Whether the verifier said right."""
        return self.score.verdict == "right"


def score_answer(
    environment: Environment, task: Task, tokenizer: Tokenizer, token_ids: Sequence[int]
) -> Score:
    """The verdict on a sampled answer; one that never ended has given no final answer, whatever
    stands in it.
    """
    answer, finished = parse_assistant(tokenizer, token_ids)
    if not finished:
        answer = replace(answer, content="")
    return environment.score(task, [Message("user", _question(environment, task)), answer])


def answer_tasks(
    model: Deepseek,
    tokenizer: Tokenizer,
    environment: Environment,
    tasks: Sequence[Task],
    *,
    samples: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    think: bool = False,
) -> list[list[Answer]]:
    """`samples` answers to each task; temperature 0 is greedy. With `think` an answer is made to
    begin by thinking.
    """
    forced = [tokenizer.think_id] if think else []
    prompts = [
        [*encode_chat(tokenizer, [Message("user", _question(environment, task))]), *forced]
        for task in tasks
        for _ in range(samples)
    ]
    params = [
        SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=derive(seed, "answer", task.split, task.index, sample),
        )
        for task in tasks
        for sample in range(samples)
    ]
    requests = generate_ids(model, prompts, params, eos_id=tokenizer.eos_id)
    answers: list[list[Answer]] = [[] for _ in tasks]
    for number, request in enumerate(requests):
        task = tasks[number // samples]
        ids = [*forced, *request.token_ids]
        answer, _ = parse_assistant(tokenizer, ids)
        answers[number // samples].append(
            Answer(
                task,
                answer.reasoning,
                answer.content,
                score_answer(environment, task, tokenizer, ids),
                len(ids),
            )
        )
    return answers


def _question(environment: Environment, task: Task) -> str:
    question = environment.reply(task, ())
    assert question is not None, "an episode begins with its question"
    return question.content
