from __future__ import annotations

from layers.trees import make_tar, rich_tree

__all__ = ["make_tar", "rich_tree"]
