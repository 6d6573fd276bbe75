"""Help texts show the names that are documented."""

from __future__ import annotations

from cli_helpers import command


def test_the_older_name_of_a_flag_is_accepted_but_not_shown() -> None:
    assert "--pictures" not in command("serve", "--help").out
    for flag in (["--pictures", "x"], ["--pictures=x"]):
        outcome = command("serve", "--model", "acme/none", "--index", "nothing", *flag)
        assert outcome.code == 1 and "nothing" in outcome.err and "pictures" not in outcome.err
