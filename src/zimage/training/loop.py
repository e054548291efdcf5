"""The loop that every stage runs in: steps, progress bar, log and saved states. Knows no model and no loss.

The log is `log.jsonl` in the run's folder, a line for every `log_every` steps with the means since the last one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ..errors import NonFiniteError, RequestError
from .config import Stage
from .state import STATE, TrainingState

LOG = "log.jsonl"

Losses = dict[str, Tensor]
"""What a step's loss is made of; "loss" is what gradients are taken of."""


def run(
    state: TrainingState,
    losses: Callable[[int], Losses],
    stage: Stage,
    *,
    folder: Path,
    seed: int,
    resume: bool,
    until: int | None = None,
    progress: bool = True,
) -> None:
    """Train up to `stage.steps`, or stop after step `until`, and save the state.

    `losses(step)` must depend on the step and the weights alone. Raises `RequestError` if the folder holds a run
    already, `CheckpointError` if what `resume` finds is of another, `NonFiniteError` at a loss that is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if resume:
        state.load(folder, stage, seed)
        _cut_log(folder / LOG, state.step)
    elif (folder / STATE).exists():
        raise RequestError(f"{folder} holds a run already; go on with --resume, or choose another folder")
    end = stage.steps if until is None else min(until, stage.steps)
    window = _Window()
    with tqdm(total=stage.steps, initial=state.step, unit="step", disable=not progress) as bar:
        while state.step < end:
            parts = losses(state.step)
            parts["loss"].backward()
            window.add(parts, state.update(stage))
            bar.update()
            if state.step % stage.log_every == 0 or state.step == end:
                line = {"step": state.step, **window.close()}
                bar.set_postfix(loss=f"{line['loss']:.4f}")
                with open(folder / LOG, "a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
            if state.step % stage.save_every == 0 or state.step == end:
                state.save(folder, stage, seed)


class _Window:
    """Sums since the last line of the log."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0
        self.start = time.monotonic()

    def add(self, parts: Losses, norm: float) -> None:
        values = {name: float(part.detach()) for name, part in parts.items()} | {"gradient": norm}
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteError(
                f"the loss is not finite: {values}; the last saved state is whole: lower the learning rate and start "
                "from it"
            )
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def close(self) -> dict[str, float]:
        means = {name: round(total / self.count, 6) for name, total in self.sums.items()}
        seconds = round(time.monotonic() - self.start, 3)
        self.__init__()  # type: ignore[misc]
        return {**means, "seconds": seconds}


def _cut_log(path: Path, step: int) -> None:
    """Drop the lines of steps that were not saved and are taken again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")
