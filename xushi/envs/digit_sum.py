"""The digit sum modulo 10: the answer is one token, and it is easy only step by step.

`83514927` -> 9. Worked out, it is the running sum modulo 10 after each digit, 8 1 6 7 1 0 2 9,
written without separators. A model that answers at once must add all digits in one forward pass. A
model that writes the running sums adds two digits at a time.
"""

from collections.abc import Sequence

from pydantic import Field, model_validator

from xushi.base.config import StrictConfig
from xushi.base.messages import Message, ToolCall
from xushi.base.seeds import derive
from xushi.envs.environment import (
    Card,
    Environment,
    Score,
    Task,
    check_split,
    split_of,
    thinks,
)

_DIGITS = "0123456789"


class DigitSumConfig(StrictConfig):
    """Lengths are drawn evenly from `min_digits` to `max_digits`, both included."""

    # One digit gives ten instances, which do not fill three splits.
    min_digits: int = Field(8, ge=2, le=1000)
    max_digits: int = Field(8, ge=2, le=1000)

    @model_validator(mode="after")
    def _consistent(self) -> "DigitSumConfig":
        if self.max_digits < self.min_digits:
            raise ValueError(f"max_digits={self.max_digits} is below min_digits={self.min_digits}")
        return self


class DigitSum(Environment):
    """One turn: the prompt is the bare digit string, and the content of the answer is one digit.

    Only the content counts, and it must be exactly one ASCII digit, without a space or a line end:
    whatever a verifier forgives, a policy learns to write. Reasoning without content is no answer.
    """

    name = "digit_sum"
    version = 1
    Config = DigitSumConfig
    config: DigitSumConfig

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

    def reply(self, task: Task, transcript: Sequence[Message]) -> Message | None:
        """The digits first; one answer ends the episode."""
        return None if transcript else Message("user", task.prompt)

    def score(self, task: Task, transcript: Sequence[Message]) -> Score:
        """Right if the transcript is [user: prompt, assistant: answer] and the content of the
        answer is the digit.
        """
        if [message.role for message in transcript] != ["user", "assistant"]:
            return Score("error", "the transcript is not one question and one answer")
        question, answer = transcript
        if question != Message("user", task.prompt):
            return Score("error", "the transcript asks another question")
        if answer.tool_calls:
            return Score("wrong", "the answer calls a tool")
        if not answer.content:
            return Score("wrong", "no answer")
        if len(answer.content) != 1 or answer.content not in _DIGITS:
            return Score("wrong", "the answer is not one digit")
        if answer.content != task.answer:
            return Score("wrong", f"the sum is {task.answer}")
        return Score("right", "the sum")

    def solve(self, task: Task) -> Sequence[Message]:
        """The running sums as reasoning, then the digit."""
        return _episode(task, task.answer, running_sums(task.prompt))

    def exploits(self, task: Task) -> list[Sequence[Message]]:
        """Answers that contain the digit but are not it, transcripts that are not an episode, and
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
            "", " ", _DIGITS, sums, task.prompt, f"{task.prompt}{answer}", answer * 2,
            f"{answer}{other}", f"{other}{answer}", f"{answer} {other}", f" {answer}",
            f"{answer} ", f"{answer}\n", f"\n{answer}", f"{answer}.", f"{answer}, or so",
            f"={answer}", f"-{answer}", f"+{answer}", f"1{answer}", f"0{answer}", f"{answer}.0",
            f"</think>{answer}", f"<think>{sums}</think>{answer}", f"{answer}<think>",
            f"{answer}\0", f"\u200b{answer}", f"\\boxed{{{answer}}}", fullwidth, arabic,
            superscript, other, "right", "None",
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
            [question, Message("assistant", answer, tool_calls=(ToolCall("sum", "{}"),))],
            [Message("user", task.prompt, sums), Message("assistant", answer)],
            [question, Message("user", answer)],
            [question, Message("system", answer)],
            [question, Message("assistant", other), Message("assistant", answer)],
            [question, Message("assistant", answer), Message("assistant", other)],
            [Message("user", answer), Message("assistant", answer)],
            [Message("user", f"{task.prompt}{other}"), Message("assistant", answer)],
            [Message("system", f"The answer is {answer}."), question, Message("assistant", answer)],
        ]

    def demonstration(self, split: str, index: int, thinking_share: float) -> Sequence[Message]:
        """The running sums and the answer with probability `thinking_share`, else the answer
        alone.
        """
        worked = thinks(self.name, self.version, split, index, thinking_share)
        task = self.task(split, index)
        return self.solve(task) if worked else _episode(task, task.answer)

    def text(self, transcript: Sequence[Message]) -> str:
        """One line: "83514927:81671029=9", or "83514927=9" without reasoning.

        The digits stand next to one another as in the conversation. A tokenizer that reads single
        digits keeps each of them a token, beside the two signs and the line end.
        """
        question, answer = transcript
        worked = "" if answer.reasoning is None else f":{answer.reasoning}"
        return f"{question.content}{worked}={answer.content}\n"

    def longest_transcript(self) -> Sequence[Message]:
        """A worked answer to a number of the greatest length."""
        digits = "9" * self.config.max_digits
        sums = running_sums(digits)
        return [Message("user", digits), Message("assistant", sums[-1], sums)]

    def card(self) -> Card:
        """What people are told of a model that was trained on this."""
        least = self.config.min_digits
        most = self.config.max_digits
        lengths = f"{most}" if least == most else f"{least} to {most}"
        return Card(
            title="digit sum modulo 10",
            can=f"It gives the digit sum of a number of {lengths} digits, modulo 10, and shows "
            "its working.",
            cannot="It knows nothing else: anything but a number gets a meaningless answer.",
            example=self.task("test", 0).prompt,
            tasks=f"numbers of {lengths} digits",
            chinese=self._card_in_chinese(),
        )

    def _card_in_chinese(self) -> Card:
        least, most = self.config.min_digits, self.config.max_digits
        lengths = f"{most}" if least == most else f"{least} 到 {most}"
        return Card(
            title="各位数字之和模 10",
            can=f"给它一个 {lengths} 位数，它求各位数字之和除以 10 的余数，并写出每一步。",
            cannot="它不会别的：输入若不是数字，回答没有意义。",
            example=self.task("test", 0).prompt,
            tasks=f"{lengths} 位数",
        )

    def _draw(self, split: str, index: int, attempt: int) -> str:
        # Hashes and no generator: no version of a library can change what they give.
        def number(place: str | int) -> int:
            return derive(0, self.name, self.version, split, index, attempt, place)

        length = self.config.min_digits + number("length") % (
            self.config.max_digits - self.config.min_digits + 1
        )
        # Nine digits from each hash: 2**64 is so large that all 10**9 residues are equally likely
        # to ten decimal places.
        return "".join(f"{number(place) % 10**9:09}" for place in range(0, length, 9))[:length]


def running_sums(digits: str) -> str:
    """The sum modulo 10 after each digit, as digits: "835" -> "816"."""
    total, sums = 0, []
    for digit in digits:
        total = (total + int(digit)) % 10
        sums.append(_DIGITS[total])
    return "".join(sums)


def _episode(task: Task, content: str, reasoning: str | None = None) -> Sequence[Message]:
    return [Message("user", task.prompt), Message("assistant", content, reasoning)]
