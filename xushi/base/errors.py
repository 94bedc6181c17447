"""The exceptions that a user may see: what is wrong and where, and what to do about it."""


class XushiError(Exception):
    """Something the user can correct; raise one of the two subclasses.

    `problem` is one line that says what is wrong and where (file, key, line). `remedy` is one line
    that says what to do. The command line prints both and exits with `exit_code`.
    """

    exit_code: int

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n{remedy}")
        self.problem = problem
        self.remedy = remedy


class BadInput(XushiError):
    """The input is wrong: an argument, a recipe, a file that the user gave."""

    exit_code = 2


class Failed(XushiError):
    """The input may be right, but the work failed: a full disk, a damaged file, a lost process."""

    exit_code = 1
