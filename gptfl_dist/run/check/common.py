"""Checks and helpers that the files share."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.silo import Coordinator, SiloFile
from gptfl_dist.errors import IdentityError, LaunchError, StorageError, TrainerError
from gptfl_dist.files import storage_error
from gptfl_dist.run.check.findings import Doubt
from gptfl_dist.security.authority import Credentials
from gptfl_dist.security.credentials import ONE_AUTHORITY, certificates_in, leads_to, load_credentials
from gptfl_dist.security.expiry import ending

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def code_beside(path: Path) -> Iterator[None]:
    """Lets modules beside the file at `path` be imported, then forgets them: another silo's may be named alike."""
    folder = path.absolute().parent
    path_before, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path_before
        for name in set(sys.modules) - known:
            top = name.partition(".")[0]
            origin = getattr(sys.modules.get(top), "__file__", None)
            if top != "gptfl_dist" and origin is not None and Path(origin).parent in (folder, folder / top):
                del sys.modules[name]


def built_model(path: Path, file: FederationFile, tell: Callable[[str], None] = lambda told: None) -> nn.Module:
    """The federation's model as the coordinator builds it."""
    from gptfl_dist.learning.models import build_model

    with code_beside(path):
        return build_model(file.model, file.task, len(file.labels), file.seed, tell)


def check_test_data(file: FederationFile) -> str:
    """Decodes every sample of the test data once, and looks for labels that they lack."""
    if file.test_data is None:
        return "none named: accuracy is measured on the silos' validation data alone"
    from gptfl_dist.config.silo import Data
    from gptfl_dist.learning.data import load_images

    images = load_images(Data(path=file.test_data), file.task, file.labels)
    counts = images.labels.bincount(minlength=len(file.labels)).tolist()
    absent = [label for label, count in zip(file.labels, counts, strict=True) if not count]
    if absent:
        raise Doubt(
            f"{len(images)} {file.task.samples} in {file.test_data}, none of {', '.join(absent)}",
            "accuracy will say nothing of these labels",
        )
    return f"{len(images)} {file.task.samples} of all {len(counts)} labels in {file.test_data}"


def writable(folder: Path) -> str:
    """Writes a file into the folder, or into the nearest one above that exists."""
    existing = nearest(folder)
    if not existing.is_dir():
        raise StorageError(f"{existing} is a file, expected a folder", hint="name another folder, or move the file")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        raise storage_error(error, existing) from None
    return f"{folder} is writable" if existing == folder else f"{folder} can be made, {existing} is writable"


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def check_credentials(
    authority: Path, certificate: Path, key: Path, role: str, name: str | None, federation: str | None
) -> Credentials:
    """Checks one side's three files, and returns them; `name` and `federation` where they are known."""
    section = "exchange" if role == "coordinator" else "coordinator"
    credentials, identity = load_credentials(authority, certificate, key, section=section)
    if identity.role != role or name not in (None, identity.name) or federation not in (None, identity.federation):
        whose = f"{role} {name}" if name else role
        raise IdentityError(
            f"{certificate} is the certificate of {identity.uri}, expected the {whose}"
            + (f" of {federation}" if federation else ""),
            hint="use the set that was made for this side",
        )
    return credentials


def require_trusted(certificate: Path, authority: Path) -> None:
    """Raises IdentityError where those who go by `authority`, the other side, would refuse this certificate."""
    if not any(leads_to(certificates_in(certificate), root) for root in certificates_in(authority)):
        raise IdentityError(
            f"{certificate} was not issued by the other side's {authority}",
            hint=ONE_AUTHORITY,
        )


def valid_until(credentials: Credentials, whose: str, *, renewed: bool = False) -> str:
    """Raises Doubt where a certificate ends soon; one that is `renewed` by itself may have a short life."""
    if soon := ending(credentials, renewed=renewed):
        raise ending_soon(whose, soon)
    end = x509.load_pem_x509_certificate(credentials.certificate).not_valid_after_utc
    return f"{whose}, valid until {end:%F %R} UTC"


def ending_soon(whose: str, told: list[str]) -> Doubt:
    """The warning of certificates that end soon, as `ending` tells of them."""
    return Doubt(f"{whose}: {'; '.join(told)}", "replace them in time: see docs/institutions.md")


def not_dialled(side: Coordinator) -> str:
    raise Doubt(f"{side.address} was not dialled: that needs the credentials", "mend them, then check again")


def reach(side: Coordinator) -> str:
    """Dials the coordinator as a silo or an operator would, up to its first word over TLS 1.3."""
    from gptfl_dist.security.credentials import load_credentials
    from gptfl_dist.security.handshake import shake_hands

    credentials, own = load_credentials(side.authority, side.certificate, side.key)
    asyncio.run(shake_hands(side.address, credentials))
    return f"{side.address} answers over TLS 1.3 as the coordinator of {own.federation}"


def host_names(certificate: Path) -> set[str]:
    """The host names and addresses that a certificate holds for."""
    read = x509.load_pem_x509_certificate(certificate.read_bytes())
    names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*names.get_values_for_type(x509.DNSName), *(str(a) for a in names.get_values_for_type(x509.IPAddress))}


def parse_script(script: Path) -> str:
    """Reads a script without running it: its syntax, and whether what it imports is here."""
    try:
        tree = ast.parse(script.read_bytes(), filename=str(script))
    except OSError as error:
        raise TrainerError(
            f"code.script {script} cannot be read: {error.strerror}", hint="check the path, relative to the silo file"
        ) from None
    except (SyntaxError, ValueError) as error:
        raise TrainerError(f"code.script {script} is no Python: {error}") from None
    modules = set(_imported(ast.walk(tree)))
    with code_beside(script):
        absent = sorted(name for name in modules if importlib.util.find_spec(name) is None)
    if absent:
        raise TrainerError(
            f"code.script {script} imports {', '.join(absent)}, not found here",
            hint="install it for this Python, or put it beside the script",
        )
    if "gptfl_dist" not in modules:
        raise Doubt(f"{script} does not import gptfl_dist", "it must call gptfl_dist.join to take part")
    return f"{script} and what it imports are here"


def _imported(nodes: Iterable[ast.AST]) -> Iterable[str]:
    """The top-level modules that a script's import statements name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def launcher_found(silo: SiloFile) -> str:
    """Whether the launcher is here; of a Slurm job, whether it would be taken, and when it could start."""
    launch = silo.launch
    if launch.how == "torchrun":
        return f"torchrun with {launch.torchrun.processes} processes"
    program = launch.mpirun.command if launch.how == "mpirun" else "sbatch"
    if (found := shutil.which(program)) is None:
        raise LaunchError(f"{program} is not found on this machine", hint="check launch in the silo file, and PATH")
    if launch.how == "mpirun":
        return f"{found} with {launch.mpirun.ranks} ranks"
    asked = subprocess.run(
        [found, "--test-only", *launch.slurm.options, "--wrap=true"], capture_output=True, text=True, check=False
    )
    said = asked.stderr.strip().removeprefix("sbatch: ")
    if asked.returncode != 0:
        raise LaunchError(f"sbatch would refuse the job: {said}", hint="see launch.slurm.options in the silo file")
    return said
