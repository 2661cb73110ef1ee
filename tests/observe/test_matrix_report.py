"""The report of an experiment: the page needs nothing but itself, and every file says the numbers of the rows."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ET
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_report import EVIL, PLAIN_TAGS, Page

from gptfl_dist.config.experiment import Group
from gptfl_dist.errors import StorageError
from gptfl_dist.observe.matrix import Outcome, Row, rows_of
from gptfl_dist.observe.matrix_cost import Cost
from gptfl_dist.observe.matrix_figures import looks_of, sweeps_of
from gptfl_dist.observe.matrix_files import escape_latex
from gptfl_dist.observe.matrix_measures import MEASURES, Known
from gptfl_dist.observe.matrix_report import Matrix, Tuned, write_matrix_report

RANDOM = frozenset({"random"})
FILES = ["report.html", "results.csv", "results.json", "rounds.csv", "table.tex"]
SPLIT = 'St. "Mary" ' + EVIL


def outcome(*curve: float, start: float = 0.1) -> Outcome:
    cost = Cost(3600.0, 90.0, 12.0, 10**6 * len(curve), ("generate: one GPU", "pretrain: CPU, 2 threads"))
    sent: Known = {"bytes_down": 9e5, "bytes_up": 1e5}
    rounds: list[Known] = [dict.fromkeys(MEASURES), *({**dict.fromkeys(MEASURES, value), **sent} for value in curve)]
    silos: list[dict[str, float]] = [{}, *({"north": value, "south": value - 0.1} for value in curve)]
    return Outcome(start, curve, max(curve), curve[-1] - 0.1, 1e6, cost, tuple(rounds), tuple(silos), curve[-1] / 2)


FOUND: dict[Group, dict[int, Outcome]] = {
    Group("even", "random", "fedavg", "all"): {0: outcome(0.2, 0.6), 1: outcome(0.3, 0.7), 2: outcome(0.3, 0.8)},
    Group("even", "random", "fed_prox", "all"): {0: outcome(0.2, 0.5), 1: outcome(0.3, 0.6), 2: outcome(0.1, 0.3)},
    Group("even", "random", "fedavg", 5): {0: outcome(0.2, 0.4), 1: outcome(0.3, 0.5), 2: outcome(0.1, 0.3)},
    Group("even", "random", "fedavg", "alone"): {0: outcome(0.2, 0.3), 1: outcome(0.2, 0.3), 2: outcome(0.1, 0.3)},
    Group("even", "random", "fedavg", "pooled"): {0: outcome(0.7, 0.9)},
    Group("even", "synthetic", "fedavg", "all"): {
        0: outcome(0.72, 0.8, start=0.5),
        1: outcome(0.6, 0.75, start=0.52),
        2: outcome(0.5, 0.65, start=0.51),
    },
    Group("even", "synthetic", "moon", "all"): {},
    Group(SPLIT, "synthetic", "fedavg", "all"): {0: outcome(0.5), 1: outcome(0.6), 2: outcome(0.7)},
}


def split_rows(found: Mapping[Group, Mapping[int, Outcome]]) -> dict[str, list[Row]]:
    rows = rows_of(found, RANDOM)
    return {split: [row for row in rows if row.group.split == split] for split in dict.fromkeys(g.split for g in found)}


@pytest.fixture
def matrix() -> Matrix:
    points = ("learning_rate 0.1", f"learning_rate 0.4 {EVIL}")
    return Matrix(
        name="digits",
        rows=split_rows(FOUND),
        random_starts=RANDOM,
        seeds=[0, 1, 2],
        labels=["yes", EVIL, "$x_{"],
        counts={"even": {f"silo-{number}": [number, 4, 0] for number in range(10)}},
        tuning={
            Group("even", "random", "fedavg", "all"): Tuned(points, (5, 5), (0.31, 0.42), 1),
            Group("even", "synthetic", "fedavg", "all"): Tuned(points, (1, 3), (0.66, None), 0),
        },
        failures={"even/synthetic/moon/all/seed-0": f"the loss is not a number {EVIL}"},
        settings_text=f"name: digits # {EVIL} & more\n",
    )


def test_the_page_has_every_part(tmp_path: Path, matrix: Matrix) -> None:
    path = write_matrix_report(tmp_path / "report", matrix)
    assert sorted(file.name for file in path.parent.iterdir()) == FILES
    page = Page(path)
    assert page.open == []
    assert page.sections == ["split-even", f"split-{SPLIT}", "tuning", "failures", "settings"]
    assert page.tags.count("h1") == 1
    assert "Of 1 federated arm from other than random weights, 1 ends above the best" in page.text
    chosen = "On split even, validation data choose fedavg from synthetic: 73.3 ± 7.6 %, +3.3 ± 17.6 points"
    assert page.text.count(chosen) == 2, "in the headline and at the split"
    assert "points to fedavg from random, whose end it reaches in 1.5 of 2 rounds (2 of 3 seeds)." in page.text
    for part in ("70.0 ± 10.0 %", "baseline", "silo-9", "seeds 0, 1, 2", "51.0 ± 1.0 %"):
        assert part in page.text
    # Of fedavg from synthetic: rounds 1 and 2 reach the 70.0 % of the baseline, seed 2 does not.
    to_target, difference = r"1\.5 \(2 of 3 seeds\)1\.50 MB \(2 of 3 seeds\)", r"\+3\.3 ± 17\.62 of 3"
    assert re.search(rf"73\.3 ± 7\.6 %.*{to_target}{difference}", page.text)
    assert "fedavg from random, all data pooled (1 of 3 seeds)" in page.text
    assert re.search(r"fedavg from synthetic1 h 00 min1 min 30 s12 s2\.00 MB", page.text)
    assert "The coordinator's devices were generate: one GPU; pretrain: CPU, 2 threads." in page.text
    assert "How far the silos' updates agree" in page.text
    assert "moon from synthetic (0 of 3 seeds)" in page.text
    assert "same budget: 2 points, each a federation on seed 0, of so many rounds" in page.text
    assert "even: fedavg from random531.0 %" in page.text
    assert "even: fedavg from synthetic1 to 366.0 %" in page.text, "of a strategy with fewer rounds than trials have"
    assert "42.0 % ✓" in page.text
    assert "66.0 % ✓" in page.text
    assert "31.0 % ✓" not in page.text
    assert "- stands for a trial that failed or told none, whose point is out." in page.text
    assert "the loss is not a number" in page.text


def test_the_headline_says_where_the_baseline_is_not_reached(tmp_path: Path, matrix: Matrix) -> None:
    worse = {**FOUND, Group("even", "synthetic", "fedavg", "all"): {seed: outcome(0.1, 0.2) for seed in range(3)}}
    page = Page(write_matrix_report(tmp_path, replace(matrix, rows=split_rows(worse))))
    assert "points to fedavg from random, whose end it does not reach in 2 rounds." in page.text


def test_labels_have_their_unit_and_one_silo_is_one(tmp_path: Path, matrix: Matrix) -> None:
    single = {**FOUND, Group("even", "random", "fedavg", 1): {0: outcome(0.2, 0.4)}}
    page = Page(write_matrix_report(tmp_path, replace(matrix, rows=split_rows(single))))
    assert "Difference (points)" in page.text
    assert "fedavg from random, 1 silo a round" in page.text
    alts = [str(image["alt"]) for image in page.images]
    assert not any("1 silos" in text for text in [page.text, *alts])
    assert any("1 silo 40.0 %, 5 silos 40.0 ± 10.0 %" in alt for alt in alts)
    assert any("accuracy at the worst silo (%)" in alt for alt in alts)


def test_arms_that_look_alike_stand_in_different_figures(tmp_path: Path, matrix: Matrix) -> None:
    """Colour, mark and dashes are those of strategy and start, so that they leave out how many silos take part."""
    alts = [str(image["alt"]) for image in Page(write_matrix_report(tmp_path, matrix)).images]
    charts = [alt.partition(":")[0] for alt in alts if alt.startswith("Line charts by round")]
    assert charts == [f"Line charts by round, {silos}" for silos in ("all silos", "5 silos a round")] * 2


def test_the_page_says_what_chose_the_kept_model(tmp_path: Path, matrix: Matrix) -> None:
    silos = "the kept model is the best on these"
    assert silos in Page(write_matrix_report(tmp_path / "silos", matrix)).text
    ours = Group("even", "synthetic", "fedavg", "all")

    def judged(*groups: Group) -> str:
        found = {
            group: {seed: replace(one, kept_by="synthetic") if group in groups else one for seed, one in cells.items()}
            for group, cells in FOUND.items()
            if group.split == "even"
        }
        return Page(write_matrix_report(tmp_path / str(len(groups)), replace(matrix, rows=split_rows(found)))).text

    held_out = "the best on held-out synthetic data"
    assert f"{silos}, but of fedavg from synthetic {held_out};" in judged(ours)
    every = judged(*FOUND)
    assert f"the kept model is {held_out};" in every
    assert silos not in every


def test_the_page_says_whose_validation_accuracy_is_of_personal_models(tmp_path: Path, matrix: Matrix) -> None:
    said = "is that of the silos' personal models, so that it is not among those that validation data choose from"
    assert said not in Page(write_matrix_report(tmp_path / "none", matrix)).text
    group = Group("even", "synthetic", "fedavg", "all")
    found = {**FOUND, group: {seed: replace(one, personal=True) for seed, one in FOUND[group].items()}}
    text = Page(write_matrix_report(tmp_path / "one", replace(matrix, rows=split_rows(found)))).text
    assert f"The validation accuracy of fedavg from synthetic {said}" in text


def test_the_page_needs_nothing_but_itself(tmp_path: Path, matrix: Matrix) -> None:
    page = Page(write_matrix_report(tmp_path, matrix))
    assert len(page.images) == 8, "curves of two splits, bars, agreement and quality of two ways to take part, a sweep"
    assert len(page.resources) == 8
    for image in page.images:
        mime, _, data = str(image["src"]).removeprefix("data:").partition(";base64,")
        assert mime == "image/svg+xml"
        assert ET.fromstring(b64decode(data, validate=True)).tag.endswith("svg")
        assert len(str(image["alt"])) > 30
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert "url(" not in page.source
    assert "http:" not in page.source
    assert "default-src 'none'" in page.source


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(st.characters(codec="latin-1", exclude_categories=["Cc"])))
@example(EVIL)
@example("$x_{")
def test_no_text_from_outside_becomes_markup(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    text = f"a{text}"  # a name starts with a letter or digit
    group = Group(text, text, text, "all")
    cells = {0: outcome(0.5, 0.6)}
    matrix = Matrix(
        name=text,
        rows={text: rows_of({group: cells}, frozenset({text}))},
        random_starts=frozenset({text}),
        seeds=[0],
        labels=[text],
        counts={text: {text: [3]}},
        tuning={group: Tuned((text,), (1,), (0.5,), 0)},
        failures={text: text},
        settings_text=text,
    )
    path = write_matrix_report(tmp_path_factory.mktemp("report"), matrix)
    page = Page(path)
    assert page.open == []
    assert text in page.text
    assert set(page.tags) <= PLAIN_TAGS | {"img", "figure", "figcaption"}
    (line,) = csv.DictReader(path.with_name("results.csv").open(encoding="utf-8", newline=""))
    assert line["strategy"] == text
    assert json.loads(path.with_name("results.json").read_text(encoding="utf-8"))["experiment"] == text


def test_csv_has_the_numbers_of_every_seed_and_round(tmp_path: Path, matrix: Matrix) -> None:
    write_matrix_report(tmp_path, matrix)
    results = list(csv.DictReader((tmp_path / "results.csv").open(encoding="utf-8", newline="")))
    rounds = list(csv.DictReader((tmp_path / "rounds.csv").open(encoding="utf-8", newline="")))
    rows = {str(row.group): row for each in matrix.rows.values() for row in each}
    assert len(results) == sum(len(cells) for cells in FOUND.values())
    for line in results:
        row, seed = rows["/".join(line[name] for name in ("split", "start", "strategy", "silos"))], int(line["seed"])
        one = row.outcomes[seed]
        assert float(line["start_accuracy"]) == one.start
        assert float(line["final_accuracy"]) == one.curve[-1]
        assert float(line["kept_accuracy"]) == one.kept
        assert float(line["validation_accuracy"]) == one.validation
        assert line["worst_alone_accuracy"] == (str(one.worst) if row.group.silos == "alone" else "")
        assert line["bytes_a_round"] == (str(one.bytes_a_round) if row.federated else "")
        reached = row.rounds_to_target[seed]
        assert line["rounds_to_target"] == ("" if reached is None else str(reached))
        difference = None if row.pairs is None else row.pairs.by_seed.get(seed)
        assert line["difference_to_baseline"] == ("" if difference is None else str(difference))
        assert (line["generate_device_seconds"], line["silo_seconds"]) == ("3600.0", "12.0")
        assert line["bytes"] == (str(one.cost.bytes) if row.federated else "")
    curve = [
        (int(line["round"]), float(line["accuracy"]))
        for line in rounds
        if (line["split"], line["start"], line["strategy"], line["silos"], line["seed"])
        == ("even", "synthetic", "fedavg", "all", "1")
    ]
    assert curve == [(0, 0.52), (1, 0.6), (2, 0.75)]
    of_ours = [line for line in rounds if (line["start"], line["silos"], line["seed"]) == ("synthetic", "all", "1")]
    assert [line["diversity"] for line in of_ours] == ["", "0.6", "0.75", "", "0.6"], "of two splits, from round 0"
    assert len(rounds) == sum(1 + len(one.curve) for cells in FOUND.values() for one in cells.values())


def test_json_has_the_numbers_of_every_arm(tmp_path: Path, matrix: Matrix) -> None:
    write_matrix_report(tmp_path, matrix)
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert found["seeds"] == [0, 1, 2]
    assert found["failures"] == matrix.failures
    even, other = found["splits"]
    assert even["target"] == matrix.rows["even"][0].target
    assert even["baseline"] == {"split": "even", "start": "random", "strategy": "fedavg", "silos": "all"}
    assert other["target"] is None
    assert other["baseline"] is None
    assert even["chosen"] == {"split": "even", "start": "synthetic", "strategy": "fedavg", "silos": "all"}
    for arm, row in zip(even["arms"], matrix.rows["even"], strict=True):
        assert Group(arm["split"], arm["start"], arm["strategy"], arm["silos"]) == row.group
        assert arm["final_accuracy"] == {"mean": row.accuracy.mean, "sd": row.accuracy.sd}
        assert (arm["worst_alone_accuracy"] is None) == (row.group.silos != "alone")
        assert "worst_silo_accuracy" not in arm, "that is of rounds, on validation data"
        assert [cell["seed"] for cell in arm["cells"]] == list(row.outcomes)
        for cell in arm["cells"]:
            assert tuple(cell["curve"]) == row.outcomes[cell["seed"]].curve
            assert cell["rounds_to_target"] == row.rounds_to_target[cell["seed"]]
            assert [one["loss"] for one in cell["rounds"]] == [None, *cell["curve"]]
            assert cell["rounds"][1]["silo_accuracy"]["north"] == cell["curve"][0]
            assert cell["cost"]["hardware"] == ["generate: one GPU", "pretrain: CPU, 2 threads"]
    ours = next(arm for arm in even["arms"] if arm["start"] == "synthetic")
    assert ours["median_rounds_to_target"] == 1.5
    assert ours["median_bytes_to_target"] == 1.5e6
    assert ours["seeds_at_target"] == 2
    assert ours["seeds_above_baseline"] == 2
    assert ours["difference_to_baseline"]["mean"] == pytest.approx(0.1 / 3)


def test_latex_has_a_table_a_split_and_no_commands_from_outside(tmp_path: Path, matrix: Matrix) -> None:
    write_matrix_report(tmp_path, matrix)
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert r"fed\_prox from random & 46.7 $\pm$ 15.3 \%" in text
    assert r"& $-$23.3 $\pm$ 23.1 & 0 of 3 \\" in text
    assert r"\textless{}script\textgreater{}" in text
    columns = {line.count("&") for line in text.splitlines() if line.endswith(r"\\")}
    assert columns == {9, 8}, "the first split has a column for the worst silo"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100 %", r"100 \%"),
        ("a_b & c", r"a\_b \& c"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("$x^2~#1|", r"\$x\textasciicircum{}2\textasciitilde{}\#1\textbar{}"),
    ],
)
def test_latex_is_escaped(text: str, expected: str) -> None:
    assert escape_latex(text) == expected


def test_the_same_outcomes_give_the_same_bytes(tmp_path: Path, matrix: Matrix) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        write_matrix_report(folder, matrix)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_experiment_in_which_all_failed_still_has_a_report(tmp_path: Path, matrix: Matrix) -> None:
    failed = replace(matrix, rows=split_rows({group: {} for group in FOUND}), tuning={})
    page = Page(write_matrix_report(tmp_path, failed))
    assert page.sections == ["split-even", f"split-{SPLIT}", "failures", "settings"]
    assert page.images == []
    assert "has no arm to compare" in page.text
    assert len((tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()) == 1


def test_a_grid_of_other_size_is_not_called_equal(tmp_path: Path, matrix: Matrix) -> None:
    other = Tuned(("a", "b", "c"), (5, 5, 5), (0.1, 0.2, 0.3), 2)
    uneven = replace(matrix, tuning={**matrix.tuning, Group("even", "random", "fed_prox", "all"): other})
    page = Page(write_matrix_report(tmp_path, uneven))
    assert "different budgets: 2 and 3 points" in page.text
    assert "same budget" not in page.text


def test_no_point_is_marked_as_chosen_where_every_trial_failed(tmp_path: Path, matrix: Matrix) -> None:
    group = Group("even", "synthetic", "moon", "all")
    hopeless = Tuned(("a", "b"), (5, 5), (None, None), None)
    text = Page(write_matrix_report(tmp_path / "hopeless", replace(matrix, tuning={group: hopeless}))).text
    assert "even: moon from synthetic5--" in text
    assert text.count("✓") == 1, "in the note alone"
    told = replace(hopeless, scores=(0.1, 0.2), chosen=1)
    assert "stands for a trial" not in Page(write_matrix_report(tmp_path, replace(matrix, tuning={group: told}))).text


def test_a_report_that_cannot_be_written_is_an_error_that_names_the_file(tmp_path: Path, matrix: Matrix) -> None:
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(StorageError, match=r"results\.csv"):
        write_matrix_report(tmp_path / "report", matrix)


def test_a_sweep_needs_several_numbers_of_silos() -> None:
    rows = split_rows(FOUND)["even"]
    sweeps = sweeps_of(rows, everyone=10)
    assert {(group.start, group.strategy): list(each) for group, each in sweeps.items()} == {
        ("random", "fedavg"): [5, 10]
    }
    assert sweeps_of([row for row in rows if row.group.silos != 5], everyone=10) == {}
    assert sweeps_of(rows, everyone=None) == {}


def test_strategies_share_a_colour_and_starts_their_dashes() -> None:
    starts, strategies = ("random", "synthetic", "other"), [f"method-{number}" for number in range(10)]
    groups = [Group("even", start, strategy, "all") for start in starts for strategy in strategies]
    looks = looks_of(groups, RANDOM)
    assert len({(line["color"], line["marker"], line["ls"]) for line in map(looks.line, groups)}) == len(groups)
    assert len({looks.colour(group) for group in groups if group.strategy == "method-3"}) == 1
