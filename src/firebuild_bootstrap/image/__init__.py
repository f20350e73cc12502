"""Base images in, finished images out, and the local store of both."""
