"""Finishes what interrupted requests left: folders half made or half deleted, sessions half planned or half ended."""

from __future__ import annotations

import asyncio

from storage_proxy.core.errors import MooringError
from storage_proxy.core.logs import get_logger, new_request_id

from .api import Services

log = get_logger(__name__)

INTERVAL_SECONDS = 60.0


async def run_janitor(services: Services, interval: float = INTERVAL_SECONDS) -> None:
    """Sweeps until it is cancelled. The first sweep is at the start: that is when a crash is most likely behind us."""
    while True:
        new_request_id()
        try:
            folders, sessions = await services.folders.sweep(), await services.sessions.sweep()
        except MooringError as err:  # the database does not answer: later
            log.warning("sweep failed", cause=err.message)
        except Exception:
            # One bad row must not stop the service, nor hide: it is in the log every minute.
            log.exception("sweep failed")
        else:
            if folders or sessions:
                log.info("swept", folders=folders, sessions=sessions)
        await asyncio.sleep(interval)
