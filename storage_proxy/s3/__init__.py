"""Everything that speaks S3: clients, listing, multipart, scoped credentials, capability probe."""

from .client import ObjectStream, S3Client
from .endpoint import Endpoint
from .objects import DeleteFailure, ListPage, MultipartUpload, ObjectInfo, PartInfo
from .pool import S3Pool
from .probe import Capabilities, probe
from .scoped import ScopedCredential, ScopedIssuer
from .transfer import Uploaded, download_ranges, plan_part_size, upload_stream

__all__ = [
    "Capabilities",
    "DeleteFailure",
    "Endpoint",
    "ListPage",
    "MultipartUpload",
    "ObjectInfo",
    "ObjectStream",
    "PartInfo",
    "S3Client",
    "S3Pool",
    "ScopedCredential",
    "ScopedIssuer",
    "Uploaded",
    "download_ranges",
    "plan_part_size",
    "probe",
    "upload_stream",
]
