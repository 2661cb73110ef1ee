"""The pre-flight of a silo file: device, data, code, folders, launcher, certificate, the way to the coordinator."""

from __future__ import annotations

from pathlib import Path

from gptfl_dist.config.silo import Coordinator, SiloFile
from gptfl_dist.launch.start import launch_folder
from gptfl_dist.run.at_rest import try_at_rest
from gptfl_dist.run.check.common import (
    check_credentials,
    code_beside,
    launcher_found,
    not_dialled,
    parse_script,
    reach,
    valid_until,
    writable,
)
from gptfl_dist.run.check.findings import Checklist


def check_silo(checks: Checklist, path: Path, silo: SiloFile) -> None:
    checks.run("device", lambda: _silo_device(silo))
    if silo.data is not None:
        checks.run("data", lambda: _silo_data(silo))
    if silo.code is not None:
        checks.run("code", lambda: _silo_code(path, silo))
    work = silo.work_folder or path.absolute().parent / f"{silo.name}-work"
    checks.run("work folder", lambda: writable(work))
    checks.run("at_rest", lambda: try_at_rest(silo.at_rest, work))
    if silo.launch.how != "child":
        checks.run("launch folder", lambda: writable(launch_folder(silo, work)))
        checks.run("launcher", lambda: launcher_found(silo))
    side = silo.coordinator
    if side is None:
        checks.run("coordinator", lambda: "none named: this silo runs under gptfl run or mpiexec alone")
        return
    usable = checks.run("credentials", lambda: _silo_credentials(silo, side))
    checks.run("coordinator", lambda: reach(side) if usable else not_dialled(side))


def _silo_device(silo: SiloFile) -> str:
    from gptfl_dist.learning.device import resolve_device

    return f"{silo.device} is {resolve_device(silo.device)}"


def _silo_data(silo: SiloFile) -> str:
    """Decodes every sample once. The federation's task and labels are not known here."""
    from gptfl_dist.config.task import Task
    from gptfl_dist.learning.data import count_labels, find_kind, load_images, split

    assert silo.data is not None
    kind = find_kind(silo.data)
    counts = count_labels(silo.data, kind)
    task = Task(kind=kind)
    samples = load_images(silo.data, task, tuple(counts))
    split(samples, silo.data.validation_share, 0)
    told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items())[:20])
    return f"{len(samples)} {task.samples} can be read: {told}{', ...' if len(counts) > 20 else ''}"


def _silo_code(path: Path, silo: SiloFile) -> str:
    from gptfl_dist.learning.code import import_function

    assert silo.code is not None
    if silo.code.script is not None:
        return parse_script(silo.code.script)
    named = {"code.function": silo.code.function, "code.model": silo.code.model}
    sources = [(setting, source) for setting, source in named.items() if source is not None]
    with code_beside(path):
        for setting, source in sources:
            import_function(source, setting)
    return f"{', '.join(source for _, source in sources)} can be imported"


def _silo_credentials(silo: SiloFile, side: Coordinator) -> str:
    shown = check_credentials(side.authority, side.certificate, side.key, "silo", silo.name, None)
    return valid_until(shown, f"those of {silo.name}", renewed=True)
