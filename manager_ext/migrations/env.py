"""Run by alembic, on the connection that `storage_proxy.db.upgrade` opened."""

from alembic import context

from manager_ext.models import VERSION_TABLE, Base
from storage_proxy.db.migrate import run_env

run_env(context.config.attributes["connection"], VERSION_TABLE, Base.metadata)
