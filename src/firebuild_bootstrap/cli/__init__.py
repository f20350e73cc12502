"""The command `firebuild`: parses, calls, renders. What it does is in the packages below it."""

from __future__ import annotations

from firebuild_bootstrap.cli.app import main

__all__ = ["main"]
