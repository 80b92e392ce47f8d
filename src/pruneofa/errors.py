"""The two exceptions a user can cause; the CLI turns them into exit codes."""


class InputError(ValueError):
    """The user's input is wrong: one line that says what, got, wanted and what to do (exit code 2)."""


class CheckFailed(RuntimeError):  # noqa: N818 - it is a verdict, not a malfunction
    """A check was carried out and its answer is no (exit code 1)."""
