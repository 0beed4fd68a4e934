"""The connection to the registry's database: SQLite in one file, or PostgreSQL.

SQLite allows one writer at a time. Each write transaction says so from its beginning (``BEGIN IMMEDIATE``): one that
started as a reader could not wait for its turn, only fail.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, InterfaceError, OperationalError
from sqlalchemy.orm import Session

from ethogram.errors import IllegalState, InvalidInput, Unavailable
from services.jobs.tables import REVISION

log = logging.getLogger(__name__)

BUSY_SECONDS = 30.0
MIGRATIONS = Path(__file__).parent / "migrations"
# Any constant that no other program uses for its advisory locks.
MIGRATION_LOCK = 0x6574686F6772616D


class Database:
    """An open database whose tables are those of this version. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        """Connect and migrate.

        Raises :class:`InvalidInput` for a URL that is none, :class:`Unavailable` when the database cannot be used and
        :class:`IllegalState` when a newer version wrote it.
        """
        try:
            self.url = make_url(url)
        except ArgumentError:
            raise InvalidInput.field(
                "database_url", "is not a database URL; write sqlite:////absolute/path/registry.db"
            ) from None
        self.name = self.url.render_as_string(hide_password=True)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self._turn = threading.Lock()
        with self._clear_errors():
            self._engine = self._connect()
            self._writer = self._engine.execution_options(ethogram_write=True)
            self._migrate()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that sees one state of the database and changes nothing."""
        with self._clear_errors(), Session(self._engine, autoflush=False, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that is committed, durably, when the block ends, and undone when it raises."""
        with (
            # Threads of one process take turns here, in order; SQLite would have them sleep and try again.
            self._turn if self.sqlite else nullcontext(),
            self._clear_errors(),
            Session(self._writer, autoflush=False, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _connect(self) -> Engine:
        if not self.sqlite:
            return create_engine(self.url, pool_size=8, max_overflow=32, pool_pre_ping=True)
        if not self.url.database or self.url.database == ":memory:":
            raise InvalidInput.field("database_url", "must name a file: the processes of the platform share it")
        Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(self.url, pool_size=8, max_overflow=56, connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        _use_wal(engine)
        return engine

    def _migrate(self) -> None:
        with self._engine.connect() as connection:
            if self._revision(connection) == REVISION:
                return
        with self._writer.begin() as connection:
            if not self.sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            # Another process may have done it while this one waited for the lock.
            revision = self._revision(connection)
            if revision != REVISION:
                self._upgrade(connection, revision)

    def _revision(self, connection: Connection) -> str | None:
        if not connection.dialect.has_table(connection, "alembic_version"):
            return None
        revision: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        return revision

    def _upgrade(self, connection: Connection, revision: str | None) -> None:
        # Slow to import, and only the first start needs it.
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if revision is not None and revision not in known:
            raise IllegalState(
                f"the database {self.name} was written by a newer version of Ethogram (its schema is {revision}, this "
                f"version knows {REVISION}): use that version, or another state directory"
            )
        command.upgrade(config, "head")
        log.info("migrated the database %s from %s to %s", self.name, revision or "empty", REVISION)

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except (OperationalError, InterfaceError) as error:
            raise self._unavailable(str(error.orig)) from error
        except OSError as error:
            raise self._unavailable(str(error.strerror)) from error
        except sqlite3.Error as error:
            # A new connection's first words are not wrapped.
            raise self._unavailable(str(error)) from error
        except DatabaseError as error:
            # SQLite tells of a file that is no database in the most general class.
            if type(error) is DatabaseError:
                raise self._unavailable(str(error.orig)) from error
            raise

    def _unavailable(self, cause: str) -> Unavailable:
        hint = "free some space" if "full" in cause or "space" in cause else "see that it runs and can be written"
        return Unavailable(f"the database {self.name} cannot be used ({cause.strip()}): {hint}, then try again")


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # The driver would otherwise begin transactions by itself, as readers.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("ethogram_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _use_wal(engine: Engine) -> None:
    """Set the file to write-ahead logging. Unlike other statements, the switch does not wait for others."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        raw = engine.raw_connection()
        try:
            cursor = raw.cursor()
            cursor.execute("PRAGMA journal_mode = WAL")
            mode = cursor.fetchone()
            cursor.close()
            if mode is not None and mode[0] == "wal":
                return
            raise OSError(0, f"its file system does not support write-ahead logging (journal mode {mode})")
        except Exception as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                if isinstance(error, OSError):
                    raise
                raise OSError(0, str(error)) from error
        finally:
            raw.close()
        time.sleep(0.02)
