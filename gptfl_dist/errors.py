"""The exceptions of gptfl_dist. Each says what was found, what was expected and what to do next.

The tree, with the exit code of the command line for each:

    GptflError                    1   anything of ours that fits no branch below
      StageFailed                 1   the process of a stage before the federation ended without a word
      SiloFailed                  1   a silo that this run started ended with an error: its exit code, if it has one
      ConfigError                 2   a federation or silo file is wrong
      DataError                   3   data cannot be read or does not fit the federation
      GeneratorError              4   a generator cannot be loaded or run
      ModelError                  5   a model cannot be built, or weights do not fit its layout
      ConnectionFailed            6   the other side cannot be reached, or refuses us
        IdentityError             6   a certificate is missing, wrong or not trusted
      ProtocolError               6   a peer sent what the protocol does not allow
      PolicyError                 7   the silo's own policy forbids what was asked
      FederationError             8   the federation cannot go on (quorum lost, no silo left)
      TrainerError                9   a trainer process failed
        TrainerLost               9   it was killed, or its job was cancelled, preempted or out of time
      StorageError               10   a disk is full, or a file cannot be written or is damaged
      LaunchError                11   a process, an MPI world or a port cannot be had
        RankLost                 11   another rank of a group of processes ended, or hangs
      RunAborted                 12   the run was ended for good by `gptfl abort`
      AuditError                 13   the audit log was changed, or something is missing from it
    Interrupted                 130   Ctrl-C or SIGTERM: stopped cleanly, the same command goes on
      Requeue                    75   the same by SIGUSR1, under mpiexec and torchrun also by SIGTERM

`Interrupted` stands apart so that no `except GptflError` swallows it.
"""

from __future__ import annotations

__all__ = [
    "AuditError",
    "ConfigError",
    "ConnectionFailed",
    "DataError",
    "FederationError",
    "GeneratorError",
    "GptflError",
    "IdentityError",
    "Interrupted",
    "LaunchError",
    "ModelError",
    "PolicyError",
    "ProtocolError",
    "RankLost",
    "Requeue",
    "RunAborted",
    "SiloFailed",
    "StageFailed",
    "StorageError",
    "TrainerError",
    "TrainerLost",
]


class GptflError(Exception):
    """Base of every error that a user can do something about."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        """`message` says what was found and expected; `hint` says what to do next."""
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class StageFailed(GptflError):
    pass


class SiloFailed(GptflError):
    pass


class ConfigError(GptflError):
    exit_code = 2


class DataError(GptflError):
    exit_code = 3


class GeneratorError(GptflError):
    exit_code = 4


class ModelError(GptflError):
    exit_code = 5


class ConnectionFailed(GptflError):
    exit_code = 6


class IdentityError(ConnectionFailed):
    pass


class ProtocolError(GptflError):
    exit_code = 6


class PolicyError(GptflError):
    exit_code = 7


class FederationError(GptflError):
    exit_code = 8


class TrainerError(GptflError):
    exit_code = 9


class TrainerLost(TrainerError):
    pass


class StorageError(GptflError):
    exit_code = 10


class LaunchError(GptflError):
    exit_code = 11


class RankLost(LaunchError):
    pass


class RunAborted(GptflError):
    exit_code = 12


class AuditError(GptflError):
    exit_code = 13


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM arrived; everything was put away and the same command goes on from there."""

    exit_code = 130


class Requeue(Interrupted):
    """A scheduler ends the job before its time: queued again, it goes on from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


def first_line(error: BaseException, limit: int = 300) -> str:
    """What a foreign exception says, for a message of ours: the first line, or its class where it says nothing."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= limit else line[:limit] + "..."
