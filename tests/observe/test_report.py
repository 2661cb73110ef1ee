"""`report.html`: every part is there, nothing comes from elsewhere, and no text from outside becomes markup."""

from __future__ import annotations

import base64
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from finished_run import arm, records, summary_of, three_arms
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gptfl_dist.errors import StorageError
from gptfl_dist.observe.figures import spread
from gptfl_dist.observe.report import ReportDetails, write_report
from gptfl_dist.observe.summary import Arms, Summary, SyntheticArm

EVIL = "<script>alert(1)</script>"
PLAIN_TAGS = {"html", "head", "meta", "title", "style", "body", "main", "header", "section", "p", "h1", "h2", "h3"}
PLAIN_TAGS |= {"b", "div", "span", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "pre", "code"}
SECTIONS = ["result", "curves", "measures", "synthetic", "confusion", "split", "costs", "updates", "tuning", "settings"]


class Page(HTMLParser):
    """What a browser would make of the page: its tags, the resources they name, its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sections: list[str] = []
        self.resources: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        values = dict(attrs)
        assert not any(name.startswith("on") for name in values)
        self.resources += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset", "action")]
        if tag == "section":
            self.sections.append(values["id"] or "")
        if tag == "img":
            self.images.append(values)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def details(tmp_path: Path) -> ReportDetails:
    sheet = tmp_path / "sheet.png"
    Image.new("L", (60, 40), 128).save(sheet)
    return ReportDetails(
        labels=["yes", EVIL, "$x_{"],
        settings_text=f"name: demo # {EVIL} & more\n",
        contact_sheet=sheet,
        confusion=[[8, 2, 0], [1, 9, 0], [0, 0, 0]],
        rounds={"fedavg_random": records([0.3, 0.6, 0.9, 0.8]), "gptfl": records([0.88, 0.92, 0.95, 0.96])},
        split={"silo-a": [100, 20, 0], f'St. "Mary" {EVIL}': [0, 30, 5]},
    )


def test_every_part_is_there(tmp_path: Path, details: ReportDetails) -> None:
    path = write_report(tmp_path, three_arms(), details)
    page = Page(path)
    assert path == tmp_path / "report.html"
    assert page.sections == SECTIONS
    assert page.tags.count("h1") == 1
    assert "GPT-FL reaches 96.0 % on test data" in page.text
    for part in ("Synthetic only", "FedAvg from random weights", "2 of 4", "3 of 4", "380 B"):
        assert part in page.text
    assert "17 of 20 samples right" in page.text
    assert "80.0 %" in page.text
    assert "96.0 %4.0 %2.00086.0 %0.5001.000" in page.text, "what was measured of GPT-FL's last round"
    assert "silo-a" in page.text
    assert "120" in page.text
    assert "91.0 % ✓" in page.text
    assert "1.0, at most 1" in page.text  # rounds that the updates of north were old
    assert "88.0 % ✓" not in page.text
    assert "ab" * 32 in page.text
    assert "cd" * 32 in page.text
    assert page.open == []


def test_it_needs_nothing_but_itself(tmp_path: Path, details: ReportDetails) -> None:
    page = Page(write_report(tmp_path, three_arms(), details))
    assert len(page.resources) == 3
    assert all(source.startswith("data:image/") for source in page.resources)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert "http:" not in page.source
    assert "default-src 'none'" in page.source
    assert len(page.source) < 400_000
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


def test_figures_are_whole_and_described(tmp_path: Path, details: ReportDetails) -> None:
    page = Page(write_report(tmp_path, three_arms(), details))
    for image in page.images:
        assert image["alt"]
        assert len(image["alt"]) > 30
        mime, _, data = str(image["src"]).removeprefix("data:").partition(";base64,")
        content = base64.b64decode(data, validate=True)
        assert content.startswith(b"\x89PNG") if mime == "image/png" else content.rstrip().endswith(b"</svg>")
    assert "GPT-FL ends at 96.0 % after 4 rounds" in str(page.images[0]["alt"])


def test_texts_from_outside_are_shown_and_never_markup(tmp_path: Path, details: ReportDetails) -> None:
    summary = three_arms().model_copy(update={"run": EVIL, "transport": EVIL, "seconds": {EVIL: 1.0}})
    page = Page(write_report(tmp_path, summary, details))
    assert "script" not in page.tags
    for part in (f"name: demo # {EVIL} & more", f'St. "Mary" {EVIL}', "$x_{"):
        assert part in page.text
    many = replace(details, labels=[EVIL] * 40, confusion=[[1] * 40] * 40, split={EVIL: [1] * 40})
    assert "script" not in Page(write_report(tmp_path, summary, many)).tags


@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_label_keeps_the_page_whole(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("report")
    summary = summary_of(Arms(synthetic_only=SyntheticArm(accuracy=0.5)))
    details = ReportDetails(labels=[text, "b"], settings_text=text, confusion=[[1, 2], [0, 3]], split={text: [5, 1]})
    page = Page(write_report(folder, summary, details))
    assert page.open == []
    assert text in page.text
    assert set(page.tags) <= PLAIN_TAGS


def test_parts_without_data_are_left_out(tmp_path: Path) -> None:
    arms = Arms(synthetic_only=SyntheticArm(accuracy=None, validation_accuracy=0.5))
    summary = summary_of(arms, curve_of="validation", tuning={}, weights={}, seconds={})
    page = Page(write_report(tmp_path, summary, ReportDetails(labels=["a", "b"], settings_text="")))
    assert page.sections == ["result", "costs", "settings"]
    assert "Synthetic only reaches 50.0 % on validation data." in page.text


def test_a_run_without_test_data_shows_validation_curves(tmp_path: Path) -> None:
    arms = Arms(fedavg_random=arm([0.5, 0.7], test=False), gptfl=arm([0.6, 0.8], test=False))
    summary: Summary = summary_of(arms, curve_of="validation")
    page = Page(write_report(tmp_path, summary, ReportDetails(labels=["a", "b"], settings_text="")))
    assert "accuracy on validation data" in str(page.images[0]["alt"])
    assert "on test data" not in page.text


def test_many_labels_become_a_list_of_confusions(tmp_path: Path) -> None:
    labels = [f"flower {number}" for number in range(102)]
    confusion = [[20 if i == j else 7 if (i, j) == (3, 50) else 0 for j in range(102)] for i in range(102)]
    details = ReportDetails(labels=labels, settings_text="", confusion=confusion)
    page = Page(write_report(tmp_path, three_arms(), details))
    assert "2,040 of 2,047 samples right" in page.text
    assert re.search(r"flower 3\s*flower 50\s*7", page.text)


def test_a_large_contact_sheet_is_made_small(tmp_path: Path, details: ReportDetails) -> None:
    sheet = tmp_path / "large.png"
    Image.effect_noise((2000, 1500), 90).save(sheet)
    assert sheet.stat().st_size > 2_000_000
    path = write_report(tmp_path, three_arms(), replace(details, contact_sheet=sheet))
    assert path.stat().st_size < 2_000_000
    assert any(str(image["src"]).startswith("data:image/jpeg") for image in Page(path).images)


def test_what_the_filter_dropped_stands_below_what_it_kept(tmp_path: Path, details: ReportDetails) -> None:
    sheet = tmp_path / "dropped.png"
    Image.new("L", (30, 20), 90).save(sheet)
    filtered = replace(details, filter=f"5 of 9 images kept; least: {EVIL} 1", dropped_sheet=sheet)
    page = Page(write_report(tmp_path, three_arms(), filtered))
    assert page.sections == SECTIONS
    assert f"Filter: 5 of 9 images kept; least: {EVIL} 1." in page.text
    assert "Images that the filter dropped" in page.text
    assert len([image for image in page.images if "Contact sheet" in str(image["alt"])]) == 2
    assert "script" not in page.tags


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_a_contact_sheet_that_cannot_be_read_is_named(
    tmp_path: Path, details: ReportDetails, content: bytes | None
) -> None:
    sheet = tmp_path / "broken.png"
    if content is not None:
        sheet.write_bytes(content)
    with pytest.raises(StorageError, match=r"broken\.png"):
        write_report(tmp_path, three_arms(), replace(details, contact_sheet=sheet))
    assert not (tmp_path / "report.html").exists()


@given(st.lists(st.floats(0, 1), max_size=8))
def test_labels_of_lines_keep_their_order_and_distance(places: list[float]) -> None:
    moved = spread(places, 0.06, 0.97)
    order = sorted(range(len(places)), key=lambda index: places[index])
    assert all(moved[b] - moved[a] >= 0.06 - 1e-9 for a, b in itertools.pairwise(order))
    assert all(place <= 0.97 + 1e-9 for place in moved)
    apart = all(b - a >= 0.0601 for a, b in itertools.pairwise(sorted(places)))
    if apart and max(places, default=0) <= 0.97:
        assert moved == pytest.approx(places)
