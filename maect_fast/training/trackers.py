"""Where a run's metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

Each library is imported by the runs that ask for it alone, and configured as its own documentation
says (WANDB_MODE=offline, MLFLOW_TRACKING_URI).
"""

import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from maect_fast.checkpoint import write_atomically
from maect_fast.config import Config, ConfigError, flat_settings
from maect_fast.names import one_line

__all__ = ["TRACKERS", "Trackers", "check_trackers"]

# The identities under which a run is known elsewhere, so that it goes on there, too.
IDENTITIES = "trackers.json"
PROJECT = "maect-fast"
MLFLOW_URI = "MLFLOW_TRACKING_URI"
# How long the end of a run waits for what has not been sent yet.
CLOSE_SECONDS = 60.0

Metrics = dict[str, float]


class Tracker(Protocol):
    """A run in a library that keeps metrics. Any exception ends the tracker, and nothing else."""

    def __init__(self, folder: Path, config: Config, start: int):
        """Start or continue the run of the run directory `folder`, after update `start`."""

    def log(self, metrics: Metrics, update: int) -> None:
        """Record the metrics of an update, which a resumed run may repeat."""

    def close(self, *, finished: bool) -> None:
        """Record that the process ends; `finished` where the run has made its last update."""


class TensorBoard:
    """Event files in the run directory."""

    def __init__(self, folder: Path, config: Config, start: int):
        # Takes seconds to import.
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(folder), purge_step=start + 1)

    def log(self, metrics: Metrics, update: int) -> None:
        """A scalar each."""
        for name, value in metrics.items():
            self.events.add_scalar(name, value, update)

    def close(self, *, finished: bool) -> None:
        """Flush the events."""
        self.events.close()


class WandB:
    """A run of Weights & Biases; its files are in the run directory."""

    def __init__(self, folder: Path, config: Config, start: int):
        import wandb

        identity = _identities(folder).get("wandb") or secrets.token_hex(4)
        # Before the run is there, so that no kill leaves it without its name.
        _keep(folder, "wandb", identity)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(folder),
            id=identity,
            name=folder.name,
            resume="allow",
            config=flat_settings(config),
            # Progress bars are no log.
            settings=wandb.Settings(console="off"),
        )
        # Its own steps may not go back, as a run that is continued does.
        self.run.define_metric("*", step_metric="update")

    def log(self, metrics: Metrics, update: int) -> None:
        """One row."""
        self.run.log({**metrics, "update": update})

    def close(self, *, finished: bool) -> None:
        """Wait for what is sent."""
        self.run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow: at MLFLOW_TRACKING_URI, else in a database in the run directory."""

    def __init__(self, folder: Path, config: Config, start: int):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get(MLFLOW_URI) or f"sqlite:///{folder.resolve()}/mlflow.db"
        self.client = MlflowClient(tracking_uri=uri)
        identity = _identities(folder).get("mlflow")
        if identity is None:
            found = self.client.get_experiment_by_name(PROJECT)
            experiment = found.experiment_id if found else self.client.create_experiment(PROJECT)
            identity = self.client.create_run(experiment, run_name=folder.name).info.run_id
            _keep(folder, "mlflow", identity)
            params = [Param(key, str(value)) for key, value in flat_settings(config).items()]
            self.client.log_batch(identity, params=params)
        self.client.update_run(identity, status="RUNNING")
        self.identity: str = identity

    def log(self, metrics: Metrics, update: int) -> None:
        """One batch."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        batch = [Metric(name, value, now, update) for name, value in metrics.items()]
        self.client.log_batch(self.identity, metrics=batch)

    def close(self, *, finished: bool) -> None:
        """Say how it ended."""
        self.client.set_terminated(self.identity, status="FINISHED" if finished else "KILLED")


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose libraries are missing.

    Raises:
        ConfigError: says what to install.
    """
    needs = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "mlflow": ["mlflow"]}
    packages = {"mlflow": "mlflow-skinny"}
    if not os.environ.get(MLFLOW_URI):
        needs["mlflow"] += ["sqlalchemy", "alembic"]
    for name in names:
        missing = [module for module in needs[name] if find_spec(module) is None]
        if missing:
            wanted = " ".join(packages.get(module, module) for module in missing)
            raise ConfigError(
                f"trackers: {name} needs what is not installed; pip install {wanted}, or leave it "
                "out"
            )


class Trackers:
    """All trackers of a run, of which one that fails is told once and left out from then on.

    A thread of its own sends the metrics: a network that hangs delays no update, and so no other
    rank.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Config, *, start: int):
        self.open: dict[str, Tracker] = {}
        for name in names:
            with self._guarded(name):
                self.open[name] = TRACKERS[name](folder, config, start)
        self.queue: SimpleQueue[tuple[Metrics, int] | bool] = SimpleQueue()
        self.thread = Thread(target=self._send, name="trackers", daemon=True)
        self.thread.start()

    def log(self, metrics: Metrics, update: int) -> None:
        """Send the metrics of an update, some time soon."""
        self.queue.put((metrics, update))

    def close(self, *, finished: bool) -> None:
        """Send what is left, as far as that is possible within a minute."""
        self.queue.put(finished)
        self.thread.join(CLOSE_SECONDS)
        if self.thread.is_alive():
            names = ", ".join(self.open)
            _tell(f"trackers: the last metrics were not taken in {CLOSE_SECONDS:g} s ({names})")

    def _send(self) -> None:
        while not isinstance(item := self.queue.get(), bool):
            for name, tracker in list(self.open.items()):
                with self._guarded(name):
                    tracker.log(*item)
        for name, tracker in list(self.open.items()):
            with self._guarded(name):
                tracker.close(finished=item)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Whatever a tracker's library raises, training goes on."""
        try:
            yield
        except Exception as error:
            self.open.pop(name, None)
            _tell(f"trackers: going on without {name}: {type(error).__name__}: {one_line(error)}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 (a warning of the run)


def _identities(folder: Path) -> dict[str, Any]:
    path = folder / IDENTITIES
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if isinstance(found, dict) else {}


def _keep(folder: Path, name: str, identity: str) -> None:
    text = json.dumps({**_identities(folder), name: identity})
    write_atomically(folder / IDENTITIES, lambda temporary: temporary.write_text(text))
