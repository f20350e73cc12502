"""The build context: what COPY and ADD send."""

from firebuild_bootstrap.context.build_context import BuildContext
from firebuild_bootstrap.context.download import Checksum, FetchLimits
from firebuild_bootstrap.context.entries import Entry, EntryKind, Resource
from firebuild_bootstrap.context.sources import ContextResource, InlineSource, LocalSource, RemoteSource

__all__ = [
    "BuildContext",
    "Checksum",
    "ContextResource",
    "Entry",
    "EntryKind",
    "FetchLimits",
    "InlineSource",
    "LocalSource",
    "RemoteSource",
    "Resource",
]
