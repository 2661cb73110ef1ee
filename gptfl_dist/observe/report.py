"""`report.html`: the result of a run for people, as one page that needs nothing but itself.

Every text from outside (labels, names of silos, the federation file) is escaped.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median

from gptfl_dist.errors import StorageError
from gptfl_dist.files import write_file
from gptfl_dist.observe.figures import ARM_COLOURS, costs, learning_curves
from gptfl_dist.observe.page import figure, page, section, table
from gptfl_dist.observe.silos_by_label import SILO_LIMIT, silos_by_label
from gptfl_dist.observe.summary import FederatedArm, RoundRecord, Summary
from gptfl_dist.observe.wording import (
    ARM_NAMES,
    UNKNOWN,
    choice_text,
    chosen_on,
    duration,
    headline,
    kept_accuracy,
    percent,
    rounds_to_target_text,
    size,
    stop_texts,
)

FILE_NAME = "report.html"

_SHEET_LIMIT = 400_000
"""Bytes up to which a contact sheet goes into the page as it is; a larger one is shrunk and becomes a JPEG."""

_SHEET_WIDTH = 1400

_MATRIX_LIMIT = 30
"""Labels up to which the whole confusion matrix is legible; beyond, the most frequent confusions are listed."""


@dataclass(frozen=True)
class ReportDetails:
    """What the report shows beyond the summary; a part that is None or empty is left out.

    `confusion[i][j]` counts samples of label i taken for label j by the kept model; `split[silo][i]` the samples
    of label i at a silo, training and validation together; `contact_sheet` and `dropped_sheet` are PNG files, of the
    synthetic images that were trained on and of those that the filter dropped; `filter` says how many it kept.
    """

    labels: Sequence[str]
    settings_text: str
    contact_sheet: Path | None = None
    filter: str | None = None
    dropped_sheet: Path | None = None
    confusion: Sequence[Sequence[int]] | None = None
    rounds: Mapping[str, Sequence[RoundRecord]] = field(default_factory=dict)
    split: Mapping[str, Sequence[int]] | None = None


def write_report(folder: Path, summary: Summary, details: ReportDetails) -> Path:
    """Write `report.html` into the run's folder, whole or not at all; returns its path. Raises StorageError."""
    path = folder / FILE_NAME
    parts = [
        _result(summary, details),
        _curves(summary) if summary.arms.federated else "",
        _measures(summary) if any(arm.measures[1:] for arm in summary.arms.federated.values()) else "",
        _contact_sheets(summary, details, details.contact_sheet) if details.contact_sheet is not None else "",
        _confusion(summary, details.labels, details.confusion) if details.confusion is not None else "",
        section("split", "Private data by silo", silos_by_label(details.labels, details.split))
        if details.split
        else "",
        _costs(summary, details.rounds),
        _updates(summary) if any(arm.updates for arm in summary.arms.federated.values()) else "",
        _tuning(summary) if summary.tuning else "",
        _settings(summary, details.settings_text),
    ]
    title = f"{summary.run}: federated learning report"
    finished = summary.finished.strftime("%d %B %Y, %H:%M %Z")
    facts = f"{summary.silos} silos · {escape(summary.transport)} · seed {summary.seed} · {finished}"
    write_file(path, page(title, f"Run <b>{escape(summary.run)}</b>", headline(summary), facts, parts))
    return path


def _arm(name: str) -> str:
    return f'<span class="chip" style="background:{ARM_COLOURS[name]}"></span>{ARM_NAMES[name]}'


def _result(summary: Summary, details: ReportDetails) -> str:
    rows = []
    if (synthetic := summary.arms.synthetic_only) is not None:
        accuracy = f"<b>{percent(kept_accuracy(summary, synthetic))}</b>"
        rows.append([_arm("synthetic_only"), accuracy, *[UNKNOWN] * 6])
    for name, arm in summary.arms.federated.items():
        rows.append([_arm(name), *_result_cells(summary, arm, details.rounds.get(name, ()))])
    notes = [
        f"Accuracy is that of each arm's best model, on {summary.curve_of} data. The best model was chosen on "
        f"{chosen_on(summary)}."
    ]
    if summary.target_accuracy is not None:
        notes.append(
            f"The target, {percent(summary.target_accuracy)}, is the best that FedAvg from random weights reaches in "
            "its rounds."
        )
    notes += map(escape, stop_texts(summary))
    head = ["Arm", "Accuracy", "After the last round", "Rounds to the target", "Traffic to the target"]
    head += ["Bytes down", "Bytes up", "Time a round"]
    return section("result", "Result", table(head, rows, "numbers"), f'<p class="note">{" ".join(notes)}</p>')


def _result_cells(summary: Summary, arm: FederatedArm, records: Sequence[RoundRecord]) -> list[str]:
    last = arm.final_accuracy if summary.curve_of == "test" else (arm.validation_curve or [None])[-1]
    spent = UNKNOWN
    if arm.rounds_to_target is not None and len(records) >= arm.rounds_to_target:
        spent = size(sum(record.bytes_down + record.bytes_up for record in records[: arm.rounds_to_target]))
    return [
        f"<b>{percent(kept_accuracy(summary, arm))}</b>",
        percent(last),
        rounds_to_target_text(summary, arm),
        spent,
        size(arm.bytes_down),
        size(arm.bytes_up),
        duration(arm.seconds_per_round),
    ]


def _curves(summary: Summary) -> str:
    ends = [
        f"{ARM_NAMES[name]} ends at {percent(next((v for v in reversed(arm.curve) if v is not None), None))}"
        f" after {arm.rounds} rounds"
        for name, arm in summary.arms.federated.items()
    ]
    caption = "Numbers are those of the last round. A dot marks the model that was kept, the best on validation data."
    if summary.curve_of == "test" and any(arm.start_accuracy is not None for arm in summary.arms.federated.values()):
        caption += " Round 0 is the start, before any silo trained."
    alt = f"Line chart of accuracy on {summary.curve_of} data by round. {'. '.join(ends)}."
    return section("curves", "Learning curves", figure("image/svg+xml", learning_curves(summary), alt, caption))


def _measures(summary: Summary) -> str:
    head = ["Arm", "Macro-F1", "Calibration error", "Loss", "Worst silo", "Gradient diversity", "Mean cosine"]
    rows = []
    for name, arm in summary.arms.federated.items():
        for last in arm.measures[1:][-1:]:
            shares = (last.macro_f1, last.calibration_error)
            numbers = (last.loss, last.diversity, last.mean_cosine)
            loss, diversity, cosine = (UNKNOWN if number is None else f"{number:.3f}" for number in numbers)
            rows.append([_arm(name), *map(percent, shares), loss, percent(last.worst_silo_accuracy), diversity, cosine])
    where = " on test data" if summary.curve_of == "test" else ""
    note = (
        f"Of the last round: its weights{where}, the accuracy of the silo on whose validation data they do worst, "
        "and how far the round's updates agree. summary.json has all rounds."
    )
    return section("measures", "Beside accuracy", table(head, rows, "numbers"), f'<p class="note">{note}</p>')


def _contact_sheets(summary: Summary, details: ReportDetails, path: Path) -> str:
    caption = f"A sample of the {summary.synthetic_images:,} synthetic images that the start weights were trained on."
    alt = "Contact sheet of synthetic images, a sample of every label."
    parts = [figure(*_sheet_bytes(path), alt, caption)]
    if summary.choice is not None:
        parts.append(f'<p class="note">{escape(choice_text(summary.choice))}</p>')
    if details.filter is not None:
        parts.append(f'<p class="note">Filter: {escape(details.filter)}.</p>')
    if details.dropped_sheet is not None:
        caption = (
            "Images that the filter dropped, from its surest to its least sure: the row says what was asked for, the "
            "words below an image what the judge saw, with its probability."
        )
        alt = "Contact sheet of synthetic images that the filter dropped, by the label that was asked for."
        parts.append(figure(*_sheet_bytes(details.dropped_sheet), alt, caption))
    return section("synthetic", "Synthetic data", *parts)


def _sheet_bytes(path: Path) -> tuple[str, bytes]:
    from PIL import Image, UnidentifiedImageError

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as sheet:
            if sheet.format == "PNG" and len(data) <= _SHEET_LIMIT:
                return "image/png", data
            small = sheet.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise StorageError(
            f"{path}: the contact sheet cannot be read ({error})", hint="Generate the synthetic data again."
        ) from error
    small.thumbnail((_SHEET_WIDTH, _SHEET_WIDTH))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "image/jpeg", buffer.getvalue()


def _confusion(summary: Summary, labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    total = sum(map(sum, confusion))
    right = sum(row[index] for index, row in enumerate(confusion))
    if len(labels) <= _MATRIX_LIMIT:
        shown = _matrix(labels, confusion)
        reading = (
            "Rows are the true labels, columns what the model predicted. Blue is right, orange wrong, darker is more."
        )
    else:
        shown = _most_confused(labels, confusion)
        reading = "The most frequent confusions."
    note = f"{right:,} of {total:,} samples right, {summary.curve_of} data. {reading}"
    return section("confusion", "Confusion matrix of the kept model", shown, f'<p class="note">{note}</p>')


def _matrix(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    dense = " dense" if len(labels) > 15 else ""
    # Long names stand upright above their columns.
    upright = ' class="upright"' if max(map(len, labels)) > 5 else ""
    head = "".join(f'<th scope="col"{upright}><span>{escape(label)}</span></th>' for label in labels)
    rows = []
    for index, (label, counts) in enumerate(zip(labels, confusion, strict=True)):
        samples = sum(counts)
        cells = "".join(_cell(count, samples, right=index == column) for column, count in enumerate(counts))
        recall = percent(counts[index] / samples if samples else None)
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}<td class="recall">{recall}</td></tr>')
    return (
        f'<div class="scroll"><table class="matrix{dense}"><thead><tr><td class="corner"></td>'
        f'<th scope="colgroup" colspan="{len(labels)}" class="axis">predicted</th><td></td></tr>\n'
        f'<tr><th scope="col" class="axis">true</th>{head}<th scope="col" class="recall">right</th></tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(count: int, samples: int, *, right: bool) -> str:
    if not count:
        return '<td class="none">0</td>'
    # Mistakes are few: by the root of their share they are seen, beside the diagonal too.
    share = count / samples
    strength = 0.12 + 0.88 * (share if right else share**0.5)
    ink = "#fff" if right and strength > 0.5 else "#1f2328"
    hue = "0,103,168" if right else "230,130,40"
    return f'<td style="background:rgba({hue},{strength:.2f});color:{ink}">{count}</td>'


def _most_confused(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    wrong = [
        (count, true, said)
        for true, counts in enumerate(confusion)
        for said, count in enumerate(counts)
        if count and true != said
    ]
    worst = sorted(wrong, key=lambda entry: (-entry[0], entry[1:]))[:20]
    rows = [[escape(labels[true]), escape(labels[said]), f"{count:,}"] for count, true, said in worst]
    return table(["True label", "Taken for", "Samples"], rows)


def _split(details: ReportDetails) -> str:
    return section("split", "Private data by silo", silos_by_label(details.labels, details.split or {}))


def _costs(summary: Summary, rounds: Mapping[str, Sequence[RoundRecord]]) -> str:
    rounds = {name: records for name, records in rounds.items() if records}
    content = []
    if rounds:
        medians = [
            f"{ARM_NAMES[name]}: {size(median(r.bytes_down for r in records))} down, "
            f"{size(median(r.bytes_up for r in records))} up, {duration(median(r.seconds for r in records))}"
            for name, records in rounds.items()
        ]
        caption = f"A median round, all silos together. {'; '.join(medians)}."
        alt = f"Three line charts by round: bytes to the silos, bytes from the silos, seconds. {caption}"
        content.append(figure("image/svg+xml", costs(rounds), alt, caption))
    longest = max(summary.seconds.values(), default=0) or 1
    stages = [
        [escape(stage), duration(taken), f'<span class="bar" style="width:{100 * taken / longest:.1f}%"></span>']
        for stage, taken in summary.seconds.items()
    ]
    content.append(table(["Stage", "Time", ""], stages, "stages"))
    return section("costs", "What it costs: bytes and seconds", *content)


def _updates(summary: Summary) -> str:
    arms = {name: arm for name, arm in summary.arms.federated.items() if arm.updates}
    silos = sorted({silo for arm in arms.values() for silo in arm.updates})
    rows = []
    for silo in silos[:SILO_LIMIT]:
        cells = [escape(silo)]
        for arm in arms.values():
            told = arm.updates.get(silo)
            cells.append(f"{told.counted if told else 0} of {arm.rounds}")
            cells.append(f"{told.mean_staleness:.1f}, at most {told.max_staleness}" if told else UNKNOWN)
        rows.append(cells)
    head = ["Silo"]
    for name in arms:
        head += [f"{ARM_NAMES[name]}: rounds", "rounds old"]
    more = f" {len(silos) - len(rows)} more silos are not shown." if len(silos) > len(rows) else ""
    note = f"In how many rounds an update of the silo counted, and how many rounds old it was on average.{more}"
    return section("updates", "Updates by silo", table(head, rows, "numbers"), f'<p class="note">{note}</p>')


def _tuning(summary: Summary) -> str:
    rates = sorted({rate for grid in summary.tuning.values() for rate in grid})
    arms = summary.arms.federated
    rows = []
    for name, grid in summary.tuning.items():
        chosen = next((arm.learning_rate for key, arm in arms.items() if key == name), None)
        cells = [percent(grid.get(rate)) for rate in rates]
        marked = [
            f'<b class="chosen">{cell} ✓</b>' if rate == chosen else cell
            for rate, cell in zip(rates, cells, strict=True)
        ]
        rows.append([_arm(name), *marked])
    note = "Accuracy on validation data after a short federation at each client learning rate. ✓ marks the rate chosen."
    head = ["Learning rate", *(f"{rate:g}" for rate in rates)]
    rates_table = table(head, rows, "numbers")
    return section("tuning", "Choice of the learning rate", rates_table, f'<p class="note">{note}</p>')


def _settings(summary: Summary, text: str) -> str:
    federated = summary.arms.federated
    facts = [
        ("Run", escape(summary.run)),
        ("Transport", escape(summary.transport)),
        ("Silos", str(summary.silos)),
        ("Seed", str(summary.seed)),
        ("Model", f"{summary.parameters:,} parameters, {size(summary.model_bytes)}"),
        ("Synthetic images", f"{summary.synthetic_images:,}"),
        *((f"Learning rate, {ARM_NAMES[name]}", f"{arm.learning_rate:g}") for name, arm in federated.items()),
        ("Started", summary.started.isoformat(timespec="seconds")),
        ("Finished", summary.finished.isoformat(timespec="seconds")),
    ]
    for name, digests in summary.weights.items():
        facts.append((f"Weights (BLAKE3), {ARM_NAMES[name]}", f"kept model <code>{digests.best}</code>"))
        if digests.final != digests.best:
            facts.append(("", f"last round <code>{digests.final}</code>"))
    entries = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    return section("settings", "Settings", f"<dl>{entries}</dl>", f"<h3>Federation file</h3><pre>{escape(text)}</pre>")
