"""A WordNet database folder of a few nouns, in the format of wndb(5WN)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

LICENCE = "  1 This software and database is made for tests.  \n  2   \n"
# Each synset: its names, its gloss, whether it is an instance. The order of a name's senses is theirs.
SYNSETS: Sequence[tuple[Sequence[str], str, bool]] = (
    (["entity"], "that which is perceived to have its own existence", False),
    (["Crane", "Stephen_Crane"], "United States writer (1871-1900)", True),
    (["crane"], 'lifts and moves heavy objects; "the crane lifted the beam"', False),
    (["crane"], "large (long-necked) wading bird of marshes; it flies far", False),
    (["machine"], "any mechanical or electrical device", False),
    (["car", "auto", "automobile", "machine", "motorcar"], "a motor vehicle with four wheels", False),
    (["truck", "auto"], "an automotive vehicle suitable for hauling", False),
    (["three", "3", "III"], "the cardinal number that is the sum of two and one", False),
    (["seven", "7", "VII"], "the cardinal number that is the sum of six and one", False),
    (["guinea_pig", "Cavia_cobaya"], "stout-bodied nearly tailless domesticated cavy", False),
    (["T-shirt", "tee_shirt"], "a close-fitting pullover shirt", False),
    (["wolf"], "(of the genus Canis)", False),
    (["mouse"], "any of numerous small rodents", False),
    (["lens"], "a transparent optical device", False),
)


def write_small_wordnet(folder: Path) -> Path:
    """Writes index.noun, data.noun and noun.exc; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data, offsets = LICENCE, []
    for number, (names, gloss, instance) in enumerate(SYNSETS):
        offsets.append(len(data.encode()))
        words = " ".join(f"{name} 0" for name in names)
        pointer = f"{'@i' if instance else '@'} {offsets[0]:08} n 0000"
        pointers = f"001 {pointer}" if number else "000"
        data += f"{offsets[-1]:08} 03 n {len(names):02x} {words} {pointers} | {gloss}  \n"
    index = LICENCE
    lemmas = sorted({name.lower() for names, _, _ in SYNSETS for name in names})
    for lemma in lemmas:
        senses = [at for at, (names, _, _) in zip(offsets, SYNSETS, strict=True) if lemma in map(str.lower, names)]
        count = len(senses)
        index += f"{lemma} n {count} 2 @ ~ {count} 0 {' '.join(f'{at:08}' for at in senses)}  \n"
    (folder / "data.noun").write_text(data)
    (folder / "index.noun").write_text(index)
    (folder / "noun.exc").write_text("lice louse  \nmice mouse  \n")
    return folder
