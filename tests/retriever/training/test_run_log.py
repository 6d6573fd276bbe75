"""metrics.jsonl of a run that was killed while writing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from index.files import InputError
from retriever.training.tracking.run_log import RunLog


def test_rows_after_the_checkpoint_and_an_incomplete_last_row_are_removed(tmp_path: Path) -> None:
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3, 4)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join([*rows, '{"step": 5, "lo']))
    RunLog(tmp_path, step=2, dev_step=-1).close()
    assert file.read_text().splitlines() == rows[:2]
    file.write_text("\n".join([rows[0], '{"step": 2, "lo', *rows[2:]]))
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: expected JSON"):
        RunLog(tmp_path, step=4, dev_step=-1)


@pytest.mark.parametrize("step", ["x", None, [1], 1.5, True, {"a": 1}])
def test_a_row_whose_step_is_no_number_is_refused(tmp_path: Path, step: object) -> None:
    rows = [json.dumps({"step": step}), '{"step": 2}', '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:1: step: expected a whole number"):
        RunLog(tmp_path, step=4, dev_step=-1)
