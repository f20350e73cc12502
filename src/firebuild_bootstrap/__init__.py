"""Builds root file systems from Dockerfiles: the bootstrap service, the guest, and all around them."""
