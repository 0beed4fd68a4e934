"""The revision of a database's tables, and migrations up and down.

Functions here work inside a write transaction of the caller, so that a migration is done completely or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Connection, MetaData, func, inspect, select, text

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
    found: str | None = connection.execute(text(f"SELECT version_num FROM {_OWN_TABLE}")).scalar()
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
    before, rows = _shape(connection), _rows(connection)
    command.downgrade(_config(connection), to)
    after = _shape(connection)
    lost = []
    for table, columns in before.items():
        if table not in after:
            lost.append(Loss(f"table {table}", rows[table, None]))
        else:
            lost += [Loss(f"column {table}.{name}", rows[table, name]) for name in columns if name not in after[table]]
    return lost


def _config(connection: Connection | None = None) -> Config:
    # Alembic is slow to import, and only the first start needs it.
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _shape(connection: Connection) -> dict[str, list[str]]:
    found = inspect(connection)
    return {
        table: [column["name"] for column in found.get_columns(table)]
        for table in found.get_table_names()
        if table not in (_OWN_TABLE, "sqlite_sequence")
    }


def _rows(connection: Connection) -> dict[tuple[str, str | None], int]:
    """The number of rows of each table, and for each column the number in which it is not null."""
    metadata = MetaData()
    metadata.reflect(connection)
    counts: dict[tuple[str, str | None], int] = {}
    for table in metadata.tables.values():
        columns: list[Any] = [func.count(), *(func.count(column) for column in table.columns)]
        found = connection.execute(select(*columns).select_from(table)).one()
        counts.update(zip([(table.name, None), *((table.name, c.name) for c in table.columns)], found, strict=True))
    return counts
