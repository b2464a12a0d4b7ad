"""Write a file whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cacheplan.errors import InputError


def atomic_write(path: str | os.PathLike[str], data: bytes | Iterable[bytes]) -> None:
    """Put `data` (one piece or several in order) at `path`, replacing what is there.

    The bytes reach the disk under a temporary name in the same folder and are then renamed, so
    a reader sees the old file or the new one, never a part.  After any failure, also one raised
    by `data` itself, the old file is as it was and the temporary one is gone.

    Raises InputError if the file cannot be written.
    """
    # A link stays a link: the file it points to is replaced.
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        # Renaming over /dev/null would take it away from everybody else.
        raise InputError(f"cannot write {path}: it is not a regular file; choose another name")
    temporary = target.with_name(f".cacheplan-{secrets.token_hex(8)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:  # not mkstemp: the file's mode follows the umask
                for piece in [data] if isinstance(data, bytes) else data:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror or error}); "
            "choose a folder that exists, may be written to and has room"
        ) from error
