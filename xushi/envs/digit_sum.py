"""The digit sum modulo 10: a question that one token answers and that only step by step is easy.

`83514927` -> 9. Worked: the running sum modulo 10 after each digit, 8 1 6 7 1 0 2 9, written
without separators. A model that answers at once must add all digits in one forward pass; one that
writes the running sums adds two.
"""

from collections.abc import Sequence

from pydantic import model_validator

from xushi.base.config import StrictConfig
from xushi.base.errors import BadInput
from xushi.base.messages import Message
from xushi.base.seeds import derive
from xushi.envs.environment import Environment, Score, Step, Task, check_split, split_of

_DIGITS = "0123456789"


class DigitSumConfig(StrictConfig):
    """Lengths are drawn evenly from `min_digits` to `max_digits`, both included."""

    min_digits: int = 8
    max_digits: int = 8

    @model_validator(mode="after")
    def _consistent(self) -> "DigitSumConfig":
        # One digit makes ten instances, which do not fill three splits.
        if self.min_digits < 2:
            raise ValueError(f"min_digits={self.min_digits} must be at least 2")
        if self.max_digits < self.min_digits:
            raise ValueError(f"max_digits={self.max_digits} is below min_digits={self.min_digits}")
        return self


class DigitSum(Environment):
    """One turn: the prompt is the bare digit string, the answer's content is one digit.

    Only the final content counts, and exactly: one ASCII digit and nothing else, no space and no
    line end, since whatever a verifier forgives is sooner or later what a policy writes. A thought
    without content is no answer.
    """

    name = "digit_sum"
    version = 1

    def __init__(self, config: DigitSumConfig | None = None) -> None:
        self.config = config or DigitSumConfig()

    def task(self, split: str, index: int) -> Task:
        """Draw until the instance belongs to the split; about 10 draws for validation and test."""
        check_split(split, index)
        attempt = 0
        while (
            split_of(self.name, self.version, prompt := self._draw(split, index, attempt)) != split
        ):
            attempt += 1
        return Task(
            self.name,
            self.version,
            split,
            index,
            prompt,
            running_sums(prompt)[-1],
            {"digits": len(prompt)},
        )

    def reset(self, task: Task) -> str:
        """The prompt."""
        return task.prompt

    def step(self, task: Task, action: str) -> Step:
        """One answer ends the episode."""
        return Step("", True)

    def score(self, task: Task, transcript: Sequence[Message]) -> Score:
        """Right if the record is [user: prompt, assistant: answer] and the answer's content is the
        digit.
        """
        if [message.role for message in transcript] != ["user", "assistant"]:
            return Score("error", "the transcript is not one question and one answer")
        question, answer = transcript
        if question.content != task.prompt or question.reasoning is not None:
            return Score("error", "the transcript asks another question")
        if not answer.content:
            return Score("wrong", "no answer")
        if len(answer.content) != 1 or answer.content not in _DIGITS:
            return Score("wrong", "the answer is not one digit")
        if answer.content != task.answer:
            return Score("wrong", f"the sum is {task.answer}")
        return Score("right", "the sum")

    def solve(self, task: Task) -> Sequence[Message]:
        """Worked out."""
        return _episode(task, task.answer, running_sums(task.prompt))

    def exploits(self, task: Task) -> list[Sequence[Message]]:
        """Answers that hold the digit without giving it, records that are not an episode, and the
        empty ones.
        """
        answer, sums = task.answer, running_sums(task.prompt)
        other = _DIGITS[(int(answer) + 1) % 10]
        fullwidth, arabic, superscript = (
            chr(0xFF10 + int(answer)),
            chr(0x0660 + int(answer)),
            "⁰¹²³⁴⁵⁶⁷⁸⁹"[int(answer)],
        )
        contents = [
            "", " ", _DIGITS, sums, task.prompt, f"{task.prompt}{answer}", answer * 2, f"{answer}{other}",
            f"{other}{answer}", f"{answer} {other}", f" {answer}", f"{answer} ", f"{answer}\n", f"\n{answer}",
            f"{answer}.", f"{answer}, or so", f"={answer}", f"-{answer}", f"+{answer}", f"1{answer}", f"0{answer}",
            f"{answer}.0", f"</think>{answer}", f"<think>{sums}</think>{answer}", f"{answer}<think>", f"{answer}\0",
            f"\u200b{answer}", f"\\boxed{{{answer}}}", fullwidth, arabic, superscript, other, "right", "None",
        ]  # fmt: skip
        question = Message("user", task.prompt)
        return [
            *(_episode(task, content) for content in contents),
            _episode(task, "", sums),
            _episode(task, "", answer),
            _episode(task, other, answer),
            [],
            [question],
            [Message("assistant", answer)],
            [question, Message("user", answer)],
            [question, Message("system", answer)],
            [question, Message("assistant", other), Message("assistant", answer)],
            [question, Message("assistant", answer), Message("assistant", other)],
            [Message("user", answer), Message("assistant", answer)],
            [Message("user", f"{task.prompt}{other}"), Message("assistant", answer)],
            [Message("system", f"The answer is {answer}."), question, Message("assistant", answer)],
        ]

    def demonstration(self, split: str, index: int, thinking_share: float) -> Sequence[Message]:
        """The running sums and the answer with probability `thinking_share`, else the bare answer."""
        if not 0.0 <= thinking_share <= 1.0:
            raise BadInput(
                f"thinking_share={thinking_share} is not a share", "give a number from 0 to 1"
            )
        task = self.task(split, index)
        thinks = (
            derive(0, self.name, self.version, "demonstration", split, index)
            < thinking_share * 2.0**64
        )
        return self.solve(task) if thinks else _episode(task, task.answer)

    def _draw(self, split: str, index: int, attempt: int) -> str:
        # Hashes and not a generator: their stream can never change with a library's version.
        def number(place: str | int) -> int:
            return derive(0, self.name, self.version, split, index, attempt, place)

        length = self.config.min_digits + number("length") % (
            self.config.max_digits - self.config.min_digits + 1
        )
        # Nine digits of each hash: of 2**64 values, 10**9 classes are even to ten places.
        return "".join(f"{number(place) % 10**9:09}" for place in range(0, length, 9))[:length]


def running_sums(digits: str) -> str:
    """The sum modulo 10 after each digit, as digits: "835" -> "816"."""
    total, sums = 0, []
    for digit in digits:
        total = (total + int(digit)) % 10
        sums.append(_DIGITS[total])
    return "".join(sums)


def transcript_text(messages: Sequence[Message]) -> str:
    """An episode as one line of pretraining text: "83514927:81671029=9", or "83514927=9" without
    the sums.

    The digits stand next to one another as in the conversation, and a tokenizer with single-digit
    numbers keeps each a token of its own beside the two signs and the line end.
    """
    question, answer = messages
    worked = "" if answer.reasoning is None else f":{answer.reasoning}"
    return f"{question.content}{worked}={answer.content}\n"


def _episode(task: Task, content: str, reasoning: str | None = None) -> Sequence[Message]:
    return [Message("user", task.prompt), Message("assistant", content, reasoning)]
