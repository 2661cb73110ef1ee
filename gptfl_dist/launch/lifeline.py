"""No process outlives the one that started it, even if that one is killed.

The parent keeps the writing end of a pipe open and never writes. The child reads: when the parent is gone, however it
went, the read returns and the child exits. What the child started ends the same way, by its own lifeline.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from gptfl_dist.errors import LaunchError
from gptfl_dist.learning.group import PLACE, outside

_ENV = "GPTFL_LIFELINE"


def hold_on() -> bool:
    """In the child: exits this process when its parent is gone. False, and nothing done, if it is no `Child`."""
    fd = os.environ.pop(_ENV, None)
    if fd is None:
        return False
    threading.Thread(target=_wait_for_the_end, args=(int(fd),), name="lifeline", daemon=True).start()
    return True


def _wait_for_the_end(fd: int) -> None:
    os.read(fd, 1)
    os._exit(1)


class Child:
    """A process with a lifeline, in a session of its own, so that Ctrl-C reaches the parent alone."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        output: IO[bytes] | None,
        answer: IO[bytes] | None = None,
        cwd: Path | None = None,
        place: int | None = None,
    ) -> None:
        """Starts the command; `output` takes its stdout and stderr (None: the parent's own), `answer` stdout alone.

        `place` is its number among those that run side by side, which take the machine's GPUs in turn; None is the
        parent's own. Raises LaunchError if the command cannot be run.
        """
        reading, self._lifeline = os.pipe()
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=answer if answer is not None else output,
                stderr=output,
                cwd=cwd,
                env={**outside(os.environ), **({} if place is None else {PLACE: str(place)}), _ENV: str(reading)},
                pass_fds=(reading,),
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._lifeline)
            raise LaunchError(f"cannot start {error.filename or command[0]}: {error.strerror}") from None
        finally:
            os.close(reading)

    def stop(self, grace: float = 5.0) -> int:
        """Asks the process to stop, kills it after `grace` seconds; returns its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(grace)
            except subprocess.TimeoutExpired:
                self.process.kill()
        code = self.process.wait()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        return code
