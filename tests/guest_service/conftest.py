from __future__ import annotations

from agent.conftest import kernel, store

__all__ = ["kernel", "store"]
