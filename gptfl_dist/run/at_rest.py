"""The key with which a side encrypts what it keeps on disk: where it comes from, and whether it is the right one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from gptfl_dist.config.at_rest import AtRest
from gptfl_dist.errors import ConfigError, IdentityError, StorageError, first_line
from gptfl_dist.files import storage_error, write_file
from gptfl_dist.security.credentials import require_private
from gptfl_dist.weights.sealed import KEY_BYTES, seal, unsealed, use_key

KEY_CHECK = "at-rest.check"
"""What the key decrypts, in a run folder or a silo's work folder, so that another key is found out at once."""

_PATIENCE = 60.0  # seconds for the command that tells the key
_HINT = "make one with: openssl rand -hex 32"


def use_at_rest(settings: AtRest | None, folder: Path | None = None) -> None:
    """From now on this process encrypts what it writes, where the settings say so.

    `folder` is where it keeps its files: what lies there must have been encrypted with the same key.

    Raises ConfigError, StorageError.
    """
    key = None if settings is None else key_of(settings)
    use_key(key)
    if folder is None:
        return
    check = folder / KEY_CHECK
    if check.exists():
        try:
            unsealed(check.read_bytes(), check)
        except StorageError:
            found = "no at_rest names its key" if key is None else "the key that at_rest names is another one"
            raise ConfigError(
                f"{folder}: what lies there is encrypted, and {found}", hint="name the key that it was begun with"
            ) from None
    elif key is not None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, folder) from None
        write_file(check, seal(b"the key"))


def key_of(settings: AtRest) -> bytes:
    """The key, from wherever the settings say. Raises ConfigError, also where others may read its file."""
    if settings.key_file is not None:
        where = f"at_rest.key_file {settings.key_file}"
        try:
            require_private(settings.key_file)
            text = settings.key_file.read_text("ascii")
        except IdentityError as error:
            raise ConfigError(f"at_rest.key_file {error.message}", hint=error.hint) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: {first_line(error)}", hint=_HINT) from None
    elif settings.key_env is not None:
        where, text = f"at_rest.key_env {settings.key_env}", os.environ.get(settings.key_env, "")
        if not text:
            raise ConfigError(f"{where}: there is no such variable", hint="set it before the command is started")
    else:
        where, text = "at_rest.key_command", _told(settings.key_command or [])
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{where} gives no key: expected {2 * KEY_BYTES} hexadecimal digits", hint=_HINT)
    return key


def _told(command: list[str]) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"at_rest.key_command {command[0]}: {first_line(error)}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ConfigError(
            f"at_rest.key_command {command[0]} ended with exit code {done.returncode}{': ' if said else ''}"
            f"{''.join(said)}"
        )
    return done.stdout.decode(errors="replace")
