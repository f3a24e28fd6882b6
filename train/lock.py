"""A lock on a folder: one run at a time, until the process ends, however it ends.

The lock is the kernel's (flock), so that a kill releases it. The file names its holder, and the holder looks there
before it writes: a folder that was removed and made again, or a file system that lost the lock while the process was
paused, belongs to somebody else.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from .errors import RunError

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without locks answers: there, the name in the file alone tells who started last."""


class Lock:
    """A lock that this process holds.

    Args:
        path: the file to lock, made if it is missing; its folder must exist.

    Raises:
        RunError: another process holds the lock; it is named.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._file, 200).decode(errors="replace").strip() or "unknown"
            os.close(self._file)
            raise RunError(
                f"{path.parent}: another process works in this folder ({holder}). Wait for it, end it, or choose "
                "another --out."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        self._name = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{self._name}\n".encode(), 0)

    def check(self) -> None:
        """Raise RunError if the folder belongs to another process by now."""
        found, same = "", False
        with contextlib.suppress(OSError):
            found = self.path.read_text(errors="replace").strip()
            same = os.path.samestat(os.fstat(self._file), self.path.stat())
        if found != self._name or not same:
            raise RunError(
                f"{self.path.parent}: this folder now belongs to {found or 'nobody: it was removed'}. This process "
                "writes nothing more."
            )

    def release(self) -> None:
        """Let another process take the lock. The file stays: removing it would let two processes lock two files."""
        os.close(self._file)
