"""A second environment, of several turns with a tool: ask for hidden digits one at a time, then
say their sum modulo 10.

Nothing in xushi/ names it. A recipe does: `kind = "game.py:Counting"`.
"""

from collections.abc import Sequence

from pydantic import Field

from xushi.base.config import StrictConfig
from xushi.base.messages import Message, Tool, ToolCall
from xushi.base.seeds import derive
from xushi.envs import Card, Environment, Score, Task
from xushi.envs.environment import check_split, split_of, thinks

ASK = ToolCall("next", "{}")


class CountingConfig(StrictConfig):
    """How many digits are hidden: evenly from `fewest` to `most`."""

    fewest: int = Field(3, ge=3)
    most: int = Field(4, ge=3)


class Counting(Environment):
    """The question is how many digits there are: "3". Each call of `next` gives one of them. The
    answer is one digit; it is right only after all digits were asked for.
    """

    name = "counting"
    version = 1
    Config = CountingConfig
    config: CountingConfig
    tools = (Tool("next", "the next digit", {"type": "object", "properties": {}}),)

    def task(self, split: str, index: int) -> Task:
        check_split(split, index)
        attempt = 0
        while True:
            digits = self._draw(split, index, attempt)
            if split_of(self.name, self.version, digits) == split:
                break
            attempt += 1
        answer = str(sum(map(int, digits)) % 10)
        prompt = str(len(digits))
        return Task(self.name, self.version, split, index, prompt, answer, {"digits": digits})

    def reply(self, task: Task, transcript: Sequence[Message]) -> Message | None:
        if not transcript:
            return Message("user", task.prompt)
        digits = str(task.details["digits"])
        asked = [message.tool_calls for message in transcript if message.role == "assistant"]
        if not asked or not asked[-1] or len(asked) > len(digits):
            return None
        if asked[-1] != (ASK,):
            return Message("tool", "?")
        return Message("tool", digits[asked.count((ASK,)) - 1])

    def score(self, task: Task, transcript: Sequence[Message]) -> Score:
        for place, message in enumerate(transcript):
            if place % 2 == 1 and message.role != "assistant":
                return Score("error", f"message {place} is not the solver's")
            if place % 2 == 0 and message != self.reply(task, transcript[:place]):
                return Score("error", f"message {place} is not what the environment says")
        if not transcript or len(transcript) % 2 == 1:
            return Score("error", "no answer follows the last observation")
        if [message.content for message in transcript[2::2]] != [*str(task.details["digits"])]:
            return Score("wrong", "not all digits were asked for")
        if transcript[-1].tool_calls or transcript[-1].content != task.answer:
            return Score("wrong", f"the sum is {task.answer}")
        return Score("right", "the sum")

    def solve(self, task: Task) -> Sequence[Message]:
        digits = str(task.details["digits"])
        sums = [str(sum(map(int, digits[: end + 1])) % 10) for end in range(len(digits))]
        return self._episode(task, task.answer, "".join(sums))

    def exploits(self, task: Task) -> list[Sequence[Message]]:
        other = str((int(task.answer) + 1) % 10)
        whole = self._episode(task, task.answer)
        said = Message("assistant", task.answer)
        contents = ["", other, f" {task.answer}", f"{task.answer}\n", task.answer * 2]
        return [
            *(self._episode(task, content) for content in contents),
            self._episode(task, "", task.answer),
            [whole[0], said],  # guessed
            [*whole[:3], said],  # guessed after one digit
            [*whole[:-1], Message("assistant", task.answer, tool_calls=(ASK,))],
            [whole[0], whole[1], Message("tool", "0" * 9), *whole[3:]],
            whole[2:],
        ]

    def demonstration(self, split: str, index: int, thinking_share: float) -> Sequence[Message]:
        task = self.task(split, index)
        if thinks(self.name, self.version, split, index, thinking_share):
            return self.solve(task)
        return self._episode(task, task.answer)

    def text(self, transcript: Sequence[Message]) -> str:
        digits = "".join(message.content for message in transcript[2::2])
        sums = transcript[-1].reasoning or ""
        return f"{transcript[0].content}:{digits}:{sums}={transcript[-1].content}\n"

    def longest_transcript(self) -> Sequence[Message]:
        digits = "0" * self.config.most
        task = Task(self.name, self.version, "test", 0, str(len(digits)), "0", {"digits": digits})
        return self.solve(task)

    def card(self) -> Card:
        return Card(
            title="sum of hidden digits",
            can="It asks for hidden digits with a tool and says their sum modulo 10.",
            cannot="It knows nothing else.",
            example=str(self.config.most),
            tasks=f"{self.config.fewest} to {self.config.most} hidden digits",
        )

    def _draw(self, split: str, index: int, attempt: int) -> str:
        range_ = self.config.most - self.config.fewest + 1
        length = self.config.fewest + derive(0, self.name, split, index, attempt, "n") % range_
        number = derive(0, self.name, split, index, attempt, "digits") % 10**length
        return f"{number:0{length}}"

    def _episode(self, task: Task, content: str, reasoning: str | None = None) -> list[Message]:
        episode = [Message("user", task.prompt)]
        for digit in str(task.details["digits"]):
            episode += [Message("assistant", "", tool_calls=(ASK,)), Message("tool", digit)]
        return [*episode, Message("assistant", content, reasoning)]
