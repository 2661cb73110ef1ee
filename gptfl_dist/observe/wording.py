"""Numbers and results as people read them, the same on the terminal, in the table and in the report."""

from __future__ import annotations

from gptfl_dist.observe.summary import Choice, FederatedArm, Summary, SyntheticArm

ARM_NAMES = {
    "synthetic_only": "Synthetic only",
    "fedavg_random": "FedAvg from random weights",
    "gptfl": "GPT-FL",
}
"""How each arm of a federation file is called in front of people."""

UNKNOWN = "-"

_STOPS = {
    "max_time": "its time was over",
    "target_accuracy": "its target was reached on validation data",
    "patience": "there was no more progress on validation data",
}
_UNITS = (("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12))


def chosen_on(summary: Summary) -> str:
    """The data by which the kept model was chosen."""
    return "the silos' validation data" if summary.chosen_by == "silos" else "held-out synthetic data"


def duration(seconds: float) -> str:
    """Seconds as "0.4 s", "12 s", "3 min 05 s" or "2 h 10 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes as "812 B", "45.1 kB", "3.20 MB" or "1.75 GB" (powers of ten)."""
    if count < 999.5:
        return f"{count:.0f} B"
    unit, factor = next(((unit, factor) for unit, factor in _UNITS if count < 999.5 * factor), _UNITS[-1])
    value = count / factor
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def percent(share: float | None) -> str:
    """A share between 0 and 1 as "93.4 %"; a dash where it is unknown."""
    return UNKNOWN if share is None else f"{share * 100:.1f} %"


def kept_accuracy(summary: Summary, arm: SyntheticArm | FederatedArm) -> float | None:
    """Accuracy of the arm's kept model on the data that the run's curves are of."""
    return arm.accuracy if summary.curve_of == "test" else arm.validation_accuracy


def rounds_to_target_text(summary: Summary, arm: FederatedArm) -> str:
    """In which round the arm's curve first reaches the target, or that it does not."""
    if summary.target_accuracy is None:
        return UNKNOWN
    return "not reached" if arm.rounds_to_target is None else f"{arm.rounds_to_target} of {arm.rounds}"


def stop_texts(summary: Summary) -> list[str]:
    """Of each arm that ended before its last round, why, in one sentence."""
    return [
        f"{ARM_NAMES[name]} ended after {arm.rounds} rounds, for {_STOPS[arm.stopped_by]} "
        f"(federation.{arm.stopped_by})."
        for name, arm in summary.arms.federated.items()
        if arm.stopped_by is not None
    ]


def choice_text(choice: Choice) -> str:
    """Which candidate was chosen, and why, in one sentence."""
    where = "the silos' validation data" if choice.by == "silos" else "the held-out images of all candidates"
    figures = ", ".join(f"{name}: {percent(accuracy)}" for name, accuracy in choice.accuracy.items())
    return f"Candidate {choice.chosen} was chosen on {where} ({figures})."


def headline(summary: Summary) -> str:
    """The result of the run in one sentence, as it came out, good or bad."""
    gptfl, fedavg, synthetic = summary.arms.gptfl, summary.arms.fedavg_random, summary.arms.synthetic_only
    where = f"on {summary.curve_of} data"
    if gptfl is None:
        arm = fedavg or synthetic
        if arm is None:
            return "No arm was run."
        name = ARM_NAMES["fedavg_random" if fedavg else "synthetic_only"]
        rounds = f" after {fedavg.rounds} rounds" if fedavg else ""
        return f"{name} reaches {percent(kept_accuracy(summary, arm))} {where}{rounds}."
    accuracy = kept_accuracy(summary, gptfl)
    sentence = f"GPT-FL reaches {percent(accuracy)} {where}"
    reference, name = (fedavg, "FedAvg from random weights") if fedavg else (synthetic, "the synthetic data alone")
    against = kept_accuracy(summary, reference) if reference else None
    if accuracy is not None and against is not None:
        sentence += f", {_difference(accuracy - against, name)}"
    if fedavg is not None and summary.target_accuracy is not None:
        best = f"FedAvg's best ({percent(summary.target_accuracy)})"
        if gptfl.rounds_to_target is None:
            sentence += f"; it does not reach {best} in {gptfl.rounds} rounds"
        else:
            sentence += f"; it reaches {best} in round {gptfl.rounds_to_target}"
            sentence += f", FedAvg itself in round {fedavg.rounds_to_target}"
    return f"{sentence}."


def _difference(points: float, name: str) -> str:
    if abs(points) < 0.0005:
        return f"as much as {name}"
    return f"{abs(points) * 100:.1f} points {'above' if points > 0 else 'below'} {name}"
