"""Compiles protos/ when the package is built; all else stands in pyproject.toml.

A wheel gets the generated modules in its build folder, an editable install beside the sources, where imports find
them. Each .proto keeps its path below protos/ as its name (names are global to a process), and its module lands in
gptfl_dist/exchange/grpc/ as a plain module. Only messages are generated: the payload methods use generic handlers.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib import resources
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

PROTOS = Path("protos")
PACKAGE = Path("gptfl_dist", "exchange", "grpc")


class BuildWithProtos(build_py):
    """`build_py` that also compiles the wire schema."""

    def run(self) -> None:
        super().run()
        compile_protos(PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE)


def compile_protos(target: Path) -> None:
    """Write NAME_pb2.py and NAME_pb2.pyi for each .proto into the folder `target`. Raises SetupError."""
    try:
        from grpc_tools import protoc
    except ImportError as error:
        raise SetupError(
            f"cannot compile protos/: {error}. Building gptfl-dist needs grpcio-tools; a plain `pip install .` brings "
            "it, with --no-build-isolation install the build-system.requires of pyproject.toml first."
        ) from error
    protos = sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto"))
    if not protos:
        raise SetupError(f"no .proto files below {PROTOS.resolve()}: build from a complete checkout or sdist")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        well_known = resources.files("grpc_tools") / "_proto"
        options = [f"-I{PROTOS}", f"-I{well_known}", f"--python_out={folder}", f"--pyi_out={folder}"]
        if protoc.main(["protoc", *options, *protos]) != 0:
            raise SetupError(f"protoc refused {', '.join(protos)}; its messages are above")
        for module in sorted(Path(folder).rglob("*_pb2.py*")):
            shutil.copyfile(module, target / module.name)


setup(cmdclass={"build_py": BuildWithProtos})
