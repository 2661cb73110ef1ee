"""`--fresh` deletes an earlier run only once nothing that can be known speaks against the new one."""

from __future__ import annotations

from collections.abc import Callable

import yaml
from support import Command, Commands, Federation

from gptfl_dist.config.document import dump_yaml
from gptfl_dist.errors import ConfigError, DataError, LaunchError


def test_a_run_that_cannot_begin_anew_deletes_nothing(gptfl: Commands, federation: Callable[..., Federation]) -> None:
    world = federation(epochs=1)
    gptfl.run("run", world.path)
    before = {path: path.read_bytes() for path in world.run_folder.rglob("*.s*") if path.is_file()}
    assert {"ledger.sqlite", "fedavg_random.safetensors"} <= {path.name for path in before}

    def refused(command: Command, code: int, said: str) -> None:
        assert command.wait() == code, command.stderr
        assert said in command.stderr
        assert {path: path.read_bytes() for path in before} == before

    refused(gptfl.start("coordinator", world.path, "--fresh"), ConfigError.exit_code, "exchange.authority")

    content = yaml.safe_load(world.path.read_text())
    world.path.write_text(dump_yaml({**content, "collective": {"trust": "tls"}}))
    refused(gptfl.mpi(2, "run", world.path, "--fresh"), LaunchError.exit_code, "expected 3 of MPI")
    refused(gptfl.mpi(3, "run", world.path, "--fresh"), ConfigError.exit_code, "collective.trust is tls")
    world.path.write_text(dump_yaml(content))

    for lost, starts in (
        (
            "silo-2.npz",
            [lambda: gptfl.start("run", world.path, "--fresh"), lambda: gptfl.mpi(3, "run", world.path, "--fresh")],
        ),
        ("test.npz", [lambda: gptfl.start("run", world.path, "--fresh")]),
    ):
        data = world.folder / lost
        data.rename(data.with_suffix(".away"))
        for start in starts:
            refused(start(), DataError.exit_code, f"{data}")
        data.with_suffix(".away").rename(data)

    anew = gptfl.mpi(3, "run", world.path, "--fresh")
    assert anew.wait() == 0, anew.stderr
    assert {path: path.read_bytes() for path in before if path.exists()} != before
    assert world.summary()["arms"]["fedavg_random"]["rounds"] == 3
