"""What a check found, and the list that turns a check's result or error into it, so that no check stops the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from gptfl_dist.errors import GptflError

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. `exit_code` is 0 unless `status` is failed; `hint` says what to do about it."""

    checked: str
    status: Status
    found: str
    hint: str = ""
    exit_code: int = 0

    def line(self) -> str:
        """The finding for people; a second line holds the hint."""
        hint = f"\n         {self.hint}" if self.hint else ""
        return f"{self.status:8} {self.checked}: {self.found}{hint}"

    def as_dict(self) -> dict[str, str | int]:
        return asdict(self)


class Doubt(Exception):
    """Raised by a check whose finding is a warning."""

    def __init__(self, found: str, hint: str) -> None:
        super().__init__(found)
        self.found = found
        self.hint = hint


class Checklist:
    """Runs checks and keeps what they found."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def run(self, checked: str, check: Callable[[], str]) -> bool:
        """Notes what `check` returns, the Doubt or the GptflError that it raises, or what nobody foresaw.

        False where it failed.
        """
        try:
            finding = Finding(checked, "ok", check())
        except Doubt as doubt:
            finding = Finding(checked, "warning", doubt.found, doubt.hint)
        except GptflError as error:
            finding = Finding(checked, "failed", error.message, error.hint, error.exit_code)
        except Exception as error:  # of a library or of the user's code: the other checks shall still be made
            finding = Finding(checked, "failed", f"{type(error).__name__}: {error}", "", GptflError.exit_code)
        self.findings.append(finding)
        return finding.status != "failed"
