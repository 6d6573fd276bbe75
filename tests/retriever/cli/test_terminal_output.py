"""What reaches a terminal, and what a log where there is none."""

from __future__ import annotations

import io

import pytest

from eval.reports.escaping import printable
from retriever.cli.commands.search import escaped
from retriever.cli.terminal import Terminal


def test_without_a_terminal_a_bar_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 30.0, 61.0, 62.0, 200.0, 300.0])
    monkeypatch.setattr("retriever.cli.terminal.time.monotonic", lambda: next(clock))
    with Terminal() as terminal, terminal.bar("encode", 1200, "passages") as advance:
        for _ in range(3):
            advance(100)
        advance(0, "noted by who prints lines")
        advance(100)
    assert capsys.readouterr().err == "encode  200/1,200 passages  3.3 passages/s  left 0:05:05\n"


def test_control_characters_of_passages_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\u202ec\n d\u200de\tü") == "a\ufffd[31mb\ufffd\ufffdc\n d\u200de\tü"


def test_control_characters_are_escaped_in_fields() -> None:
    assert escaped("a\x1b[31mb\u202ec\n\u2028d\u200de\tü\ue000") == "a\\x1b[31mb\\u202ec\\n\\u2028d\u200de\\tü\ue000"


def test_on_a_terminal_the_start_is_shown_until_there_is_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown()
    monkeypatch.setattr("sys.stderr", shown)
    with Terminal() as terminal:
        assert [task.description for task in terminal._bars.tasks] == ["loading libraries"]
        with terminal.bar("encode", 10, "passages"):
            assert [task.description for task in terminal._bars.tasks] == ["encode"]
        assert not terminal._bars.tasks
    assert "loading libraries" in shown.getvalue()
    with Terminal() as terminal:
        terminal.line("10 examples")
        assert not terminal._bars.tasks
    with Terminal():
        pass


class Shown(io.StringIO):
    """Standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True
