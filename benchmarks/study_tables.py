"""The tables of docs/studies.md and their picture, from what the studies left in benchmarks/results.

    python benchmarks/study_tables.py benchmarks/results/*.json                                    prints the tables
    python benchmarks/study_tables.py benchmarks/results/*.json --picture docs/images/studies.png

A value is the mean over the seeds, with the standard deviation in parentheses.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Arm = dict[str, Any]
STARTS = ("random", "synthetic")
NAMES = {
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "scaffold": "SCAFFOLD",
    "moon": "MOON",
    "fedadam": "FedAdam",
    "fedadam-warped": "FedAdam, warped samples",
    "one-shot": "one round for all",
}
OTHERS = {
    1: "one silo a round",
    3: "three silos a round",
    "alone": "each silo alone",
    "pooled": "all data in one place",
}
COSTS = {
    "generation and pre-training": ("generate_device_seconds", "pretrain_device_seconds"),
    "training of all silos": ("silo_seconds",),
}
COLOURS = {"random": "#c2500a", "synthetic": "#0067a8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="NAME.json of each study")
    parser.add_argument("--picture", type=Path, help="where to draw them, as PNG")
    options = parser.parse_args()
    studies = [json.loads(path.read_text()) for path in options.results]
    for study in studies:
        print(f"# {study['experiment']}\n")
        print("\n".join(tables_of(study)))
    if options.picture is not None:
        draw(studies, options.picture)


def tables_of(study: dict[str, Any]) -> list[str]:
    """All lines of all tables, with an empty one after each."""
    lines: list[str] = []
    unseen: list[dict[str, Any]] = []
    for split in study["splits"]:
        if split["split"].startswith("unseen-"):
            unseen.append(split)
            continue
        lines += [*strategies_of(split), ""]
        if any(arm["silos"] != "all" for arm in split["arms"]):
            lines += [*references_of(split), ""]
        lines += [*agreement_of(split), ""]
    return lines + ([*unseen_of(unseen), ""] if unseen else [])


def strategies_of(split: dict[str, Any]) -> list[str]:
    """Strategies from both starts; * marks what validation data chose, of the arms from synthetic weights."""
    head = f"{split['split']}: %", "random", "synthetic", "to the best from random", "rounds to its end"
    body = []
    for name, arms in _pairs(split, "all"):
        random, synthetic = arms
        is_chosen = all(synthetic[field] == value for field, value in split["chosen"].items())
        rounds = ", ".join(str(cell["rounds_to_target"] or "-") for cell in synthetic["cells"])
        body.append(
            (
                NAMES[name],
                percent(random["final_accuracy"]),
                percent(synthetic["final_accuracy"]) + (" *" if is_chosen else ""),
                _with_spread(synthetic["difference_to_baseline"], "+.1f"),
                rounds,
            )
        )
    return _table(head, body)


def references_of(split: dict[str, Any]) -> list[str]:
    """FedAvg with fewer silos a round, alone and pooled, what all starts are before the first round, and the costs."""
    whole = _by_start(arm for arm in split["arms"] if arm["strategy"] == "fedavg" and arm["silos"] == "all")
    body = [("before the first round", *(percent(arm["start_accuracy"]) for arm in whole))]
    for silos, name in OTHERS.items():
        for _, arms in _pairs(split, silos):
            body.append((name, *(percent(arm["final_accuracy"]) for arm in arms)))
            if silos == "alone":
                own = "on their own held-out samples"
                body.append((f"{name}, {own}", *(percent(arm["validation_accuracy"]) for arm in arms)))
                body.append((f"all silos a round, {own}", *(percent(arm["validation_accuracy"]) for arm in whole)))
    for name, fields in COSTS.items():
        body.append((f"{name}, seconds", *(f"{cost(arm, fields):.0f}" for arm in whole)))
    return _table((f"FedAvg, {split['split']}: %", *STARTS), body)


def agreement_of(split: dict[str, Any]) -> list[str]:
    """How far the silos' updates agree, the mean over rounds: the first quarter of them, and all."""
    measures = {"diversity": "diversity", "mean_cosine": "mean cosine"}
    head = [f"{split['split']}: updates"]
    head += [f"{text}, {start}" for text in measures.values() for start in STARTS]
    body = []
    for name, arms in _pairs(split, "all"):
        if len(arms[0]["cells"][0]["curve"]) > 1:
            cells = (f"{early(arm, field):.2f}, {over(arm, field):.2f}" for field in measures for arm in arms)
            body.append((NAMES[name], *cells))
    return _table(head, body)


def unseen_of(splits: Sequence[dict[str, Any]]) -> list[str]:
    """FedAdam on those that were left out, before the first round and after the last."""
    body = []
    for split in splits:
        random, synthetic = _by_start(split["arms"])
        ends = (percent(arm["final_accuracy"]) for arm in (random, synthetic))
        body.append((split["split"].removeprefix("unseen-"), percent(synthetic["start_accuracy"]), *ends))
    return _table(("left out: %", "synthetic, before the first round", *STARTS), body)


def percent(spread: dict[str, float]) -> str:
    """Such as "96.4 (0.5)"; of one seed without its spread."""
    return _with_spread(spread, ".1f")


def _with_spread(spread: dict[str, float], form: str) -> str:
    mean = format(100 * spread["mean"], form)
    return mean if spread["sd"] is None else f"{mean} ({100 * spread['sd']:.1f})"


def cost(arm: Arm, fields: Sequence[str]) -> float:
    """The mean over an arm's seeds of what these take together."""
    return statistics.fmean(sum(cell["cost"][field] for field in fields) for cell in arm["cells"])


def over(arm: Arm, field: str, share: float = 1.0) -> float:
    """The mean of a measure over an arm's first rounds and its seeds, where it is known."""
    rounds = round(share * len(arm["cells"][0]["curve"]))
    values = [cell["rounds"][number][field] for cell in arm["cells"] for number in range(1, rounds + 1)]
    return statistics.fmean(value for value in values if value is not None)


def early(arm: Arm, field: str) -> float:
    return over(arm, field, 0.25)


def draw(studies: Sequence[dict[str, Any]], path: Path) -> None:
    """Test accuracy and gradient diversity by round, of the first split of each study; a thin line is a strategy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, grid = pyplot.subplots(2, len(studies), figsize=(4 * len(studies), 6), sharex="col", squeeze=False)
    for column, study in enumerate(studies):
        split = study["splits"][0]
        for name, arms in _pairs(split, "all"):
            if name == "one-shot":
                continue
            for start, arm in zip(STARTS, arms, strict=True):
                fedavg = name == "fedavg"
                look = {"color": COLOURS[start], "lw": 2.2 if fedavg else 0.8, "alpha": 1 if fedavg else 0.6}
                label = f"FedAvg, {start}" if fedavg else None
                accuracy = _by_round(arm, lambda cell: [100 * value for value in cell["curve"]])
                grid[0][column].plot(range(1, len(accuracy) + 1), accuracy, label=label, **look)
                diversity = _by_round(arm, lambda cell: [one["diversity"] for one in cell["rounds"][1:]])
                grid[1][column].plot(range(1, len(diversity) + 1), diversity, **look)
        grid[0][column].set(title=f"{study['experiment']}, {split['split']}")
        grid[1][column].set(xlabel="round", ylim=(0, None))
        grid[1][column].xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0][0].set(ylabel="accuracy on test data, %")
    grid[1][0].set(ylabel="gradient diversity")
    grid[0][0].legend(frameon=False, loc="lower right")
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _by_round(arm: Arm, of: Callable[[Any], list[float | None]]) -> list[float]:
    """The mean over seeds by round; no number where a seed does not know it."""
    rounds = zip(*(of(cell) for cell in arm["cells"]), strict=True)
    return [statistics.fmean(known) if None not in (known := list(each)) else float("nan") for each in rounds]


def _pairs(split: dict[str, Any], silos: int | str) -> Iterable[tuple[str, list[Arm]]]:
    """The arms of each strategy, from random weights and from synthetic ones."""
    for name in NAMES:
        arms = [arm for arm in split["arms"] if (arm["strategy"], arm["silos"]) == (name, silos)]
        if arms:
            yield name, _by_start(arms)


def _by_start(arms: Iterable[Arm]) -> list[Arm]:
    return sorted(arms, key=lambda arm: STARTS.index(arm["start"]))


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


if __name__ == "__main__":
    main()
