"""What the server computes with torch, in processes of its own: training uploaded tasks, judging adapters.

A job is a JSON object, and so is its outcome; both are the same whichever process does the job, and a job
that is done again comes to the same outcome. ``python -m emutune.fleet.server.worker`` reads jobs from
standard input, one a line, and writes an outcome for each.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from emutune.fleet.protocol import Training
from emutune.fleet.server.child import answer_lines, errors_as_answers

_HELD_BACK_BLOCKS = 24


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
    from emutune.tuning.text import fitting_block, pack, read_text, split_blocks
    from emutune.tuning.tune import Bench, adapter_layers, adapter_manifest

    catalogue = open_catalogue(job.catalogue)
    emulator, tokenizer = catalogue.emulator(job.emulator), catalogue.tokenizer()
    assert emulator is not None
    splits = split_blocks(
        pack(read_text(job.text), tokenizer), fitting_block(catalogue.config, job.training.block)
    )
    full = catalogue.assemble(catalogue.base())
    training = job.training
    manifest = adapter_manifest(catalogue, emulator, training.adapter, training.width)
    parameters = attach(adapter_layers(catalogue, full), manifest.kind, manifest.width, training.seed)
    if job.start is not None:
        start_from(job.start, manifest, parameters)
    config = trainer_config(training)
    bench = Bench(catalogue, full, emulator, splits, tokenizer.mask_token_id)
    result = bench.train(parameters, config, job.work, job.model_dump_json(exclude={"work"}))
    save_adapter(job.out, manifest, parameters)
    return {"before": result.before, "after": result.after}


def _judge(job: JudgeJob) -> dict[str, Any]:
    model, splits, mask_token = _whole_model(job.catalogue, job.text, job.block)
    return {"perplexity": [_plugged_perplexity(model, path, splits, mask_token) for path in job.adapters]}


@lru_cache(maxsize=4)
def _whole_model(catalogue_directory: Path, text: Path | None, block: int) -> Any:
    from emutune.tuning.text import fitting_block, pack, read_text

    tokenizer, model = _opened(catalogue_directory)
    words = _documentation() if text is None else read_text(text)
    blocks = _held_back(pack(words, tokenizer), fitting_block(model.config, block))
    return model, blocks, tokenizer.mask_token_id


def _documentation() -> str:
    from emutune.tuning.documentation import reference_text

    return reference_text()


@lru_cache(maxsize=1)
def _opened(directory: Path) -> Any:
    from emutune.tuning.catalogue import open_catalogue

    catalogue = open_catalogue(directory)
    return catalogue.tokenizer(), catalogue.assemble(catalogue.base())


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
    numbers = np.unique(np.linspace(0, count - 1, min(count, _HELD_BACK_BLOCKS)).astype(int))
    return Blocks(tokens, block, numbers)


def _plugged_perplexity(model: Any, adapter: Path | None, blocks: Any, mask_token: int | None) -> float:
    import copy

    from emutune.tuning.adapters import check_belongs, load_adapter, plug_in
    from emutune.tuning.layers import keep_layers, layer_stack, replace_stack, stack_name
    from emutune.tuning.perplexity import perplexity

    if adapter is None:
        return perplexity(model, blocks, mask_token=mask_token)
    manifest, values = load_adapter(adapter)
    layers = list(layer_stack(model))
    check_belongs(manifest, base=manifest.base, layers=len(layers))
    plugged = keep_layers(model, range(len(layers)))
    own = {index: copy.deepcopy(layers[index]) for index in manifest.layer_map}
    plug_in(own, manifest, values)
    replace_stack(plugged, stack_name(plugged), [own.get(i, layer) for i, layer in enumerate(layers)])
    return perplexity(plugged, blocks, mask_token=mask_token)


def outcome_of(line: str | bytes) -> dict[str, Any]:
    """Do a job given as JSON; see ``errors_as_answers`` for what goes wrong."""
    return errors_as_answers(lambda: run_job(_JOB.validate_json(line)))


def main() -> None:
    """Do jobs until the server ends."""
    answer_lines(outcome_of)


if __name__ == "__main__":
    main()
