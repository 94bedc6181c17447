"""The one exception a user may see: what is wrong and where, and what to do about it."""


class XushiError(Exception):
    """Something the user can mend.

    `problem` is one line that says what is wrong and where (file, key, line); `remedy` is one line
    that says what to do. `exit_code` follows the command line's contract: 2 for bad input, 1 for a
    failure.
    """

    def __init__(self, problem: str, remedy: str, exit_code: int = 2) -> None:
        super().__init__(f"{problem}\n{remedy}")
        self.problem = problem
        self.remedy = remedy
        self.exit_code = exit_code
