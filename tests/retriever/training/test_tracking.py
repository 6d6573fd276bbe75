"""Trackers receive the rows of a run in their offline modes, and the plot shows them."""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from index.files import InputError
from retriever.config.run import TrainConfig
from retriever.training.tracking import plot
from retriever.training.tracking.plot import PANELS, Panel, plot_run
from retriever.training.tracking.run_log import RunLog
from retriever.training.tracking.trackers import Tracker, Trackers, check_trackers, open_trackers

SETTINGS = {"optim.lr": 2e-5, "optim.betas": (0.9, 0.999), "loss.name": "inf_cl"}
ROWS: list[dict[str, Any]] = [
    {"step": 0, "dev_ndcg@10": 0.2, "dev_ndcg@10_low": 0.1, "dev_ndcg@10_high": 0.3},
    {"step": 1, "loss": 2.0, "lr": 1e-5, "grad_norm": None, "logit_scale": 20.0},
    {"step": 2, "loss": 1.0, "lr": 2e-5, "grad_norm": 0.5, "logit_scale": 20.0},
    {"step": 2, "dev_ndcg@10": 0.4, "dev_ndcg@10_low": 0.3, "dev_ndcg@10_high": 0.5},
]


def write_run(folder: Path, tracker: str) -> None:
    """Write the rows in two parts, as a run that was interrupted after step 1 does."""
    folder.mkdir(exist_ok=True)
    for step, dev_step, rows in ((0, -1, ROWS[:2]), (1, 0, ROWS[2:])):
        log = RunLog(folder, step=step, dev_step=dev_step, trackers=[tracker], settings=SETTINGS)
        for row in rows:
            log.write(row)
        log.close()


def test_wandb_writes_rows_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", "wandb")
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    # Both parts have the same id.
    assert files and len({file.name for file in files}) == 1
    content = b"".join(file.read_bytes() for file in files)
    assert b"dev_ndcg@10" in content and b"optim.lr" in content


def test_mlflow_writes_rows_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    write_run(tmp_path / "run", "mlflow")
    client = tracking.MlflowClient()
    experiment = client.get_experiment_by_name("dense-retriever")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["optim.betas"] == "(0.9, 0.999)"
    history = client.get_metric_history(run.info.run_id, "dev_ndcg_at_10")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.2), (2, 0.4)]
    # In milliseconds: MLflow's charts have an axis of time.
    assert all(abs(metric.timestamp / 1000 - time.time()) < 300 for metric in history)


def test_trackio_writes_rows_to_its_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("trackio.utils")
    monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    write_run(tmp_path / "run", "trackio")
    with sqlite3.connect(tmp_path / "dense-retriever.db") as database:
        runs = database.execute("SELECT DISTINCT run_name FROM metrics").fetchall()
        values = [row[0] for row in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    assert len(runs) == 1 and len(values) == len(ROWS) and b"0.4" in bytes(values[-1])


def test_a_missing_or_failing_tracker_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'wandb is not installed: pip install "dense-retriever\[wandb\]"'):
        check_trackers(TrainConfig(track=("wandb",)).trackers)
    monkeypatch.undo()

    class Failing(Tracker):
        def log(self, values: Any, step: int) -> None:
            raise ConnectionError("no answer")

        def close(self) -> None:
            raise AssertionError("closed after it failed")

    trackers = Trackers({"remote": Failing()})
    with caplog.at_level(logging.WARNING, "retriever"):
        trackers.log(ROWS[1])
        trackers.close()
    assert "remote failed and gets no more rows: no answer" in caplog.text
    if pytest.importorskip("mlflow"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "nothing://here")
        with pytest.raises(InputError, match="track: mlflow does not start"):
            open_trackers(["mlflow"], tmp_path, 0, {})


def test_tensorboard_true_is_a_tracker() -> None:
    assert TrainConfig(tensorboard=True, track=("wandb", "tensorboard")).trackers == ("wandb", "tensorboard")
    assert TrainConfig(tensorboard=True).trackers == ("tensorboard",)


def test_labels_of_a_logarithmic_axis_are_numbers() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    plot._draw(ax, Panel("Norm", ("x",), log_scale=True), {"x": [{"step": 1, "x": 0.5}, {"step": 2, "x": 30.0}]})
    ax.figure.canvas.draw()
    labels = [label.get_text() for label in ax.yaxis.get_majorticklabels() + ax.yaxis.get_minorticklabels()]
    assert "10" in labels and not any("$" in label for label in labels)


def test_the_plot_has_a_panel_for_each_kind_of_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    monkeypatch.setattr(plot, "MIN_ROWS", 3)
    sizes = []
    # Further panels need no more than their keys.
    for panels in ([*PANELS, Panel("Other", ("dev_*",))], PANELS[:1]):
        assert plot_run(ROWS, tmp_path / "metrics.png", panels)
        with Image.open(tmp_path / "metrics.png") as image:
            sizes.append(image.size)
            assert len(set(image.convert("L").tobytes())) > 10
    assert sizes[0][0] > 2 * sizes[1][0] and sizes[0][1] > sizes[1][1]
    assert not plot_run(ROWS[:2], tmp_path / "none.png") and not (tmp_path / "none.png").exists()
