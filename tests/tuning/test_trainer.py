"""The training loop against torch by hand, and its checkpoints against whatever interrupts it."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import trained
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trained import CONFIG, ROWS, batch, build, loss

from emutune.errors import CheckpointError, EmutuneError, TrainingInterruptedError
from emutune.tuning import trainer
from emutune.tuning.trainer import Bookkeeping, Progress, TrainerConfig, forget, train

FILE = "training.safetensors"
MOVED = 0.5
EVERY_STEP = CONFIG.model_copy(update={"save_every_s": 0.0})


def run(parameters=None, config=CONFIG, score=None, **kept) -> tuple[dict[str, nn.Parameter], Progress]:
    parameters = build() if parameters is None else parameters

    def value(tokens: Tensor, step: int) -> Tensor:
        return loss(parameters, tokens, step)

    return parameters, train(parameters, value, batch, config, Bookkeeping(**kept), score=score)


def distance(parameters: dict[str, nn.Parameter]) -> float:
    """Something to choose by that is lowest after some of the steps."""
    moved = (parameters["hidden.weight"] - build()["hidden.weight"]).detach()
    return abs(float(moved.norm()) - MOVED)


def bits(parameters) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in parameters.items()}


def told(progress: Progress) -> tuple:
    return progress.step, progress.losses, progress.scores, progress.best_step, progress.tokens


class StopError(Exception):
    pass


# the mathematics


def by_hand(config: TrainerConfig) -> tuple[dict[str, nn.Parameter], list[float]]:
    """The same training with torch's parts alone."""
    parameters = build()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    warmup = max(1, round(config.warmup_share * config.steps))
    warm = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / warmup
            if step < warmup
            else config.final_rate_share
            + (1 - config.final_rate_share)
            * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))
            / 2
        ),
    )
    losses = []
    for step in range(config.steps):
        optimizer.zero_grad()
        value = loss(parameters, batch(step), step)
        value.backward()
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        for gradient in gradients:
            gradient.mul_((config.gradient_norm / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        warm.step()
        losses.append(value.item())
    return parameters, losses


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.5, "gradient_norm": 0.01},
        {"warmup_share": 0.0, "final_rate_share": 0.0, "learning_rate": 0.1},
        {"warmup_share": 0.5, "gradient_norm": 100.0},
    ],
)
def test_it_is_adamw(changes):
    config = CONFIG.model_copy(update=changes)
    expected, losses = by_hand(config)
    parameters, progress = run(config=config)
    for name, tensor in expected.items():
        torch.testing.assert_close(parameters[name], tensor, rtol=1e-5, atol=1e-7)
    assert progress.losses == pytest.approx(losses, rel=1e-5)
    assert progress.losses[-1] < progress.losses[0]


def test_the_schedule_warms_up_and_falls():
    config = TrainerConfig(steps=100, learning_rate=0.5, warmup_share=0.1, final_rate_share=0.2)
    rates = [config.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert rates[10] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.5 * (0.2 + 0.8 / 2))
    assert config.rate(100) == pytest.approx(0.1)


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.floats(1e-6, 1), st.integers(0, 59))
def test_every_rate_is_positive_and_at_most_the_peak(steps, warmup, final, peak, step):
    config = TrainerConfig(steps=steps, warmup_share=warmup, final_rate_share=final, learning_rate=peak)
    assert 0 < config.rate(step % steps) <= peak * (1 + 1e-12)


@given(st.integers(1, 5), st.sampled_from([1, 2, 4, 8]))
def test_accumulated_parts_are_the_whole_batch(steps, parts):
    rows = ROWS[:40]

    def after(accumulation: int) -> dict[str, nn.Parameter]:
        size = 8 // accumulation
        parameters = build()
        config = TrainerConfig(steps=steps, accumulation=accumulation, gradient_norm=0.5, learning_rate=0.01)
        train(
            parameters,
            lambda tokens, step: loss(parameters, tokens, 0),
            lambda number: rows[number * size : (number + 1) * size],
            config,
        )
        return parameters

    whole, split = after(1), after(parts)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-6)


def test_parts_are_numbered_through_and_their_losses_averaged():
    asked, steps = [], []
    parameter = nn.Parameter(torch.zeros(1))

    def part(number: int) -> Tensor:
        asked.append(number)
        return torch.full((2, 3), number)

    def value(tokens: Tensor, step: int) -> Tensor:
        steps.append(step)
        return parameter.sum() * 0 + tokens.float().mean()

    progress = train({"p": parameter}, value, part, TrainerConfig(steps=3, accumulation=2))
    assert asked == [0, 1, 2, 3, 4, 5]
    assert steps == [0, 0, 1, 1, 2, 2]
    assert progress.losses == [0.5, 2.5, 4.5]
    assert progress.tokens == 36


def test_the_same_seed_has_the_same_bits():
    (first, one), (second, two) = run(), run()
    assert bits(first) == bits(second)
    assert told(one) == told(two)


def test_gradients_left_behind_do_not_count():
    parameters = build()
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    run(parameters)
    assert bits(parameters) == bits(run()[0])


def test_only_what_is_trainable_changes():
    parameters = build()
    frozen = parameters["hidden.bias"]
    before = frozen.detach().clone()
    some = {name: p for name, p in parameters.items() if name != "hidden.bias"}
    train(some, lambda tokens, step: loss(parameters, tokens, step), batch, CONFIG)
    assert torch.equal(frozen, before)


# scores


def test_scores_are_asked_for_at_the_start_now_and_then_and_at_the_end():
    _, progress = run(config=CONFIG.model_copy(update={"steps": 11, "score_every": 4}), score=lambda: 1.0)
    assert list(progress.scores) == [0, 4, 8, 11]
    assert progress.best_step == 0


@pytest.mark.parametrize("best", [0, 3, 6, 7])
def test_parameters_are_left_at_the_best_score(best):
    config = CONFIG.model_copy(update={"steps": 7, "score_every": 3})
    parameters, seen = build(), []

    def score() -> float:
        seen.append(bits(parameters))
        return abs([0, 3, 6, 7][len(seen) - 1] - best)

    _, progress = run(parameters, config, score=score)
    assert progress.best_step == best
    assert bits(parameters) == seen[[0, 3, 6, 7].index(best)]
    assert len({str(state) for state in seen}) == 4


def test_of_equal_scores_the_earlier_state_stays():
    config = CONFIG.model_copy(update={"score_every": 3})
    parameters = build()
    before = bits(parameters)
    run(parameters, config, score=lambda: 2.0)
    assert bits(parameters) == before


def test_without_a_score_the_last_state_stays():
    assert run()[1].scores == {}
    assert run()[1].best_step == 0


@pytest.mark.parametrize("values", [[math.nan, 5.0, 4.0, math.nan], [math.inf, math.nan, 4.0, 6.0]])
def test_a_score_that_is_no_number_is_never_the_best(values):
    left = iter(values)
    config = CONFIG.model_copy(update={"steps": 9, "score_every": 3})
    assert run(config=config, score=lambda: next(left))[1].best_step == 6


def test_progress_is_reported_after_every_step():
    seen = []
    run(report=lambda progress: seen.append((progress.step, len(progress.losses), progress.tokens)))
    assert seen == [(n, n, n * batch(0).numel()) for n in range(1, CONFIG.steps + 1)]


def test_tokens_per_second():
    assert Progress().tokens_per_s == 0.0
    assert Progress(seconds=2.0, tokens=10).tokens_per_s == 5.0
    assert run()[1].tokens_per_s > 0


# interruption


@pytest.mark.parametrize("step", range(1, CONFIG.steps + 1))
def test_a_run_stopped_at_any_step_resumes_to_the_same_bits(tmp_path, step):
    def stop(progress: Progress) -> None:
        if progress.step == step:
            raise StopError

    def scored(**options) -> tuple[dict[str, nn.Parameter], Progress]:
        parameters = build()
        return run(parameters, EVERY_STEP, score=lambda: distance(parameters), **options)

    whole, undisturbed = scored()
    assert 0 < undisturbed.best_step < CONFIG.steps
    with pytest.raises(StopError):
        scored(directory=tmp_path, report=stop)
    asked = []
    resumed, progress = scored(directory=tmp_path, report=lambda progress: asked.append(progress.step))
    assert asked == list(range(max(1, step), CONFIG.steps + 1))
    assert bits(resumed) == bits(whole)
    assert told(progress) == told(undisturbed)


@pytest.mark.parametrize("step", range(1, CONFIG.steps + 1))
def test_ctrl_c_at_any_step_finishes_it_and_writes_a_checkpoint(tmp_path, step):
    def interrupt(progress: Progress) -> None:
        if progress.step == step:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterruptedError, match=f"stopped after step {step} of {CONFIG.steps}"):
        run(directory=tmp_path, report=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    seen = []
    resumed, progress = run(directory=tmp_path, report=lambda progress: seen.append(progress.step))
    assert seen == list(range(step + 1, CONFIG.steps + 1))
    assert bits(resumed) == bits(run()[0])
    assert told(progress) == told(run()[1])


def test_ctrl_c_within_a_step_lets_it_finish(tmp_path):
    parameters = build()

    def value(tokens: Tensor, step: int) -> Tensor:
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return loss(parameters, tokens, step)

    with pytest.raises(TrainingInterruptedError, match="after step 5 of"):
        train(parameters, value, batch, CONFIG, Bookkeeping(tmp_path))
    assert bits(run(directory=tmp_path)[0]) == bits(run()[0])


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    parameters = build()

    def value(tokens: Tensor, step: int) -> Tensor:
        if step == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return loss(parameters, tokens, step)

    with pytest.raises(KeyboardInterrupt) as caught:
        train(parameters, value, batch, EVERY_STEP, Bookkeeping(tmp_path))
    assert not isinstance(caught.value, TrainingInterruptedError)
    assert bits(run(config=EVERY_STEP, directory=tmp_path)[0]) == bits(run()[0])


def test_ctrl_c_during_the_last_checkpoint_is_not_lost(tmp_path, monkeypatch):
    real = trainer.save_file

    def slow(*arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)
        real(*arguments)

    monkeypatch.setattr(trainer, "save_file", slow)
    with pytest.raises(TrainingInterruptedError, match=f"after step {CONFIG.steps} of {CONFIG.steps}"):
        run(directory=tmp_path)
    monkeypatch.undo()
    assert bits(run(directory=tmp_path)[0]) == bits(run()[0])


def test_another_thread_can_train(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(directory=tmp_path)[0]))
    thread.start()
    thread.join()
    assert bits(results[0]) == bits(run()[0])


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it():
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        parameters, _ = run(report=lambda _: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert bits(parameters) == bits(run()[0])


def test_parameters_without_a_gradient_in_some_steps_resume_to_the_same_bits(tmp_path):
    """As with LayerDrop: the optimiser does not count a step in which a parameter was left out."""

    def dropped(directory: Path | None, stop: int | None = None) -> dict[str, nn.Parameter]:
        parameters = {
            name: nn.Parameter(torch.ones(3, 2)) for name in ("always", "sometimes", "later", "never")
        }

        def value(tokens: Tensor, step: int) -> Tensor:
            used = ["always", *["sometimes"] * (step % 3 == 0), *["later"] * (step >= 6)]
            inputs = (tokens.float() % 5).mean(dim=0)[:2]
            return torch.stack([(parameters[name] * inputs).sin().sum() for name in used]).sum()

        def report(progress: Progress) -> None:
            if progress.step == stop:
                raise StopError

        train(parameters, value, batch, EVERY_STEP, Bookkeeping(directory, report=report))
        return parameters

    whole = bits(dropped(None))
    for stop in range(2, CONFIG.steps + 1):
        directory = tmp_path / str(stop)
        with pytest.raises(StopError):
            dropped(directory, stop)
        assert bits(dropped(directory)) == whole, stop


def test_memory_order_is_put_back(tmp_path):
    def transposed(**options) -> dict[str, nn.Parameter]:
        parameters = {
            name: nn.Parameter(p.detach().T.contiguous().T) for name, p in build().items() if p.ndim == 2
        }
        parameters |= {name: p for name, p in build().items() if p.ndim == 1}
        assert not parameters["hidden.weight"].is_contiguous()
        run(parameters, EVERY_STEP, **options)
        return parameters

    def stop(progress: Progress) -> None:
        if progress.step == 5:
            raise StopError

    with pytest.raises(StopError):
        transposed(directory=tmp_path, report=stop)
    assert bits(transposed(directory=tmp_path)) == bits(transposed())


# real processes


def command(out: Path, pause_s: float = 0.0, first: str = "") -> list[str]:
    # A shell's background jobs ignore Ctrl-C, and so would all their children: undo that.
    program = (
        f"import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); {first}"
        f"runpy.run_path({trained.__file__!r})['main']({str(out)!r}, {pause_s})"
    )
    return [sys.executable, "-B", "-c", program]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_real_process_that_is_stopped_resumes_to_the_same_bits(tmp_path, how):
    whole, progress = run(config=EVERY_STEP)
    out = tmp_path / "result.safetensors"
    with subprocess.Popen(command(out, pause_s=0.1), env=environment(), stderr=subprocess.PIPE) as process:
        while not (tmp_path / FILE).exists():
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.5))
        process.send_signal(how)
        _, said = process.communicate()
    assert not out.exists()
    assert process.returncode != 0
    assert how is signal.SIGKILL or b"stopped after step" in said
    with safe_open(tmp_path / FILE, "pt") as file:
        assert file.metadata()["identity"]
    trained.main(str(out), 0.0)
    assert bits(load_file(out)) == bits(whole)
    with safe_open(out, "pt") as file:
        assert file.metadata()["losses"] == repr(progress.losses)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path):
    def stop(progress: Progress) -> None:
        if progress.step == 5:
            raise StopError

    with pytest.raises(StopError):
        run(config=EVERY_STEP, directory=tmp_path, report=stop)
    earlier = (tmp_path / FILE).read_bytes()

    limited = (
        "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(earlier) // 2},) * 2);"
    )
    out = tmp_path / "result.safetensors"
    ended = subprocess.run(
        command(out, first=limited), env=environment(), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    said = ended.stderr.splitlines()[-1]
    assert said.startswith(f"emutune.errors.CheckpointError: {tmp_path / FILE}: cannot be written (")
    assert said.endswith("free some space or choose another directory")
    assert (tmp_path / FILE).read_bytes() == earlier
    assert list(tmp_path.glob("*.partial")) == []
    assert bits(run(config=EVERY_STEP, directory=tmp_path)[0]) == bits(run()[0])


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    with pytest.raises(EmutuneError, match=r"file/training\.safetensors: cannot be written .*choose another"):
        run(directory=blocked)


# the checkpoint


def test_a_completed_run_returns_at_once_with_the_best_weights(tmp_path):
    def again(**options) -> tuple[dict[str, nn.Parameter], Progress]:
        parameters = build()
        return run(parameters, directory=tmp_path, score=lambda: distance(parameters), **options)

    first, one = again()
    assert 0 < one.best_step < CONFIG.steps
    written = (tmp_path / FILE).stat().st_mtime_ns

    parameters, fail = build(), pytest.fail
    two = train(
        parameters,
        lambda *_: fail("trained again"),
        lambda _: fail("read again"),
        CONFIG,
        Bookkeeping(tmp_path, report=lambda _: fail("reported again")),
        score=lambda: fail("scored again"),
    )
    assert bits(parameters) == bits(first)
    assert told(one) == told(two)
    assert one.seconds == two.seconds
    assert (tmp_path / FILE).stat().st_mtime_ns == written


def test_forgetting_removes_the_checkpoint_alone(tmp_path):
    run(directory=tmp_path)
    (tmp_path / (FILE + ".partial")).write_bytes(b"left by a killed process")
    (tmp_path / "result").write_bytes(b"kept")
    forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    forget(tmp_path)
    forget(tmp_path / "absent")


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(config=EVERY_STEP)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_written_now_and_then(tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        trainer, "save_file", lambda tensors, path, metadata: saved.append(now[0]) or path.touch()
    )

    def pass_time(progress: Progress) -> None:
        now[0] += 7.0

    run(config=CONFIG.model_copy(update={"save_every_s": 20.0}), directory=tmp_path, report=pass_time)
    assert saved == [21.0, 42.0, 63.0, 84.0]


@pytest.mark.parametrize(
    "change",
    [
        {"purpose": "another"},
        {"config": CONFIG.model_copy(update={"learning_rate": 0.5})},
        {"config": CONFIG.model_copy(update={"seed": 1})},
        {"parameters": {**build(), "more": nn.Parameter(torch.zeros(1))}},
        {"parameters": {name: nn.Parameter(torch.zeros(1)) for name in build()}},
    ],
    ids=["purpose", "rate", "seed", "names", "shapes"],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change):
    run(directory=tmp_path, purpose="this one")
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(CheckpointError, match=rf"{FILE}: belongs to a run with other settings; .*delete"):
        run(directory=tmp_path, **{"purpose": "this one", **change})
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.parametrize("left", [0, 7, 300, -1])
def test_a_truncated_checkpoint_is_named(tmp_path, left):
    run(directory=tmp_path)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=rf"{FILE}: damaged \(.*delete it to start again"):
        run(directory=tmp_path)


@pytest.mark.parametrize(
    "damage", ["no metadata", "no progress", "progress", "a tensor", "a moment", "a shape"]
)
def test_a_checkpoint_that_lacks_something_is_named(tmp_path, damage):
    run(directory=tmp_path)
    path = tmp_path / FILE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    match damage:
        case "no metadata":
            metadata = None
        case "no progress":
            del metadata["progress"]
        case "progress":
            metadata["progress"] = '{"unknown": 1, "scores": {}}'
        case "a tensor":
            del tensors["parameter/head"]
        case "a moment":
            del tensors["exp_avg/head"]
        case "a shape":
            tensors["exp_avg_sq/head"] = torch.zeros(2, 2, 7)
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=rf"{FILE}: damaged \(.*delete it to start again"):
        run(directory=tmp_path)


def test_unknown_and_impossible_settings_are_refused():
    for wrong in (
        {"step": 3},
        {"steps": 0},
        {"learning_rate": 0},
        {"warmup_share": 1.5},
        {"save_every_s": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TrainerConfig(**wrong)
