"""Work on whole file trees, done by a process of its own inside the id mapping of the build.

Runs as `python -m firebuild_bootstrap.image.worker` in a sandbox that sees one tree and one archive, so
that owners come out right and a hostile archive reaches nothing else. Imports the standard library only.
"""
