"""The microVM metadata service: its document, its writers, and an emulator for machines without one."""

from firebuild_bootstrap.mmds.document import BOOTSTRAP_WIPE, MetadataDocument, bootstrap_block
from firebuild_bootstrap.mmds.emulator import MetadataEmulator
from firebuild_bootstrap.mmds.members import DriveInfo, InterfaceInfo, MachineInfo, NetworkInfo, UserInfo
from firebuild_bootstrap.mmds.protocol import MmdsVersion
from firebuild_bootstrap.mmds.store import STORE_LIMIT, DataStore, StoreError
from firebuild_bootstrap.mmds.writer import MetadataWriter

__all__ = [
    "BOOTSTRAP_WIPE",
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
