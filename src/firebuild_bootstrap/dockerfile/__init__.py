"""Dockerfiles: from text to the plan of a build."""

from firebuild_bootstrap.dockerfile.assignments import parse_assignments
from firebuild_bootstrap.dockerfile.model import BaseResolver, BuildPlan, Diagnostic, DockerfileSource, Step
from firebuild_bootstrap.dockerfile.plan import make_plan

__all__ = [
    "BaseResolver",
    "BuildPlan",
    "Diagnostic",
    "DockerfileSource",
    "Step",
    "make_plan",
    "parse_assignments",
]
