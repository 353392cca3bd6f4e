"""What the proxy keeps in SQL: bound folders, upload sessions, issued mount credentials; and the migrations."""

from .tables import (
    Base,
    BoundFolder,
    CredentialState,
    CredentialUse,
    MountCredential,
    Upload,
    UploadMode,
    upgrade_state,
)

__all__ = [
    "Base",
    "BoundFolder",
    "CredentialState",
    "CredentialUse",
    "MountCredential",
    "Upload",
    "UploadMode",
    "upgrade_state",
]
