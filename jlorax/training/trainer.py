"""The training itself: prepare, step, evaluate, save, publish."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlorax.errors import ConfigError, TrainingDiverged
from jlorax.training.batches import Batch
from jlorax.training.card import model_card
from jlorax.training.checkpoints import Checkpoint, Checkpoints
from jlorax.training.events import (
    Began,
    Cancelled,
    Ended,
    Evaluated,
    Report,
    Saved,
    StepDone,
    no_report,
)
from jlorax.training.export import write_peft
from jlorax.training.frozen import Leaf
from jlorax.training.lora import Adapter, initial_adapter
from jlorax.training.optimizer import learning_rates, make_optimizer
from jlorax.training.preparation import Prepared
from jlorax.training.repository import Published
from jlorax.training.step import Rows, TrainState, make_evaluation, make_step

_WARM_STEPS = 1  # compiled in: not counted in a speed


@dataclass
class History:
    """What has been seen so far; goes into checkpoints, so it is plain values."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min((loss for _, loss in self.evaluations), default=math.inf)

    @property
    def num_since_best(self) -> int:
        """Evaluations after the best one."""
        losses = [loss for _, loss in self.evaluations]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class Trainer:
    """One training over what ``prepare`` made ready. ``run`` returns the published adapter, or
    None when it was cancelled."""

    def __init__(
        self,
        prepared: Prepared,
        report: Report = no_report,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._prepared = prepared
        self._config = prepared.config
        self._report = report
        self._is_cancelled = is_cancelled
        self._optimizer = make_optimizer(self._config.optimizer, prepared.num_steps)
        self._rates = learning_rates(self._config.optimizer, prepared.num_steps)
        forward = prepared.forward
        self._step = jax.jit(
            make_step(forward, self._optimizer, self._config.run.seed), donate_argnums=0
        )
        self._evaluate = jax.jit(make_evaluation(forward))
        self._leaves: list[Leaf] = forward.base.leaves
        self._history = History()
        self._state = self._initial_state()
        self._best: Adapter = jax.tree.map(jnp.copy, self._state.adapter)

    def run(self) -> Published | None:
        prepared, repository = self._prepared, self._prepared.repository
        with repository.claimed(), Checkpoints(repository.work, prepared.digest) as checkpoints:
            if self._config.run.resume and checkpoints.last_step is not None:
                self._continue_from(checkpoints)
            self._report(
                Began(
                    step=self._step_number,
                    num_steps=prepared.num_steps,
                    num_parameters=prepared.shape.num_parameters,
                    data=prepared.data.report.to_dict(),
                )
            )
            reason = self._train(checkpoints)
            if reason == "cancelled":
                self._save(checkpoints)
                checkpoints.wait()
                self._report(Cancelled(self._step_number))
                return None
            try:
                published = self._publish(reason)
            except Exception:
                with suppress(ConfigError):  # started again where there is room, it only publishes
                    self._save(checkpoints)
                raise
            checkpoints.remove()
            return published

    @property
    def _step_number(self) -> int:
        return int(self._state.step)

    def _initial_state(self) -> TrainState:
        adapter = initial_adapter(self._prepared.shape, self._config.run.seed)
        return TrainState(adapter, self._optimizer.init(adapter), jnp.int32(0))

    def _continue_from(self, checkpoints: Checkpoints) -> None:
        state, best, history = checkpoints.restore(self._state)
        self._state, self._best = state, best
        self._history = History(
            losses=[(step, loss) for step, loss in history["losses"]],
            evaluations=[(step, loss) for step, loss in history["evaluations"]],
        )

    # ---- the loop

    def _train(self, checkpoints: Checkpoints) -> str:
        """Why it ended: "finished", "early_stop" or "cancelled"."""
        prepared, patience = self._prepared, self._config.run.early_stopping_patience
        clock = _Clock()
        for number, batches in self._remaining():
            if self._is_cancelled():
                return "cancelled"
            self._one_step(number, batches, checkpoints, clock)
            if number % prepared.eval_every == 0 or number == prepared.num_steps:
                self._evaluate_all(number)
                clock.restart()
                if patience is not None and self._history.num_since_best >= patience:
                    return "early_stop"
            if number % self._config.run.checkpoint_every_steps == 0:
                self._save(checkpoints)
        return "finished"

    def _remaining(self) -> Iterator[tuple[int, list[Batch]]]:
        """(step's number from 1, its micro-batches), from where the state stands."""
        accumulation, batches = self._config.run.accumulation, self._prepared.batches
        done = self._step_number
        per_epoch = self._prepared.steps_per_epoch
        for number in range(done, self._prepared.num_steps):
            epoch, at = divmod(number, per_epoch)
            if number == done or at == 0:
                stream = batches.epoch(epoch, start=at * accumulation)
            yield number + 1, list(islice(stream, accumulation))

    def _one_step(
        self, number: int, batches: list[Batch], checkpoints: Checkpoints, clock: _Clock
    ) -> None:
        accumulation = self._config.run.accumulation
        rows = stacked(batches, self._prepared.max_targets, accumulation)
        self._state, result = self._step(self._state, self._leaves, rows)
        loss, norm = float(result.loss), float(result.grad_norm)
        if not bool(result.is_finite):
            self._give_up(number, loss, batches, checkpoints)
        self._history.losses.append((number, loss))
        num_tokens = sum(batch.num_tokens for batch in batches)
        speed = clock.took(num_tokens)
        self._report(
            StepDone(
                step=number,
                epoch=number / self._prepared.steps_per_epoch,
                loss=loss,
                learning_rate=float(self._rates(number - 1)),
                grad_norm=norm,
                tokens_per_s=speed,
                eta_s=clock.seconds_a_step * (self._prepared.num_steps - number),
            )
        )

    def _give_up(
        self, number: int, loss: float, batches: list[Batch], checkpoints: Checkpoints
    ) -> None:
        """The state is still that before the step: it is kept, so nothing good is lost."""
        self._save(checkpoints)
        checkpoints.wait()
        rows = [row for batch in batches for row in batch.examples]
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise TrainingDiverged(
            f"step {number} gave a loss of {loss} or gradients that are no numbers; its batch "
            f"holds the data's rows {shown}. The state before it is kept as a checkpoint. A lower "
            f"learning_rate than {self._config.optimizer.learning_rate} may help"
        )

    def _evaluate_all(self, number: int) -> None:
        validation = self._prepared.validation
        if validation is None:
            return
        total = weight = 0.0
        for batch in validation.epoch(0):
            rows = jax.tree.map(lambda x: x[0], stacked([batch], self._prepared.max_targets))
            summed = self._evaluate(self._state.adapter, self._leaves, rows)
            total, weight = total + float(summed.total), weight + float(summed.weight)
        loss = total / weight
        is_best = loss < self._history.best
        self._history.evaluations.append((number, loss))
        if is_best:
            self._best = jax.tree.map(jnp.copy, self._state.adapter)
        self._report(Evaluated(number, loss, is_best))

    def _save(self, checkpoints: Checkpoints) -> None:
        if checkpoints.last_step == self._step_number:
            return
        history = {"losses": self._history.losses, "evaluations": self._history.evaluations}
        checkpoints.save(Checkpoint(self._state, self._best, history))
        self._report(Saved(self._step_number))

    # ---- the result

    def _publish(self, reason: str) -> Published:
        """With early stopping the best adapter, else the last."""
        prepared = self._prepared
        stops_early = self._config.run.early_stopping_patience is not None
        adapter = self._best if stops_early else self._state.adapter
        metrics = self._metrics()
        record = {**prepared.record(), "metrics": metrics, "history": vars(self._history)}

        def write(folder: Any, adapter_id: str) -> None:
            card = model_card(adapter_id, record)
            dtype = self._config.run.save_dtype
            write_peft(folder, adapter, prepared.peft_config, card, record, dtype)

        published = prepared.repository.publish(write)
        self._report(Ended(reason, published.adapter_id, str(published.folder), metrics))
        return published

    def _metrics(self) -> dict[str, Any]:
        losses = [loss for _, loss in self._history.losses]
        evaluations = [loss for _, loss in self._history.evaluations]
        return {
            "steps": self._step_number,
            "train_loss": losses[-1] if losses else None,
            "first_train_loss": losses[0] if losses else None,
            "validation_loss": evaluations[-1] if evaluations else None,
            "best_validation_loss": min(evaluations, default=None),
        }


class _Clock:
    """Tokens a second and seconds a step; the first step, which compiles, does not count."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._tokens: list[tuple[float, int]] = []

    def restart(self) -> None:
        """What was done since the last step was no step."""
        self._started_s = time.monotonic()

    def took(self, num_tokens: int) -> float:
        now = time.monotonic()
        self._tokens.append((now - self._started_s, num_tokens))
        self._started_s = now
        counted = self._counted
        return sum(n for _, n in counted) / sum(s for s, _ in counted)

    @property
    def seconds_a_step(self) -> float:
        counted = self._counted
        return sum(s for s, _ in counted) / len(counted)

    @property
    def _counted(self) -> list[tuple[float, int]]:
        return self._tokens[_WARM_STEPS:][-20:] or self._tokens


def stacked(batches: list[Batch], max_targets: int, num_parts: int = 1) -> Rows:
    """Micro-batches as the step takes them, with a leading axis of ``num_parts``: an epoch's last
    step may have fewer, and gets some without targets, so that nothing is compiled for it."""
    length = max(batch.tokens.shape[1] for batch in batches)
    parts = [_rows(batch, length, max_targets) for batch in batches]
    *_, targets = parts[0]
    nothing = (*parts[0][:-1], np.full_like(targets, -1))
    parts += [nothing] * (num_parts - len(parts))
    return Rows(*(jnp.asarray(np.stack(x)) for x in zip(*parts, strict=True)))


def _rows(batch: Batch, length: int, max_targets: int) -> tuple[np.ndarray, ...]:
    wider = ((0, 0), (0, length - batch.tokens.shape[1]))
    tokens, segments, positions = (
        np.pad(x, wider) for x in (batch.tokens, batch.segments, batch.positions)
    )
    rows, columns = np.nonzero(batch.targets >= 0)
    places = np.zeros(max_targets, np.int32)
    targets = np.full(max_targets, -1, np.int32)
    places[: len(rows)] = rows * length + columns
    targets[: len(rows)] = batch.targets[rows, columns]
    return tokens, segments, positions, places, targets
