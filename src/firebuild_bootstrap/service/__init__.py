"""The bootstrap server: one per build, one guest, mutual TLS only."""

from firebuild_bootstrap.events import StepInfo
from firebuild_bootstrap.service.limits import Limits
from firebuild_bootstrap.service.reporting import Outcome
from firebuild_bootstrap.service.server import BootstrapServer

__all__ = ["BootstrapServer", "Limits", "Outcome", "StepInfo"]
