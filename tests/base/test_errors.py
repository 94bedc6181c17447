"""The exception a user sees."""

from xushi.base.errors import BadInput, Failed, XushiError


def test_two_lines_and_an_exit_code():
    error = BadInput("what and where", "what to do")
    assert str(error) == "what and where\nwhat to do"
    assert (error.problem, error.remedy, error.exit_code) == ("what and where", "what to do", 2)
    assert Failed("a", "b").exit_code == 1 and isinstance(error, XushiError)
