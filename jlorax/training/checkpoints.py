"""Where a training continues after it was killed: orbax checkpoints in a folder of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp

from jlorax.errors import ConfigError
from jlorax.training.lora import Adapter
from jlorax.training.step import TrainState

_JOB_FILE = "job.json"


class Checkpoint(NamedTuple):
    """``best``: the adapter of the best evaluation so far; the initial one before the first.
    ``history``: of steps and evaluations, plain values."""

    state: TrainState
    best: Adapter
    history: dict[str, Any]


class Checkpoints:
    """The last checkpoint of one training, known by ``digest``: of its config, data and base.

    What another training left in the folder is removed. A context manager: leaving it waits for
    what is still being written.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        if _digest_in(folder) != digest:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _JOB_FILE).write_text(json.dumps({"digest": digest}))
        self._folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager((folder / "steps").absolute(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What ended the training is said rather than what befell a checkpoint after it."""
        with suppress(ConfigError) if kind is not None else nullcontext(), self._writing():
            self._manager.close()

    @property
    def last_step(self) -> int | None:
        step: int | None = self._manager.latest_step()
        return step

    def save(self, checkpoint: Checkpoint) -> None:
        """Copies the arrays now and writes them beside what follows; whole, or not there."""
        arrays = {"state": checkpoint.state, "best": checkpoint.best}
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), history=ocp.args.JsonSave(checkpoint.history)
        )
        with self._writing():
            self._manager.save(int(checkpoint.state.step), args=args)

    def restore(self, like: TrainState) -> Checkpoint:
        """The last one, in the shapes of ``like``."""
        wanted = jax.tree.map(
            ocp.utils.to_shape_dtype_struct, {"state": like, "best": like.adapter}
        )
        restored = self._manager.restore(
            self._manager.latest_step(),
            args=ocp.args.Composite(
                arrays=ocp.args.StandardRestore(wanted), history=ocp.args.JsonRestore()
            ),
        )
        arrays = restored["arrays"]
        return Checkpoint(arrays["state"], arrays["best"], restored["history"])

    def wait(self) -> None:
        """Until the last save is on disk. ConfigError says what went wrong with it."""
        with self._writing():
            self._manager.wait_until_finished()

    def remove(self) -> None:
        """The training has ended well: nobody will continue it."""
        self._manager.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """orbax tells of a full disk by many kinds of errors, and of the last save's later."""
        try:
            yield
        except Exception as error:
            said = str(error).splitlines() or [type(error).__name__]
            raise ConfigError(
                f"a checkpoint in {self._folder} cannot be written: {said[0]}"
            ) from error


def _digest_in(folder: Path) -> str | None:
    try:
        digest: str = json.loads((folder / _JOB_FILE).read_text())["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest
