"""One environment under proof: every call of it is told, and what it gives is checked for its form.

Not here: what is promised (promises).
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from xushi.base.messages import Message
from xushi.envs.environment import SPLITS, Score, Task
from xushi.envs.forms import Broken, check_message, check_task, check_transcript, short

LOOKED_AT = 30  # tasks of each split that are solved, attacked and scored


class Probe:
    """The environment under proof. Every call of it goes through `ask`."""

    def __init__(self, out: TextIO, instances: int) -> None:
        self.instances = instances  # of each split, to see whether splits are disjoint
        self.environment: Any = None  # an Environment, once it is made
        self.at = ""  # the last call
        self._out = out
        self._tasks: dict[tuple[str, int], Task] = {}

    def tell(self, **line: Any) -> None:
        """Write one line for `check`."""
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()

    def ask(self, method: str, where: str, *arguments: Any) -> Any:
        """Call a method of the environment; whatever it raises breaks the promise."""
        self.at = f"{method} of {where}"
        self.tell(at=self.at)
        try:
            return getattr(self.environment, method)(*arguments)
        except Exception as error:
            raise Broken(
                f"{method} of {where} raised {type(error).__name__}: {short(error)}",
                f"make {method} return for everything it can be given",
            ) from error

    def task(self, split: str, index: int) -> Task:
        """One task, made once and checked for its form."""
        if (split, index) not in self._tasks:
            task = self.ask("task", f"{split} task {index}", split, index)
            check_task(self.environment, task, split, index)
            self._tasks[split, index] = task
        return self._tasks[split, index]

    def looked_at(self, count: int = LOOKED_AT) -> Iterator[tuple[Task, str]]:
        """The first tasks of every split, with their name for messages."""
        for split in SPLITS:
            for index in range(count):
                yield self.task(split, index), f"{split} task {index}"

    def reply(self, task: Task, where: str, transcript: Sequence[Message]) -> Message | None:
        """The next observation, checked for its form."""
        observation: Message | None = self.ask("reply", where, task, tuple(transcript))
        if observation is None:
            return None
        check_message(observation, f"reply of {where}")
        roles = ("user",) if not transcript else ("user", "tool")
        if observation.role not in roles:
            raise Broken(
                f"reply of {where} gave role {observation.role!r} after {len(transcript)} messages",
                'give role "user" for the question, and "tool" or "user" after it',
            )
        if observation.role == "tool" and not self.environment.tools:
            raise Broken(
                f"reply of {where} gave role 'tool', and the environment declares no tools",
                "declare them in the class attribute tools: the vocabulary needs their tokens",
            )
        if observation.reasoning is not None or observation.tool_calls:
            raise Broken(
                f"reply of {where} gave a message with reasoning or tool calls",
                "give role and content alone: only a solver thinks and calls tools",
            )
        return observation

    def score(self, task: Task, where: str, transcript: Sequence[Message]) -> Score:
        """The verdict, checked for its form."""
        score = self.ask("score", where, task, tuple(transcript))
        if not isinstance(score, Score) or score.verdict not in ("right", "wrong", "error"):
            raise Broken(
                f"score of {where} gave {short(score)}",
                'return a Score whose verdict is "right", "wrong" or "error"',
            )
        if not isinstance(score.reason, str):
            raise Broken(
                f"score of {where} gave the reason {short(score.reason)}", "give it as text"
            )
        return score

    def transcript(self, method: str, where: str, *arguments: Any) -> list[Message]:
        """What solve, demonstration or longest_transcript gives, checked for its form."""
        messages = self.ask(method, where, *arguments)
        return check_transcript(self.environment.tools, messages, f"{method} of {where}")
