"""The pre-flight of an operator file: the certificate, the way to the coordinator."""

from __future__ import annotations

from gptfl_dist.config.operator import OperatorFile
from gptfl_dist.run.check.common import check_credentials, not_dialled, reach, valid_until
from gptfl_dist.run.check.findings import Checklist


def check_operator(checks: Checklist, file: OperatorFile) -> None:
    side = file.coordinator
    usable = checks.run("credentials", lambda: _credentials(file))
    checks.run("coordinator", lambda: reach(side) if usable else not_dialled(side))


def _credentials(file: OperatorFile) -> str:
    side = file.coordinator
    valid = check_credentials(side.authority, side.certificate, side.key, file.role, file.name, None)
    return valid_until(valid, f"those of the {file.role} {file.name}", renewed=True)
