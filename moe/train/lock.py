"""One process at a time in a folder: a lock that the system lets go of when its holder dies, however it dies."""

import fcntl
import logging
import os
import socket
from pathlib import Path

from moe.config import ConfigError

log = logging.getLogger(__name__)


class Lock:
    """Holds `path` (`flock`) from here on until `close`, or until the process is gone.

    The file stays and says who holds it, or who held it last. On a file system that has no such locks this warns and
    goes on. Raises ConfigError, naming the holder's process and host, if another one has it; `where` and `what` it is.
    """

    def __init__(self, path: Path, where: str, what: str) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # is not inherited by programs started from here
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._file, 200).decode(errors="replace").strip() or "which has not said its name yet"
            self.close()
            raise ConfigError(f"{where}: another process ({holder}) {what}") from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): nothing keeps a second process out", path, error.strerror)
        os.ftruncate(self._file, 0)
        os.write(self._file, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())

    def close(self) -> None:
        """Lets go of it; may be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()


def is_held(path: Path) -> bool:
    """Whether some process holds the lock at this moment."""
    if not path.is_file():
        return False
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False
