"""Properties: units read back what they wrote, files load back equal, and no text raises anything but ConfigError."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gptfl_dist.config import (
    Exchange,
    Federation,
    FederationFile,
    LocalTraining,
    Model,
    Plan,
    Prompts,
    SiloEntry,
    SiloFile,
    Synthesis,
    Task,
    Training,
    load_federation,
    load_silo,
    to_yaml,
)
from gptfl_dist.config.document import dump_yaml, read_document
from gptfl_dist.config.plan import rate_factor
from gptfl_dist.config.units import format_duration, format_size, parse_duration, parse_size
from gptfl_dist.errors import ConfigError

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)
# Everything that a file may hold: no NUL and no surrogates.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
labels = texts | st.sampled_from(["yes", "no", "on", "off", "3", "1e-3", "0o7", "~", "null", "true", ".inf", "=", "<<"])
positive = st.integers(1, 10**9)
rates = st.floats(1e-9, 10.0)
paths = texts.filter(bool).map(lambda text: Path("/data", text))
durations = st.integers(0, 10**9).map(lambda milliseconds: f"{milliseconds}ms")
chunks = st.integers(4096, 2**24).map(lambda size: f"{size}B")
sizes = st.integers(0, 2**50).map(lambda size: f"{size}B")


@st.composite
def federation_files(draw: st.DrawFn) -> FederationFile:
    silos = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    channels = draw(st.sampled_from([1, 3]))
    return FederationFile(
        name=draw(names),
        seed=draw(st.integers(0, 2**63 - 1)),
        run_folder=draw(paths),
        labels=draw(st.lists(labels, min_size=2, max_size=6, unique=True)),
        task=Task(
            channels=channels, size=draw(positive), std=draw(st.lists(rates, min_size=channels, max_size=channels))
        ),
        model=draw(st.sampled_from([Model(), Model(name="transformers", source="owner/model", pretrained=True)])),
        synthesis=Synthesis(folder=draw(paths), prompts=draw(st.just(Prompts()) | st.builds(Prompts, file=paths))),
        training=Training(
            learning_rate=draw(rates | st.lists(rates, min_size=1, max_size=3)),
            schedule=draw(st.sampled_from(["constant", "cosine"])),
            warm_up_rounds=draw(st.integers(0, 100)),
            head_rounds=draw(st.integers(0, 100)),
        ),
        federation=Federation.model_validate(
            {"cohort": draw(st.just("all") | st.integers(1, len(silos))), "deadline": draw(durations)}
        ),
        exchange=Exchange.model_validate({"chunk": draw(chunks)}),
        test_data=draw(st.none() | paths),
        silos=[SiloEntry(name=name, max_samples=draw(positive), file=draw(st.none() | paths)) for name in silos],
    )


@pytest.fixture(scope="module")
def load_text(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    file = tmp_path_factory.mktemp("properties") / "f.yaml"

    def load(content: str | bytes, loader: Callable[[Path], object]) -> object:
        file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        return loader(file)

    return load


@given(st.integers(0, 2**50))
def test_a_size_reads_back(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.floats(0, 1e12) | st.integers(0, 10**12).map(float))
def test_a_duration_reads_back(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("30s", 30), ("1.5h", 5400), ("10 m", 600), ("2d", 172800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(("text", "size"), [("7B", 7), ("2kB", 2000), ("64MiB", 2**26), ("1.5 GiB", 3 * 2**29)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("value", [30, 1.5, "30", "s", "-3s", "1e3s", "3 parsecs", "", None, True, "9" * 400 + "s"])
def test_what_is_no_quantity_is_refused(value: object) -> None:
    for parse in (parse_duration, parse_size):
        with pytest.raises(ValueError, match="expected a number with a unit"):
            parse(value)


def test_a_quantity_beyond_any_number_is_refused() -> None:
    with pytest.raises(ValidationError):
        Exchange.model_validate({"chunk": "9" * 400 + "B"})
    with pytest.raises(ValidationError):
        Federation.model_validate({"deadline": "9" * 400 + "h"})


@settings(max_examples=40)
@given(federation_files())
def test_a_federation_file_dumped_loads_back_equal(load_text: Callable[..., object], file: FederationFile) -> None:
    assert load_text(to_yaml(file), load_federation) == file


@settings(max_examples=40)
@given(names, paths, st.dictionaries(labels, labels, max_size=4), sizes)
def test_a_silo_file_dumped_loads_back_equal(
    load_text: Callable[..., object], name: str, path: Path, renamed: dict[str, str], size: str
) -> None:
    file = SiloFile.model_validate(
        {"name": name, "data": {"path": path, "labels": renamed}, "policy": {"max_model": size}, "work_folder": path}
    )
    assert load_text(to_yaml(file), load_silo) == file


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | labels,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(labels, below, max_size=4),
    max_leaves=10,
)


@settings(max_examples=40)
@given(st.dictionaries(labels, values, min_size=1, max_size=5))
def test_plain_values_dumped_read_back_equal(load_text: Callable[..., object], value: dict[str, object]) -> None:
    document = load_text(dump_yaml(value), read_document)
    assert document.problems == []
    assert document.value == value


@settings(max_examples=40)
@given(st.text(max_size=60) | st.binary(max_size=60))
def test_no_text_raises_anything_but_config_error(load_text: Callable[..., object], text: str | bytes) -> None:
    for loader in (load_federation, load_silo):
        with contextlib.suppress(ConfigError):
            load_text(text, loader)


keys = st.sampled_from([*FederationFile.model_fields, *SiloFile.model_fields, "epochs", "path", "listen"]) | labels
wrong = st.recursive(
    values | st.sampled_from(["30s", "1GiB", "all", "9" * 400 + "B", "9" * 400 + "h"]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(keys, below, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40)
@given(st.dictionaries(keys, wrong, min_size=1, max_size=6))
def test_no_settings_raise_anything_but_config_error(load_text: Callable[..., object], value: object) -> None:
    for loader in (load_federation, load_silo):
        with contextlib.suppress(ConfigError):
            load_text(dump_yaml(value), loader)


@settings(max_examples=40)
@given(federation_files(), st.data())
def test_a_damaged_file_raises_nothing_but_config_error(
    load_text: Callable[..., object], file: FederationFile, data: st.DataObject
) -> None:
    text = to_yaml(file)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    damaged = text[:start] + data.draw(st.text(":-[]{}&*!|>'\"%@`# \n\t\\0a", max_size=6)) + text[end:]
    with contextlib.suppress(ConfigError):
        load_text(damaged, load_federation)


@settings(max_examples=40)
@given(federation_files())
def test_plan_and_local_training_survive_the_wire(file: FederationFile) -> None:
    plan = Plan.of(file)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert (plan.labels, plan.task, plan.model) == (file.labels, file.task, file.model)
    for rate in file.training.learning_rates:
        for round_ in (1, 2, file.federation.rounds):
            local = LocalTraining.of(file, rate, round_)
            assert 0 < local.learning_rate <= rate
            assert LocalTraining.model_validate_json(local.model_dump_json()) == local


recipes = st.builds(Training, schedule=st.sampled_from(["constant", "cosine"]), warm_up_rounds=st.integers(0, 20))


@given(recipes, st.integers(1, 10**9))
def test_the_rate_climbs_over_the_warm_up_and_never_after_it(training: Training, rounds: int) -> None:
    warm_up = training.warm_up_rounds
    factors = [rate_factor(training, round_, rounds) for round_ in range(1, warm_up + 30)]
    assert all(0 < factor <= 1 for factor in factors)
    after = factors[warm_up:]
    assert after == sorted(after, reverse=True)
    if training.schedule == "constant":
        assert after == [1.0] * len(after)
        assert factors[:warm_up] == sorted(factors[:warm_up])
    assert 0 < rate_factor(training, rounds, rounds) <= 1


def test_a_cosine_halves_the_rate_in_the_middle_of_the_rounds() -> None:
    training = Training(schedule="cosine", warm_up_rounds=0)
    assert [rate_factor(training, round_, 100) for round_ in (1, 51)] == pytest.approx([1.0, 0.5])
    assert rate_factor(training, 100, 100) < 0.001
