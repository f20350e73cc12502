"""Whom a file of the build context meets between the Dockerfile and the guest's disk.

A build of one COPY runs under a profiler, the host's part in this process and vminit's in its own. Every
function of ours counts that is handed, or hands back, the file's name or content, in whatever it is
wrapped.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

from benchmarks.shape import Benchmark, Row, Run

MODULES: Final = Row("COPY of a file: modules that it meets", "limit that was set", "modules", 1.0)
MOST: Final = 16
NAME: Final = "needle-in-the-context"
CONTENT: Final = b"the content of the needle"

# Runs as it stands in both processes; vminit's knows nothing of this file.
PROFILER: Final = '''
import sys, threading

def watch(name, content):
    """Return a set that functions with the file in their hands are added to, as module and name."""
    found = set()
    code_names = {}

    def ours(code):
        if code not in code_names:
            path = code.co_filename.replace("\\\\", "/")
            at = path.rfind("/firebuild_bootstrap/")
            code_names[code] = path[at + 1 :] if at >= 0 else None
        return code_names[code]

    def holds(value, depth=3):
        if isinstance(value, str):
            return name in value
        if isinstance(value, (bytes, bytearray, memoryview)):
            return content in bytes(value) or name.encode() in bytes(value)
        if depth == 0:
            return False
        if isinstance(value, (list, tuple, set, frozenset)):
            return any(holds(each, depth - 1) for each in list(value)[:50])
        if isinstance(value, dict):
            return any(holds(each, depth - 1) for each in list(value.values())[:50])
        if hasattr(value, "SerializeToString"):
            return holds(value.SerializeToString(), depth)
        if hasattr(value, "__fspath__"):
            return name in str(value)
        fields = getattr(type(value), "__dataclass_fields__", ())
        return any(holds(getattr(value, each, None), depth - 1) for each in fields)

    def profile(frame, event, argument):
        module = ours(frame.f_code) if event in ("call", "return") else None
        # Python 3.11 and later; the name of a method with that of its class.
        key = (module, frame.f_code.co_qualname)
        if module and key not in found:
            values = list(frame.f_locals.values()) if event == "call" else [argument]
            try:
                if any(holds(value) for value in values):
                    found.add(key)
            except Exception:
                pass  # a value that can't be looked at in this moment

    threading.setprofile(profile)
    sys.setprofile(profile)
    return found
'''
_GUEST: Final = """
import json, runpy
found = watch({name!r}[::-1], {content!r}[::-1])  # backwards, so that who passes this on is not counted
try:
    sys.argv[0] = {module!r}
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
finally:
    sys.setprofile(None)
    print("WATCHED" + json.dumps(sorted(found)), file=sys.stderr, flush=True)
"""


@dataclass(frozen=True)
class Way:
    """The functions that a file meets, each as module and name."""

    host: frozenset[tuple[str, str]]
    guest: frozenset[tuple[str, str]]

    @property
    def modules(self) -> int:
        """How many modules these are in."""
        return len({module for module, _ in self.host | self.guest})

    @property
    def told(self) -> str:
        """The same, in parts."""
        host, guest = ({module for module, _ in part} for part in (self.host, self.guest))
        functions = len(self.host | self.guest)
        return f"host {len(host)}, guest {len(guest)}, both {len(host & guest)}; {functions} functions"


def way_of_a_file(directory: Path) -> Way:
    """Build in a directory, which has to be empty."""
    from firebuild_bootstrap.build import build_image
    from firebuild_bootstrap.home import Home
    from firebuild_bootstrap.image.names import Reference
    from firebuild_bootstrap.machine.local import LocalMachine
    from firebuild_bootstrap.request import BuildRequest
    from firebuild_bootstrap.sandbox.runtime import Runtime
    from firebuild_bootstrap.settings import BuildSettings

    (directory / NAME).write_bytes(CONTENT)
    (directory / "Dockerfile").write_text(f"FROM scratch\nCOPY {NAME} /etc/\n")
    request = BuildRequest(
        dockerfile=directory / "Dockerfile",
        context=directory,
        tag=Reference.parse("bench/way:1"),
        outputs=(),
    )
    logs: list[str] = []
    module, wait = Runtime.module, LocalMachine.wait

    def watched(self: Runtime, name: str, *arguments: str) -> list[str]:
        if not name.endswith("guest.main"):
            return module(self, name, *arguments)
        script = PROFILER + _GUEST.format(name=NAME[::-1], content=CONTENT[::-1], module=name)
        return [*self.python, "-c", script, *arguments]

    def listening(self: LocalMachine, timeout: float | None = None) -> Any:
        end = wait(self, timeout)
        logs.append(end.log if end is not None else "")
        return end

    scope: dict[str, Any] = {}
    exec(PROFILER, scope)
    with mock.patch.object(Runtime, "module", watched), mock.patch.object(LocalMachine, "wait", listening):
        found = scope["watch"](NAME, CONTENT)
        try:
            build_image(request, BuildSettings(), Home(directory / "home"))
        finally:
            sys.setprofile(None)
            scope["threading"].setprofile(None)
    text = next(log for log in reversed(logs) if "WATCHED" in log).rpartition("WATCHED")[2]
    guest = frozenset((module, name) for module, name in json.loads(text.splitlines()[0]))
    return Way(frozenset(found), guest)


def measure(run: Run) -> None:
    """Count once; it is the same each time."""
    way = way_of_a_file(run.directory)
    run.add(MODULES, way.modules, MOST)
    run.note(way.told)


BENCHMARK: Final = Benchmark("way-of-a-file", __doc__, (MODULES,), measure, rounds=1)
