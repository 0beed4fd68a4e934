"""The state directory of a platform: its paths, its lock, and the address of the running platform."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from ethogram.errors import Conflict, InvalidInput, Unavailable
from ethogram.platform import defaults

_LEAVING_SECONDS = 20.0


@dataclass(frozen=True)
class StateDir:
    """Paths inside a state directory."""

    root: Path

    @classmethod
    def find(cls, path: str | Path | None = None) -> StateDir:
        """``path``, else the one that ``ETHOGRAM_STATE`` names, else ``runs/state`` under the current folder."""
        return cls(Path(path or os.environ.get("ETHOGRAM_STATE") or defaults.STATE).expanduser().absolute())

    @property
    def database_url(self) -> str:
        """URL of the registry."""
        return f"sqlite:///{self.root / 'registry.db'}"

    @property
    def store(self) -> Path:
        """Folder of the artifact store."""
        return self.root / "store"

    @property
    def redis(self) -> Path:
        """Folder of Redis' data."""
        return self.root / "redis"

    @property
    def logs(self) -> Path:
        """Folder of the processes' logs."""
        return self.root / "logs"

    @property
    def record(self) -> Path:
        """``platform.json``: the running platform."""
        return self.root / "platform.json"

    @property
    def _lock_file(self) -> Path:
        return self.root / "lock"

    def make(self) -> None:
        """Create the folders. Raises :class:`InvalidInput` when that cannot be done."""
        try:
            for folder in (self.root, self.store, self.redis, self.logs, self.root / "work"):
                folder.mkdir(parents=True, exist_ok=True)
            self.redis.chmod(0o700)
        except OSError as error:
            message = f"{self.root} cannot be used ({error.strerror}); name another folder with --state"
            raise InvalidInput.field("state", message) from None

    def write_record(self, url: str, inference: str) -> None:
        """Record the address of this process's platform."""
        record = {"pid": os.getpid(), "url": url, "inference": inference, "started": datetime.now(UTC).isoformat()}
        fresh = self.record.with_suffix(".new")
        fresh.write_text(json.dumps(record) + "\n")
        fresh.replace(self.record)

    def read_record(self) -> dict[str, Any] | None:
        """The running platform, or None. A record whose process is gone is not a platform."""
        try:
            record = json.loads(self.record.read_text())
            # After a reboot the process id may be another process's; the lock is free then.
            alive = _alive(int(record["pid"])) and self._held()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if alive and isinstance(record, dict) else None

    def _held(self) -> bool:
        with self._lock_file.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def lock(self) -> IO[str]:
        """Hold this directory until the returned file, and every copy that a child inherited, is closed.

        Raises :class:`Conflict` when a platform has it. One whose parent was killed is given time to leave.
        """
        # Opened for appending, so that a second process does not erase the holder's process id.
        file = self._lock_file.open("a+")
        deadline = time.monotonic() + _LEAVING_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = self._holder(file)
                if holder is not None and _alive(holder):
                    record = self.read_record()
                    where = f" and answers at {record['url']}" if record else ""
                    file.close()
                    raise Conflict(
                        f"process {holder} already runs a platform in {self.root}{where}; "
                        f"use that one, stop it (kill {holder}), or name another folder with --state"
                    ) from None
                if time.monotonic() > deadline:
                    file.close()
                    raise Unavailable(
                        f"processes of an earlier platform still hold {self.root}; end them, or name another folder "
                        "with --state"
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file

    @staticmethod
    def _holder(file: IO[str]) -> int | None:
        file.seek(0)
        try:
            return int(file.read())
        except ValueError:
            return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
