"""Emulators of the reference model: quality, recovery, cost of a step, memory, and speed of the commands.

    python benchmarks/tuning.py --json tuning.json

Memory and steps are measured in processes of their own; the two kinds of step take turns, and the ratios of
their medians are quoted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

TASKS = ("asyncio", "email", "http", "unittest")
SEEDS = (0, 1, 2)
ORDERS = ("loss", "importance", "uniform")
COMMAND = [sys.executable, "-c", "from emutune.cli.main import run; run()"]
MEDIUM = {"n_layer": 24, "n_embd": 1024, "n_head": 16}
ROWS, LENGTH, STEPS = 2, 256, 4


def command(*arguments):
    started = time.perf_counter()
    subprocess.run([*COMMAND, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def curve(work):
    """All orders at every retention, on the test split of the model's own text."""
    from emutune.tuning.catalogue import open_catalogue
    from emutune.tuning.documentation import reference_text
    from emutune.tuning.perplexity import perplexity
    from emutune.tuning.text import block_length, pack, split_blocks

    for order in ORDERS:
        command("catalogue", "build", "reference", "--out", work / "orders", "--order", order)
    catalogue = open_catalogue(work / "orders")
    full = catalogue.assemble(catalogue.base())
    blocks = split_blocks(pack(reference_text(), catalogue.tokenizer()), block_length(catalogue.config))[
        "test"
    ]
    measured = {
        order: {
            f"{emulator.retention:.3f}": perplexity(catalogue.cut(full, emulator), blocks)
            for emulator in catalogue.emulators(f"layer_drop-{order}")
        }
        for order in ORDERS
    }
    nested, uniform = measured["loss"], measured["uniform"]
    values = list(nested.values())
    return {
        "perplexity": measured,
        "nested_over_uniform_worst": max(nested[at] / uniform[at] for at in nested),
        "monotone": all(later <= 1.01 * earlier for earlier, later in pairwise(values)),
        "fall_0.25_to_1": nested["0.250"] / nested["1.000"],
    }


def recovery(work):
    """Perplexity gained by tuning at E = 0.5 and plugging in, over that of tuning in the whole model."""
    command(
        *("catalogue", "build", "reference", "--out", work / "distilled"),
        *("--compress", "layer_drop,distill", "--retentions", "0.5"),
    )
    # Two runs of one thread each are faster than one of two.
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(alone, "recover", work, task, seed) for task in TASKS for seed in SEEDS]
        for run in runs:
            rows.append(row := run.result()["result"])
            print(
                " ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
            )
    del os.environ["OMP_NUM_THREADS"]
    percents = [row["percent"] for row in rows]
    return {
        "recovery_percent": {"mean": statistics.mean(percents), "min": min(percents)},
        "recovery": rows,
    }


def recover(work, task, seed):
    """One task and seed: the whole model before, the emulator, and both ways of tuning."""
    from emutune.tuning.catalogue import open_catalogue
    from emutune.tuning.documentation import task_text
    from emutune.tuning.trainer import TrainerConfig
    from emutune.tuning.tuner import TuneConfig, tune

    training = TrainerConfig(steps=120, score_every=20, seed=int(seed))
    found = {
        where: tune(
            open_catalogue(work / "distilled"),
            task_text(task),
            TuneConfig(where=where, retention=0.5, training=training),
            work / f"{task}-{seed}-{where}.safetensors",
        )
        for where in ("server", "device")
    }
    before, full, device = found["server"].before, found["server"].after, found["device"]
    return {
        "task": task,
        "seed": int(seed),
        "before": before,
        "emulator": device.emulator_before,
        "emulator_tuned": device.emulator_after,
        "plugged": device.after,
        "full": full,
        "percent": 100 * (before - device.after) / (before - full),
    }


def medium_model():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**MEDIUM, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))


def medium_directory(work):
    """A random model of GPT-2 medium's size in several shards, with the reference model's tokenizer."""
    from emutune.tuning.foundation import load_tokenizer, open_foundation

    directory = work / "medium"
    if not directory.exists():
        medium_model().save_pretrained(directory, max_shard_size="250MB")
        reference = open_foundation("reference")
        load_tokenizer(reference.directory, reference.config).save_pretrained(directory)
    return directory


def medium_tokens(step):
    import torch

    return torch.randint(0, 4096, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))


def trainer_step(work):
    """Seconds of a step of LoRA in the whole model, by transformers.Trainer and PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(medium_directory(work))
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, fan_in_fan_out=True, task_type="CAUSAL_LM"))
    rows = torch.cat([medium_tokens(step) for step in range(STEPS + 1)])
    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.started)

    arguments = TrainingArguments(
        output_dir=str(work / "trainer"),
        per_device_train_batch_size=ROWS,
        max_steps=STEPS + 1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[Clock()]).train()
    return seconds


def emulator_step(work, kind="lora"):
    """Seconds of a step of the same rank of LoRA in the adapter layers of the emulator at E = 0.5."""
    from emutune.tuning.adapters import attach
    from emutune.tuning.catalogue import open_catalogue
    from emutune.tuning.head_loss import training_loss
    from emutune.tuning.layers import layer_stack
    from emutune.tuning.trainer import Bookkeeping, TrainerConfig, train

    catalogue = open_catalogue(work / "medium-catalogue")
    model = catalogue.assemble(catalogue.find(0.5))
    stack = layer_stack(model)
    ends = {index: stack[index] for index in (0, 1, len(stack) - 2, len(stack) - 1)}
    parameters = attach(ends, kind, 8)
    loss = training_loss(model)
    moments = []
    config = TrainerConfig(steps=STEPS + 1, batch=ROWS)
    kept = Bookkeeping(report=lambda progress: moments.append(progress.seconds))
    train(parameters, loss, medium_tokens, config, kept)
    return [later - earlier for earlier, later in zip([0.0, *moments], moments, strict=False)]


def build_memory(work, order="uniform"):
    """Peak memory of building a catalogue of the same model, over that of the imports alone, in bytes."""
    from emutune.tuning.build import Recipe, build_catalogue

    text = "Some words about nothing in particular. " * 4000
    recipe = Recipe(retentions=(0.25, 0.5), order=order)
    idle = own_bytes()
    samples, done = [idle], threading.Event()

    def sample():
        while not done.wait(0.002):
            samples.append(own_bytes())

    watcher = threading.Thread(target=sample)
    watcher.start()
    catalogue = build_catalogue(work / "medium", work / "medium-catalogue", recipe, text)
    done.set()
    watcher.join()
    largest = max(catalogue.base().shards.values())
    return {"peak": max(samples), "idle": idle, "largest_shard": largest}


def own_bytes():
    """Memory of this process without pages of files, which the kernel can drop."""
    return status_bytes("RssAnon")


def peak_bytes():
    """Of this process alone: ru_maxrss starts at what the process that started it had."""
    return status_bytes("VmHWM")


def status_bytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def cost(work):
    """Steps and peak memory, whole model against emulator, each in a process of its own, in turns."""
    medium_directory(work)
    memory = alone("build_memory", work)["result"]
    whole, half, layers = [], [], []
    peaks = {"trainer_step": 0, "emulator_step": 0}
    for _ in range(2):
        for name, into in (("trainer_step", whole), ("emulator_step", half)):
            measured = alone(name, work)
            into += measured["result"][1:]
            peaks[name] = max(peaks[name], measured["peak"])
    layers += alone("emulator_step", work, "layers")["result"][1:]
    return {
        "step_time_ratio": statistics.median(half) / statistics.median(whole),
        "step_time_ratio_whole_layers": statistics.median(layers) / statistics.median(whole),
        "peak_memory_ratio": peaks["emulator_step"] / peaks["trainer_step"],
        "step_seconds": {"trainer": statistics.median(whole), "emulator": statistics.median(half)},
        "peak_gb": {name: peak / 1e9 for name, peak in peaks.items()},
        "build_peak_mb": {name: value / 1e6 for name, value in memory.items()},
        "build_peak_over_largest_shard": (memory["peak"] - memory["idle"]) / memory["largest_shard"],
    }


def alone(name, *arguments):
    output = subprocess.run(
        [sys.executable, __file__, "--alone", name, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


def commands(work):
    """Seconds from shell to result."""
    command("reference", "tasks", "--out", work / "tasks")
    command("catalogue", "build", "reference", "--out", work / "orders")
    email = work / "tasks" / "email.txt"
    catalogue = work / "orders"
    recipe = ("--recipe", "layer_drop-loss")
    return {
        "tune_seconds": command("tune", catalogue, "--data", email, "--out", work / "a.safetensors", *recipe),
        "calibrate_seconds": command(
            "calibrate", catalogue, "--data", email, "--out", work / "curve.toml", *recipe
        ),
    }


MEASURES = (curve, commands, cost, recovery)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", nargs="*", help="curve, commands, cost, recovery; all if not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--work", type=Path, help="where to keep catalogues and adapters; nowhere if not given"
    )
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from emutune.cli.libraries import quiet_libraries

    quiet_libraries("tuning", "benchmark")
    if arguments.alone:
        name, work, *rest = arguments.alone
        result = globals()[name](Path(work), *rest)
        print(json.dumps({"result": result, "peak": peak_bytes()}))
        return
    figures = {}
    if arguments.json and arguments.json.exists():
        figures = json.loads(arguments.json.read_text())
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("HF_HOME", str(Path(directory) / "hub"))
        for measure in MEASURES:
            if arguments.part and measure.__name__ not in arguments.part:
                continue
            measured = measure(arguments.work or Path(directory))
            print(json.dumps(measured, indent=2), flush=True)
            figures |= measured
            if arguments.json:
                arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
