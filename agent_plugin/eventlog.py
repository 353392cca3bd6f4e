"""`EventLog`: the last events of this agent, numbered, for whoever wants to follow them.

There is one buffer for all who follow, each with a number of its own, so a slow one costs nothing and finds out by the
numbers what it missed. `boot` tells this run of the agent from the one before: numbers start anew with it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime

from storage_proxy.client.storages import MountEvent

from .events import Event

KEPT = 1000


@dataclass(frozen=True, slots=True)
class Numbered:
    """`number` counts from 1."""

    number: int
    event: Event


class EventLog:
    def __init__(self, agent_id: str, kept: int = KEPT) -> None:
        self.agent_id = agent_id
        self.boot = secrets.token_hex(4)
        self.last = 0
        self.closed = False
        self._events: deque[Numbered] = deque(maxlen=kept)
        self._changed = asyncio.Event()

    def note(self, event: Event) -> None:
        """A listener for `Attachments.listen`."""
        self.last += 1
        self._events.append(Numbered(self.last, event))
        self._wake()

    def close(self) -> None:
        """Those who follow are woken and shall end; events are still noted."""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def after(self, number: int) -> list[Numbered]:
        """The events after this number, oldest first. The first may have a larger one: what is between is gone."""
        missing = self.last - number
        return list(self._events)[-missing:] if missing > 0 else []

    async def wait(self, number: int, seconds: float) -> None:
        """Until there is an event after this number, `seconds` have passed, or the log becomes closed."""
        if self.last > number:
            return
        changed = self._changed
        try:
            async with asyncio.timeout(seconds):
                await changed.wait()
        except TimeoutError:
            return

    def describe(self, numbered: Numbered) -> MountEvent:
        """The event as it is told to others. `id` is the boot and the number."""
        event = numbered.event
        location = event.plan.location if event.plan else None
        return MountEvent(
            id=f"{self.boot}-{numbered.number}",
            at=datetime.fromtimestamp(event.at, UTC),
            agent_id=self.agent_id,
            boot=self.boot,
            number=numbered.number,
            kind=event.kind.value,
            key=event.key,
            volume=event.plan.volume if event.plan else None,
            bucket=location.bucket if location else None,
            prefix=location.prefix if location else None,
            old=event.old.value if event.old else None,
            new=event.new.value if event.new else None,
            error=event.error,
            detail=dict(event.detail),
        )

    def place(self, text: str) -> int:
        """The number after which to go on for somebody who knows events up to the id `text`; 0, everything that is
        kept, for an id of another boot or none at all."""
        boot, _, number = text.partition("-")
        return min(int(number), self.last) if boot == self.boot and number.isascii() and number.isdigit() else 0
