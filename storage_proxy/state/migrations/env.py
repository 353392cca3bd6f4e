"""Run by alembic inside `storage_proxy.db.upgrade`, which opened the connection."""

from alembic import context

from storage_proxy.db.migrate import run_env
from storage_proxy.state.tables import VERSION_TABLE, Base

run_env(context.config.attributes["connection"], VERSION_TABLE, Base.metadata)
