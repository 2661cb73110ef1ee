"""Text-to-speech engines as a generator of clips: each sample's text spoken by an engine, in a voice of its own.

The engines take turns by a sample's index, so each speaks an equal part of every label. Voice, speed and the size of
the speaker are drawn from the sample's seed: a clip that is played faster sounds as if somebody smaller spoke it, with
another pitch and other formants. Programs are started without a shell, with the text in a file.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from blake3 import blake3

from gptfl_dist.audio.clip import read_clip, resampled, trimmed
from gptfl_dist.config.synthesis import Engine
from gptfl_dist.errors import GeneratorError, first_line
from gptfl_dist.synthesis.samples import Sample

SPEED = 0.25  # of the natural logarithm of how fast is spoken, at most
SPEAKER = 0.18  # of the natural logarithm of the speaker's size, at most
_PATIENCE = 60.0  # seconds that a program has for one text
_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-029")
_VARIANTS = (
    *(f"m{number}" for number in range(1, 9)),
    *(f"f{number}" for number in range(1, 6)),
    *("Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Henrique", "Hugo", "Jacky", "Lee"),
    *("Marco", "Mario", "Michael", "Mike", "adam", "antonio", "belinda", "benjamin", "boris", "caleb", "david", "ed"),
    *("edward", "gustave", "iven", "john", "linda", "marcelo", "max", "miguel", "pablo", "paul", "pedro", "quincy"),
    *("rob", "robert", "sandro", "shelby", "steph", "travis", "victor", "zac"),
)  # those of espeak-ng that sound like people
_BY_HAND = "try the program by hand, or leave it out of generator.engines"
_INSTALL: dict[Engine, str] = {
    "espeak-ng": "install the program espeak-ng (Debian: apt-get install espeak-ng)",
    "flite": "install the program flite (Debian: apt-get install flite)",
    "hibari": "install the library hibari-tts: pip install 'gptfl-dist[tts]'",
}


class _Speaker(Protocol):
    """An engine that is there."""

    release: str
    """What is said and how depends on it."""

    def speak(self, text: str, random: random.Random, rate: int) -> np.ndarray:
        """The text as a clip at `rate`; voice and speed drawn from `random`."""


@dataclass(frozen=True)
class Engines:
    """The engines of a set: their names for people, and the digest of names, releases and voices."""

    id: str
    digest: str
    releases: dict[str, str]
    speakers: Sequence[_Speaker]


def find_engines(names: Sequence[Engine]) -> Engines:
    """The engines of these names. Raises GeneratorError that says what to install where one is not there."""
    speakers = [_KINDS[name]() for name in names]
    releases: dict[str, str] = {name: speaker.release for name, speaker in zip(names, speakers, strict=True)}
    digest = blake3(json.dumps([releases, _ACCENTS, _VARIANTS, _FLITE_VOICES, SPEED, SPEAKER]).encode()).hexdigest()
    return Engines(f"tts: {', '.join(names)}", digest, releases, speakers)


class SpeechGenerator:
    """Engines behind one call."""

    takes_guidance = False

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def describe(self) -> dict[str, str]:
        """`id` and `digest` of the engines, for the manifest."""
        return {"id": self._engines.id, "digest": self._engines.digest}

    def clips(self, samples: Sequence[Sample], labels: Sequence[str], rate: int, seconds: float) -> list[np.ndarray]:
        """Each sample's prompt, spoken, float32 at `rate`, without silence at its ends.

        It takes as long as it takes: `labels` and `seconds` are for pipelines. Raises GeneratorError where an engine
        fails, or says nothing.
        """
        return [self._clip(sample, rate) for sample in samples]

    def _clip(self, sample: Sample, rate: int) -> np.ndarray:
        speakers = self._engines.speakers
        speaker = speakers[sample.index % len(speakers)]
        draws = random.Random(sample.seed)
        size = math.exp(draws.uniform(-SPEAKER, SPEAKER))
        clip = trimmed(speaker.speak(sample.prompt, draws, round(rate * size)), rate)
        if not clip.any():
            raise GeneratorError(
                f"the engine {list(self._engines.releases)[sample.index % len(speakers)]} says nothing for "
                f"{sample.prompt!r}",
                hint="spell the prompt as a word of English, or leave the engine out of generator.engines",
            )
        return clip


class _Espeak:
    def __init__(self) -> None:
        self._program = _program("espeak-ng")
        self.release = _output([self._program, "--version"])

    def speak(self, text: str, random: random.Random, rate: int) -> np.ndarray:
        voice = f"{random.choice(_ACCENTS)}+{random.choice(_VARIANTS)}"
        speed, pitch = round(160 * _speed(random)), random.randint(25, 75)
        return _spoken(
            lambda said, wav: [self._program, "-v", voice, "-s", f"{speed}", "-p", f"{pitch}", "-w", wav, "-f", said],
            text,
            rate,
        )


_FLITE_VOICES = ("kal", "kal16", "awb", "rms", "slt")


class _Flite:
    def __init__(self) -> None:
        self._program = _program("flite")
        self.release = _output([self._program, "--version"])

    def speak(self, text: str, random: random.Random, rate: int) -> np.ndarray:
        voice, stretch = random.choice(_FLITE_VOICES), f"duration_stretch={1 / _speed(random):.3f}"
        return _spoken(
            lambda said, wav: [self._program, "-voice", voice, "--setf", stretch, "-f", said, "-o", wav], text, rate
        )


class _Hibari:
    """The voice that is in the package; the others would be fetched."""

    def __init__(self) -> None:
        try:
            self.release = version("hibari-tts")
        except PackageNotFoundError as error:
            raise _absent("hibari") from error
        self._voice: Any = None

    def speak(self, text: str, random: random.Random, rate: int) -> np.ndarray:
        from hibari import Hibari

        self._voice = self._voice or Hibari(threads=1)
        clip = self._voice(text, speed=_speed(random), seed=random.getrandbits(32))
        return resampled(np.asarray(clip, np.float32), self._voice.sample_rate, rate)


_KINDS: dict[Engine, Callable[[], _Speaker]] = {"espeak-ng": _Espeak, "flite": _Flite, "hibari": _Hibari}


def _speed(random: random.Random) -> float:
    return math.exp(random.uniform(-SPEED, SPEED))


def _program(name: Engine) -> str:
    found = shutil.which(name)
    if found is None:
        raise _absent(name)
    return found


def _absent(name: Engine) -> GeneratorError:
    return GeneratorError(
        f"generator.engines names {name}, which is not installed here",
        hint=f"{_INSTALL[name]}, or leave it out of generator.engines",
    )


def _spoken(command: Callable[[str, str], list[str]], text: str, rate: int) -> np.ndarray:
    """What a program makes of a text, by the command for the two files."""
    with tempfile.TemporaryDirectory(prefix="gptfl-speech-") as folder:
        said, wav = Path(folder, "text"), Path(folder, "clip.wav")
        said.write_text(f"{text}\n", encoding="utf-8")
        called = command(str(said), str(wav))
        told = _output(called)
        if not wav.exists():
            raise GeneratorError(f"{called[0]} made no clip of {text!r}: {told or 'it says nothing'}", hint=_BY_HAND)
        return read_clip(f"that {called[0]} made of {text!r}", wav, rate)


def _output(command: list[str]) -> str:
    """What a program prints, in one line. Its exit code says nothing: flite's is 1 where it tells its version."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GeneratorError(f"{command[0]} failed: {first_line(error)}", hint=_BY_HAND) from error
    return " ".join((done.stdout or done.stderr).split())
