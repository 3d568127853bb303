"""A shipped world rehearsed on this machine: the files of a fleet, and the tasks of its devices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emutune.errors import FleetError
from emutune.files import replacing
from emutune.fleet.comparison import compare_steps, errors
from emutune.fleet.config import FleetConfig, load_fleet
from emutune.fleet.costing import costs_of, simulated_costs
from emutune.fleet.local import LocalDevice, local_devices, with_drawn_abilities
from emutune.fleet.server.choices import Opening, opening_of
from emutune.fleet.server.decide import open_decider
from emutune.fleet.server.drawn import Draws
from emutune.fleet.server.run import opened_ledger
from emutune.fleet.worlds import ServedWorld, served_world
from emutune.policies.measure import run_episodes
from emutune.policies.registry import baseline_policy
from emutune.scenario import Scenario, dump_scenario, load_scenario
from emutune.tuning.documentation import MODELS, REFERENCE, TASKS, task_text
from emutune.tuning.inventory import open_inventory
from emutune.world import build_world, draw_batch

if TYPE_CHECKING:
    from emutune.tuning.making import Report

# So long a usual step takes here, and so long a training that is faster than most: as a processor needs for it. What
# is slower than a minute a step is too slow to wait for.
_STEP_S, _TRAINING_S, _SLOWEST_STEP_S = 6.0, 3.0, 60.0
_EPISODES = 16
_HELD_BACK = 5
_FLEET = """# Written by emutune fleet; emutune serve takes it too.

name = "{name}"
scenario = "../scenario.toml"

[server]
directory = "."
port = 0

[steps]
count = {steps}
fresh = true
gather_s = 60.0
deadline_s = 1200.0

[shaping]
time_scale = {time_scale!r}
byte_scale = {byte_scale!r}
seed = {seed}

# As the curves of the shipped models were measured.
[training]
adapter = "lora"
width = 8
steps = 20
batch = 4
block = 128
learning_rate = 0.005
"""


@dataclass(frozen=True)
class Rehearsal:
    """A world as fleets of this machine run it, each in a folder of its own.

    Attributes:
        root: holds ``scenario.toml`` and a folder for each policy.
        served: the world, with the models of the catalogues.
        catalogues: directories of those.
        devices: how many take part.
        steps: of the one episode.
        seed: of all that is drawn.
        time_scale: seconds of the world in one of this machine.
    """

    root: Path
    served: ServedWorld
    catalogues: tuple[Path, ...]
    devices: int
    steps: int
    seed: int
    time_scale: float

    @property
    def scenario(self) -> Scenario:
        """What the fleets run, and what a policy for them is trained in."""
        return self.served.scenario

    def fleet_file(self, policy: str) -> Path:
        """Where the file of a policy's fleet is."""
        return self.root / re.sub(r"[^0-9A-Za-z_-]+", "-", policy).strip("-") / "fleet.toml"

    def check(self, policy: str) -> None:
        """See that a policy exists and decides about the fleet's own models.

        Raises:
            EmutuneError: it does not.
        """
        known = open_decider(Opening(policy=policy, scenario=self.scenario)).scenario
        if known.models != self.scenario.models:
            raise FleetError(
                f"--policy {policy}: was trained in the scenario {known.name!r}, whose models are not those of the "
                f"fleet; train one in {self.root / 'scenario.toml'}"
            )

    def prepare(self, policy: str) -> tuple[FleetConfig, list[LocalDevice]]:
        """Write what a policy's fleet needs: its file, and every device's tasks; the same for each policy."""
        path = self.fleet_file(policy)
        content = _FLEET.format(
            name=self.scenario.name,
            steps=self.steps,
            time_scale=self.time_scale,
            byte_scale=self.served.byte_scale,
            seed=self.seed,
        )
        _write(path, content)
        config = load_fleet(path)
        devices = with_drawn_abilities(config, self.scenario, local_devices(config, self.devices))
        self._write_tasks(config, devices)
        return config, devices

    def _write_tasks(self, config: FleetConfig, devices: Sequence[LocalDevice]) -> None:
        """Texts as large as the world's law draws them and of its models, a file a task in their order.

        A device's are about one subject, in English or in code.
        """
        episode = Draws(build_world(self.scenario), self.seed).episode(0, [device.name for device in devices])
        sizes = np.asarray(episode.data_bits) / 8 / self.served.byte_scale
        # Where there is one model, none is drawn.
        families = np.broadcast_to(
            0 if len(self.catalogues) == 1 else np.asarray(episode.family), sizes.shape
        )
        names = [path.name for path in self.catalogues]
        for number, device in enumerate(devices):
            subject = TASKS[number % len(TASKS)]
            own = [_divided(task_text(subject, name if name in MODELS else REFERENCE)) for name in names]
            for task, (size, family) in enumerate(zip(sizes[:, number], families[:, number], strict=True)):
                text = _part(own[family].kept, task, round(float(size)))
                # Where there is one model, nothing is called by it.
                folder = device.data / names[family] if len(names) > 1 else device.data
                _write(folder / f"{task:04}.txt", text)
            if (held_back := config.acceptance.held_back) is not None:
                for number, (name, texts) in enumerate(zip(names, own, strict=True)):
                    path = (
                        held_back / device.name / f"{name}.txt"
                        if number
                        else held_back / f"{device.name}.txt"
                    )
                    _write(path, texts.held_back)


class _Divided(NamedTuple):
    """A subject's text: what a device has of it, and what is kept from it for the server to judge adapters on."""

    kept: str
    held_back: str


def shipped_catalogues(world: str, root: Path, report: "Report" = lambda stage, progress: None) -> list[Path]:
    """Emulators of the shipped models, of as many as a world has and there are; those that are there stay.

    Args:
        world: its name or path.
        root: below which each has a directory, called as its model.
        report: told how far building is.
    """
    paths = [root / name for name in MODELS[: len(load_scenario(world).models)]]
    for path in paths:
        shipped_catalogue(path.name, path, report)
    return paths


def shipped_catalogue(model: str, out: Path, report: Report = lambda stage, progress: None) -> None:
    """Emulators of a shipped model, in the order of layers in which its curve was measured."""
    from emutune.tuning.build import Recipe, build_catalogue

    build_catalogue(model, out, Recipe(order="importance"), None, report)


def rehearse(
    world: str,
    root: Path,
    catalogues: Sequence[Path],
    devices: int,
    steps: int,
    seed: int,
    policy: str = "best_fixed",
) -> Rehearsal:
    """Make a shipped world, or a scenario's file, ready to be run on this machine.

    Args:
        world: its name or path.
        root: where everything is kept.
        catalogues: directories of the emulators, one for each foundation model.
        devices: how many take part.
        steps: of the one episode that is run.
        seed: of all that is drawn.
        policy: whose usual step takes a few seconds.

    Raises:
        EmutuneError: the world or the catalogues cannot be used.
    """
    opened = [open_inventory(path) for path in catalogues]
    served = served_world(load_scenario(world), opened, devices, steps)
    time_scale = float(f"{_time_scale(served.scenario, policy):.3g}")
    _write(root / "scenario.toml", dump_scenario(served.scenario))
    return Rehearsal(root, served, tuple(catalogues), devices, steps, seed, time_scale)


def figures_of(rehearsal: Rehearsal, policy: str) -> dict[str, Any]:
    """What a policy's fleet came to, beside what was predicted of each step and what the simulator charges.

    Sums are over the steps of which everything was measured, the simulator's too.
    """
    config = load_fleet(rehearsal.fleet_file(policy))
    names = [device.name for device in local_devices(config, rehearsal.devices)]
    with opened_ledger(config) as ledger:
        rows = ledger.comparison(range(rehearsal.steps))
    costs = costs_of(rows, rehearsal.scenario, names)
    decider = open_decider(opening_of(config, policy, rehearsal.scenario))
    simulated = simulated_costs(rows, rehearsal.scenario, names, decider.policy, rehearsal.seed)
    compared = compare_steps(rows)
    known = [step for step in compared if step.measured_delay_s is not None]
    return {
        "cost": float(costs.measured[costs.complete].sum()),
        "predicted_cost": float(costs.predicted[costs.complete].sum()),
        "simulated_cost": float(simulated[costs.complete].sum()),
        "delay_s": sum(step.measured_delay_s or 0.0 for step in known),
        "predicted_delay_s": sum(step.predicted_delay_s for step in known),
        "steps": int(costs.complete.sum()),
        "errors": asdict(errors(rows)),
    }


def _time_scale(scenario: Scenario, policy: str) -> float:
    """How many of its seconds pass in one of ours."""
    usual_s = _usual_step_s(scenario, policy)
    world = build_world(scenario)
    if not world.rules.trains_in_time:
        return usual_s / _STEP_S
    models, bits = world.rules.models, jnp.mean(world.data_bits)
    here_s = models.tflop_per_bit[0, models.low[0]] * bits / world.devices.tflops.quantile(jnp.float32(0.75))
    there_s = models.whole_tflop_per_bit[0] * bits / world.rules.server_tflops
    least_s = float(jnp.minimum(here_s, there_s))
    return max(min(usual_s / _STEP_S, least_s / _TRAINING_S), usual_s / _SLOWEST_STEP_S)


def _usual_step_s(scenario: Scenario, policy: str) -> float:
    """Mean delay of a step in the simulator, of a policy that needs no training."""
    world = build_world(scenario)
    episodes = draw_batch(jax.random.key(0), world, _EPISODES)
    summary = run_episodes(world, baseline_policy(policy, scenario, None), episodes)
    return max(float(np.mean(summary.delay_min)) * 60 / scenario.fleet.tasks, 1e-3)


def _divided(text: str) -> _Divided:
    """Every fifth paragraph is held back."""
    paragraphs = text.split("\n\n")
    kept = "\n\n".join(part for place, part in enumerate(paragraphs) if place % _HELD_BACK)
    return _Divided(kept, "\n\n".join(paragraphs[::_HELD_BACK]))


def _part(text: str, number: int, size: int) -> str:
    """So many bytes of a text without end, which repeats; each number's part begins elsewhere."""
    content = text.encode()
    begin = number * size % len(content)
    cut = (content * (2 + size // len(content)))[begin : begin + size].decode("utf-8", "ignore")
    # In the place of letters that were cut in two.
    return cut + "." * (size - len(cut.encode()))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            aside.write_text(text, "utf-8")
    except OSError as error:
        raise FleetError(f"{path}: cannot be written ({error.strerror}); free some space") from error
