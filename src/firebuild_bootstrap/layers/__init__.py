"""Layers: the one form in which files travel, and everything that reads, writes or walks it.

A layer is a tar stream in PAX format with OCI whiteouts, in canonical order: the same files give the same
bytes. Standard library only, because vminit imports this; take names from their modules:

- `tar`: `Entry` (one file, or one change), `LayerWriter(out).add(entry, content)` / `.close()`, `LayerError`,
  `write_layer(out, files)`. A content is bytes, a stream of what is stored, or a file's descriptor.
- `reader`: `LayerReader(source, limits, whiteouts=...)` iterates over `Entry`; `.read(size)`, `.pieces()` and
  `.copy_to(descriptor, size)` give the current file's content; `Limits`, `DamagedArchive`.
- `tree`: `tree_entries(root)` and `upper_entries(upper)` (an overlay's upper directory) yield (Entry,
  content) in canonical order; `data_regions(descriptor, size)` finds the holes of a file.
- `apply`: `apply(reader, root)` writes a layer into a tree and returns an `UnpackReport`.
- `root`: `Root(path)`, file operations that no link leads out of a tree; the only walk of paths in a root.
- `compression`: gzip, bzip2, xz and zstd, with damage told the same on every Python. For the host only.

A tree becomes a layer, and again a tree:

    with open("layer.tar", "wb") as out:
        write_layer(out, tree_entries("/tree"))
    with open("layer.tar", "rb") as layer, Root("/other") as root:
        apply(LayerReader(layer.fileno(), whiteouts=True), root)
"""
