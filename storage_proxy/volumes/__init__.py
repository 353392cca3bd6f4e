"""Volumes and the folders on them: the interface, the `minio` backend, files on object keys, uploads."""

from .interface import Binding, Capability, Entry, EntryPage, EntryType, Folder, Usage, Volume
from .minio import MinioVolume
from .registry import VolumeRegistry
from .tree import FolderTree

__all__ = [
    "Binding",
    "Capability",
    "Entry",
    "EntryPage",
    "EntryType",
    "Folder",
    "FolderTree",
    "MinioVolume",
    "Usage",
    "Volume",
    "VolumeRegistry",
]
