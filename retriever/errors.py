"""Errors that the command line prints as one line."""

from __future__ import annotations

from index.files import InputError


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


def check_at_least(minimum: float, **arguments: float | None) -> None:
    """Raise an ArgumentError for the first argument below `minimum`; None is accepted."""
    for name, value in arguments.items():
        if value is not None and value < minimum:
            raise ArgumentError(name, f"expected at least {minimum}, found {value}")


def check_choice(choices: tuple[str, ...], **arguments: str) -> None:
    """Raise an ArgumentError for the first argument that is not one of the choices."""
    for name, value in arguments.items():
        if value not in choices:
            raise ArgumentError(name, f"expected one of {', '.join(choices)}, found {value!r:.60}")
