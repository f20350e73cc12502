"""The microVM metadata service: its document, its writers, and an emulator for machines without one."""

from firebuild_bootstrap.mmds.document import (
    BOOTSTRAP_WIPE,
    IDENTITY_WIPE,
    DriveInfo,
    InterfaceInfo,
    MachineInfo,
    MetadataDocument,
    NetworkInfo,
    UserInfo,
    bootstrap_block,
)
from firebuild_bootstrap.mmds.emulator import MetadataEmulator
from firebuild_bootstrap.mmds.protocol import MmdsVersion
from firebuild_bootstrap.mmds.store import STORE_LIMIT, DataStore, MetadataWriter, StoreError

__all__ = [
    "BOOTSTRAP_WIPE",
    "IDENTITY_WIPE",
    "STORE_LIMIT",
    "DataStore",
    "DriveInfo",
    "InterfaceInfo",
    "MachineInfo",
    "MetadataDocument",
    "MetadataEmulator",
    "MetadataWriter",
    "MmdsVersion",
    "NetworkInfo",
    "StoreError",
    "UserInfo",
    "bootstrap_block",
]
