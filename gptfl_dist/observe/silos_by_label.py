"""The picture of a split: how many samples of each label each silo has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

SILO_LIMIT = 60
"""Silos up to which all are shown."""

_LABEL_COLOURS = (
    *("#332288", "#88ccee", "#cc6677", "#117733", "#ddcc77"),
    *("#aa4499", "#44aa99", "#882255", "#999933", "#bbbbbb"),
)


def silos_by_label(labels: Sequence[str], split: Mapping[str, Sequence[int]]) -> str:
    """A bar a silo, cut by label: `split[silo][i]` are its samples of label i."""
    largest = max((sum(counts) for counts in split.values()), default=0) or 1
    shown = list(split.items())[:SILO_LIMIT]
    rows = []
    for silo, counts in shown:
        segments = "".join(
            _segment(index, labels[index], count, count / largest) for index, count in enumerate(counts) if count
        )
        name = escape(silo)
        rows.append(
            f'<div class="silo"><span class="name" title="{name}">{name}</span><span class="track">{segments}</span>'
            f'<span class="total">{sum(counts):,}</span></div>'
        )
    legend = "".join(
        f'<span><span class="chip" style="background:{_label_colour(index)}"></span>{escape(label)}</span>'
        for index, label in enumerate(labels)
    )
    more = f" {len(split) - len(shown)} more silos are not shown." if len(split) > len(shown) else ""
    note = f"Samples of each label at each silo, training and validation together.{more}"
    return f'<div class="legend">{legend}</div><div class="split">{"".join(rows)}</div><p class="note">{note}</p>'


def _segment(index: int, label: str, count: int, share: float) -> str:
    colour = _label_colour(index)
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    ink = "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "#fff"
    name = escape(label)
    # A track is about 680 pixels wide, a character 7.
    inside = name if share * 680 > 7 * len(label) + 8 else ""
    style = f"width:{share * 100:.2f}%;background:{colour};color:{ink}"
    return f'<span class="segment" style="{style}" title="{name}: {count:,}">{inside}</span>'


def _label_colour(index: int) -> str:
    return _LABEL_COLOURS[index % len(_LABEL_COLOURS)]
