"""Preflight: everything that a build needs of its certificate authority, tried before a build does."""

from __future__ import annotations

from firebuild_pki.preflighting.report import PreflightReport, PreflightRow, RowLevel, Verdict
from firebuild_pki.preflighting.run import preflight, refused

__all__ = ["PreflightReport", "PreflightRow", "RowLevel", "Verdict", "preflight", "refused"]
