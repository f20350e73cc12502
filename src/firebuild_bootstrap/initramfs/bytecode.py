"""Compiles Python sources for a machine, with the interpreter that runs there."""

from __future__ import annotations

import marshal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import MachineError

# A process of its own that always does the same: what is shared and interned shows in compiled code.
_WORKER: Final = """
import importlib.util, marshal, sys
sources = marshal.load(sys.stdin.buffer)
for name in sorted(sources):
    path, source = sources[name]
    code = compile(source, path, "exec", dont_inherit=True)
    # PEP 552: a hash that is never compared with the source, which is not there
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(source)
    sources[name] = header + marshal.dumps(code)
marshal.dump(sources, sys.stdout.buffer)
"""


def compile_sources(python: Path, sources: Mapping[str, bytes], prefix: str) -> dict[str, bytes]:
    """Return the compiled form of each source.

    Args:
        python: the interpreter.
        sources: source code by the path of its file, relative to `prefix`.
        prefix: where the files are in the machine; tracebacks name them so.

    Raises:
        MachineError: the interpreter failed.
    """
    request = marshal.dumps({name: (f"{prefix}/{name}", data) for name, data in sources.items()})
    done = subprocess.run(
        [python, "-I", "-S", "-B", "-X", "utf8", "-W", "ignore", "-c", _WORKER],
        input=request,
        capture_output=True,
        env={"PYTHONHASHSEED": "0"},
        check=False,
    )
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it failed silently"]
        raise MachineError(f"{python} could not compile the initramfs: {words[-1]}")
    compiled: dict[str, bytes] = marshal.loads(done.stdout)  # noqa: S302 - our own
    return compiled
