"""An emulated `jailer`: it makes the jail and starts the program in it, but stays root outside of it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    own, theirs = sys.argv[1:], []
    if "--" in own:
        own, theirs = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(prog="jailer")
    for name in ("--id", "--exec-file", "--uid", "--gid"):
        parser.add_argument(name, required=name != "--version")
    parser.add_argument("--chroot-base-dir", default="/srv/jailer")
    parser.add_argument("--netns")
    parser.add_argument("--cgroup", action="append")
    parser.add_argument("--cgroup-version", choices=["1", "2"])
    if own == ["--version"]:
        print("Jailer v1.13.1")
        return
    parsed = parser.parse_args(own)
    program = Path(parsed.exec_file)
    assert "firecracker" in program.name
    assert program.is_absolute()
    root = Path(parsed.chroot_base_dir) / program.name / parsed.id / "root"
    root.mkdir(parents=True, exist_ok=True)
    os.chown(root, int(parsed.uid), int(parsed.gid))
    os.closerange(3, 256)
    environ = {
        "PATH": os.environ["PATH"],
        "FC_EMULATOR_ROOT": str(root),
        "FC_EMULATOR_OWNER": f"{parsed.uid}:{parsed.gid}",
        **{name: value for name, value in os.environ.items() if name.startswith("FC_EMULATOR_")},
    }
    command = [str(program), f"--id={parsed.id}", "--start-time-us=1", "--start-time-cpu-us=1", *theirs]
    if parsed.netns:
        command = ["nsenter", f"--net={parsed.netns}", "--", *command]
    os.execvpe(command[0], command, environ)


if __name__ == "__main__":
    main()
