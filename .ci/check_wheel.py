"""Checks an installed wheel; run with `python -I` outside the checkout, in the environment that holds the wheel."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import gptfl_dist

HELP = "from gptfl_dist.cli.main import main; import sys; sys.argv = ['gptfl', '--help']; main()"
HEAVY = "{'torch', 'grpc', 'diffusers', 'transformers', 'mpi4py'}"

# The command line starts without the heavy libraries.
probe = (
    f"import atexit, sys\natexit.register(lambda: print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr))\n{HELP}"
)
answer = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True, timeout=120, check=True)
assert answer.stderr.strip() == "[]", f"gptfl --help loaded {answer.stderr.strip()}"
assert "Usage" in answer.stdout, answer.stdout

# The data files came along.
for name in ("federation.yaml", "silo.yaml"):
    assert (resources.files("gptfl_dist.config") / "defaults" / name).is_file(), name
assert (resources.files("gptfl_dist") / "py.typed").is_file()

# Every module imports with what the wheel asked for; an MPI library itself is not among that.
modules = [module.name for module in pkgutil.walk_packages(gptfl_dist.__path__, "gptfl_dist.")]
for module in modules:
    if module.rpartition(".")[2] == "__main__":
        continue
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) or "mpi" not in str(error).lower():
            raise
assert {f"gptfl_dist.exchange.grpc.{name}_pb2" for name in ("exchange", "operator")} <= set(modules)
print(f"{Path(gptfl_dist.__file__).parent}: {len(modules)} modules import")
