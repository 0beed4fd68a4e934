"""The revision of a database's tables, and migrations up and down.

Functions here work inside a write transaction of the caller, so that a migration is done completely or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Connection, MetaData, func, select, text

from ethogram.errors import InvalidInput

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).parent / "migrations"
BASE = "base"
"""The revision before the first: no tables."""
# Any constant that no other program uses for its advisory locks.
_LOCK = 0x6574686F6772616D
_OWN_TABLE = "alembic_version"


class Loss(NamedTuple):
    """What a downgrade deletes: a table or a column, and the number of rows with a value in it."""

    name: str
    rows: int


def revision(connection: Connection) -> str | None:
    """The revision of the tables; ``None`` for an empty database."""
    if not connection.dialect.has_table(connection, _OWN_TABLE):
        return None
    found: str | None = connection.scalar(text(f"SELECT version_num FROM {_OWN_TABLE}"))
    return found


def revisions() -> list[str]:
    """All revisions that this version knows, oldest first."""
    from alembic.script import ScriptDirectory

    return [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()][::-1]


def take_turn(connection: Connection) -> None:
    """Wait until no other process migrates this database; SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        # A migration may take longer than an ordinary transaction may.
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})


def upgrade(connection: Connection) -> None:
    """Migrate to the tables of this version."""
    from alembic import command

    command.upgrade(_config(connection), "head")


def downgrade(connection: Connection, to: str) -> list[Loss]:
    """Migrate back to revision ``to``; return what was deleted. Raises :class:`InvalidInput` for a later revision."""
    from alembic import command

    known, now = [BASE, *revisions()], revision(connection) or BASE
    if to not in known[: known.index(now) + 1]:
        earlier = ", ".join(known[: known.index(now) + 1])
        raise InvalidInput.field("revision", f"{to!r} is not a revision at or before {now}; use one of: {earlier}")
    before = _rows(connection)
    command.downgrade(_config(connection), to)
    after = _rows(connection)
    dropped = {table for table, column in before.keys() - after.keys() if column is None}
    return [
        Loss(f"table {table}" if column is None else f"column {table}.{column}", rows)
        for (table, column), rows in before.items()
        if (table, column) not in after and (column is None or table not in dropped)
    ]


def _config(connection: Connection | None = None) -> Config:
    # Alembic is slow to import, and only the first start needs it.
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _rows(connection: Connection) -> dict[tuple[str, str | None], int]:
    """The number of rows of each table, and for each column the number in which it is not null; tables by name."""
    metadata = MetaData()
    metadata.reflect(connection, only=lambda name, _: name not in (_OWN_TABLE, "sqlite_sequence"))
    counts: dict[tuple[str, str | None], int] = {}
    for name, table in sorted(metadata.tables.items()):
        columns: list[Any] = [func.count(), *(func.count(column) for column in table.columns)]
        found = connection.execute(select(*columns).select_from(table)).one()
        counts.update(zip([(name, None), *((name, column.name) for column in table.columns)], found, strict=True))
    return counts
