"""The command `retriever`, and `python -m retriever`."""

import os
import sys

from retriever.utils.own_packages import HOME, PackageClash


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from retriever.cli.command_line import main
    except PackageClash as error:
        print(f"retriever: {error}", file=sys.stderr)
        return 1
    return main()


def _leave_working_directory() -> None:
    """Take the working directory off the path, where `python -m` puts it first.

    A file or folder there that is named like a library would be imported in its place. It stays where this project
    itself lies in it, which need not be installed then.
    """
    first = os.path.realpath(sys.path[0])
    if not sys.flags.safe_path and first == os.path.realpath(os.getcwd()) != HOME:
        del sys.path[0]
        # For processes that are started from here.
        os.environ["PYTHONSAFEPATH"] = "1"


if __name__ == "__main__":
    _leave_working_directory()
    sys.exit(main())
