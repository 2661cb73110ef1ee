"""The federation file: what the coordinator runs, from the labels to the last round.

The commented default of every setting is `defaults/federation.yaml`; the sections' types stand in modules beside this
one, that of `federation` here, with what the sections must agree on. Paths in the file are relative to the file.
Sections appear in the order in which the run uses them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gptfl_dist.config.at_rest import AtRest
from gptfl_dist.config.base import Name, Section
from gptfl_dist.config.mixing import Mixing
from gptfl_dist.config.strategy import Strategy
from gptfl_dist.config.synthesis import Synthesis
from gptfl_dist.config.task import Model, Task
from gptfl_dist.config.training import Pretraining, Training, Tuning
from gptfl_dist.config.units import Duration
from gptfl_dist.config.wire import Collective, Compression, Enrolment, Exchange

Arm = Literal["synthetic_only", "fedavg_random", "gptfl"]


class Federation(Section):
    """The rounds: with whom, how long to wait, what becomes of late updates, what ends an arm early, what is kept."""

    mode: Literal["synchronous", "asynchronous"] = "synchronous"
    rounds: PositiveInt = 30
    cohort: Literal["all"] | PositiveInt = "all"
    buffer: Literal["majority"] | PositiveInt = "majority"
    quorum: Literal["all", "majority"] | PositiveInt = "majority"
    deadline: Duration = 600.0
    join_deadline: Duration = 300.0
    late: Literal["drop", "carry"] = "drop"
    staleness: NonNegativeFloat = 0.5
    max_staleness: PositiveInt | None = None
    max_time: Duration | None = None
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    patience: PositiveInt | None = None
    choose_by: Literal["silos", "synthetic"] = "silos"
    keep: Literal["best", "all"] = "best"
    max_update_norm: PositiveFloat | None = None
    diversity: bool = False

    def cohort_of(self, silos: int) -> int:
        """How many of so many silos a round calls on (asynchronous: how many train at once)."""
        return silos if self.cohort == "all" else self.cohort

    def wanted_of(self, silos: int) -> int:
        """How many updates a round takes: those of the cohort, or in asynchronous mode the buffer."""
        cohort = self.cohort_of(silos)
        if self.mode == "synchronous":
            return cohort
        return cohort // 2 + 1 if self.buffer == "majority" else self.buffer

    def quorum_of(self, silos: int) -> int:
        """How many of these updates are enough at the deadline."""
        wanted = self.wanted_of(silos)
        return {"all": wanted, "majority": wanted // 2 + 1}.get(str(self.quorum)) or int(self.quorum)

    @model_validator(mode="after")
    def _settings_of_the_mode(self) -> Self:
        if self.mode == "asynchronous" and self.late == "carry":
            raise ValueError(
                "late is carry, which is for the synchronous mode: an asynchronous round has no late updates"
            )
        if self.mode == "synchronous" and self.buffer != "majority":
            raise ValueError(f"buffer is {self.buffer}, but mode is synchronous: a buffer is for the asynchronous mode")
        if self.mode == "synchronous" and self.late == "drop" and self.max_staleness is not None:
            raise ValueError(
                f"max_staleness is {self.max_staleness}, but no update is stale: mode is synchronous and late is drop"
            )
        return self


class SiloEntry(Section):
    """A silo that may take part. `file` is its silo file, for runs on this machine or under MPI."""

    name: Name
    max_samples: PositiveInt = 1_000_000_000
    file: Path | None = None


class FederationFile(Section):
    """The whole federation file."""

    name: Name
    seed: NonNegativeInt = 0
    run_folder: Path = Path("run")
    durability: Literal["process", "power"] = "process"
    labels: list[str] = Field(min_length=2)
    task: Task = Task()
    model: Model = Model()
    arms: list[Arm] = Field(default=["synthetic_only", "gptfl"], min_length=1)
    synthesis: Synthesis = Synthesis()
    pretraining: Pretraining = Pretraining()
    training: Training = Training()
    mixing: Mixing = Mixing()
    tuning: Tuning = Tuning()
    federation: Federation = Federation()
    strategy: Strategy = Strategy()
    exchange: Exchange = Exchange()
    enrolment: Enrolment | None = None
    collective: Collective = Collective()
    compression: Compression = Compression()
    at_rest: AtRest | None = None
    test_data: Path | None = None
    silos: list[SiloEntry] = Field(min_length=1)

    @property
    def pretrains(self) -> bool:
        """Whether a model is trained on the synthetic set."""
        return bool({"synthetic_only", "gptfl"} & set(self.arms))

    @property
    def synthesises(self) -> bool:
        """Whether the run needs a synthetic set: to train on it, to hand out of it, or to judge models by it."""
        return self.pretrains or self.mixing.samples != "none" or self.federation.choose_by == "synthetic"

    @model_validator(mode="after")
    def _nothing_that_needs_single_updates(self) -> Self:
        rules = self.federation
        needs = {
            f"federation.mode is {rules.mode}": rules.mode != "synchronous",
            f"federation.late is {rules.late}": rules.late != "drop",
            "federation.diversity is true": rules.diversity,
            f"compression.up is {self.compression.up}": self.compression.up != "none",
            f"compression.down is {self.compression.down}": self.compression.down != "none",
            f"collective.trust is {self.collective.trust}": self.collective.trust != "plain",
            f"strategy.rule is {self.strategy.rule}": self.strategy.rule != "mean",
            f"strategy.clip_norm is {self.strategy.clip_norm}": self.strategy.clip_norm is not None,
            f"training.contrastive is {self.training.contrastive:g}": self.training.contrastive > 0,
            "training.private_norms is true": self.training.private_norms,
            f"mixing.samples is {self.mixing.samples}": self.mixing.samples != "none",
        }
        for setting, given in needs.items():
            if given and self.collective.reduction == "fast":
                raise ValueError(
                    f"collective.reduction is fast, which sums the plain updates of one round, but {setting}: "
                    "set collective.reduction to exact"
                )
        return self

    @model_validator(mode="after")
    def _enough_for_the_rule(self) -> Self:
        strategy, training = self.strategy, self.training
        silos, fewest = len(self.silos), strategy.fewest
        quorum = self.federation.quorum_of(silos)
        if quorum < fewest:
            found = (
                f"strategy.rule is {strategy.rule}, which needs {fewest} updates to bear {strategy.borne} malicious "
                "silo(s), but "
            )
            if silos < fewest:
                raise ValueError(
                    f"{found}silos names {silos}: name {fewest} silos or more, lower strategy.malicious, or take "
                    "another rule"
                )
            raise ValueError(
                f"{found}a round may end with {quorum}: raise federation.quorum to {fewest} or more, or lower "
                "strategy.malicious"
            )
        if strategy.rule == "fednova" and training.proximal * max(training.learning_rates) >= 1:
            raise ValueError(
                f"training.proximal is {training.proximal:g}, which at a rate of {max(training.learning_rates):g} "
                "pulls beyond the received weights, and strategy.rule fednova knows no length of such a walk: lower one"
            )
        return self

    @model_validator(mode="after")
    def _as_scaffold_is_defined(self) -> Self:
        needs = {
            f"federation.mode is {self.federation.mode}": self.federation.mode != "synchronous",
            f"federation.late is {self.federation.late}": self.federation.late != "drop",
            f"training.momentum is {self.training.momentum:g}": self.training.momentum > 0,
        }
        for setting, given in needs.items():
            if given and self.strategy.rule == "scaffold":
                raise ValueError(
                    f"strategy.rule is scaffold, whose control variates are the mean gradients of plain SGD in the "
                    f"same round, but {setting}: leave it out, or take another rule"
                )
        return self

    @model_validator(mode="after")
    def _as_the_synthetic_set_allows(self) -> Self:
        uses = {
            f"mixing.samples is {self.mixing.samples}": self.mixing.samples != "none",
            "federation.choose_by is synthetic": self.federation.choose_by == "synthetic",
        }
        for setting, given in uses.items():
            if given and self.synthesis.candidates:
                raise ValueError(
                    f"{setting}, and synthesis.candidates leaves open of which set: choose a candidate first, and name "
                    "its settings under synthesis"
                )
        unfit = {
            "fednova": "which counts a silo's steps by its own samples",
            "scaffold": "whose control variates tell how many steps a silo made, and so how much it was filled up",
        }
        if self.mixing.samples != "none" and self.strategy.rule in unfit:
            raise ValueError(
                f"strategy.rule is {self.strategy.rule}, {unfit[self.strategy.rule]}, but mixing.samples is "
                f"{self.mixing.samples}: leave it out, or take another rule"
            )
        return self

    @model_validator(mode="after")
    def _as_class_means_need(self) -> Self:
        rules, strategy, training = self.federation, self.strategy, self.training
        needs = {
            f"federation.mode is {rules.mode}": rules.mode != "synchronous",
            f"federation.late is {rules.late}": rules.late != "drop",
            "federation.max_update_norm is set": rules.max_update_norm is not None,
            f"strategy.rule is {strategy.rule}": strategy.rule not in ("mean", "fednova"),
            "strategy.clip_norm is set": strategy.clip_norm is not None,
            f"training.contrastive is {training.contrastive:g}": training.contrastive > 0,
            "training.private_norms is true": training.private_norms,
            f"compression.up is {self.compression.up}": self.compression.up != "none",
            f"tuning.rounds is {self.tuning.rounds}": self.tuning.rounds < 2 and len(training.learning_rates) > 1,
        }
        for setting, given in needs.items():
            if given and training.first_round == "means":
                raise ValueError(
                    f"training.first_round is means, in which silos send sums of what the model sees in their samples, "
                    f"but {setting}: leave it out, or set training.first_round to train"
                )
        return self

    @model_validator(mode="after")
    def _all_of_one_kind(self) -> Self:
        audio, settings = self.task.kind == "audio", self.synthesis
        if self.model.name == "conv1d-gru" and not audio:
            raise ValueError("model.name is conv1d-gru, which is for task.kind audio, and task.kind is image")
        for one in [settings.of_candidate(name) for name in settings.candidates] or [settings]:
            source = one.generator.source
            if source == "tts" and not audio:
                raise ValueError("synthesis.generator.source is tts, which speaks, and task.kind is image")
            if not audio or not self.synthesises:
                continue
            if source == "embedded":
                raise ValueError(
                    "synthesis.generator.source is embedded, which draws digits, and task.kind is audio: set it to tts "
                    "or to a text-to-audio pipeline"
                )
            if one.filter is not None and one.filter.judge != "cross":
                raise ValueError(
                    f"synthesis.filter.judge is {one.filter.judge}, which looks at pictures, and task.kind is audio: "
                    "set it to cross"
                )
        return self

    @model_validator(mode="after")
    def _one_authority(self) -> Self:
        if self.enrolment is not None and self.exchange.certificate is not None:
            raise ValueError(
                "enrolment keeps an authority, which makes the coordinator's certificate, and exchange names another: "
                "give one of them"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        named: dict[str, list[str]] = {"labels": self.labels, "arms": [], "silos": [silo.name for silo in self.silos]}
        named["arms"].extend(self.arms)
        for what, values in named.items():
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"{what} names {', '.join(twice)} twice")
        if self.synthesis.candidates and self.synthesis.choose_by == "silos" and "gptfl" not in self.arms:
            raise ValueError(
                "synthesis.choose_by is silos, who are asked before the arm gptfl, which arms does not name: "
                "add it, or choose by synthetic"
            )
        rules, silos = self.federation, len(self.silos)
        cohort, wanted, quorum = rules.cohort_of(silos), rules.wanted_of(silos), rules.quorum_of(silos)
        if cohort > silos:
            raise ValueError(f"federation.cohort is {cohort}, but there are only {silos} silos")
        if rules.mode == "asynchronous":
            if wanted > silos:
                raise ValueError(
                    f"federation.buffer is {wanted}, but there are only {silos} silos, and each is in it at most once"
                )
            if quorum > wanted:
                raise ValueError(f"federation.quorum is {quorum}, more than the buffer of {wanted}")
        elif quorum > wanted:
            raise ValueError(f"federation.quorum is {quorum}, more than the cohort of {wanted}")
        elif rules.late == "carry" and quorum == wanted:
            raise ValueError(
                f"federation.late is carry, but the quorum is the whole cohort of {cohort}: no round could end without "
                "its late updates; lower federation.quorum"
            )
        return self
