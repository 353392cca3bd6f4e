"""alembic at start: every package brings its own migration folder and version table, so two can share one database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData
from sqlalchemy.ext.asyncio import AsyncEngine

from .engine import Database

UPGRADE_DEADLINE_SECONDS = 60.0


async def upgrade(database: Database, script_location: Path, version_table: str) -> None:
    """Brings the schema to the newest revision in one transaction. Idempotent.

    Processes that start at once wait for each other: on PostgreSQL by an advisory lock, on SQLite because a transaction
    takes the write lock at its beginning.
    """
    async with asyncio.timeout(UPGRADE_DEADLINE_SECONDS):
        async with database.engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                await connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7040614)")
            await connection.run_sync(_run(script_location, version_table))


def _run(script_location: Path, version_table: str) -> Callable[[Connection], None]:
    def run(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(script_location))
        config.attributes["connection"] = connection
        config.attributes["version_table"] = version_table
        command.upgrade(config, "head")

    return run


def run_env(connection: Connection, version_table: str, metadata: MetaData) -> None:
    """The body of every `env.py`: migrations run on the connection that `upgrade` opened."""
    from alembic import context

    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=version_table,
        render_as_batch=connection.dialect.name == "sqlite",
        transactional_ddl=True,
    )
    context.run_migrations()


async def current_revision(engine: AsyncEngine, version_table: str) -> str | None:
    async with engine.connect() as connection:
        return await connection.run_sync(
            lambda sync: MigrationContext.configure(sync, opts={"version_table": version_table}).get_current_revision()
        )


def head_revision(script_location: Path) -> str | None:
    """The newest revision that the code knows; no database is asked."""
    config = Config()
    config.set_main_option("script_location", str(script_location))
    return ScriptDirectory.from_config(config).get_current_head()
