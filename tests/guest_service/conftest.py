from __future__ import annotations

from initramfs.conftest import kernel, store

__all__ = ["kernel", "store"]
