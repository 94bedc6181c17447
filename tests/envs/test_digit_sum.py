"""Digit sums: the answer by another way, splits that cannot overlap, a verifier that cannot be
talked round.
"""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from xushi.base.errors import XushiError
from xushi.base.messages import Message, ToolCall
from xushi.envs import SPLITS, DigitSum, DigitSumConfig
from xushi.envs.digit_sum import running_sums
from xushi.envs.environment import split_of

ENVIRONMENT = DigitSum(DigitSumConfig(min_digits=4, max_digits=10))
tasks = st.builds(ENVIRONMENT.task, st.sampled_from(SPLITS), st.integers(0, 10**6))


def answered(task, content, reasoning=None):
    return ENVIRONMENT.score(
        task, [Message("user", task.prompt), Message("assistant", content, reasoning)]
    ).verdict


@given(tasks)
def test_the_answer_is_the_digit_sum(task):
    assert task.answer == str(sum(int(digit) for digit in task.prompt) % 10)
    assert (
        task.prompt.isascii()
        and task.prompt.isdigit()
        and task.details == {"digits": len(task.prompt)}
    )
    assert 4 <= len(task.prompt) <= 10


def test_the_example_of_the_documentation():
    assert running_sums("83514927") == "81671029"


@given(st.text("0123456789", min_size=2))
def test_running_sums_are_prefix_sums(digits):
    assert running_sums(digits) == "".join(
        str(sum(map(int, digits[: end + 1])) % 10) for end in range(len(digits))
    )


@given(tasks)
def test_the_reference_solution_is_right_and_every_exploit_is_not(task):
    assert ENVIRONMENT.score(task, ENVIRONMENT.solve(task)).verdict == "right"
    verdicts = [
        (ENVIRONMENT.score(task, transcript).verdict, transcript)
        for transcript in ENVIRONMENT.exploits(task)
    ]
    assert len(verdicts) > 40 and not [
        transcript for verdict, transcript in verdicts if verdict == "right"
    ]


@given(
    tasks,
    st.text(max_size=4) | st.text("0123456789 \n.９", max_size=3),
    st.none() | st.text(max_size=12),
)
def test_nothing_but_the_digit_is_right(task, content, reasoning):
    assert (answered(task, content, reasoning) == "right") == (content == task.answer)


@given(tasks)
def test_of_ten_digits_one_is_right_whatever_was_thought(task):
    verdicts = [answered(task, str(digit), "nonsense") for digit in range(10)]
    assert Counter(verdicts) == {"right": 1, "wrong": 9}


@given(tasks, tasks)
def test_a_record_of_another_task_is_an_error(task, other):
    verdict = ENVIRONMENT.score(other, ENVIRONMENT.solve(task)).verdict
    assert verdict == ("right" if task.prompt == other.prompt else "error")


@pytest.mark.parametrize(
    "roles",
    [
        [],
        ["user"],
        ["assistant"],
        ["user", "user"],
        ["assistant", "user"],
        ["user", "tool"],
        ["user", "assistant", "user"],
    ],
)
def test_malformed_records_are_errors(roles):
    task = ENVIRONMENT.task("test", 0)
    score = ENVIRONMENT.score(
        task, [Message(role, task.prompt if role == "user" else task.answer) for role in roles]
    )
    assert score.verdict == "error" and score.reason


def test_an_unfinished_thought_is_wrong():
    task = ENVIRONMENT.task("test", 0)
    assert answered(task, "", running_sums(task.prompt)) == "wrong"


def test_an_episode_is_one_turn():
    task = ENVIRONMENT.task("train", 3)
    question = ENVIRONMENT.reply(task, ())
    assert question == Message("user", task.prompt)
    for content in (task.answer, "nonsense", ""):
        assert ENVIRONMENT.reply(task, [question, Message("assistant", content)]) is None


@pytest.mark.parametrize("question", [{"reasoning": "12"}, {"reasoning": ""}, {"content": "12"},
                                      {"role": "system"}, {"tool_calls": (ToolCall("sum", "{}"),)}])  # fmt: skip
def test_only_the_question_that_was_asked_is_scored(question):
    """The right answer to a question with a thought in it, to another one, or to none."""
    task = ENVIRONMENT.task("test", 0)
    asked = replace(Message("user", task.prompt), **question)
    score = ENVIRONMENT.score(task, [asked, Message("assistant", task.answer)])
    assert score.verdict == "error"


def test_a_call_of_a_tool_is_no_answer():
    task = ENVIRONMENT.task("test", 0)
    called = Message("assistant", task.answer, tool_calls=(ToolCall("sum", "{}"),))
    assert ENVIRONMENT.score(task, [Message("user", task.prompt), called]).verdict == "wrong"


def test_splits_share_no_instance():
    # Short strings, so that instances repeat: 11,000 draws out of 1,100 instances.
    environment = DigitSum(DigitSumConfig(min_digits=2, max_digits=3))
    seen = {
        split: {environment.task(split, index).prompt for index in range(count)}
        for split, count in zip(SPLITS, (9_000, 1_000, 1_000), strict=True)
    }
    assert sum(map(len, seen.values())) == len(set().union(*seen.values()))
    assert all(
        split_of("digit_sum", 1, prompt) == split for split in SPLITS for prompt in seen[split]
    )
    assert len(seen["validation"]) > 90 and len(seen["test"]) > 90 and len(seen["train"]) > 800


@pytest.mark.parametrize("digits", [2, 3])
def test_every_length_has_instances_in_every_split(digits):
    prompts = [f"{number:0{digits}}" for number in range(10**digits)]
    assert set(Counter(split_of("digit_sum", 1, prompt) for prompt in prompts)) == set(SPLITS)


def test_splits_have_their_shares():
    """To half a percentage point: 11 % in place of 10 would be seen."""
    counts = Counter(split_of("digit_sum", 1, f"{number:06}") for number in range(100_000))
    assert counts["validation"] == pytest.approx(10_000, abs=400)
    assert counts["test"] == pytest.approx(10_000, abs=400)


def test_digits_lengths_and_answers_are_even():
    drawn = [ENVIRONMENT.task("train", index) for index in range(7000)]
    lengths = Counter(len(task.prompt) for task in drawn)
    assert set(lengths) == set(range(4, 11)) and all(
        850 < count < 1150 for count in lengths.values()
    )
    assert all(600 < count < 800 for count in Counter(task.answer for task in drawn).values())
    assert all(600 < count < 800 for count in Counter(task.prompt[0] for task in drawn).values())


def test_tasks_are_the_same_in_another_process():
    script = (
        "from xushi.envs import DigitSum, DigitSumConfig\n"
        "e = DigitSum(DigitSumConfig(min_digits=4, max_digits=10))\n"
        "print([e.task(s, i).prompt for s in ('train', 'validation', 'test') for i in (9, 0, 4)])\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONHASHSEED": "7", "PATH": ""},
    ).stdout
    assert printed.strip() == str(
        [ENVIRONMENT.task(split, index).prompt for split in SPLITS for index in (9, 0, 4)]
    )


def test_tasks_stay_what_they_are():
    # A change here changes every recorded score: raise DigitSum.version with it.
    assert [DigitSum().task(split, 0).prompt for split in SPLITS] == [
        "39690666",
        "25302652",
        "67518238",
    ]


def test_longer_lengths_are_other_tasks_of_the_same_environment():
    longer = DigitSum(DigitSumConfig(min_digits=12, max_digits=16))
    task = longer.task("test", 0)
    assert (
        12 <= len(task.prompt) <= 16 and longer.score(task, longer.solve(task)).verdict == "right"
    )


def test_demonstrations():
    share = [ENVIRONMENT.demonstration("train", index, 0.2) for index in range(2000)]
    thinking = [answer for _, answer in share if answer.reasoning is not None]
    assert len(thinking) == pytest.approx(400, rel=0.15)
    for index, (question, answer) in enumerate(share[:200]):
        task = ENVIRONMENT.task("train", index)
        assert ENVIRONMENT.score(task, [question, answer]).verdict == "right"
        assert answer.reasoning in (None, running_sums(task.prompt))
    assert all(ENVIRONMENT.demonstration("train", index, 1.0)[1].reasoning for index in range(50))
    assert not any(
        ENVIRONMENT.demonstration("train", index, 0.0)[1].reasoning for index in range(50)
    )


def test_text():
    worked = [Message("user", "83514927"), Message("assistant", "9", "81671029")]
    assert ENVIRONMENT.text(worked) == "83514927:81671029=9\n"
    assert ENVIRONMENT.text([worked[0], Message("assistant", "9")]) == "83514927=9\n"


def test_text_keeps_every_digit_a_token():
    from xushi.tokenizer import Tokenizer

    text = "".join(
        ENVIRONMENT.text(ENVIRONMENT.demonstration("train", index, 0.5)) for index in range(300)
    )
    tokenizer = Tokenizer.train([text + "x = 1\nprint(x)\n" * 50], 270)
    line = ENVIRONMENT.text(ENVIRONMENT.demonstration("test", 0, 1.0))
    assert [tokenizer.token_bytes(token).decode() for token in tokenizer.encode(line)] == list(line)


def test_the_longest_transcript_is_a_worked_answer_to_the_longest_number():
    question, answer = ENVIRONMENT.longest_transcript()
    assert len(question.content) == len(answer.reasoning) == 10 and len(answer.content) == 1
    assert answer == Message("assistant", answer.reasoning[-1], running_sums(question.content))


@pytest.mark.parametrize(
    ("least", "most", "lengths", "chinese_tasks"),
    [(8, 8, "8 digits", "8 位数"), (4, 10, "4 to 10 digits", "4 到 10 位数")],
)
def test_the_card_tells_the_lengths_and_asks_a_real_question(least, most, lengths, chinese_tasks):
    environment = DigitSum(DigitSumConfig(min_digits=least, max_digits=most))
    card = environment.card()
    assert card.tasks == f"numbers of {lengths}" and lengths in card.can and card.cannot
    assert least <= len(card.example) <= most and card.example.isdigit()
    chinese = card.chinese
    assert chinese.example == card.example and chinese.cannot and chinese.title
    assert chinese.tasks in chinese.can and chinese.tasks == chinese_tasks


@pytest.mark.parametrize(
    "config",
    [{"min_digits": 1}, {"min_digits": 9, "max_digits": 8}, {"min_digits": "4"}, {"digits": 4}],
)
def test_bad_configs(config):
    with pytest.raises(ValidationError):
        DigitSumConfig(**config)


@pytest.mark.parametrize("call", [
    lambda: ENVIRONMENT.task("dev", 0), lambda: ENVIRONMENT.task("train", -1),
    lambda: ENVIRONMENT.demonstration("train", 0, 1.5), lambda: ENVIRONMENT.demonstration("train", 0, float("nan")),
])  # fmt: skip
def test_bad_arguments_say_what_to_do(call):
    with pytest.raises(XushiError) as error:
        call()
    assert error.value.problem and error.value.remedy
