"""What a user sees of a federation or silo file: the values it means, and every mistake at its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptfl_dist.config import FederationFile, SiloFile, load_federation, load_silo
from gptfl_dist.config.document import read_document
from gptfl_dist.config.load import kind_of
from gptfl_dist.errors import ConfigError

MINIMAL = """\
name: trial
labels: [cat, dog]
silos:
  - name: a
"""


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "f.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def errors_of(folder: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        load_federation(write(folder, text))
    return caught.value.message.replace(str(folder) + "/", "")


def test_minimal_file_has_the_defaults_of_the_models(tmp_path: Path) -> None:
    loaded = load_federation(write(tmp_path, MINIMAL))
    expected = FederationFile.model_validate({"name": "trial", "labels": ["cat", "dog"], "silos": [{"name": "a"}]})
    assert loaded.training == expected.training
    assert loaded.exchange == expected.exchange
    assert loaded.run_folder == tmp_path / "run"


def test_labels_of_yaml_1_1_booleans_stay_text(tmp_path: Path) -> None:
    text = MINIMAL.replace("[cat, dog]", "[yes, no, on, off, Yes, y, n, 12:30, 1_000, 2020-01-01]")
    expected = ["yes", "no", "on", "off", "Yes", "y", "n", "12:30", "1_000", "2020-01-01"]
    assert load_federation(write(tmp_path, text)).labels == expected


@pytest.mark.parametrize("label", ["3", "0x1F", "1e3", "true", "False", "null", "~", ".5"])
def test_a_label_that_yaml_reads_as_no_text_must_be_quoted(tmp_path: Path, label: str) -> None:
    message = errors_of(tmp_path, MINIMAL.replace("dog", label))
    assert message.startswith("f.yaml:2:15: labels[1]: found ")
    assert message.endswith(f'expected text: quote it as "{label}"')
    assert load_federation(write(tmp_path, MINIMAL.replace("dog", f'"{label}"'))).labels == ["cat", label]


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = MINIMAL + "seed: 0o17\ntask: {size: 0x20}\ntraining: {learning_rate: [1e-3, 2, .5, 1.]}\n"
    loaded = load_federation(write(tmp_path, text))
    assert (loaded.seed, loaded.task.size) == (15, 32)
    assert loaded.training.learning_rate == [0.001, 2.0, 0.5, 1.0]
    assert load_federation(write(tmp_path, MINIMAL + "seed: 010\n")).seed == 10


@pytest.mark.parametrize("word", ["yes", "on", '"true"', "1"])
def test_only_true_and_false_are_truth_values(tmp_path: Path, word: str) -> None:
    message = errors_of(tmp_path, MINIMAL + f"pretraining:\n  augmentation: {word}\n")
    assert message.startswith("f.yaml:6:17: pretraining.augmentation: found ")
    assert message.endswith("expected true or false")


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ("trainig: {}", "f.yaml:5:1: trainig: unknown key, the nearest valid keys are training"),
        ("training: {epoch: 2}", "f.yaml:5:12: training.epoch: unknown key, the nearest valid key is epochs"),
        ("tuning: {zzz: 2}", "f.yaml:5:10: tuning.zzz: unknown key, valid keys are rounds"),
        ("training: {epochs: three}", 'f.yaml:5:20: training.epochs: found "three" (text), expected a whole number'),
        ('training: {epochs: "3"}', 'f.yaml:5:20: training.epochs: found "3" (text), expected a whole number'),
        ("training: {epochs: 1.5}", "f.yaml:5:20: training.epochs: found 1.5 (a number), expected a whole number"),
        ("training: {epochs: }", "f.yaml:5:19: training.epochs: found nothing, expected a whole number"),
        ("training: {epochs: [1]}", "f.yaml:5:20: training.epochs: found a list of 1, expected a whole number"),
        ("training: {epochs: 0}", "f.yaml:5:20: training.epochs: found 0 (a number), expected a number greater than 0"),
        ("training: 3", "f.yaml:5:11: training: found 3 (a number), expected a section of keys"),
        ("arms: gptfl", 'f.yaml:5:7: arms: found "gptfl" (text), expected a list'),
        ("arms: []", "f.yaml:5:7: arms: found a list of 0, expected a list of at least 1"),
        ("model: {name: vgg}", "f.yaml:5:15: model.name: found \"vgg\" (text), expected 'cnn', 'convnet'"),
        ("training: {learning_rate: fast}", "expected a number or a list"),
        ("training: {learning_rate: [0.1, fast]}", "f.yaml:5:33: training.learning_rate[1]: found"),
        ("federation: {cohort: many}", "f.yaml:5:22: federation.cohort: found \"many\" (text), expected 'all' or a"),
        ("federation: {deadline: 30}", "f.yaml:5:24: federation.deadline: found 30 (a number), expected a number with"),
        ("federation: {deadline: 3 weeks}", 'found "3 weeks" (text), expected a number with a unit (ms, s, m, h, d)'),
        ("exchange: {listen: here}", "f.yaml:5:20: exchange.listen: found"),
        ("seed: 99999999999999999999999", "f.yaml:5:7: seed: found 99999999999999999999999 (a number), expected a num"),
        ("seed: " + "9" * 9000, "expected a number of at most 64 bits"),
        ("training: {learning_rate: .inf}", "found .inf (a number), expected a finite number"),
        ("training: {learning_rate: 1e999}", "expected a finite number"),
        ("run_folder: 3", "f.yaml:5:13: run_folder: found 3 (a number), expected text: quote it"),
        ('run_folder: "a\\0b"', "expected text without NUL"),
        ('run_folder: "\\ud800"', "surrogate"),
        ("seed: 1\nseed: 2", "f.yaml:6:1: seed: the key stands here twice, first in line 5"),
        ("3: x", 'f.yaml:5:1: 3: found the key 3 (a number), expected text: quote it as "3"'),
        ("? [a]\n: x", "f.yaml:5:3: found a list of 1 as a key, expected text"),
        ("<<: {seed: 3}", "f.yaml:5:1: <<: unknown key"),
        ("seed: !!python/object/apply:os.getpid []", "found the tag tag:yaml.org,2002:python/object/apply:os.getpid"),
        ("seed: !!int x", "seed: found x (a number), expected what its tag int promises"),
    ],
)
def test_a_mistake_is_named_at_its_place(tmp_path: Path, added: str, expected: str) -> None:
    message = errors_of(tmp_path, MINIMAL + added + "\n")
    assert expected in message
    assert message.startswith("f.yaml:"), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (
            "federation: {cohort: 5}",
            "f.yaml:5:22: federation.cohort: federation.cohort is 5, but there are only 1 silos",
        ),
        ("federation: {buffer: 2}", "federation.buffer: buffer is 2, but mode is synchronous"),
        ("federation: {max_staleness: 3}", "federation.max_staleness: max_staleness is 3, but no update is stale"),
        (
            "federation: {mode: asynchronous, late: carry}",
            "federation.late: late is carry, which is for the synchronous",
        ),
        ("federation: {mode: asynchronous, buffer: 2}", "federation.buffer is 2, but there are only 1 silos"),
        ("federation: {mode: asynchronous, quorum: 2}", "federation.quorum is 2, more than the buffer of 1"),
        ("federation: {late: carry}", "federation.late is carry, but the quorum is the whole cohort of 1"),
        ("model:\n  name: transformers", "f.yaml:6:9: model.name: model.name is transformers, so model.source must"),
        ("exchange: {key: k.pem}", "f.yaml:5:17: exchange.key: key given without authority, certificate"),
        ("task: {mean: [0.1, 0.2]}", "f.yaml:5:14: task.mean: mean has 2 values, expected 1"),
        ("task: {bins: 64}", "task.bins: bins is not of kind image"),
        ("task: {kind: audio, channels: 3}", "task.channels: channels is not of kind audio"),
        (
            "task: {kind: audio, window: 2s}",
            "task.window: window has 32000 samples at sample_rate 16000, expected 2 to",
        ),
        ("task: {kind: audio, hop: 0ms}", "task.hop: hop is less than one sample"),
        ("model: {name: conv1d-gru}", "conv1d-gru, which is for task.kind audio"),
        ("task: {kind: audio}", "synthesis.generator.source is embedded, which draws digits"),
        ("synthesis: {generator: {source: tts}}", "synthesis.generator.source is tts, which speaks"),
        ("synthesis: {generator: {engines: [flite]}}", "engines are of source tts, and source is embedded"),
        (
            "task: {kind: audio}\nsynthesis: {generator: {source: tts, engines: [flite, flite]}}",
            "engines names flite twice",
        ),
        (
            "task: {kind: audio}\nsynthesis: {generator: {source: tts}, filter: {judge: encoder, source: ./clip}}",
            "synthesis.filter.judge is encoder, which looks at pictures",
        ),
        (
            "synthesis:\n  prompts: {file: p.yaml, styles: []}",
            "synthesis.prompts.file: file holds the prompts themselves: give it without styles",
        ),
        ("synthesis:\n  prompts:\n    templates: [a cat]", "synthesis.prompts: the template 'a cat' has no {label}"),
        (
            "collective: {reduction: fast}\nfederation: {mode: asynchronous}",
            "f.yaml:5:25: collective.reduction: collective.reduction is fast, which sums the plain updates of one "
            "round, but federation.mode is asynchronous: set collective.reduction to exact",
        ),
        ("collective: {reduction: fast}\ncompression: {up: int8}", "but compression.up is int8"),
        ("collective: {reduction: fast}\ncompression: {down: fp16}", "but compression.down is fp16"),
        ("arms: [gptfl, gptfl]", "f.yaml:5:7: arms: arms names gptfl twice"),
    ],
)
def test_an_impossible_combination_points_at_a_setting(tmp_path: Path, added: str, expected: str) -> None:
    assert expected in errors_of(tmp_path, MINIMAL + added + "\n")


def test_two_silos_with_one_name(tmp_path: Path) -> None:
    assert errors_of(tmp_path, MINIMAL + "  - name: a\n") == "f.yaml:4:3: silos: silos names a twice"


def test_missing_settings_are_named(tmp_path: Path) -> None:
    message = errors_of(tmp_path, "silos: [{max_samples: 3}]\n")
    assert "f.yaml:1:1: labels: missing, expected a list" in message
    assert "f.yaml:1:1: name: missing, expected letters, digits" in message
    assert "f.yaml:1:9: silos[0].name: missing" in message


def test_all_mistakes_of_a_file_are_said_at_once_in_its_order(tmp_path: Path) -> None:
    text = "name: x y\nlabels: [a, 3]\nnope: 1\nseed: -1\nseed: 2\nsilos: [{name: a, max_samples: lots}]\n"
    message = errors_of(tmp_path, text)
    assert message.startswith("f.yaml has 6 errors:\n")
    places = [line.strip().split(": ")[0] for line in message.splitlines()[1:]]
    assert places == ["f.yaml:1:7", "f.yaml:2:13", "f.yaml:3:1", "f.yaml:4:7", "f.yaml:5:1", "f.yaml:6:32"]


def test_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_federation(write(tmp_path, MINIMAL + "x: 1\n"))
    assert "gptfl init" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "f.yaml: the file is empty"),
        ("# only a comment\n", "f.yaml: the file is empty"),
        ("just words\n", 'f.yaml:1:1: found "just words" (text), expected settings'),
        ("- a\n", "f.yaml:1:1: found a list of 1, expected settings"),
        ("name: a\n  seed: 3\n", "f.yaml:2:7: not valid YAML"),
        ("name: a\n\tseed: 3\n", "f.yaml:2:1: not valid YAML"),
        ('name: "a\nseed: 3\n', "not valid YAML"),
        ('name: "\\UFFFFFFFF"\n', "f.yaml:1:"),
        ("name: a\n---\nname: b\n", "f.yaml:2:1: not valid YAML"),
        (b"name: a\nlabels: [caf\xe9]\n", "f.yaml:2:13: found the byte 0xe9, expected text in UTF-8"),
        ("name: a\nseed: \x07\n", "f.yaml:2:7: found the character U+0007"),
        ("a: &x [1]\nb: *x\n", "f.yaml:2:4: found an alias"),
        ("a: " + "[" * 5000, "levels of nesting"),
        ("#" * 2**20 + "\n", "f.yaml: found more than 1048576 bytes"),
    ],
)
def test_what_is_no_yaml_is_refused(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert expected in errors_of(tmp_path, text)


def test_a_billion_laughs_are_refused_unexpanded(tmp_path: Path) -> None:
    text = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
    assert "f.yaml:2:10: found an alias" in errors_of(tmp_path, text)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_federation(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="found a folder"):
        load_silo(tmp_path)
    with pytest.raises(ConfigError, match="no file can have this name"):
        load_silo(tmp_path / "a\0b")


def test_a_file_with_a_byte_order_mark_loads(tmp_path: Path) -> None:
    assert load_federation(write(tmp_path, b"\xef\xbb\xbf" + MINIMAL.encode())).name == "trial"


def test_paths_are_resolved_against_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """\
name: trial
labels: [cat, dog]
run_folder: out/run
model: {name: transformers, source: ./resnet}
synthesis:
  folder: /absolute/synthetic
  generator: {source: ../pipeline}
  prompts: {file: prompts/set.yaml}
exchange: {authority: a.pem, certificate: c.pem, key: k.pem}
test_data: test
silos:
  - {name: a, file: silos/a.yaml}
  - {name: b}
"""
    write(tmp_path, text)
    monkeypatch.chdir(tmp_path.parent)
    loaded = load_federation(Path(tmp_path.name, "f.yaml"))
    assert loaded.run_folder == tmp_path / "out/run"
    assert loaded.synthesis.folder == Path("/absolute/synthetic")
    assert loaded.model.source == str(tmp_path / "resnet")
    assert loaded.synthesis.prompts.file == tmp_path / "prompts/set.yaml"
    assert loaded.synthesis.generator.source == str(tmp_path / "../pipeline")
    assert loaded.exchange.authority == tmp_path / "a.pem"
    assert loaded.test_data == tmp_path / "test"
    assert [silo.file for silo in loaded.silos] == [tmp_path / "silos/a.yaml", None]


def test_a_hub_id_is_left_alone(tmp_path: Path) -> None:
    text = MINIMAL + "model: {name: transformers, source: owner/model}\n"
    assert load_federation(write(tmp_path, text)).model.source == "owner/model"


def test_silo_file(tmp_path: Path) -> None:
    text = """\
name: hospital
coordinator: {address: "host:443", authority: a.pem, certificate: c.pem, key: k.pem}
data: {path: scans, labels: {"3": three, yes: ja}}
code: {script: train.py}
policy: {max_model: 100MiB, max_seconds_per_round: 10m, metrics: []}
model_source: ./resnet
work_folder: work
"""
    loaded = load_silo(write(tmp_path, text))
    assert loaded.coordinator is not None
    assert loaded.coordinator.key == tmp_path / "k.pem"
    assert loaded.data is not None
    assert loaded.data.path == tmp_path / "scans"
    assert loaded.data.labels == {"3": "three", "yes": "ja"}
    assert loaded.code is not None
    assert loaded.code.script == tmp_path / "train.py"
    assert (loaded.policy.max_model, loaded.policy.max_seconds_per_round) == (100 * 2**20, 600.0)
    assert loaded.model_source == str(tmp_path / "resnet")
    assert loaded.work_folder == tmp_path / "work"


def test_silo_file_without_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data is missing"):
        load_silo(write(tmp_path, "name: hospital\n"))
    with pytest.raises(ConfigError, match=r"f\.yaml:3:7: code: code is empty: give"):
        load_silo(write(tmp_path, "name: hospital\ndata: {path: x}\ncode: {}\n"))


def test_paths_in_candidates_are_relative_to_the_file_and_what_they_leave_out_is_shared(tmp_path: Path) -> None:
    text = (
        MINIMAL
        + """\
synthesis:
  images_per_label: 7
  prompts: {file: shared.yaml}
  candidates:
    own: {prompts: {file: own.yaml}, generator: {source: ./pipe}}
    strict: {filter: {judge: encoder, source: ./clip}}
"""
    )
    synthesis = load_federation(write(tmp_path, text)).synthesis
    own, strict = synthesis.of_candidate("own"), synthesis.of_candidate("strict")
    assert (own.prompts.file, own.generator.source) == (tmp_path / "own.yaml", str(tmp_path / "pipe"))
    assert (strict.prompts.file, strict.generator.source) == (tmp_path / "shared.yaml", "embedded")
    assert strict.filter is not None
    assert strict.filter.source == str(tmp_path / "clip")
    assert (own.folder, strict.folder) == (tmp_path / "synthetic" / "own", tmp_path / "synthetic" / "strict")
    assert own.images_per_label == strict.images_per_label == 7


def test_an_unknown_key_of_a_candidate_gets_the_nearest_valid_one(tmp_path: Path) -> None:
    text = MINIMAL + "synthesis:\n  candidates:\n    a: {generator: {stepps: 4}}\n    b: {generater: {steps: 2}}\n"
    message = errors_of(tmp_path, text)
    assert "synthesis.candidates.a.generator.stepps: unknown key, the nearest valid key is steps" in message
    assert "synthesis.candidates.b.generater: unknown key, the nearest valid key is generator" in message


def test_a_choice_needs_two_candidates_and_someone_to_choose(tmp_path: Path) -> None:
    one = errors_of(tmp_path, MINIMAL + "synthesis: {candidates: {calm: {}}}\n")
    assert "expected two or more" in one
    nobody = errors_of(tmp_path, MINIMAL + "arms: [synthetic_only]\nsynthesis: {candidates: {calm: {}, free: {}}}\n")
    assert "choose by synthetic" in nobody


@pytest.mark.parametrize("text", ["name: hospital\ndata: {pathh: x}\n", "name: [\n", "", "- 1\n", b"\xff"])
def test_a_mistake_in_a_silo_file_leads_to_the_silo_file_that_init_prints(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        load_silo(write(tmp_path, text))
    assert "`gptfl init silo` prints" in caught.value.hint


@pytest.mark.parametrize("text", ["name: trial\nlabels: [cat, 3]\n", "name: [\n", "", "- 1\n", b"\xff"])
def test_a_mistake_in_a_federation_file_leads_to_the_federation_file(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        load_federation(write(tmp_path, text))
    assert "`gptfl init` prints" in caught.value.hint


def test_a_file_of_the_other_kind_is_known_by_its_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_federation(write(tmp_path, "name: hospital\ndata: {path: x}\ndevice: cpu\n"))
    assert caught.value.message == f"{tmp_path / 'f.yaml'} looks like a silo file, expected a federation file"
    assert "`gptfl silo`" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        load_silo(write(tmp_path, MINIMAL))
    assert caught.value.message == f"{tmp_path / 'f.yaml'} looks like a federation file, expected a silo file"
    for command in ("run", "coordinator", "generate", "pretrain", "credentials"):
        assert f"`gptfl {command}`" in caught.value.hint
    # Whose keys most are; where that can be said of two kinds, it is taken for what was asked for.
    with pytest.raises(ConfigError, match="unknown key"):
        load_federation(write(tmp_path, "name: trial\nlabels: [a, b]\nrun_folder: run\ndata: {path: x}\n"))
    minimal = "name: north\ncoordinator: {address: host:1, authority: a, certificate: b, key: c}\ndata: {path: x}\n"
    assert kind_of(read_document(write(tmp_path, minimal)).value) is SiloFile


def test_prompts_that_are_left_out_fit_the_generator(tmp_path: Path) -> None:
    def templates(synthesis: str) -> list[str]:
        return load_federation(write(tmp_path, MINIMAL + f"synthesis: {synthesis}\n")).synthesis.prompts.templates

    digits, photos = ["a handwritten digit {label}"], ["a photo of a {label}"]
    assert load_federation(write(tmp_path, MINIMAL)).synthesis.prompts.templates == digits
    assert templates("{generator: {steps: 3}}") == templates("{generator: {source: embedded}}") == digits
    assert templates("{generator: {source: ./sd}}") == photos
    assert templates("{generator: {source: owner/name}, prompts: {styles: [old]}}") == photos
    assert templates('{generator: {source: ./sd}, prompts: {templates: ["{label}"]}}') == ["{label}"]


def test_engines_speak_the_label_itself(tmp_path: Path) -> None:
    text = MINIMAL + "task: {kind: audio}\nsynthesis: {generator: {source: tts}}\n"
    assert load_federation(write(tmp_path, text)).synthesis.prompts.templates == ["{label}"]
