"""One training loop for everything that is trained: deterministic, checkpointed, resumable."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emutune.errors import CheckpointError, TrainingInterruptedError
from emutune.files import replacing

CHECKPOINT = "training.safetensors"
# Of every parameter; its step too, since a step in which it got no gradient does not count.
_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


class TrainerConfig(BaseModel):
    """How to train; the defaults are those of tuning an adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=200, ge=1)
    batch: int = Field(default=8, ge=1, description="blocks in one forward pass")
    accumulation: int = Field(default=1, ge=1, description="forward passes per step")
    learning_rate: float = Field(default=1e-3, gt=0)
    final_rate_share: float = Field(default=0.1, ge=0, le=1, description="of the cosine's end to its peak")
    warmup_share: float = Field(default=0.05, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    gradient_norm: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0)
    score_every: int = Field(default=50, ge=1, description="steps between two scores")
    save_every_s: float = Field(default=20.0, ge=0)

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine."""
        warmup = max(1, round(self.warmup_share * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (self.final_rate_share + (1 - self.final_rate_share) * cosine)


@dataclass
class Progress:
    """Where a training run stands."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    best_step: int = 0
    seconds: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on per second, the time of scores and checkpoints left out."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Bookkeeping:
    """Where a training run is kept, and who is told of it.

    Attributes:
        directory: of the checkpoints; a run that was stopped goes on from there, to the same weights. There are none
            if not given.
        purpose: what the checkpoint belongs to; one of another purpose or configuration is refused.
        report: told after every step.
    """

    directory: Path | None = None
    purpose: str = ""
    report: Callable[[Progress], None] | None = None


def train(
    trainable: Mapping[str, nn.Parameter],
    loss: Callable[[Tensor, int], Tensor],
    batch: Callable[[int], Tensor],
    config: TrainerConfig,
    kept: Bookkeeping = Bookkeeping(),
    *,
    score: Callable[[], float] | None = None,
) -> Progress:
    """Train parameters in place with AdamW, and leave them at the best score.

    The last checkpoint stays, so that nothing is trained twice if the process ends before the result is
    written: the same call then returns at once. ``forget`` removes it.

    Args:
        trainable: the parameters, by name.
        loss: scalar loss of a batch at a step; must depend on nothing but its arguments and the parameters.
        batch: the batch of a forward pass, by its number; tokens (rows, length).
        config: how to train.
        kept: where the run is kept, and who is told of it.
        score: what chooses between states, lower is better; asked before the first step, every
            ``score_every`` steps and at the end. Without it the last state stays.

    Raises:
        CheckpointError: the directory holds a checkpoint of another run or a damaged one, or cannot be
            written; an earlier checkpoint is then untouched.
        TrainingInterruptedError: Ctrl-C; a checkpoint was written first.
    """
    run = _Run(trainable, config, kept)
    run.restore()
    complete = run.progress.step == config.steps
    if score is not None and not run.progress.scores:
        run.keep_score(score())
    with _deferred_interrupt() as interrupted:
        while run.progress.step < config.steps:
            run.step(loss, batch)
            step = run.progress.step
            if score is not None and (step % config.score_every == 0 or step == config.steps):
                run.keep_score(score())
            if kept.report is not None:
                kept.report(run.progress)
            if interrupted.is_set():
                break
            if step < config.steps:
                run.save_now_and_then()
        if not complete:
            run.save()
    # Ctrl-C during the last checkpoint counts as well.
    if interrupted.is_set():
        raise TrainingInterruptedError(f"stopped after step {run.progress.step} of {config.steps}")
    run.restore_best()
    return run.progress


def forget(directory: Path) -> None:
    """Remove the checkpoint of a training run, once its result is kept elsewhere."""
    path = directory / CHECKPOINT
    for file in (path, path.with_name(path.name + ".partial")):
        file.unlink(missing_ok=True)


class _Run:
    """Parameters, optimiser, progress and their checkpoint."""

    def __init__(
        self, trainable: Mapping[str, nn.Parameter], config: TrainerConfig, kept: Bookkeeping
    ) -> None:
        self.parameters = dict(trainable)
        self.config = config
        self.path = None if kept.directory is None else kept.directory / CHECKPOINT
        shapes = {name: list(parameter.shape) for name, parameter in self.parameters.items()}
        described = json.dumps([kept.purpose, config.model_dump(), sorted(shapes.items())])
        self.identity = hashlib.sha256(described.encode()).hexdigest()
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        decayed = [p for p in self.parameters.values() if p.ndim >= 2]
        others = [p for p in self.parameters.values() if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            weight_decay=config.weight_decay,
            betas=(0.9, 0.95),
        )
        # A run that was stopped within a step left its gradients behind.
        self.optimizer.zero_grad(set_to_none=True)
        self.saved_at = time.monotonic()

    def step(self, loss: Callable[[Tensor, int], Tensor], batch: Callable[[int], Tensor]) -> None:
        begun = time.monotonic()
        progress, config = self.progress, self.config
        total = 0.0
        for part in range(config.accumulation):
            tokens = batch(progress.step * config.accumulation + part)
            value = loss(tokens, progress.step) / config.accumulation
            value.backward()
            total += float(value.detach())
            progress.tokens += tokens.numel()
        nn.utils.clip_grad_norm_(self.parameters.values(), config.gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(progress.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.losses.append(total)
        progress.seconds += time.monotonic() - begun

    def keep_score(self, value: float) -> None:
        progress = self.progress
        progress.scores[progress.step] = value
        best = progress.scores[progress.best_step]
        # Anything is better than a score that is no number.
        if progress.step == 0 or value < best or math.isnan(best):
            progress.best_step = progress.step
            self.best = {name: tensor.detach().clone() for name, tensor in self.parameters.items()}

    def restore_best(self) -> None:
        with torch.no_grad():
            for name, tensor in self.best.items():
                self.parameters[name].copy_(tensor)

    def save_now_and_then(self) -> None:
        if time.monotonic() - self.saved_at >= self.config.save_every_s:
            self.save()

    def save(self) -> None:
        self.saved_at = time.monotonic()
        if self.path is None:
            return
        tensors = {f"parameter/{name}": tensor.detach() for name, tensor in self.parameters.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.parameters.items():
            # Of a parameter that had no gradient so far there is nothing to keep.
            if state := self.optimizer.state.get(parameter):
                tensors |= {f"{key}/{name}": state[key] for key in _OPTIMIZER_STATE}
        metadata = {"identity": self.identity, "progress": json.dumps(asdict(self.progress))}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as aside:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path}: cannot be written ({error}); free some space or choose another directory"
            ) from error

    def restore(self) -> None:
        if self.path is None or not self.path.exists():
            return
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["identity"] == self.identity:
                self._resume(json.loads(metadata["progress"]), tensors)
                return
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: damaged ({error}); delete it to start again") from error
        raise CheckpointError(
            f"{self.path}: belongs to a run with other settings; run that one to its end, or delete the file"
        )

    def _resume(self, progress: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        progress["scores"] = {int(step): value for step, value in progress["scores"].items()}
        self.progress = Progress(**progress)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameter/{name}"])
                if f"best/{name}" in tensors:
                    self.best[name] = _like(parameter, tensors[f"best/{name}"])
                if f"step/{name}" in tensors:
                    self.optimizer.state[parameter] = {
                        "step": tensors[f"step/{name}"],
                        "exp_avg": _like(parameter, tensors[f"exp_avg/{name}"]),
                        "exp_avg_sq": _like(parameter, tensors[f"exp_avg_sq/{name}"]),
                    }


def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
    # Where the parameter is and in the order of its memory, as the optimiser would have made it.
    return torch.empty_like(parameter).copy_(tensor)


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that no step is cut in half; a second Ctrl-C stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, previous)

    if callable(previous):
        signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        if callable(previous):
            signal.signal(signal.SIGINT, previous)
