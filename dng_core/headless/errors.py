"""The one exception that the command line turns into a message instead of a traceback."""


class HeadlessError(Exception):
    """Something the user can act on: what went wrong, and what to do about it."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}\n{remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy
