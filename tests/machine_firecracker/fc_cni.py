"""Two plugins of CNI, told apart by FB_CNI_NAME: fb-ptp connects a namespace, fb-tap makes a tap in it.

They follow the specification: arguments in the environment, the configuration on standard input, a result or
an error on standard output, DEL as often as anybody likes. Each call is a line in calls.jsonl beside them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn


def run(*argv: str, inside: str = "", check: bool = True) -> None:
    entered = ["nsenter", f"--net={inside}", "--"] if inside else []
    subprocess.run([*entered, "ip", *argv], check=check, capture_output=True)


def fail(code: int, message: str, details: str = "") -> NoReturn:
    print(json.dumps({"cniVersion": "1.0.0", "code": code, "msg": message, "details": details}))
    sys.exit(1)


def connect(config: dict[str, Any], namespace: str, name: str) -> dict[str, Any]:
    host_end = f"fbv{os.getpid()}"
    run("link", "add", host_end, "type", "veth", "peer", "name", name, "netns", namespace)
    run("address", "add", config["gateway"] + "/24", "dev", host_end)
    run("link", "set", host_end, "up")
    run("address", "add", config["address"], "dev", name, inside=namespace)
    for device in ("lo", name):
        run("link", "set", device, "up", inside=namespace)
    return {
        "cniVersion": config["cniVersion"],
        "interfaces": [{"name": host_end}, {"name": name, "sandbox": namespace}],
        "ips": [
            {"address": "fd00::2/64", "interface": 1},
            {"address": config["address"], "gateway": config["gateway"], "interface": 1},
        ],
        "dns": {"nameservers": ["fd00::1", "192.0.2.53"]},
    }


def tap(previous: dict[str, Any], namespace: str, container: str) -> dict[str, Any]:
    run("tuntap", "add", "dev", "tap0", "mode", "tap", inside=namespace)
    added = [
        {"name": "tap0", "sandbox": namespace},
        {"name": "tap0", "sandbox": container, "mac": "0a:00:00:00:00:09"},
    ]
    return {**previous, "interfaces": [*previous["interfaces"], *added]}


def main() -> None:
    own = Path(os.environ["FB_CNI_NAME"])
    config = json.load(sys.stdin)
    names = ("COMMAND", "CONTAINERID", "NETNS", "IFNAME", "ARGS", "PATH")
    env = {name: os.environ[f"CNI_{name}"] for name in names}
    with (own.parent / "calls.jsonl").open("a") as log:
        log.write(json.dumps({"plugin": own.name, "env": env, "config": config}) + "\n")
    if config.get("broken") == env["COMMAND"]:
        fail(11, "try again later", "the moon is in the wrong place")
    if config.get("silent") == env["COMMAND"]:
        print("not json")
        sys.exit("out of words")
    if env["COMMAND"] == "ADD":
        if own.name == "fb-ptp":
            result = connect(config, env["NETNS"], env["IFNAME"])
        else:
            result = tap(config["prevResult"], env["NETNS"], env["CONTAINERID"])
        print(json.dumps({**result, **config.get("override", {})}))
    elif os.path.exists(env["NETNS"]):
        run(
            "link",
            "delete",
            env["IFNAME"] if own.name == "fb-ptp" else "tap0",
            inside=env["NETNS"],
            check=False,
        )


if __name__ == "__main__":
    main()
