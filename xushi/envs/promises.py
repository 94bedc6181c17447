"""The promises of an environment, each with a proof. `check` runs them in a process that it can
end: an environment may be wrong in any way, and even never return.

The process writes JSON lines to a file descriptor: before each call of the environment which one
it is, after each promise what came of it, and hashes of what the environment gave, to be compared
with another process. Not here: deadlines, that comparison, and output (check).
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from xushi.base.config import StrictConfig
from xushi.base.errors import XushiError
from xushi.base.files import sha256_json
from xushi.base.messages import Message, Tool, ToolCall
from xushi.envs.environment import SPLITS, Card, Environment, Task
from xushi.envs.forms import Broken, check_json, short
from xushi.envs.probe import LOOKED_AT, Probe
from xushi.envs.registry import environment_class

INSTANCES_SECONDS = 5.0  # for the instances of one split; fewer are looked at where it is over
ATTACKED = 5  # tasks of each split whose episodes are played by solvers that talk nonsense
MOST_TURNS = 256  # until which the episode of any solver must have ended

# Names in the recipe's table [environment] that no environment may use for keys of its own.
RESERVED = {"kind", "transcripts", "transcript_weight", "code", "environment", "make"}

# What a solver may write instead of an answer.
NONSENSE = ("", " ", "0", "yes", "\0", "</think>", "\u200b", "９", "{}", "x" * 10_000)

# What a solver may give for a parameter of a tool, whatever type the tool declares.
ODD_VALUES: tuple[Any, ...] = ("x", "", None, [], {}, True, -1, 10**30, 0.5, "\ud800")


def declared(probe: Probe, found: type[Environment]) -> str:
    """name, version, Config, tools and card; the class can be made."""
    name = getattr(found, "name", None)
    version = getattr(found, "version", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise Broken(f"name is {name!r}", 'set the class attribute name, such as name = "my_task"')
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise Broken(f"version is {version!r}", "set the class attribute version, from 1 on")
    probe.environment = _made(probe, found)
    tools = probe.environment.tools
    if not all(isinstance(tool, Tool) and tool.name for tool in tools):
        raise Broken(f"tools is {short(tools)}", "make it a sequence of Tool, each with a name")
    check_json([asdict(tool) for tool in tools], "tools")
    card = probe.ask("card", "the environment")
    _check_card(card)
    return f"{name}, version {version}, {_count(len(tools), 'tool')}, {card.tasks}"


def splits(probe: Probe) -> str:
    """No instance lies in two splits."""
    owner: dict[str, tuple[str, int]] = {}
    counts = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        began = time.monotonic()
        for index in range(max(LOOKED_AT, probe.instances)):
            if index >= LOOKED_AT and time.monotonic() - began > INSTANCES_SECONDS:
                break
            task = probe.task(split, index)
            other = owner.setdefault(_instance(task), (split, index))
            if other[0] != split:
                raise Broken(
                    f"{split} task {index} and {other[0]} task {other[1]} are the same instance: "
                    f"{short(task.prompt)}",
                    "draw until split_of(name, version, instance) is the split that was asked for",
                )
            counts[split] += 1
    _check_identity(probe)
    return ", ".join(f"{count:,} of {split}" for split, count in counts.items())


def solved(probe: Probe) -> str:
    """solve scores right, and its observations are those of reply."""
    turns = 0
    for task, where in probe.looked_at():
        transcript = probe.transcript("solve", where, task)
        _replay(probe, task, f"solve of {where}", transcript)
        score = probe.score(task, where, transcript)
        if score.verdict != "right":
            raise Broken(
                f"solve of {where} scores {score.verdict}: {score.reason}",
                "make solve return an episode that score finds right",
            )
        turns = max(turns, sum(message.role == "assistant" for message in transcript))
    return f"{LOOKED_AT * len(SPLITS)} tasks, at most {_count(turns, 'turn')}"


def exploits(probe: Probe) -> str:
    """No exploit scores right, and no episode that was cut off."""
    count = 0
    for task, where in probe.looked_at():
        known = probe.ask("exploits", where, task)
        if not isinstance(known, Sequence) or not known:
            raise Broken(
                f"exploits of {where} gave {short(known)}",
                "return a list of at least one transcript that looks right without being right",
            )
        solution = probe.transcript("solve", where, task)
        for number, transcript in enumerate([*known, *_cut_off(solution)]):
            score = probe.score(task, where, transcript)
            if score.verdict == "right":
                kind = f"exploit {number}" if number < len(known) else "an unfinished episode"
                raise Broken(
                    f"{kind} of {where} scores right: {short(transcript, 300)}",
                    "make score accept nothing but what answers the question",
                )
        count += len(known)
    return f"{count:,} transcripts"


def anything(probe: Probe) -> str:
    """Whatever a solver writes, reply and score return, and the episode ends. A transcript that is
    no episode is no error of the program.
    """
    longest = 0
    for task, where in probe.looked_at(ATTACKED):
        for transcript in _malformed(probe.transcript("solve", where, task)):
            if probe.score(task, where, transcript).verdict == "right":
                raise Broken(
                    f"score of {where} finds right what is no episode: {short(transcript, 300)}",
                    "compare the observations in the transcript with those of reply",
                )
        for answer in _solvers(probe, task, where):
            transcript = []
            while observation := probe.reply(task, where, transcript):
                probe.score(task, where, [*transcript, observation])
                transcript += [observation, answer]
                probe.score(task, where, transcript)
                if len(transcript) > 2 * MOST_TURNS:
                    raise Broken(
                        f"the episode of {where} goes on after {MOST_TURNS} turns of "
                        f"{short(answer)}",
                        "make reply return None after some number of turns, whatever is said",
                    )
            longest = max(longest, len(transcript) // 2)
    return f"at most {_count(longest, 'turn')}"


def demonstrations(probe: Probe) -> str:
    """They score right, replay, become text, and are no longer than longest_transcript."""
    longest = probe.transcript("longest_transcript", "the environment")
    limit = _characters(longest)
    for task, where in probe.looked_at():
        _check_length(probe.transcript("solve", where, task), f"solve of {where}", limit)
        for share in (0.0, 0.5, 1.0):
            name = f"{where} with thinking_share {share}"
            transcript = probe.transcript("demonstration", name, task.split, task.index, share)
            _replay(probe, task, f"demonstration of {name}", transcript)
            _check_length(transcript, f"demonstration of {name}", limit)
            if share == 0.0 and any(message.reasoning is not None for message in transcript):
                raise Broken(
                    f"demonstration of {name} has reasoning",
                    "leave reasoning out with probability 1 - thinking_share",
                )
            score = probe.score(task, where, transcript)
            if score.verdict != "right":
                raise Broken(
                    f"demonstration of {name} scores {score.verdict}: {score.reason}",
                    "demonstrate right answers",
                )
            text = probe.ask("text", name, transcript)
            if not isinstance(text, str) or not text:
                raise Broken(
                    f"text of {name} gave {short(text)}", "return a text that is not empty"
                )
    return f"{3 * LOOKED_AT * len(SPLITS)}, at most {limit:,} characters"


PROMISES: dict[str, Callable[[Probe], str]] = {
    "splits": splits,
    "solve": solved,
    "exploits": exploits,
    "anything": anything,
    "demonstrations": demonstrations,
}


def digests(probe: Probe, backwards: bool) -> None:
    """Tell a hash of everything that must be the same in every process, in either order."""
    pairs = [(split, index) for split in SPLITS for index in range(LOOKED_AT)]
    for split, index in reversed(pairs) if backwards else pairs:
        where = f"{split} task {index}"
        task = probe.ask("task", where, split, index)
        solution = list(probe.ask("solve", where, task))
        known = [list(transcript) for transcript in probe.ask("exploits", where, task)]
        prefixes = [solution[:end] for end in range(0, len(solution) + 1, 2)]
        demonstration = probe.ask("demonstration", where, split, index, 0.5)
        values = {
            "task": asdict(task),
            "solve": _tables(solution),
            "exploits": [_tables(transcript) for transcript in known],
            "reply": [_table(probe.ask("reply", where, task, each)) for each in prefixes],
            "score": [asdict(probe.ask("score", where, task, t)) for t in [*known, solution]],
            "demonstration": _tables(demonstration),
            "text": probe.ask("text", where, demonstration),
        }
        for method, value in values.items():
            probe.tell(digest=f"{method} of {where}", value=sha256_json(value))


def _made(probe: Probe, found: type[Environment]) -> Environment:
    config = getattr(found, "Config", None)
    if not isinstance(config, type) or not issubclass(config, StrictConfig):
        raise Broken(
            f"Config is {config!r}",
            "set the class attribute Config to a subclass of xushi.base.config.StrictConfig",
        )
    taken = RESERVED & set(config.model_fields)
    if taken:
        raise Broken(
            f"Config has the keys {', '.join(sorted(taken))}",
            "name them otherwise: the recipe's table [environment] has these itself",
        )
    probe.tell(at="making the environment")
    try:
        return found()
    except Exception as error:
        raise Broken(
            f"it cannot be made without a config: {type(error).__name__}: {short(error)}",
            "implement every abstract method, and give every key of Config a default",
        ) from error


def _check_card(card: Any, language: str = "") -> None:
    """All texts are there; those in Chinese too, where there are any."""
    texts = {}
    if isinstance(card, Card):
        texts = {name: text for name, text in vars(card).items() if name != "chinese"}
    if not texts or not all(isinstance(text, str) for text in texts.values()):
        raise Broken(f"card() gave {short(card)}", "return a Card whose fields are texts")
    missing = [f"{language}{name}" for name, text in texts.items() if not text]
    if missing:
        raise Broken(f"card() leaves {', '.join(missing)} empty", "fill in every field")
    if card.chinese is not None:
        _check_card(card.chinese, "chinese.")


def _check_identity(probe: Probe) -> None:
    """Details with the task's own place in them would make every task another instance."""
    tasks = [probe.task(split, index) for split in SPLITS for index in range(LOOKED_AT)]
    places = ([task.split for task in tasks], [str(task.index) for task in tasks])
    for key in set.intersection(*(set(task.details) for task in tasks)):
        if [str(task.details[key]) for task in tasks] in places:
            raise Broken(
                f"details[{key!r}] of every task is its split or index",
                "leave it out: tasks with equal prompt, answer and details are one instance",
            )


def _check_length(transcript: Sequence[Message], where: str, limit: int) -> None:
    if _characters(transcript) > limit:
        raise Broken(
            f"{where} has {_characters(transcript):,} characters, longest_transcript {limit:,}",
            "make longest_transcript as long as the longest episode that the config allows",
        )


def _replay(probe: Probe, task: Task, where: str, transcript: Sequence[Message]) -> None:
    """Each observation of a transcript is what reply gives at that place, and then it is over."""
    for place in range(0, len(transcript) + 1, 2):
        observation = probe.reply(task, where, transcript[:place])
        expected = transcript[place] if place < len(transcript) else None
        if observation != expected:
            raise Broken(
                f"message {place} of {where} is {short(expected)}, and reply gives "
                f"{short(observation)}",
                "take the observations of an episode from reply, until it gives None",
            )


def _solvers(probe: Probe, task: Task, where: str) -> Iterator[Message]:
    """Messages that a solver may give again and again."""
    solution = probe.transcript("solve", where, task)
    yield from dict.fromkeys(solution[1::2])
    for content in (*NONSENSE, task.answer, task.prompt):
        yield Message("assistant", content)
    yield Message("assistant", "", task.answer)
    names = [*(tool.name for tool in probe.environment.tools), "nothing"]
    for name in names:
        for arguments in ("{}", '{"index": 0, "x": null}', "[", ""):
            yield Message("assistant", "", tool_calls=(ToolCall(name, arguments),))
    for tool in probe.environment.tools:
        for parameter in tool.parameters.get("properties", {}):
            for value in ODD_VALUES:
                arguments = json.dumps({parameter: value})
                yield Message("assistant", "", tool_calls=(ToolCall(tool.name, arguments),))
    yield Message("assistant", "", tool_calls=(ToolCall(names[0], "{}"),) * 3)


def _cut_off(solution: Sequence[Message]) -> list[list[Message]]:
    """The solution as it is recorded when max_tokens or the context end it early: after an answer
    that is not the last, or with a last answer that was cut off and is empty.
    """
    cut: list[list[Message]] = [[]]
    for end in range(1, len(solution), 2):
        cut.append([*solution[:end], Message("assistant", "", solution[end].reasoning)])
        if end + 1 < len(solution):
            cut.append([*solution[: end + 1]])
    return cut


def _malformed(solution: Sequence[Message]) -> Iterator[list[Message]]:
    """Records that are no episode: parts missing, doubled, or of another role."""
    for place, message in enumerate(solution):
        yield [*solution[:place], *solution[place + 1 :]]
        yield [*solution[:place], message, *solution[place:]]
        for role in ("system", "user", "assistant", "tool"):
            if role != message.role:
                yield [*solution[:place], replace(message, role=role), *solution[place + 1 :]]
    yield list(reversed(solution))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _instance(task: Task) -> str:
    return sha256_json([task.prompt, task.answer, dict(sorted(task.details.items()))])


def _characters(transcript: Sequence[Message]) -> int:
    return sum(
        len(message.content)
        + len(message.reasoning or "")
        + sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
        for message in transcript
    )


def _table(message: Message | None) -> Any:
    return None if message is None else message.to_dict()


def _tables(transcript: Sequence[Message]) -> list[Any]:
    return [_table(message) for message in transcript]


def main(kind: str, folder: str, out: TextIO, instances: int, only_digests: bool = False) -> None:
    """Prove all promises, with so many instances of each split; or only tell the digests,
    backwards.
    """
    probe = Probe(out, instances)
    try:
        probe.tell(at="running the file")
        found = environment_class(kind, Path(folder))
    except XushiError as error:
        probe.tell(problem=error.problem, remedy=error.remedy)
        return
    if _proved(probe, "declared", lambda: declared(probe, found)) and not only_digests:
        for name, prove in PROMISES.items():
            _proved(probe, name, partial(prove, probe))
    if probe.environment is not None:
        try:
            digests(probe, backwards=only_digests)
        except Exception as error:  # the promise that it breaks has told it
            probe.tell(digest="all", value=short(error))
    probe.tell(end=True)


def _proved(probe: Probe, name: str, prove: Callable[[], str]) -> bool:
    """Tell what came of one promise."""
    try:
        probe.tell(promise=name, ok=True, text=prove(), remedy="")
        return True
    except Broken as broken:
        probe.tell(promise=name, ok=False, text=broken.problem, remedy=broken.remedy)
    except Exception as error:  # what an environment gives may break anything
        text = f"{probe.at} gave what cannot be used: {type(error).__name__}: {short(error)}"
        probe.tell(promise=name, ok=False, text=text, remedy="return what the contract says")
    return False


if __name__ == "__main__":
    with open(int(sys.argv[3]), "w", encoding="utf-8") as lines:
        main(sys.argv[1], sys.argv[2], lines, int(sys.argv[4]), sys.argv[5] == "digests")
