"""Orders: what somebody may have mounted here, whoever allowed it.

A grant of a manager extension becomes an order once its signature was verified; so does what the operator of this node
allows by local configuration (volume plugin, one-root mode). The attachments manager knows orders only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from storage_proxy.core.ids import SessionID, VFolderID
from storage_proxy.core.wire import S3Credential

from .drivers import MountPlan
from .grants import Grant, GrantVerifier


@dataclass(frozen=True, slots=True)
class Order:
    """One folder for one session.

    `order_id` counts once: after its attachment has ended the same one is refused. A grant brings its own; a local
    order takes a fresh one each time. `expires` in seconds since the epoch: how long a used one is remembered.
    `credential` opens the keys when they are needed; it may raise what opening a grant raises.
    """

    order_id: str
    session: SessionID
    vfid: VFolderID
    target: str
    plan: MountPlan
    expires: float
    credential: Callable[[], S3Credential]

    @classmethod
    def of(cls, grant: Grant, verifier: GrantVerifier, driver: str) -> Order:
        """From a verified grant."""
        return cls(
            order_id=grant.token_id,
            session=grant.session,
            vfid=grant.vfid,
            target=grant.request.target,
            plan=MountPlan.of(grant.request, driver),
            expires=grant.expires_at.timestamp(),
            credential=partial(verifier.open, grant),
        )
