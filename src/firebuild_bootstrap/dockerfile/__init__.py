"""Dockerfiles: from text to a graph of stages and operations."""

from firebuild_bootstrap.dockerfile.graph import Diagnostic, Graph
from firebuild_bootstrap.dockerfile.stages import BaseResolver, read_graph
from firebuild_bootstrap.dockerfile.syntax import DockerfileSource, parse_assignments

__all__ = [
    "BaseResolver",
    "Diagnostic",
    "DockerfileSource",
    "Graph",
    "parse_assignments",
    "read_graph",
]
