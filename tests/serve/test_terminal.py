import io
import signal

import pytest

from xushi.base.errors import XushiError
from xushi.engine import Delta
from xushi.serve import chat
from xushi.serve.terminal import Terminal


def type_in(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_piped_lines_are_turns(run_directory, monkeypatch, capsys):
    type_in(monkeypatch, "12\n\n/base def f\n/new\n" + "数" * 500 + "\n34\n")
    chat(run_directory)
    out = capsys.readouterr().out
    assert "def f" in out
    assert "context holds 128" in out
    assert "\x1b" not in out
    assert "think>" not in out


def test_a_run_with_only_a_base_completes(run_directory, tmp_path, monkeypatch, capsys):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "base").symlink_to(run_directory / "export" / "base")
    type_in(monkeypatch, "import os")
    chat(tmp_path)
    assert capsys.readouterr().out.startswith("import os")


def test_a_run_without_exports(tmp_path):
    with pytest.raises(XushiError, match="holds no model"):
        chat(tmp_path)


def test_control_c_stops_the_answer_and_escapes_never_reach_the_screen(run_directory, capsys):
    def deltas():
        yield Delta("reasoning", "\x1b]0;title\x07think")
        yield Delta("content", "one\ttwo\n")
        signal.raise_signal(signal.SIGINT)
        yield Delta("content", "three")
        yield Delta("content", "four")

    before = signal.getsignal(signal.SIGINT)
    assert Terminal(run_directory)._show(deltas()) == "one\ttwo\nthree"
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().out == "�]0;title�think\none\ttwo\nthree (stopped)\n"


def test_the_greeting_says_what_each_model_can_do(run_directory, capsys):
    Terminal(run_directory).greet()
    out = capsys.readouterr().out
    assert "It adds digits." in out
    assert "/base TEXT" in out
