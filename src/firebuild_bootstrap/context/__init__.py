"""The build context: what COPY and ADD send."""

from firebuild_bootstrap.context.build_context import BuildContext, FileTree, open_named
from firebuild_bootstrap.context.entries import ContextResource, Entry, FetchLimits, Resource

__all__ = [
    "BuildContext",
    "ContextResource",
    "Entry",
    "FetchLimits",
    "FileTree",
    "Resource",
    "open_named",
]
