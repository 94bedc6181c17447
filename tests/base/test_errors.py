"""The exception a user sees."""

from xushi.base.errors import XushiError


def test_two_lines_and_an_exit_code():
    error = XushiError("what and where", "what to do")
    assert str(error) == "what and where\nwhat to do"
    assert (error.problem, error.remedy, error.exit_code) == ("what and where", "what to do", 2)
    assert XushiError("a", "b", 1).exit_code == 1
