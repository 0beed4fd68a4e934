"""The connection to the registry's database: SQLite in one file, or PostgreSQL.

SQLite allows one writer at a time. Each write transaction starts as a writer (``BEGIN IMMEDIATE``): one that started as
a reader could not wait for its turn, only fail.

PostgreSQL writes at READ COMMITTED, where a statement sees what others committed before it. So code that decides by
what it has read locks the row first (``FOR UPDATE``; a parent before its children, an input before the jobs that wait
for it), or decides within the UPDATE. Reads are at REPEATABLE READ: all statements of one read see the same state.
"""

from __future__ import annotations

import logging
import random
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, Executable, Result, create_engine, event, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, InterfaceError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import DeclarativeBase, Session

from ethogram.errors import IllegalState, InvalidInput, Unavailable
from services.jobs import migrate
from services.jobs.tables import REVISION

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

BUSY_SECONDS = 30.0
_RETRIES = 4
# Options of a PostgreSQL connection, unless the URL sets them (``?connect_timeout=30``). A server behind a broken
# network is given up after 15 s (the last is in milliseconds).
_CONNECTION = {
    "application_name": "ethogram",
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 15_000,
}
# Settings of its sessions, in milliseconds. Transactions are short. A process that is stopped in the middle of one must
# not keep its locks: its session ends, and the transaction is undone. UTC, since other zones end within the year 9999.
_SESSION = {
    "timezone": "UTC",
    "lock_timeout": 15_000,
    "statement_timeout": 60_000,
    "idle_in_transaction_session_timeout": 15_000,
}
# A setting of ours. A session that has it got the options of its connection; poolers such as PgBouncer refuse them or
# drop them.
_DIRECT_SETTING = "ethogram.direct"
# Arguments of the driver that a URL must not set: they take no text, and the registry relies on their defaults.
_DRIVERS_OWN = ("autocommit", "context", "cursor_factory", "row_factory")
_OPTION = re.compile(r"(?:-c\s*|--)([\w.-]+)=((?:\\.|\S)+)")
# SQLSTATEs, or classes of them, after which a retry may succeed: connection lost, read-only (a standby that
# has not taken over yet), transaction rolled back, no resources, not in this state, ended by an operator, input/output,
# damaged files.
_FOR_NOW = ("08", "25006", "40", "53", "55", "57", "58", "XX001", "XX002")
_DEADLOCK = "40P01"
# No permission, which an operator can grant.
_NOT_ALLOWED = "42501"

# Pattern in the driver's text -> what to do about it; the first that matches.
_HINTS = {
    "full|space": "free some space",
    "permission denied": "let this user make tables there (GRANT CREATE, USAGE ON SCHEMA public)",
    "too many clients|connection slots": "raise its max_connections (a process of the platform takes up to 40)",
    "deadlock|timeout": "other transactions were in the way",
    "": "check that it runs and is writable",
}


class Collision(Unavailable):
    """Two transactions were in each other's way, and this one was undone; a repetition sees what the other did."""


def retry_collisions(method: Callable[P, R]) -> Callable[P, R]:
    """Decorate a method that is one transaction: repeat it when it is undone by a :class:`Collision`.

    Jobs that need each other's outputs can be locked in a circle, whatever the order, since locks follow as jobs end;
    the database then undoes one of the transactions.
    """

    @wraps(method)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> R:
        for _ in range(_RETRIES):
            try:
                return method(*args, **kwargs)
            except Collision:
                time.sleep(random.uniform(0.0, 0.05))
        return method(*args, **kwargs)

    return repeated


def change(session: Session, statement: Executable) -> Result[Any]:
    """Execute an UPDATE or DELETE; objects that the session has loaded already keep their old values."""
    return session.execute(statement, execution_options={"synchronize_session": False})


def set_values(
    session: Session, table: type[DeclarativeBase], *where: Any, returning: Sequence[Any] = (), **values: Any
) -> Result[Any]:
    """Execute ``UPDATE table SET values WHERE all of where RETURNING returning``, as :func:`change` does."""
    statement = update(table).where(*where).values(**values)
    return change(session, statement.returning(*returning) if returning else statement)


def insert_for(session: Session, table: type[DeclarativeBase]) -> postgresql.Insert | sqlite.Insert:
    """An INSERT in the dialect of the session's database, for ``ON CONFLICT``."""
    on_sqlite = session.get_bind().dialect.name == "sqlite"
    return sqlite.insert(table) if on_sqlite else postgresql.insert(table)


class Database:
    """An open database with the tables of this version. Safe to use from several threads."""

    def __init__(self, url: str, *, upgrade: bool = True) -> None:
        """Connect, and with ``upgrade`` migrate the tables.

        Raises :class:`InvalidInput` for a malformed URL, :class:`Unavailable` when the database cannot be used and
        :class:`IllegalState` when a newer version wrote it.
        """
        self.url = _parse(url)
        self.name = self.url.render_as_string(hide_password=True)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self._turn = threading.Lock()
        try:
            with self._clear_errors():
                self._engine = self._connect()
            reading = {} if self.sqlite else {"isolation_level": "REPEATABLE READ"}
            self._reader = self._engine.execution_options(**reading)
            self._writer = self._engine.execution_options(ethogram_write=True)
            revision = self.revision()
        except (ValueError, TypeError, ProgrammingError) as error:
            raise InvalidInput.field(
                "database_url", f"the driver refuses it: {getattr(error, 'orig', error)}"
            ) from None
        if upgrade and revision != REVISION:
            self.upgrade()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that sees one state of the database and changes nothing."""
        with self._clear_errors(), Session(self._reader, autoflush=False, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that is committed durably when the block ends, and undone when it raises."""
        with (
            # Threads of one process queue here in order; SQLite would have them sleep and try again.
            self._turn if self.sqlite else nullcontext(),
            self._clear_errors(),
            Session(self._writer, autoflush=False, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def revision(self) -> str | None:
        """The revision of the tables; ``None`` for an empty database."""
        with self.read() as session:
            return migrate.revision(session.connection())

    def upgrade(self) -> None:
        """Migrate to the tables of this version. Raises :class:`IllegalState` for a database of a newer version."""
        with self._migration() as connection:
            # Another process may have done it while this one waited for the lock.
            revision = migrate.revision(connection)
            if revision != REVISION:
                migrate.upgrade(connection)
                log.info("migrated the database %s from %s to %s", self.name, revision or "empty", REVISION)

    def downgrade(self, to: str, *, commit: bool = True) -> list[migrate.Loss]:
        """Migrate back to an earlier revision, or ``base``; return what that deletes. Without ``commit`` it is undone
        again. Raises what :meth:`upgrade` raises, and :class:`InvalidInput` for a revision that is not earlier."""
        lost: list[migrate.Loss] = []
        with suppress(_Undo), self._migration() as connection:
            lost = migrate.downgrade(connection, to)
            if not commit:
                raise _Undo
        return lost

    @contextmanager
    def _migration(self) -> Iterator[Connection]:
        with self.write() as session:
            connection = session.connection()
            migrate.take_turn(connection)
            revision = migrate.revision(connection)
            if revision is not None and revision not in migrate.revisions():
                raise IllegalState(
                    f"the database {self.name} was written by a newer version of Ethogram (its schema is {revision}, "
                    f"this version knows {REVISION}): use that version, or another state directory"
                )
            yield connection

    def _connect(self) -> Engine:
        if not self.sqlite:
            return self._connect_to_postgresql()
        assert self.url.database is not None
        Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(self.url, pool_size=8, max_overflow=56, connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        _use_wal(engine)
        return engine

    def _connect_to_postgresql(self) -> Engine:
        """Give each session its settings as it begins. Behind a pooler, where clients share sessions, each transaction
        sets them for itself, and no statement is prepared."""
        options: dict[str, Any] = {name: value for name, value in _CONNECTION.items() if name not in self.url.query}
        given = str(self.url.query.get("options", ""))
        session = {**_SESSION, **{name.replace("-", "_"): value for name, value in _OPTION.findall(given)}}
        settings = " ".join(f"-c {name}={value}" for name, value in {**session, _DIRECT_SETTING: "on"}.items())
        url = self.url.difference_update_query(["options", "prepare_threshold"])
        if own := [name for name in _DRIVERS_OWN if name in self.url.query]:
            raise InvalidInput.field("database_url", f"{own[0]} cannot be set; leave it out")
        threshold = _prepare_threshold(self.url)
        make = partial(create_engine, url, pool_size=8, max_overflow=32, pool_pre_ping=True)
        engine = make(connect_args={**options, **threshold, "options": f"{settings} {_OPTION.sub('', given)}".strip()})
        try:
            with engine.connect() as connection:
                if connection.scalar(text(f"SELECT current_setting('{_DIRECT_SETTING}', true)")) == "on":
                    return engine
        except OperationalError as error:
            if not re.search("startup parameter|options", str(error.orig)):
                raise
        engine.dispose()
        engine = make(connect_args={**options, "prepare_threshold": None})
        statement = f"SELECT {', '.join(['set_config(%s, %s, true)'] * len(session))}"
        values = tuple(str(item).replace("\\", "") for pair in session.items() for item in pair)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(statement, values))
        log.info("a pooler is in front of the database %s: transactions bring their settings along", self.name)
        return engine

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except PoolTimeout as error:
            raise self._unavailable("all its connections are in use") from error
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) == _DEADLOCK:
                raise Collision(self._unavailable(str(error.orig)).message) from error
            if self._is_outage(error):
                raise self._unavailable(str(error.orig)) from error
            raise
        except (OSError, sqlite3.Error) as error:
            # SQLAlchemy does not wrap errors of a new connection's first statements.
            raise self._unavailable(str(getattr(error, "strerror", error))) from error

    def _is_outage(self, error: DBAPIError) -> bool:
        if isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated:
            return True
        if self.sqlite:
            # SQLite reports a file that is not a database by the most general class.
            return type(error) is DatabaseError
        code = getattr(error.orig, "sqlstate", None) or ""
        return code.startswith(_FOR_NOW) or code == _NOT_ALLOWED

    def _unavailable(self, cause: str) -> Unavailable:
        cause = " ".join(cause.split())
        hint = next(hint for pattern, hint in _HINTS.items() if re.search(pattern, cause))
        return Unavailable(f"the database {self.name} cannot be used ({cause}): {hint}, then try again")


class _Undo(Exception):
    """Raised to undo a transaction on purpose."""


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise InvalidInput.field(
            "database_url",
            "is not a database URL; write sqlite:////absolute/path/registry.db or postgresql://user@host:5432/name",
        ) from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise InvalidInput.field("database_url", "must name a file: the processes of the platform share it")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise InvalidInput.field(
            "database_url", f"{parsed.drivername}:// is not supported; use sqlite:/// or postgresql://"
        )
    return parsed


def _prepare_threshold(url: URL) -> dict[str, int | None]:
    """The driver's argument of that name, if ``url`` has it: the driver itself takes no text."""
    given = str(url.query.get("prepare_threshold", ""))
    if not given:
        return {}
    if not re.fullmatch(r"\d{1,9}|none", given, re.IGNORECASE | re.ASCII):
        raise InvalidInput.field("database_url", f"prepare_threshold={given}: must be a whole number, or none")
    return {"prepare_threshold": None if given.lower() == "none" else int(given)}


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # Otherwise the driver begins transactions itself, as readers.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("ethogram_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _use_wal(engine: Engine) -> None:
    """Set the file to write-ahead logging. Unlike other statements, this one does not wait for other connections."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            with closing(engine.raw_connection()) as raw, closing(raw.cursor()) as cursor:
                cursor.execute("PRAGMA journal_mode = WAL")
                mode = cursor.fetchone()
            if mode is None or mode[0] != "wal":
                raise OSError(0, f"its file system does not support write-ahead logging (journal mode {mode})")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.02)
