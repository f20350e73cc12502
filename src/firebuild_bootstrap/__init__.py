"""Builds root file systems from Dockerfiles: the bootstrap service, the guest, and all around them."""

__version__ = "0.1.0"
"""That of the distribution `firebuild`: pyproject.toml has it from here."""
