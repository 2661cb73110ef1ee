"""The open handwriting faces whose digits stand in for the "public web" of this example.

Every face below is published under the SIL Open Font License (OFL), the Apache License 2.0 or into the public domain.
They come as Debian packages or npm packages; `fetch` unpacks both into a work folder without root, checks that each
package carries the licence noted here, and leaves the font files where `Face.find` looks for them. Fonts are never
shipped with the weights. A fixed set of faces is held out: nothing is trained on them, and every choice (checkpoint,
guidance, sampler steps) is made by how well a classifier reads their digits.
"""

from __future__ import annotations

import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

# What the licence file of a package must contain for the note in the table to stand.
LICENCE_MARKS = {"OFL": "open font license", "Apache-2.0": "apache license", "public domain": "public domain"}


@dataclass(frozen=True)
class Face:
    """One face: the package that carries it, its file inside the unpacked package, its licence."""

    name: str
    package: str
    pattern: str
    licence: str
    held_out: bool = False

    @property
    def from_npm(self) -> bool:
        return self.package.startswith("@")

    @property
    def folder(self) -> str:
        """The package's folder in the work folder. An npm version is part of the name: a new pin is fetched anew."""
        return self.package.strip("@").replace("/", "-").replace("@", "-")

    def find(self, work: Path) -> Path:
        """The font file of this face in a work folder filled by `fetch`."""
        found = sorted((work / self.folder).glob(self.pattern))
        if not found:
            raise FileNotFoundError(f"{self.name}: no {self.pattern} below {work / self.folder}; fetch the fonts first")
        return found[0]


def _expo(slug: str, version: str, licence: str = "OFL", held_out: bool = False) -> Face:
    name = slug.replace("-", " ").title()
    return Face(name, f"@expo-google-fonts/{slug}@{version}", "package/**/*_400Regular.ttf", licence, held_out)


def _source(slug: str, version: str = "5.3.0", licence: str = "OFL", held_out: bool = False) -> Face:
    name = slug.replace("-", " ").title()
    pattern = f"package/files/{slug}-latin-400-normal.woff"
    return Face(name, f"@fontsource/{slug}@{version}", pattern, licence, held_out)


def _debian(package: str, file: str, licence: str = "OFL", held_out: bool = False) -> Face:
    return Face(file.rpartition(".")[0], package, f"usr/share/fonts/**/{file}", licence, held_out)


FACES: tuple[Face, ...] = (
    _expo("alex-brush", "0.4.1"),
    _expo("amatic-sc", "0.4.2"),
    _expo("caveat", "0.4.2"),
    _expo("comfortaa", "0.4.2"),
    _expo("comic-neue", "0.4.1"),
    _expo("dancing-script", "0.4.2"),
    _expo("finger-paint", "0.4.1"),
    _expo("gloria-hallelujah", "0.4.1"),
    _expo("gochi-hand", "0.4.2"),
    _expo("great-vibes", "0.4.1"),
    _expo("indie-flower", "0.4.1"),
    _expo("kalam", "0.4.1"),
    _expo("la-belle-aurore", "0.4.1", held_out=True),
    _expo("marck-script", "0.4.1"),
    _expo("meow-script", "0.4.1"),
    _expo("nanum-pen-script", "0.4.0", held_out=True),
    _expo("patrick-hand", "0.4.1", held_out=True),
    _expo("permanent-marker", "0.4.0", licence="Apache-2.0"),
    _expo("playpen-sans", "0.4.1"),
    _expo("quicksand", "0.4.1"),
    _expo("reenie-beanie", "0.4.1", held_out=True),
    _expo("sacramento", "0.4.1"),
    _expo("satisfy", "0.4.1", licence="Apache-2.0"),
    _expo("schoolbell", "0.4.0", licence="Apache-2.0"),
    _expo("shadows-into-light", "0.4.1", held_out=True),
    _expo("shantell-sans", "0.4.1"),
    _expo("sour-gummy", "0.4.2"),
    _expo("varela-round", "0.4.1"),
    _expo("zen-maru-gothic", "0.4.1"),
    _source("annie-use-your-telescope"),
    _source("architects-daughter", held_out=True),
    _source("bad-script"),
    _source("balsamiq-sans"),
    _source("birthstone"),
    _source("caveat-brush"),
    _source("cedarville-cursive"),
    _source("chilanka"),
    _source("comic-relief"),
    _source("cookie"),
    _source("courgette"),
    _source("covered-by-your-grace", held_out=True),
    _source("damion"),
    _source("delicious-handrawn"),
    _source("delius"),
    _source("ephesis"),
    _source("gaegu", held_out=True),
    _source("grandstander"),
    _source("handlee", held_out=True),
    _source("happy-monkey", "5.2.8"),
    _source("homemade-apple", licence="Apache-2.0", held_out=True),
    _source("italianno"),
    _source("itim"),
    _source("licorice"),
    _source("liu-jian-mao-cao"),
    _source("long-cang"),
    _source("mansalva"),
    _source("montecarlo", "5.2.8"),
    _source("ms-madi"),
    _source("nanum-brush-script"),
    _source("neucha"),
    _source("oooh-baby"),
    _source("parisienne"),
    _source("poor-story"),
    _source("rock-salt", licence="Apache-2.0"),
    _source("short-stack"),
    _source("smooch"),
    _source("sniglet"),
    _source("sriracha", held_out=True),
    _source("sue-ellen-francisco"),
    _source("swanky-and-moo-moo"),
    _source("the-girl-next-door", held_out=True),
    _source("twinkle-star"),
    _source("vibur"),
    _source("yomogi"),
    _source("zen-kurenaido"),
    _source("zhi-mang-xing"),
    _debian("fonts-aoyagi-kouzan-t", "AoyagiKouzanT.ttf", licence="public domain"),
    _debian("fonts-aoyagi-soseki", "aoyagi-soseki.ttf", licence="public domain"),
    _debian("fonts-averia-sans-gwf", "AveriaSansGWF-Regular.ttf"),
    _debian("fonts-breip", "Breip.ttf"),
    _debian("fonts-bwht", "BecauseWeBuild-Regular.otf"),
    _debian("fonts-bwht", "BecauseWeConnect-Regular.otf"),
    _debian("fonts-bwht", "BecauseWeCreate-Regular.otf", held_out=True),
    _debian("fonts-bwht", "BecauseWeLearn-Regular.otf"),
    _debian("fonts-bwht", "BecauseWeMentor-Regular.otf"),
    _debian("fonts-bwht", "BecauseWeOrganize-Regular.otf"),
    _debian("fonts-dkg-handwriting", "dkg.ttf", held_out=True),
    _debian("fonts-havana", "Havana-Regular.otf"),
    _debian("fonts-humor-sans", "Humor-Sans.ttf"),
    _debian("fonts-kaushanscript", "KaushanScript-Regular.otf"),
    _debian("fonts-kouzan-mouhitsu", "kouzan-mouhitsu-gyosho.ttf", licence="public domain"),
    _debian("fonts-kristi", "Kristi.ttf", held_out=True),
    _debian("fonts-routed-gothic", "routed-gothic.ttf"),
    _debian("fonts-seto", "setofont.ttf"),
    _debian("fonts-sil-andika", "Andika-Regular.ttf"),
    _debian("fonts-tomsontalks", "TomsonTalks.ttf"),
    _debian("fonts-yozvox-yozfont-standard-kana", "YOzRSP.ttf"),
    _debian("fonts-yusei-magic", "YuseiMagic-Regular.ttf"),
)

TRAINING_FACES = tuple(face for face in FACES if not face.held_out)
HELD_OUT_FACES = tuple(face for face in FACES if face.held_out)


def fetch(work: Path) -> None:
    """Unpack every package that is not there yet, and refuse a package whose licence is not the one noted above."""
    work.mkdir(parents=True, exist_ok=True)
    for face in FACES:
        folder = work / face.folder
        if not folder.exists():
            _unpack(face, work)
        _check_licence(face, folder)


def _unpack(face: Face, work: Path) -> None:
    command = ["npm", "pack", "--silent"] if face.from_npm else ["apt-get", "download", "-qq"]
    result = subprocess.run([*command, face.package], cwd=work, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        hint = "is npm installed?" if face.from_npm else "run `apt-get update` first"
        raise RuntimeError(f"{' '.join(command)} {face.package} failed ({hint}): {result.stderr.strip()}")
    # Unpack beside the target and rename, so that an interrupted run never leaves half a package that looks whole.
    partial = work / f"{face.folder}.partial"
    partial.mkdir(exist_ok=True)
    if face.from_npm:
        archive = work / result.stdout.strip().splitlines()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    else:
        archive = next(work.glob(f"{face.package}_*.deb"))
        subprocess.run(["dpkg", "-x", archive, partial], check=True)
    archive.unlink()
    partial.rename(work / face.folder)


def _check_licence(face: Face, folder: Path) -> None:
    # The LICENSE of an Expo package covers its JavaScript; LICENSE_FONT covers the font.
    places = ["package/LICENSE_FONT", "package/LICENSE", "usr/share/doc/*/copyright"]
    files = [file for place in places for file in folder.glob(place)]
    if not files or LICENCE_MARKS[face.licence] not in _plain(files[0]):
        raise RuntimeError(f"{face.package}: its licence file does not say {face.licence}; leave the face out")


def _plain(file: Path) -> str:
    """The text in lower case on one line, hyphens as spaces: licence names are wrapped and written in several ways."""
    return " ".join(file.read_text(errors="replace").lower().replace("-", " ").split())
