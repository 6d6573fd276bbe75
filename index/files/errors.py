"""Errors of the user's input, with messages of one line."""

from __future__ import annotations


class InputError(ValueError):
    """Something in the user's input is wrong.

    The message is one line that names the file (and the line in it), what was expected and what was found; the
    command line prints it without a traceback. Control characters of what was found are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escape_control(message))


class ConfigError(InputError):
    """An invalid setting. The command line exits with code 2."""


class ArgumentError(ConfigError):
    """An argument of a public function that is not valid.

    Attributes:
        argument: Name of the argument; the command line prints the flag of that name.
        problem: What was expected and what was found.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument}: {problem}")
        self.argument = argument
        self.problem = problem


def escape_control(text: str) -> str:
    """Escape the characters of a text that are not printable: line ends, terminal commands, lone surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
