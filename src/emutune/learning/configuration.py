"""What a training run is made of, beside the scenario and the seed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Algorithm = Literal["hmppo", "ippo"]
NetworkKind = Literal["set", "flat", "ranked", "sized"]
Credit = Literal["fleet", "marginal", "mixed"]
Baseline = Literal["sequential", "as_printed"]
Teacher = Literal["none", "lookahead"]


def _usual_width(fields: dict[str, Any]) -> int:
    return 64 if fields.get("network") == "flat" else 32


class Settings(BaseModel):
    """What any learner's settings have in common; those of one's own are a subclass.

    Attributes:
        algorithm: the name of the learner.
        teacher: the policy that training begins with, by name, or none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    algorithm: str = ""
    teacher: str = "none"

    def total_steps(self, ues: int, tasks: int) -> int:
        """Environment steps of a training, for a fleet of so many UEs and episodes of so many tasks."""
        raise NotImplementedError


class TrainingConfig(Settings):
    """Hyperparameters of HMPPO and IPPO; the defaults are those of every published number.

    Attributes:
        algorithm: HMPPO (one critic for both agents) or IPPO (each agent has its own critic).
        network: one network shared by all UEs plus pooled context, or flat concatenated features.
            ``"ranked"`` is the first that also sees where each UE stands among those that wait for an
            emulator, by how fast its upload would be, and that keeps usable emulators. ``"sized"`` also sees
            what the links cost a fleet of its size, and learns on slices of the cell that stand for others.
        credit: what an action is praised for: the fleet's reward, or what the UE itself adds to it. ``"mixed"``
            is the first for cases, on which all retentions depend, and the second for retentions.
        baseline: which critic input HMPPO's advantages use: s1 alone, or {s1; s2} as printed (Eq. 22).
        width: units of each of the two hidden layers; 32 in set networks, 64 in flat ones.
        steps: environment steps in all; rounded up to whole updates.
        environments: episodes collected for each update.
        epochs: passes over the collected steps in an update.
        minibatches: parts that a pass is cut into.
        learning_rate: Adam's step at the start; it falls linearly to zero.
        discount: gamma of Eq. 17; 1 is what the figures measure, the plain sum over a finite episode.
        trace_decay: lambda of Eq. 17.
        clip: epsilon of Eq. 21.
        entropy_weight: weight of the entropy bonus of both agents.
        max_gradient_norm: each network's gradient is scaled down to this norm.
        initial_std: standard deviation of E at the start, as a share of half the retention range.
        evaluation_episodes: held-out episodes that every update's greedy policy is measured on.
        teacher: policy that the actors imitate before they learn on their own.
        fleets: fewest and most UEs of the fleets that ``"sized"`` networks learn to serve.
    """

    algorithm: Algorithm = "hmppo"
    network: NetworkKind = "set"
    baseline: Baseline = "sequential"
    credit: Credit = "fleet"
    width: int = Field(default_factory=_usual_width, ge=1)
    steps: Annotated[int, Field(ge=1)] = 100_000
    environments: Annotated[int, Field(ge=1)] = 10
    epochs: Annotated[int, Field(ge=1)] = 4
    minibatches: Annotated[int, Field(ge=1)] = 4
    learning_rate: Annotated[float, Field(gt=0)] = 7e-4
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    trace_decay: Annotated[float, Field(ge=0, le=1)] = 0.95
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    entropy_weight: Annotated[float, Field(ge=0)] = 3e-2
    max_gradient_norm: Annotated[float, Field(gt=0)] = 0.5
    initial_std: Annotated[float, Field(gt=0)] = 0.8
    evaluation_episodes: Annotated[int, Field(ge=1)] = 6
    teacher: Teacher = "none"
    fleets: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (6, 256)

    def updates(self, tasks: int) -> int:
        """How many make up at least the configured steps, in episodes of so many tasks."""
        return -(-self.steps // (self.environments * tasks))

    def total_steps(self, ues: int, tasks: int) -> int:
        """Environment steps of a training, for a fleet of so many UEs and episodes of so many tasks."""
        return self.updates(tasks) * self.environments * tasks


class GuidedConfig(Settings):
    """How guided lookahead learns.

    Attributes:
        algorithm: tells these settings from those of ``TrainingConfig``.
        teacher: the lookahead that is corrected.
        rounds: policies learned one after another, each from the decisions of the one before.
        decisions: of single UEs, collected in each round, in whole episodes.
        exploration: noise on worths while collecting, as a share of a task's mean cost.
        fits: gradient steps in each round.
        batch: states in each gradient step.
        width: units of each hidden layer.
        learning_rate: Adam's step at the start of each round; it falls linearly to zero.
        validation: episodes that decide what is kept; fewer in fleets above 24 UEs.
    """

    algorithm: Literal["guided"] = "guided"
    teacher: Literal["lookahead"] = "lookahead"
    rounds: Annotated[int, Field(ge=1)] = 4
    decisions: Annotated[int, Field(ge=1)] = 80_000
    exploration: Annotated[float, Field(ge=0)] = 0.5
    fits: Annotated[int, Field(ge=1)] = 600
    batch: Annotated[int, Field(ge=1)] = 512
    width: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    validation: Annotated[int, Field(ge=1)] = 128

    def episodes_for(self, ues: int, tasks: int) -> int:
        """Episodes of each round."""
        return max(8, self.decisions // (ues * tasks))

    def total_steps(self, ues: int, tasks: int) -> int:
        """Environment steps of a training, for a fleet of so many UEs and episodes of so many tasks."""
        return self.rounds * self.episodes_for(ues, tasks) * tasks

    def validation_for(self, ues: int) -> int:
        """Episodes that decide what is kept."""
        return max(16, min(self.validation, 24 * self.validation // ues))
