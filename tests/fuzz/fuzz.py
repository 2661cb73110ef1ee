"""Malformed input for everything that reads a peer's bytes, found by coverage (atheris), under a limit of memory.

    make fuzz N=1000000                                  so many inputs in all, shared by the targets
    python tests/fuzz/fuzz.py --inputs 100000 layout     one target
    python tests/fuzz/fuzz.py layout FILE                one input, such as one that a run has kept

Exits with 1 where a target raised what it must not, used more than the memory that it may, or took over ten seconds
for an input; the input is kept in fuzz-findings/.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_ADDRESSES = 4 << 30  # bytes of address space: an allocation of more raises MemoryError, which is no allowed exception
_RESIDENT = 512  # MiB of memory in all
_LONGEST = 4096  # bytes of an input; seeds may be longer


def fuzz(name: str, inputs: int, corpus: Path, findings: Path) -> None:
    """Fuzzes a target in this process, and ends it."""
    import atheris

    with atheris.instrument_imports(include=["gptfl_dist", "targets"], enable_loader_override=False):
        from targets import TARGETS
    target = TARGETS[name]

    def read(data: bytes) -> None:
        with contextlib.suppress(target.allowed):
            target.read(data)

    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    options = [
        *(
            f"-runs={inputs}",
            f"-rss_limit_mb={_RESIDENT}",
            f"-max_len={_LONGEST}",
            "-timeout=10",
            "-print_final_stats=1",
        ),
        f"-artifact_prefix={findings}/{name}-",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], read)
    atheris.Fuzz()


def run(name: str, inputs: int) -> bool:
    """Fuzzes a target in a process of its own, and tells how that went; whether it went well."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as corpus:
        command = [sys.executable, __file__, name, "--inputs", str(inputs), "--corpus", corpus]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    lines = done.stderr.splitlines()
    told = {line.split()[0].removeprefix("stat::").rstrip(":"): line.split()[-1] for line in lines if "stat::" in line}
    covered = next((line.partition("cov: ")[2].split()[0] for line in reversed(lines) if "cov: " in line), "?")
    count, memory = told.get("number_of_executed_units", "?"), told.get("peak_rss_mb", "?")
    verdict = "ok" if done.returncode == 0 else f"FAILED (code {done.returncode})"
    seconds = time.monotonic() - started
    print(
        f"{name:19} {count:>9} inputs in {seconds:6.1f} s, {covered:>5} edges, at most {memory} MiB: {verdict}",
        flush=True,
    )
    if done.returncode != 0:
        print("\n".join(lines[-40:]), flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?")
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets at a time")
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    findings = Path("fuzz-findings")
    if given.corpus is not None:
        fuzz(given.target, given.inputs, given.corpus, findings)
    from targets import TARGETS

    if given.file is not None:
        try:
            TARGETS[given.target].read(given.file.read_bytes())
        except TARGETS[given.target].allowed as error:
            print(f"{type(error).__name__}, as it may: {error}")
        return 0
    findings.mkdir(exist_ok=True)
    names = [given.target] if given.target else list(TARGETS)
    share = -(-given.inputs // len(names))
    with ThreadPoolExecutor(given.jobs) as pool:
        failed = [
            name for name, good in zip(names, pool.map(lambda name: run(name, share), names), strict=True) if not good
        ]
    if failed:
        print(f"failed: {', '.join(failed)}; the inputs lie in {findings}")
    else:
        findings.rmdir()
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
