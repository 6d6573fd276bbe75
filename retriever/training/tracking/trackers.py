"""Trackers: services and programs that show the metrics of runs, all of them behind one interface.

The settings of each tracker are its own environment variables, such as WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI
and TRACKIO_DIR. The ids that trackers give to a run are kept in the run folder, so that a resumed run continues there.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from index.files import InputError, read_json, write_json

TRACKERS_FILE = "trackers.json"
"""File in the run folder: tracker -> id of the run."""
PROJECT = "dense-retriever"
"""Project or experiment where the environment names none."""

log = logging.getLogger("retriever")


class Tracker(ABC):
    """Receives the rows of metrics.jsonl."""

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the numbers of a row."""

    @abstractmethod
    def close(self) -> None:
        """Flush and end."""


class TensorBoard(Tracker):
    """Event files in the folder `tensorboard` of the run."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB(Tracker):
    """A run of Weights & Biases."""

    def __init__(self, run: Path, id_: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=id_,
            resume="allow",
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Rows of a resumed run may repeat a step, which wandb's own counter refuses.
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio(Tracker):
    """A run of trackio, in its local database."""

    def __init__(self, run: Path, id_: str, settings: Mapping[str, Any]) -> None:
        import trackio

        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.name}-{id_}",
            config=dict(settings),
            resume="allow",
            embed=False,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """A run of MLflow. Characters that its names do not allow become "_"."""

    def __init__(self, run: Path, id_: str, settings: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        # The tag, because MLflow chooses the ids of runs itself.
        known = self._client.search_runs([experiment_id], f"tags.retriever_run = '{id_}'")
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"retriever_run": id_}
        self._id = self._client.create_run(experiment_id, run_name=run.name, tags=tags).info.run_id
        for key, value in settings.items():
            self._client.log_param(self._id, key, str(value)[:500])

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        metrics = [Metric(name.replace("@", "_at_"), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


_REMOTE: dict[str, type[WandB] | type[Trackio] | type[MLflow]] = {"wandb": WandB, "trackio": Trackio, "mlflow": MLflow}


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed, without importing them.

    Raises:
        InputError: One is not; the message says how to install it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f'track: {name} is not installed: pip install "dense-retriever[{name}]"')


def open_trackers(names: Sequence[str], run: Path, step: int, settings: Mapping[str, Any]) -> dict[str, Tracker]:
    """Open the trackers of a run.

    Args:
        names: "tensorboard", "wandb", "trackio" or "mlflow".
        run: The run folder.
        step: Step that the run continues from.
        settings: Hyper-parameters, by name.

    Returns:
        Name -> tracker.

    Raises:
        InputError: A tracker is not installed, or does not start.
    """
    check_trackers(names)
    ids = _ids(run, [name for name in names if name in _REMOTE])
    trackers: dict[str, Tracker] = {}
    for name in names:
        try:
            remote = _REMOTE.get(name)
            trackers[name] = TensorBoard(run, step) if remote is None else remote(run, ids[name], settings)
        # Each tracker has errors of its own, for a missing key, a server that does not answer and so on.
        except Exception as error:
            for tracker in trackers.values():
                tracker.close()
            raise InputError(f"track: {name} does not start: {' '.join(str(error).split())[:300]}") from error
    return trackers


class Trackers:
    """The trackers of a run. One that fails later is left out with a warning: metrics.jsonl has every row.

    Args:
        trackers: name and tracker of each.
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def log(self, row: Mapping[str, Any]) -> None:
        """Record the numbers of a row of metrics.jsonl under its step."""
        values = {
            name: float(value) for name, value in row.items() if name != "step" and isinstance(value, int | float)
        }
        self._each(lambda tracker: tracker.log(values, row["step"]))

    def close(self) -> None:
        """Flush and end all."""
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            # A server may stop answering in the middle of a run, which is worth more than its tracker.
            except Exception as error:  # noqa: BLE001
                del self._trackers[name]
                log.warning("track: %s failed and gets no more rows: %s", name, " ".join(str(error).split())[:300])


def _ids(run: Path, names: Sequence[str]) -> dict[str, str]:
    """Return an id of the run for each tracker: those in the run folder, and new ones that are written there."""
    file = run / TRACKERS_FILE
    ids = {name: str(id_) for name, id_ in read_json(file).items()} if file.exists() else {}
    missing = [name for name in names if name not in ids]
    if missing:
        ids |= {name: secrets.token_hex(4) for name in missing}
        write_json(file, ids)
    return ids
