"""A network of CNI for one microVM (Container Network Interface Specification, versions 0.3 to 1.1).

The plugins run in a network namespace made for the build. One of them, usually tc-redirect-tap as the last of
the chain, makes a tap device in it, which Firecracker opens from inside the namespace.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, Final

from firebuild_bootstrap.errors import MALFORMED, InputError, MachineError, reason_of
from firebuild_bootstrap.initramfs import StaticAddress
from firebuild_bootstrap.machine.firecracker.network import Link, Network, guest_address, ip, mac_of
from firebuild_bootstrap.machine.firecracker.settings import NetworkSettings
from firebuild_bootstrap.machine.leftovers import Leftovers
from firebuild_bootstrap.programs import LimitExceeded, NotStarted, run_program
from firebuild_pki.display import one_line
from firebuild_pki.homes import absolute
from firebuild_pki.values import dataclass

_INTERFACE: Final = "eth0"
_NAMESPACES: Final = Path("/run/netns")
_SUFFIXES: Final = (".conf", ".conflist", ".json")
_SECONDS: Final = 60.0
_WHERE: Final = "machine.firecracker.network.cni"


@dataclass(frozen=True)
class CniConfig:
    """A network as an administrator has described it: name, version, and the plugins in their order."""

    name: str
    version: str
    plugins: tuple[Mapping[str, Any], ...]

    def request(self, plugin: Mapping[str, Any], previous: Mapping[str, Any] | None) -> str:
        """Return what a plugin gets on its standard input."""
        # `capabilities` says what a runtime may fill in, and is for the runtime.
        own = {key: value for key, value in plugin.items() if key != "capabilities"}
        request = {**own, "name": self.name, "cniVersion": self.version}
        return json.dumps(request if previous is None else {**request, "prevResult": previous})


class CniNetwork(Network):
    """A network by its name; see `Network`. Needs root.

    Args:
        settings: the block `network`; `cni` is set.
        uid: the user that Firecracker runs as.
        gid: its group.
        name: the build's id.
        leftovers: gets the namespace, and a DEL for each ADD.
    """

    def __init__(
        self,
        settings: NetworkSettings,
        *,
        uid: int,
        gid: int,
        name: str,
        leftovers: Leftovers,
    ) -> None:
        self._settings = settings
        self._plugins = os.pathsep.join(map(os.path.expanduser, settings.cni_plugins))
        self._container = f"firebuild-{name}"
        self._arguments = f"IgnoreUnknown=1;TC_REDIRECT_TAP_UID={uid};TC_REDIRECT_TAP_GID={gid}"
        self._leftovers = leftovers
        self._namespace = _NAMESPACES / self._container

    def check(self) -> None:
        """See `Network.check`."""
        if os.geteuid() != 0:
            raise InputError(f"{_WHERE}: networks of CNI need root", hint="run firebuild as root")
        for plugin in self._config().plugins:
            self._program(plugin)

    def connect(self) -> Link:
        """Run ADD of each plugin; see `Network.connect`."""
        config = self._config()
        self._leftovers.add_command(["ip", "netns", "delete", self._container], quiet=True)
        ip("netns", "add", self._container)
        result: Mapping[str, Any] | None = None
        for plugin in config.plugins:
            # Whatever happens to an ADD, a DEL has to follow it.
            self._note_deletion(config, plugin, None)
            result = self._add(config, plugin, result)
        for plugin in config.plugins:
            self._note_deletion(config, plugin, result)
        return link_of(result or {}, self._settings, str(self._namespace), self._container)

    def _add(
        self, config: CniConfig, plugin: Mapping[str, Any], previous: Mapping[str, Any] | None
    ) -> Mapping[str, Any]:
        program = self._program(plugin)
        try:
            done = run_program(
                [program],
                data=config.request(plugin, previous).encode(),
                env=self._environment("ADD"),
                seconds=_SECONDS,
            )
        except NotStarted as error:
            raise MachineError(f"{_WHERE}: the plugin {error.message}", hint=error.hint) from error
        except LimitExceeded as error:
            raise MachineError(
                f"{_WHERE}: the plugin {program} failed: {error}", hint="run it by hand, as cnitool does"
            ) from error
        answer = _parse(done.stdout)
        if done.returncode != 0 or answer is None:
            raise MachineError(
                f"{_WHERE}: the plugin {program} could not add the network {config.name}: "
                f"{_complaint(answer, done)}",
                hint="run it by hand, as cnitool does",
            )
        return answer

    def _note_deletion(
        self, config: CniConfig, plugin: Mapping[str, Any], result: Mapping[str, Any] | None
    ) -> None:
        self._leftovers.add_command(
            [str(self._program(plugin))],
            text=config.request(plugin, result),
            env=self._environment("DEL"),
            quiet=result is None,
        )

    def _environment(self, command: str) -> dict[str, str]:
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self._container,
            "CNI_NETNS": str(self._namespace),
            "CNI_IFNAME": _INTERFACE,
            "CNI_ARGS": self._arguments,
            "CNI_PATH": self._plugins,
        }

    def _config(self) -> CniConfig:
        return find_config(absolute(self._settings.cni_config), self._settings.cni or "")

    def _program(self, plugin: Mapping[str, Any]) -> Path:
        name = str(plugin.get("type", ""))
        found = shutil.which(name, path=self._plugins) if name else None
        if found is None or "/" in name:
            raise InputError(
                f"{_WHERE}: the plugin {name!r} was not found in {', '.join(self._settings.cni_plugins)}",
                hint="install it there, or set machine.firecracker.network.cni_plugins",
            )
        return Path(found)


def link_of(result: Mapping[str, Any], settings: NetworkSettings, namespace: str, container: str) -> Link:
    """Return what the plugins made, as their last result has it.

    Args:
        result: it.
        settings: the block `network`, which wins.
        namespace: path of the network namespace.
        container: the id that the plugins were given.

    Raises:
        MachineError: something is missing, or malformed.
    """
    try:
        return _link(result, settings, namespace, container)
    except MALFORMED as error:
        why = one_line(str(error), 200)
        raise MachineError(
            f"{_WHERE}: the result of the plugins is malformed: {why}",
            hint="run them by hand, as cnitool does",
        ) from error


def _link(result: Mapping[str, Any], settings: NetworkSettings, namespace: str, container: str) -> Link:
    tap, guest_end = tap_and_guest(result, namespace, container)
    addresses = [one for one in result.get("ips", ()) if ":" not in str(one.get("address", ":"))]
    if not addresses:
        raise MachineError(
            f"{_WHERE}: the plugins gave no IPv4 address",
            hint="the network's list needs an ipam that gives IPv4 addresses, such as host-local",
        )
    interface = IPv4Interface(str(addresses[0]["address"]))
    gateway = addresses[0].get("gateway")
    host = settings.host or gateway
    if host is None:
        raise MachineError(
            f"{_WHERE}: the plugins named no gateway, which would be where the guest reaches this host",
            hint="set machine.firecracker.network.host",
        )
    servers = settings.name_servers or _name_servers(result)
    guest: StaticAddress | None = StaticAddress(str(interface), gateway, name_servers=servers)
    if settings.guest is not None:
        guest = guest_address(settings, IPv4Interface(f"{host}/{interface.network.prefixlen}"))
    mac = settings.mac or guest_end.get("mac") or mac_of(guest, tap["name"])
    return Link(tap["name"], host, guest, mac, tap.get("sandbox") or namespace)


def find_config(directory: Path, name: str) -> CniConfig:
    """Return the network `name` out of the files of `directory`, in the order of their names.

    Raises:
        InputError: there is none, or a file can't be read.
    """
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix in _SUFFIXES)
    except OSError as error:
        raise InputError(
            f"machine.firecracker.network.cni_config: {directory} can't be read: {error.strerror}",
            hint="make it, or set cni_config to where the networks are described",
        ) from error
    names = []
    for path in paths:
        config = _read(path)
        if config.name == name:
            return config
        names.append(config.name)
    raise InputError(
        f"{_WHERE}: there is no network {name!r} in {directory}",
        hint=f"it has {', '.join(names)}" if names else "it describes none",
    )


def _read(path: Path) -> CniConfig:
    try:
        document = _parse(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} can't be read: {reason_of(error)}", hint="let this user read it, or move it away"
        ) from error
    if document is None:
        raise InputError(f"{path} is not a JSON object", hint="correct it, or move it away")
    plugins = document.get("plugins", [document])
    if not isinstance(plugins, list) or not all(isinstance(one, dict) for one in plugins):
        raise InputError(
            f"{path}: expected a list of objects in plugins", hint="cnitool shows what is wrong with it"
        )
    own = [{key: value for key, value in one.items() if key not in ("name", "cniVersion")} for one in plugins]
    return CniConfig(str(document.get("name", "")), str(document.get("cniVersion", "0.3.1")), tuple(own))


def tap_and_guest(
    result: Mapping[str, Any], namespace: str, container: str
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Find the tap device in a result, and the guest's end of it.

    tc-redirect-tap lists both under one name: the tap in the namespace, and the guest's end in a sandbox that
    is the container's id. Without such a pair the last interface in the namespace is taken.

    Raises:
        MachineError: there is none.
    """
    every = [one for one in result.get("interfaces", ()) if isinstance(one, dict) and one.get("name")]
    inside = [one for one in every if one.get("sandbox") == namespace]
    guests = [one for one in every if one.get("sandbox") == container]
    for guest in guests:
        for one in inside:
            if one["name"] == guest["name"]:
                return one, guest
    taps = [one for one in inside if one["name"] != _INTERFACE]
    if not taps:
        raise MachineError(
            f"{_WHERE}: the plugins made no tap device",
            hint="add the plugin tc-redirect-tap at the end of the network's list",
        )
    return taps[-1], {}


def _name_servers(result: Mapping[str, Any]) -> tuple[str, ...]:
    servers: Sequence[Any] = (result.get("dns") or {}).get("nameservers") or ()
    return tuple(str(one) for one in servers if _is_ipv4(str(one)))[:2]


def _is_ipv4(text: str) -> bool:
    try:
        IPv4Address(text)
    except ValueError:
        return False
    return True


def _parse(text: str | bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _complaint(answer: Mapping[str, Any] | None, done: CompletedProcess[bytes]) -> str:
    if answer is not None and "msg" in answer:
        return " ".join(str(answer[key]) for key in ("msg", "details") if answer.get(key))
    words = (done.stderr or done.stdout).decode("utf-8", "replace").strip()
    return words[-500:] or f"it ended with status {done.returncode}"
