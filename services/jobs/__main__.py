"""``python -m services.jobs``: show and migrate the tables of the registry."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing

from ethogram.errors import EthogramError
from services.jobs.database import Database
from services.jobs.migrate import BASE
from services.jobs.tables import REVISION
from services.runtime.settings import ProcessSettings

_EXAMPLES = """examples:
  python -m services.jobs current
  python -m services.jobs upgrade --database-url postgresql://ethogram@db.example/ethogram
  python -m services.jobs downgrade 0001           # lists what it would delete, and changes nothing
  python -m services.jobs downgrade 0001 --yes

Stop the platform before a downgrade: its processes upgrade the tables when they start.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    given = _parser().parse_args(arguments)
    try:
        with closing(Database(given.database_url or ProcessSettings.read().database, upgrade=False)) as database:
            return _run(database, given)
    except EthogramError as error:
        sys.stderr.write(f"services.jobs: {error.message}\n")
        return 1


def _run(database: Database, given: argparse.Namespace) -> int:
    before = database.revision() or BASE
    if given.command == "current":
        line = before if before == REVISION else f"{before} (this version of Ethogram: {REVISION})"
    elif given.command == "upgrade":
        database.upgrade()
        line = f"{database.name}: {before} -> {REVISION}" if before != REVISION else f"{database.name}: {REVISION}"
    else:
        done = "dropped" if given.yes else "would drop"
        for name, rows in database.downgrade(given.revision, commit=given.yes):
            sys.stdout.write(f"{done} {name} ({rows} row{'' if rows == 1 else 's'})\n")
        if not given.yes and given.revision != before:
            sys.stderr.write("nothing was changed; add --yes to do it\n")
            return 1
        line = f"{database.name}: {before} -> {given.revision}"
    sys.stdout.write(f"{line}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m services.jobs",
        description="The tables of the job registry. Each process of the platform upgrades them when it starts.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--database-url", metavar="URL", help="default: ETHOGRAM_DATABASE_URL, else the SQLite file in ETHOGRAM_STATE"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("current", parents=[common], help="show the revision of the tables")
    commands.add_parser("upgrade", parents=[common], help="migrate to the tables of this version")
    down = commands.add_parser("downgrade", parents=[common], help="migrate back to an earlier revision")
    down.add_argument("revision", metavar="REVISION", help=f"such as 0001, or {BASE} for no tables at all")
    down.add_argument("--yes", action="store_true", help="do it; otherwise only list what it would delete")
    return parser


if __name__ == "__main__":
    sys.exit(main())
