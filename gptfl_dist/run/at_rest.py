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
_MAKE_ONE = "make one with: openssl rand -hex 32"


def use_at_rest(settings: AtRest | None, folder: Path | None = None) -> None:
    """From now on this process encrypts what it writes, where the settings say so.

    `folder` is where it keeps its files: what lies there must have been encrypted with the same key.

    Raises ConfigError, StorageError.
    """
    key = None if settings is None else key_of(settings, folder)
    use_key(key)
    if folder is None or _keeps_to_its_key(folder, key) or key is None:
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from None
    write_file(folder / KEY_CHECK, seal(b"the key"))


def try_at_rest(settings: AtRest | None, folder: Path) -> str:
    """Says what `use_at_rest` would find, and raises what it would; the process goes on without a key."""
    key = None if settings is None else key_of(settings, folder)
    use_key(key)
    try:
        begun = _keeps_to_its_key(folder, key)
    finally:
        use_key(None)
    if key is None:
        return "none: weights and updates are kept as they are"
    return f"the key is the one that {folder} was begun with" if begun else "there is a key"


def _keeps_to_its_key(folder: Path, key: bytes | None) -> bool:
    """Whether the folder was begun with a key, which is the one in use. Raises ConfigError where it is another."""
    check = folder / KEY_CHECK
    try:
        unsealed(check.read_bytes(), check)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise storage_error(error, check) from None
    except StorageError:
        found = "no at_rest names its key" if key is None else "the key that at_rest names is another one"
        raise ConfigError(
            f"{folder}: what lies there is encrypted, and {found}", hint="name the key that it was begun with"
        ) from None
    return True


def key_of(settings: AtRest, folder: Path | None = None) -> bytes:
    """The key, from wherever the settings say, for what lies in `folder` or is yet to be written.

    Raises ConfigError, also where others may read the key's file.
    """
    hint = _MAKE_ONE
    where = place_of(settings)
    if folder is not None and (folder / KEY_CHECK).exists():
        hint = f"bring back the key that {folder} was begun with: with another what lies there cannot be read"
    if settings.key_file is not None:
        try:
            require_private(settings.key_file)
            text = settings.key_file.read_text("ascii")
        except IdentityError as error:
            raise ConfigError(f"at_rest.key_file {error.message}", hint=error.hint) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: {first_line(error)}", hint=hint) from None
    elif settings.key_env is not None:
        text = os.environ.get(settings.key_env, "")
        if not text:
            raise ConfigError(f"{where}: there is no such variable", hint="set it before the command is started")
    else:
        text = _told(where, settings.key_command or [])
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{where} gives no key: expected {2 * KEY_BYTES} hexadecimal digits", hint=hint)
    return key


def place_of(settings: AtRest) -> str:
    """Where the key is to be, as people are told."""
    if settings.key_file is not None:
        return f"at_rest.key_file {settings.key_file}"
    if settings.key_env is not None:
        return f"at_rest.key_env {settings.key_env}"
    return f"at_rest.key_command {(settings.key_command or [''])[0]}"


def _told(where: str, command: list[str]) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{where}: {first_line(error)}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ConfigError(f"{where} ended with exit code {done.returncode}{': ' if said else ''}{''.join(said)}")
    return done.stdout.decode(errors="replace")
