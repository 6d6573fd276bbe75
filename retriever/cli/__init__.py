"""The command line: a thin layer over the functions of this package."""

from retriever.cli.command_line import main

__all__ = ["main"]
