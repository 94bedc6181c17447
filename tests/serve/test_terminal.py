import io
import json
import shutil
import signal

import pytest

from xushi.base.defaults import TOP_P
from xushi.base.errors import BadInput, XushiError
from xushi.base.messages import Message
from xushi.engine import LLM, Delta, SamplingParams
from xushi.serve import ModelCard, chat
from xushi.serve import terminal as terminal_module
from xushi.serve.terminal import NO_ANSWER, Terminal

from ..miniature import xushi_here


class Told:
    """Stands for a model: answers from a list, and what it was asked."""

    context = 128

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def stream_chat(self, messages, params):
        self.asked.append((list(messages), params))
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return iter([Delta(*part) for part in answer])

    def stream(self, text, params):
        return self.stream_chat([text], params)

    def conversation_ids(self, messages):
        return "".join(f"[{message.content}]" for message in messages)


THOUGHT = [("reasoning", "8 1"), ("content", "9")]


@pytest.fixture
def terminal(run_directory, monkeypatch):
    """A function that makes a terminal whose models give the answers."""

    def make(*answers, **options):
        model = Told(*answers)
        monkeypatch.setattr(Terminal, "_load", lambda *_: model)
        made = Terminal(run_directory, **options)
        made.model = model
        return made

    return make


def contents(terminal, place=-1):
    return [message.content for message in terminal.model.asked[place][0]]


def type_in(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_one_question_gives_the_answer_alone(run_directory, capsys):
    llm = LLM(run_directory / "export" / "reasoning")
    params = SamplingParams(24, temperature=0.7, top_p=TOP_P, seed=1)
    messages = [Message("system", "数"), Message("user", "是")]
    answer = llm.chat(messages, params)
    assert answer.content and answer.reasoning_content  # else this tests nothing
    options = {"temperature": 0.7, "max_tokens": 24, "seed": 1, "system": "数"}
    assert chat(run_directory, "是", **options) == 0
    out, err = capsys.readouterr()
    assert out == plain(answer.content) + "\n"
    assert err == plain(answer.reasoning_content) + "\n"


def plain(text):
    return "".join(
        c if c.isprintable() or c in "\t\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def test_the_command_takes_a_question(run_directory, capsys):
    arguments = [
        "是",
        "--seed",
        "1",
        "--max-tokens",
        "24",
        "--temperature",
        "0.7",
        "--system",
        "数",
    ]
    done = xushi_here("chat", run_directory, *arguments)
    chat(run_directory, "是", temperature=0.7, max_tokens=24, seed=1, system="数")
    assert (done.returncode, done.stdout) == (0, capsys.readouterr().out)
    done = xushi_here("chat", run_directory, "12", "--max-tokens", "0")
    assert (done.returncode, done.stdout) == (2, "") and "max_tokens is 0" in done.stderr


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"max_tokens": 0}])
def test_options_are_checked_before_a_model_is_loaded(run_directory, options):
    with pytest.raises(BadInput, match=f"{next(iter(options))} is"):
        chat(run_directory, "12", **options)


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_refused(run_directory, question):
    with pytest.raises(BadInput, match="the question is empty"):
        chat(run_directory, question)


def test_a_question_is_never_a_command(terminal):
    made = terminal(THOUGHT)
    made.ask("/clear")
    assert contents(made) == ["/clear"]


def test_piped_lines_are_questions_of_one_conversation(
    terminal, run_directory, monkeypatch, capsys
):
    made = terminal(THOUGHT, [("reasoning", "7")], BadInput("a", "b"), [("content", "two\nlines")])
    type_in(monkeypatch, "12\r\n\n34\n56\n78")
    assert chat(run_directory) == BadInput.exit_code
    out, err = capsys.readouterr()
    # Each question has its line; the second and the third have no answer.
    assert out == "9\n\n\ntwo\nlines\n"
    assert err == "8 1\n7\n(the model ended without an answer)\nerror: a\nb\n"
    # What has no answer does not stay in the conversation.
    assert contents(made) == ["12", "9", "78"]


def test_the_exit_code_of_a_pipe_tells_of_an_empty_answer(terminal, run_directory, monkeypatch):
    terminal([("reasoning", "7")], THOUGHT)
    type_in(monkeypatch, "12\n34\n")
    assert chat(run_directory) == NO_ANSWER
    terminal(THOUGHT)
    type_in(monkeypatch, "12\n/quit\n34\n")
    assert chat(run_directory) == 0


@pytest.mark.parametrize(
    ("value", "problem"),
    [({"top_p": 0}, "top_p is 0"), ({"temperature": "0.6"}, "temperature is '0.6'")],
)
def test_a_wrong_value_of_the_directory_names_its_file(run_directory, tmp_path, value, problem):
    shutil.copytree(run_directory / "export" / "base", tmp_path / "m")
    file = tmp_path / "m" / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, **value}))
    with pytest.raises(BadInput) as refused:
        chat(tmp_path / "m", "12")
    assert refused.value.problem == f"{file}: sampling parameter {problem}"
    assert refused.value.remedy.startswith("correct it there: give ")


def test_a_prompt_that_is_too_long(run_directory, monkeypatch, capsys):
    type_in(monkeypatch, "数" * 500 + "\n12\n")
    assert chat(run_directory, seed=1) != 0
    out, err = capsys.readouterr()
    assert "context holds 128" in err and out.startswith("\n") and "context" not in out


def test_input_that_is_not_text(run_directory, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    with pytest.raises(BadInput, match="not UTF-8"):
        chat(run_directory)


def test_output_that_lacks_a_character(terminal, run_directory, monkeypatch):
    terminal([("content", "数9")])
    written = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr("sys.stdout", written)
    assert chat(run_directory, "12") == 0
    assert written.buffer.getvalue() == b"?9\n"


def test_a_run_with_only_a_base_completes(run_directory, tmp_path, monkeypatch, capsys):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "base").symlink_to(run_directory / "export" / "base")
    type_in(monkeypatch, "import os")
    assert chat(tmp_path, seed=3, max_tokens=5) == 0
    params = SamplingParams(5, temperature=0.6, top_p=TOP_P, seed=3)
    [completion] = LLM(tmp_path / "export" / "base").generate("import os", params)
    assert capsys.readouterr().out == plain(completion.text) + "\n"
    with pytest.raises(BadInput, match="no system message"):
        chat(tmp_path, "import os", system="Be brief.")


def test_a_run_without_exports(tmp_path):
    with pytest.raises(XushiError, match="holds no model"):
        chat(tmp_path)


def test_retry_asks_the_last_question_again_with_another_seed(terminal):
    made = terminal(THOUGHT, [("reasoning", "")], [("content", "5")], THOUGHT, seed=4)
    made.turn("12")
    made.turn("12")  # has no answer, so the first one stays
    made.turn("/retry")
    assert contents(made) == ["12", "9", "12"]
    made.turn("/retry")
    assert contents(made) == ["12", "9", "12"]
    seeds = [params.seed for _, params in made.model.asked]
    assert seeds[0] == 4 and len(set(seeds)) == 4


def test_retry_continues_the_last_text_again(terminal):
    made = terminal(THOUGHT, [("content", "ab")], [("content", "cd")])
    made.turn("12")
    made.turn("/base import")
    made.turn("/retry")
    assert made.model.asked[1][0] == made.model.asked[2][0] == ["import"]


def test_the_commands(terminal, capsys):
    made = terminal(*[THOUGHT] * 6, interactive=True)
    assert made.turn("/system Be brief.") and made.turn("12")
    assert contents(made) == ["Be brief.", "12"]
    assert made.turn("/clear") and made.turn("/retry")
    assert "there is no question to answer again" in capsys.readouterr().out
    assert made.turn("34") and contents(made) == ["Be brief.", "34"]
    assert made.turn("/system") and made.turn("56") and contents(made) == ["34", "9", "56"]
    assert made.turn("/help")
    told = capsys.readouterr().out
    commands = ("/help", "/clear", "/retry", "/system", "/base", "/quit")
    assert all(command in told for command in commands)
    assert made.turn("/ask 12")
    assert "there is no command /ask" in capsys.readouterr().out
    assert len(made.model.asked) == 3
    for text in (" /ask", "/usr/bin", "//"):
        assert made.turn(text) and contents(made)[-1] == text
    assert not made.turn("/quit")


def test_a_long_conversation_loses_its_beginning_and_says_so_once(terminal, capsys):
    made = terminal(*[[("content", "a" * 20)]] * 6, system="sys")
    for number in range(6):
        made.turn(f"{number}" * 20)
    # 5 for the system message, and 22 for each message: 96 of 128 hold four of them.
    assert contents(made) == ["sys", "4" * 20, "a" * 20, "5" * 20]
    assert capsys.readouterr().err.count("no longer sees its beginning") == 1
    with pytest.raises(ValueError, match="9"):  # one long question is not cut
        made.model.answers.append(ValueError("9"))
        made.turn("9" * 200)
    assert contents(made) == ["sys", "9" * 200]


def test_control_c_stops_the_answer_and_escapes_never_reach_the_screen(run_directory, capsys):
    def deltas():
        yield Delta("reasoning", "\x1b]0;title\x07think")
        yield Delta("content", "one\ttwo\n")
        signal.raise_signal(signal.SIGINT)
        yield Delta("content", "three")
        yield Delta("content", "four")

    before = signal.getsignal(signal.SIGINT)
    assert Terminal(run_directory, interactive=True)._show(deltas()) == "one\ttwo\nthree"
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().out == "�]0;title�think\none\ttwo\nthree\n(stopped)\n"
    with pytest.raises(KeyboardInterrupt):  # where nobody can ask the next question
        Terminal(run_directory)._show(deltas())
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().out == "one\ttwo\nthree\n"


class Keyboard(io.StringIO):
    def isatty(self):
        return True


def test_control_c_at_the_prompt_does_not_end_the_chat(
    terminal, run_directory, monkeypatch, capsys
):
    made = terminal(THOUGHT, KeyboardInterrupt(), THOUGHT)
    typed = iter(["12", KeyboardInterrupt(), "34", "", "56", EOFError()])

    def read(prompt):
        assert prompt == "> "
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", Keyboard())
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert chat(run_directory) == 0
    assert contents(made) == ["12", "9", "56"] and len(made.model.asked) == 3
    assert "\x1b[2m8 1\x1b[22m\n9\n" in capsys.readouterr().out


def test_the_greeting_says_what_each_model_can_do(run_directory, capsys):
    Terminal(run_directory, interactive=True).greet()
    out = capsys.readouterr().out
    assert "It adds digits." in out
    assert "/help" in out and "83514927" in out


def test_a_model_that_only_continues_a_text_says_so(run_directory, capsys):
    """Also where it is asked once; the text alone is on standard output."""
    chat(run_directory / "export" / "base", "12", max_tokens=3, seed=1)
    printed = capsys.readouterr()
    assert "base has no chat template: it continues your text." in printed.err
    assert "template" not in printed.out
    chat(run_directory, "12", max_tokens=3, seed=1)
    assert "template" not in capsys.readouterr().err


def test_a_template_leaves_the_model_that_continues_texts(run_directory, tmp_path, capsys):
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}")
    made = Terminal(run_directory, template=template)
    assert (made._chatting, made._completing) == ("reasoning", "base")
    alone = Terminal(run_directory / "export" / "reasoning")
    alone.turn("/base x")
    assert "there is no model here that only completes text" in capsys.readouterr().err


def test_a_model_that_a_template_lets_chat_does_not_continue_texts_too(
    run_directory, tmp_path, capsys
):
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}")
    base = run_directory / "export" / "base"
    made = Terminal(base, template=template, load=lambda _: pytest.fail("loaded"))
    assert made.chats and made.turn("/base 12")
    assert "there is no model here that only completes text" in capsys.readouterr().err


def test_a_downloaded_card_cannot_move_the_cursor(run_directory, monkeypatch, capsys):
    card = ModelCard(title="\x1b]0;owned\x07\x1b[2J", example="\x1b[2J")
    monkeypatch.setattr(terminal_module, "read_card", lambda name, path: card)
    Terminal(run_directory).greet()
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err and "owned" in printed.out + printed.err
