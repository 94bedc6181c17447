"""`xushi env check`: sound environments keep every promise, and a fault is caught for each promise
that can be broken.

The sound one is the counting game of tests/contracts; each fault changes one place of its source.
"""

import io
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from xushi.base.errors import BadInput
from xushi.envs import DigitSum, promises
from xushi.envs.check import PROMISES, Finding, as_lines, check_environment, kept
from xushi.envs.forms import Broken
from xushi.envs.promises import _check_card, main
from xushi.run.recipe import EnvironmentTable

SOUND = Path(__file__).parents[1].joinpath("contracts", "game.py").read_text(encoding="utf-8")
NAMES = [*PROMISES, "deadline", "pure"]


def test_every_promise_is_told_and_every_key_of_the_recipe_is_reserved() -> None:
    assert ("declared", *promises.PROMISES) == PROMISES
    assert {*EnvironmentTable.model_fields, "environment", "make"} == promises.RESERVED


@dataclass(frozen=True)
class Fault:
    """`promise` must be told to be broken, in words that hold `message`, where `instead` stands in
    the source for `line`.
    """

    promise: str
    message: str
    line: str
    instead: str


def before(line: str, *code: str) -> tuple[str, str]:
    """The line, and the same with code before it at the same depth."""
    depth = " " * (len(line) - len(line.lstrip()))
    return line, "".join(f"{depth}{each}\n" for each in code) + line


def part(line: str, old: str, new: str) -> tuple[str, str]:
    """The line, and the same with one part replaced."""
    assert line.count(old) == 1
    return line, line.replace(old, new)


TASK = 'version, split, index, prompt, answer, {"digits": digits})'
IN_SPLIT = "split_of(self.name, self.version, digits) == split"
DRAW = 'number = derive(0, self.name, split, index, attempt, "digits")'
ASKS = '            return Message("user", task.prompt)'
OVER = "        if not asked or not asked[-1] or len(asked) > len(digits):\n            return None"
GIVE = '        return Message("tool", digits[asked.count((ASK,)) - 1])'
SCORE = "        for place, message in enumerate(transcript):\n            if place % 2 == 1"
WRONG = "transcript[-1].content != task.answer"
RIGHT = '        return Score("right", "the sum")'
KNOWN = "        return [\n            *(self._episode(task, content)"
SHOWN = "        if thinks(self.name"
BARE = "            return self.solve(task)\n        return self._episode(task, task.answer)"

FAULTS = {
    "no name": Fault("declared", "name", 'name = "counting"', 'name = ""'),
    "no version": Fault("declared", "version", "version = 1", "version = 0"),
    "no Config": Fault("declared", "Config", "    Config = CountingConfig\n", ""),
    "a key of the recipe": Fault("declared", "kind", *before("    most: int", "kind: int = 3")),
    "a key without a default": Fault("declared", "made", "Field(4, ge=3)", "Field(ge=3)"),
    "a missing method": Fault("declared", "abstract", "def text(self", "def words(self"),
    "tools that are none": Fault("declared", "tools", "tools = (Tool(", "tools = (print("),
    "an empty card": Fault("declared", "cannot", '"It knows nothing else."', '""'),
    "splits that overlap": Fault("splits", "same instance", IN_SPLIT, "True"),
    "equal tasks hidden": Fault(
        "splits", "split or index", *part(TASK, "digits}", 'digits, "i": index}')
    ),
    "another split's task": Fault("splits", "says that it is", *part(TASK, "split", '"test"')),
    "details without JSON": Fault("splits", "details", *part(TASK, ": digits", ": {1}")),
    "no task": Fault("splits", "return a Task", f"return Task(self.name, self.{TASK}", "return 1"),
    "a wrong solution": Fault("solve", "scores wrong", *part(RIGHT, "right", "wrong")),
    "other observations": Fault(
        "solve", "reply gives", 'Message("tool", digit)]', 'Message("tool", "")]'
    ),
    "no end of a solution": Fault(
        "solve", "reply gives", *part(OVER, "None", 'Message("user", "")')
    ),
    "a question by nobody": Fault("solve", "role", *part(ASKS, "user", "system")),
    "a reply that thinks": Fault("solve", "reasoning", *part(GIVE, " - 1])", " - 1], '')")),
    "another tool": Fault("solve", "calls", 'ToolCall("next"', 'ToolCall("other"'),
    "a call without JSON": Fault("solve", "calls", '"{}")', '"now")'),
    "a message without text": Fault("solve", "no texts", GIVE, '        return Message("tool", 7)'),
    "half a surrogate pair": Fault(
        "solve", "surrogate", GIVE, "        return Message('tool', '\\ud800')"
    ),
    "an undeclared tool": Fault("solve", "calls", "tools = (Tool(", "hidden = (Tool("),
    "an exploit that is right": Fault(
        "exploits", "exploit 2", *part(WRONG, "content", "content.strip(' ')")
    ),
    "no exploits": Fault("exploits", "at least one", *before(KNOWN, "return []")),
    "an unfinished episode that is right": Fault(
        "exploits",
        "unfinished",
        *before(
            SCORE,
            "if len(transcript) == 4 and transcript[3] == Message('assistant', ''):",
            "    return Score('right', '')",
        ),
    ),
    "an episode cut off after a call that is right": Fault(
        "exploits",
        "unfinished",
        *before(
            SCORE,
            "if len(transcript) == 4 and transcript[3].tool_calls:",
            "    return Score('right', '')",
        ),
    ),
    "a score that empties the record": Fault(
        "solve", "AttributeError", *before(SCORE, "transcript.clear()")
    ),
    "a score that raises": Fault(
        "exploits", "IndexError", *before(SCORE, "if not transcript[-1].content:", "    pass")
    ),
    "a score that is no verdict": Fault(
        "anything",
        "Score",
        *before(SCORE, "if 'yes' in [each.content for each in transcript]:", "    return 1.0"),
    ),
    "a malformed record that is right": Fault(
        "anything", "no episode", *part("if place % 2 == 1 and", "place % 2 == 1 and", "False and")
    ),
    "a reply that raises": Fault(
        "anything",
        "IndexError",
        *before("        if asked[-1] != (ASK,):", "digits[len(asked[-1][0].name) - 4]"),
    ),
    "an episode without end": Fault(
        "anything",
        "goes on",
        *before(OVER, "if transcript[-1].content == 'yes':", "    return Message('user', '')"),
    ),
    "another task's demonstration": Fault(
        "demonstrations", "reply gives", *before(SHOWN, "task = self.task(split, index + 1)")
    ),
    "a wrong demonstration": Fault(
        "demonstrations", "scores wrong", *part(BARE, "task.answer", '"?"')
    ),
    "a thought where none was asked for": Fault(
        "demonstrations", "has reasoning", *part(BARE, "task.answer", 'task.answer, ""')
    ),
    "a longest transcript that is not": Fault(
        "demonstrations", "longest_transcript", '"0" * self.config.most', '"000"'
    ),
    "an empty text": Fault(
        "demonstrations", "text", *before("        sums = transcript[-1].reasoning", 'return ""')
    ),
}

DEADLINES = {
    "a score that never returns": Fault("deadline", "score of", *before(RIGHT, "while True: pass")),
    "a reply that waits": Fault(
        "deadline", "reply of", *before(GIVE, "__import__('time').sleep(60)")
    ),
    "a file that never ends": Fault("deadline", "running", *before("ASK = ", "while True: pass")),
    "a process that ends": Fault(
        "deadline", "exit code 3", *before(GIVE, "__import__('os')._exit(3)")
    ),
}

IMPURE = {
    "a verdict by the order of sets": Fault(
        "pure", "score of", 'Score("right", "the sum")', 'Score("right", str({"the", "sum", "is"}))'
    ),
    "tasks by the order in which they are drawn": Fault(
        "pure",
        "task of",
        DRAW,
        "memo = self.__dict__.setdefault('memo', {})\n"
        "        number = memo.setdefault((split, index, attempt), len(memo))",
    ),
    "a verdict by the calls before": Fault(
        "pure",
        "score of",
        *before(
            RIGHT,
            "self.calls = getattr(self, 'calls', 0) + 1",
            "return Score('right', str(self.calls))",
        ),
    ),
}

UNDECLARED = """
from xushi.base.messages import Message
from xushi.envs import DigitSum


class Counting(DigitSum):
    def reply(self, task, transcript):
        if len(transcript) == 2 and transcript[-1].content == "yes":
            return Message("tool", "no")
        return super().reply(task, transcript)
"""


def broken(fault: Fault) -> str:
    assert SOUND.count(fault.line) == 1, f"the fault has one place, not {SOUND.count(fault.line)}"
    return SOUND.replace(fault.line, fault.instead)


def write(folder: Path, source: str) -> Path:
    (folder / "game.py").write_text(source, encoding="utf-8")
    return folder


def found_here(folder: Path, source: str) -> dict[str, dict[str, Any]]:
    """What the proofs tell, run in this process: for faults that need no other."""
    out = io.StringIO()
    main("game.py:Counting", str(write(folder, source)), out, 200)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert lines[-1] == {"end": True}
    return {line["promise"]: line for line in lines if "promise" in line}


def check(folder: Path, source: str, seconds: float = 20.0) -> list[Finding]:
    return check_environment("game.py:Counting", write(folder, source), seconds, 30)


def test_the_environment_that_ships_keeps_every_promise(tmp_path: Path) -> None:
    findings = check_environment("digit_sum", tmp_path)
    assert [finding.promise for finding in findings] == NAMES
    assert kept(findings), as_lines(findings)


def test_an_environment_of_several_turns_keeps_every_promise(tmp_path: Path) -> None:
    """What it prints disturbs nothing."""
    noisy = SOUND.replace(RIGHT, f"        print('x' * 1000)\n{RIGHT}")
    findings = check(tmp_path, noisy)
    assert kept(findings), as_lines(findings)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    found = found_here(tmp_path, broken(fault))
    line = found[fault.promise]
    assert not line["ok"] and fault.message in line["text"] + line["remedy"], line
    assert line["text"] and line["remedy"]
    before = PROMISES[: PROMISES.index(fault.promise)]
    assert all(found[promise]["ok"] for promise in before), found


def test_a_second_process_that_is_late_is_told_so(tmp_path: Path) -> None:
    slow = "__import__('os').environ['PYTHONHASHSEED'] == '2' and __import__('time').sleep(60)"
    finding = check(tmp_path, broken(Fault("pure", "", *before(RIGHT, slow))), 2.0)[-1]
    assert (finding.promise, finding.state) == ("pure", "broken")
    assert finding.text.startswith("in a second process score of ")
    assert finding.text.endswith("took more than 2 s and was stopped")
    assert "return at once" in finding.remedy


@pytest.mark.parametrize("name", [*DEADLINES, *IMPURE])
def test_a_fault_is_caught_from_outside(name: str, tmp_path: Path) -> None:
    """The process that hangs or ends is another one, and so is the one to compare with."""
    fault = {**DEADLINES, **IMPURE}[name]
    findings = check(tmp_path, broken(fault), 2.0 if name in DEADLINES else 20.0)
    found = {finding.promise: finding for finding in findings}
    assert list(found) == NAMES and not kept(findings)
    assert found[fault.promise].state == "broken", as_lines(findings)
    assert fault.message in found[fault.promise].text and found[fault.promise].remedy
    others = {finding.state for finding in findings if finding.promise != fault.promise}
    assert "broken" not in others, as_lines(findings)
    assert ("not reached" in others) == (name in DEADLINES)


def test_an_observation_of_an_undeclared_tool_is_caught(tmp_path: Path) -> None:
    assert "declares no tools" in found_here(tmp_path, UNDECLARED)["anything"]["text"]


def test_a_tool_that_fails_on_an_argument_of_another_type_is_caught(tmp_path: Path) -> None:
    """A model gives a declared parameter any value; the episode must go on."""
    source = SOUND.replace('"properties": {}', '"properties": {"step": {"type": "integer"}}')
    line, instead = before(
        "        if asked[-1] != (ASK,):",
        "step = json.loads(asked[-1][0].arguments or 'null')",
        "step = step.get('step', 1) + 1 if isinstance(step, dict) else 1",
    )
    source = source.replace(line, instead.replace("json.loads", "__import__('json').loads"))
    broken_ones = [finding for finding in check(tmp_path, source) if finding.state == "broken"]
    assert [finding.promise for finding in broken_ones] == ["anything"]


def test_what_is_broken_is_told_with_its_task(tmp_path: Path) -> None:
    source = SOUND.replace(
        RIGHT, RIGHT.replace('"right"', '"right" if task.index < 3 else "wrong"')
    )
    assert "solve of train task 3 scores wrong" in found_here(tmp_path, source)["solve"]["text"]


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    """It keeps the contract, and the page shows what the check says of it."""
    page = Path(__file__).parents[2].joinpath("docs", "envs.md").read_text(encoding="utf-8")
    source = page.split("```python\n")[1].split("```")[0]
    write(tmp_path, source)
    findings = check_environment("game.py:Reverse", tmp_path)
    assert as_lines(findings) in page


def test_a_file_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        check_environment("nothing.py:Counting", tmp_path)


@pytest.mark.parametrize("name", ["", "an empty card"])
def test_the_command(name: str, tmp_path: Path) -> None:
    """One line for each promise, what to do where one is broken, and exit code 1."""
    write(tmp_path, broken(FAULTS[name]) if name else SOUND)
    command = [sys.executable, "-m", "xushi", "env", "check", "game.py:Counting"]
    options = ["--json"] if name else []
    printed = subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert printed.returncode == (1 if name else 0) and not printed.stderr
    if name:
        table = json.loads(printed.stdout)
        assert not table["kept"] and table["promises"][0]["state"] == "broken"
        assert [promise["promise"] for promise in table["promises"]] == NAMES
    else:
        lines = printed.stdout.splitlines()
        assert [line.split()[:2] for line in lines] == [["ok", promise] for promise in NAMES]


def test_a_card_in_chinese_is_as_whole_as_the_other() -> None:
    card = DigitSum().card()
    _check_card(card)
    _check_card(replace(card, chinese=None))
    for broken, problem in (
        (replace(card, can=""), "leaves can empty"),
        (replace(card, chinese=replace(card, can="")), "leaves chinese.can empty"),
        (replace(card, chinese={"can": "x"}), "gave"),
        (None, "gave None"),
    ):
        with pytest.raises(Broken, match=problem):
            _check_card(broken)
