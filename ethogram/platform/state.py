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

from ethogram.errors import Conflict, EthogramError, InvalidInput, Unavailable
from ethogram.paths import user_path

HOST, PORT, STATE = "127.0.0.1", 8321, "runs/state"
"""Where an embedded platform runs by default."""
_LEAVING_SECONDS = 20.0


@dataclass
class StateDir:
    """Paths inside a state directory."""

    root: Path

    @classmethod
    def find(cls, path: str | Path | None = None) -> StateDir:
        """``path``, else the one that ``ETHOGRAM_STATE`` names, else ``runs/state`` under the current folder."""
        field = "--state" if path else "ETHOGRAM_STATE"
        return cls(user_path(path or os.environ.get("ETHOGRAM_STATE") or STATE, field).absolute())

    def __post_init__(self) -> None:
        self.database = self.root / "registry.db"
        """File of the registry."""
        self.database_url = f"sqlite:///{self.database}"
        """URL of the registry."""
        self.work = self.root / "work"
        """Folder of the processes' scratch folders."""
        self.inference = self.root / "inference.json"
        """Where an inference server listens."""
        self.store = self.root / "store"
        """Folder of the artifact store."""
        self.redis = self.root / "redis"
        """Folder of Redis' data."""
        self.logs = self.root / "logs"
        """Folder of the processes' logs."""
        self.record = self.root / "platform.json"
        """The running platform."""

    def make(self) -> None:
        """Create the folders. Raises :class:`InvalidInput` when that cannot be done, and for a folder with files that
        are no platform's."""
        parts = (self.store, self.redis, self.logs, self.work)
        # What a gateway, a worker or an inference server leaves that ran by itself; a new disk has the last.
        journals = (f"{self.database.name}-{suffix}" for suffix in ("wal", "shm"))
        own = {*(path.name for path in (self.database, self.work, self.inference, self.store)), *journals, "lost+found"}
        try:
            there = [path.name for path in self.root.iterdir()] if self.root.exists() else []
            others = [name for name in there if not name.startswith(".") and name not in own]
            if others and not all(folder.is_dir() for folder in parts):
                text = f"{self.root} holds other files ({others[0]}); name another folder with --state"
                raise InvalidInput.field("state", text)
            for folder in (self.root, *parts):
                folder.mkdir(parents=True, exist_ok=True)
            self.redis.chmod(0o700)
        except OSError as error:
            message = f"{self.root} cannot be used ({error.strerror}); name another folder with --state"
            raise InvalidInput.field("state", message) from None

    def write_record(self, url: str, inference: str) -> None:
        """Record the address of this process's platform."""
        record = {"pid": os.getpid(), "url": url, "inference": inference, "started": datetime.now(UTC).isoformat()}
        fresh = self.record.with_suffix(".new")
        fresh.write_text(json.dumps(record) + "\n", encoding="utf-8")
        fresh.replace(self.record)

    def read_record(self) -> dict[str, Any] | None:
        """The running platform, or None. A record whose process is gone is not a platform."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            # After a reboot the process id may be another process's; the lock is free then.
            with (self.root / "lock").open() as file:
                alive = _alive(int(record["pid"])) and not _locked(file, fcntl.LOCK_SH)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if alive and isinstance(record, dict) else None

    def lock(self) -> IO[str]:
        """Hold this directory until the returned file, and every copy that a child inherited, is closed.

        Raises :class:`Conflict` when a platform has it. One whose parent was killed is given time to leave.
        """
        # Opened for appending, so that a second process does not erase the holder's process id.
        file = (self.root / "lock").open("a+", encoding="utf-8")
        deadline = time.monotonic() + _LEAVING_SECONDS
        try:
            while not _locked(file, fcntl.LOCK_EX):
                file.seek(0)
                holder = file.read()
                if holder.isdecimal() and _alive(int(holder)):
                    record = self.read_record()
                    where = f" and answers at {record['url']}" if record else ""
                    raise Conflict(
                        f"process {holder} already runs a platform in {self.root}{where}; "
                        f"use that one, stop it (kill {holder}), or name another folder with --state"
                    )
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"processes of an earlier platform still hold {self.root}; end them, or name another folder "
                        "with --state"
                    )
                time.sleep(0.1)
        except EthogramError:
            file.close()
            raise
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file


def _locked(file: IO[str], form: int) -> bool:
    """Lock ``file``, unless another process holds a lock on it that excludes this one."""
    try:
        fcntl.flock(file, form | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
