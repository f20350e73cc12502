"""Builds with guests that do not announce themselves: the Go program `vminit`, as it runs in the field.

What such a guest does with files, users and variables differs from the Dockerfile reference in many ways
(docs/wire-protocol.md, "Old guests"). So it is only asked for what it does right: to put new files into a
directory of their own, and to run shell scripts. The scripts do the rest, and say what became of it.
"""

from firebuild_bootstrap.service.oldguest.guest import OldGuest

__all__ = ["OldGuest"]
