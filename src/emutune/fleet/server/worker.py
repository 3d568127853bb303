"""What the server computes with torch, in processes of its own: training uploaded tasks, judging adapters.

A job is a JSON object, and so is its outcome; both are the same whichever process does the job, and a job
that is done again comes to the same outcome. ``python -m emutune.fleet.server.worker`` reads jobs from
standard input, one a line, and writes an outcome for each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from emutune.fleet.protocol import Training
from emutune.fleet.server.child import answer_lines, errors_as_answers, faults_as_answers
from emutune.tuning.inventory import CatalogueInfo

_HELD_BACK_BLOCKS = 24
# What Python, torch and C++ say of it.
_NO_MEMORY = ("MemoryError", "allocate memory", "bad_alloc")


class TrainJob(BaseModel):
    """Train an adapter on a text.

    Attributes:
        emulator: name of the emulator to train against; the whole model's is ``base``.
        start: adapter from which training starts.
        out: where the adapter goes.
        work: where checkpoints are kept; whoever does the job again goes on from there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["train"] = "train"
    catalogue: Path
    emulator: str
    text: Path
    start: Path | None
    out: Path
    work: Path
    training: Training


class JudgeJob(BaseModel):
    """Perplexity of the whole model on held-back text, with each of some adapters plugged in; None is without."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["judge"] = "judge"
    catalogue: Path
    text: Path | None
    block: int
    adapters: tuple[Path | None, ...]


Job = Annotated[TrainJob | JudgeJob, Field(discriminator="kind")]
_JOB: TypeAdapter[TrainJob | JudgeJob] = TypeAdapter(Job)


def run_job(job: TrainJob | JudgeJob) -> dict[str, Any]:
    """Do a job.

    Raises:
        EmutuneError: its text, adapter or catalogue is not usable.
    """
    return _train(job) if isinstance(job, TrainJob) else _judge(job)


def _train(job: TrainJob) -> dict[str, Any]:
    from emutune.fleet.training import trainer_config
    from emutune.tuning.adapters import attach, save_adapter, start_from
    from emutune.tuning.catalogue import open_catalogue
    from emutune.tuning.text import fitting_block, task_blocks
    from emutune.tuning.tuner import Bench, adapter_layers

    catalogue = open_catalogue(job.catalogue)
    emulator, tokenizer = catalogue.emulator(job.emulator), catalogue.tokenizer()
    assert emulator is not None
    training = job.training
    block = fitting_block(catalogue.config, training.block)
    splits = task_blocks(job.text, tokenizer, block, training.steps * training.batch)
    full = catalogue.assemble(catalogue.base())
    manifest = catalogue.adapter_manifest(emulator, training.adapter, training.width)
    parameters = attach(adapter_layers(catalogue, full), manifest.kind, manifest.width, training.seed)
    if job.start is not None:
        start_from(job.start, manifest, parameters)
    config = trainer_config(training)
    bench = Bench(catalogue, full, emulator, splits, tokenizer.mask_token_id)
    began = time.thread_time()
    result = bench.train(parameters, config, job.work, job.model_dump_json(exclude={"work"}))
    save_adapter(job.out, manifest, parameters)
    return {"before": result.before, "after": result.after, "processor_s": time.thread_time() - began}


def _judge(job: JudgeJob) -> dict[str, Any]:
    bench = _bench(job.catalogue, job.text, job.block)
    return {"perplexity": [_plugged_perplexity(bench, path) for path in job.adapters]}


class _Bench(NamedTuple):
    """What adapters are judged with: the whole model, what its catalogue says of it, and held-back text."""

    info: CatalogueInfo
    model: Any
    blocks: Any
    mask_token: int | None


def _bench(catalogue_directory: Path, text: Path | None, block: int) -> _Bench:
    info, tokenizer, model = _opened(catalogue_directory)
    return _Bench(info, model, _blocks(catalogue_directory, text, block), tokenizer.mask_token_id)


# Kept apart from the model, of which only one is in memory at a time.
@lru_cache(maxsize=4)
def _blocks(catalogue_directory: Path, text: Path | None, block: int) -> Any:
    from emutune.tuning.text import fitting_block, pack, read_text

    _, tokenizer, model = _opened(catalogue_directory)
    words = _documentation() if text is None else read_text(text)
    return _held_back(pack(words, tokenizer), fitting_block(model.config, block))


def _documentation() -> str:
    from emutune.tuning.documentation import reference_text

    return reference_text()


@lru_cache(maxsize=1)
def _opened(directory: Path) -> Any:
    from emutune.tuning.catalogue import open_catalogue

    catalogue = open_catalogue(directory)
    return catalogue.info, catalogue.tokenizer(), catalogue.assemble(catalogue.base())


def _held_back(tokens: Any, block: int) -> Any:
    """Blocks from all over the text, as many as one answer is worth waiting for."""
    import numpy as np

    from emutune.errors import DataError
    from emutune.tuning.text import Blocks

    count = len(tokens) // block
    if not count:
        raise DataError(
            f"acceptance: held-back text has {len(tokens)} tokens, fewer than a block of {block}; give more text"
        )
    return Blocks(tokens, block, np.arange(count)).spread(_HELD_BACK_BLOCKS)


def _plugged_perplexity(bench: _Bench, adapter: Path | None) -> float:
    import copy

    from emutune.tuning.adapters import check_belongs, load_adapter, plug_in
    from emutune.tuning.layers import keep_layers, layer_stack, replace_stack, stack_name
    from emutune.tuning.perplexity import perplexity

    model = bench.model
    if adapter is None:
        return perplexity(model, bench.blocks, mask_token=bench.mask_token)
    manifest, values = load_adapter(adapter)
    layers = list(layer_stack(model))
    info = bench.info
    check_belongs(manifest, base=info.base, layers=info.layers, layer_map=info.adapter_layers)
    plugged = keep_layers(model, range(len(layers)))
    own = {index: copy.deepcopy(layers[index]) for index in manifest.layer_map}
    plug_in(own, manifest, values, info.adapters.get(manifest.kind))
    replace_stack(plugged, stack_name(plugged), [own.get(i, layer) for i, layer in enumerate(layers)])
    return perplexity(plugged, bench.blocks, mask_token=bench.mask_token)


def outcome_of(line: str | bytes, memory_bytes: int = 0) -> dict[str, Any]:
    """Do a job given as JSON; see ``errors_as_answers`` and ``faults_as_answers`` for what goes wrong.

    Args:
        line: the job.
        memory_bytes: the most that the process may have while it does it; 0 for no limit.
    """
    with _limited_memory(memory_bytes):
        outcome = faults_as_answers(lambda: errors_as_answers(lambda: run_job(_JOB.validate_json(line))))
    if any(sign in outcome.get("error", "") for sign in _NO_MEMORY):
        outcome["error"] += (
            f" (it may have {memory_bytes / 1e6:.0f} MB; raise jobs.memory_mb in the fleet's file)"
        )
    return outcome


@contextmanager
def _limited_memory(most: int) -> Iterator[None]:
    """Let whatever asks for more memory fail, where the system can do that."""
    try:
        import resource
    except ImportError:  # there is none for Windows
        yield
        return
    # Not the address space, of which torch maps many times what it uses.
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if most and (before == resource.RLIM_INFINITY or most < before):
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def main() -> None:
    """Do jobs until the server ends."""
    memory_bytes = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    answer_lines(lambda line: outcome_of(line, memory_bytes))


if __name__ == "__main__":
    main()
