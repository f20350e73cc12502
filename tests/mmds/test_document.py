"""The metadata document has the names, the nesting and the string leaves that guests expect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.mmds import (
    BOOTSTRAP_WIPE,
    DataStore,
    DriveInfo,
    InterfaceInfo,
    MachineInfo,
    MetadataDocument,
    NetworkInfo,
    UserInfo,
    bootstrap_block,
)
from firebuild_bootstrap.wire import BootstrapBlock
from firebuild_pki import TLSMaterial, open_authority


@pytest.fixture(scope="module")
def guest() -> TLSMaterial:
    with open_authority(build_id="b1") as authority:
        return authority.issue_guest()


def full(guest: TLSMaterial) -> MetadataDocument:
    return MetadataDocument(
        bootstrap=bootstrap_block(guest, host_port="127.0.0.1:4000", ping_interval=2.5, host_time=1.5),
        vmm_id="vm-1",
        drives={"rootfs": DriveInfo(drive_id="rootfs", is_root_device=True, path_on_host="/image.ext4")},
        entrypoint_json='{"cmd":["sh"]}',
        env={"PATH": "/bin"},
        local_hostname="box",
        machine=MachineInfo(
            cpu=2, cpu_template="T2", ht_enabled=True, kernel_args="reboot=k", mem_mib=512, vmlinux="6.1"
        ),
        network=NetworkInfo(
            cni_network_name="net",
            interfaces={
                "02:00:00:00:00:01": InterfaceInfo(
                    gateway="10.0.0.1",
                    host_device_name="tap0",
                    if_name="eth0",
                    ip="10.0.0.2/24",
                    ip_addr="10.0.0.2",
                    ip_mask="ffffff00",
                    ip_net="10.0.0.0/24",
                    name_servers="1.1.1.1,8.8.8.8",
                )
            },
        ),
        image_tag="org/app:1",
        users={"root": UserInfo(ssh_keys="ssh-ed25519 AAAA")},
    )


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for member in value.values():
            yield from leaves(member)
    else:
        yield value


def test_the_document_has_the_names_that_guests_read(guest: TLSMaterial) -> None:
    members = full(guest).to_json()["latest"]["meta-data"]
    bootstrap = members.pop("Bootstrap")
    assert {name: bootstrap[name] for name in ("HostPort", "ServerName", "PingInterval", "HostTime")} == {
        "HostPort": "127.0.0.1:4000",
        "ServerName": "b1.firebuild.internal",
        "PingInterval": "2500ms",
        "HostTime": "1.500",
    }
    assert bootstrap["CAChain"].startswith("-----BEGIN CERTIFICATE-----")
    assert "PRIVATE KEY" in bootstrap["Key"]
    assert members == {
        "VMMID": "vm-1",
        "Drives": {
            "rootfs": {
                "DriveID": "rootfs",
                "IsReadOnly": "false",
                "IsRootDevice": "true",
                "PartUUID": "",
                "PathOnHost": "/image.ext4",
            }
        },
        "EntrypointJSON": '{"cmd":["sh"]}',
        "Env": {"PATH": "/bin"},
        "LocalHostname": "box",
        "Machine": {
            "CPU": "2",
            "CPUTemplate": "T2",
            "HTEnabled": "true",
            "KernelArgs": "reboot=k",
            "Mem": "512",
            "VMLinux": "6.1",
        },
        "Network": {
            "CniNetworkName": "net",
            "Interfaces": {
                "02:00:00:00:00:01": {
                    "Gateway": "10.0.0.1",
                    "HostDeviceName": "tap0",
                    "IfName": "eth0",
                    "IP": "10.0.0.2/24",
                    "IPAddr": "10.0.0.2",
                    "IPMask": "ffffff00",
                    "IPNet": "10.0.0.0/24",
                    "NameServers": "1.1.1.1,8.8.8.8",
                }
            },
        },
        "ImageTag": "org/app:1",
        "Users": {"root": {"SSHKeys": "ssh-ed25519 AAAA"}},
    }


def test_every_leaf_is_a_string(guest: TLSMaterial) -> None:
    for document in (full(guest), MetadataDocument()):
        assert all(isinstance(leaf, str) for leaf in leaves(document.to_json()))


def test_the_wipe_removes_the_bootstrap_block_only(guest: TLSMaterial) -> None:
    store = DataStore()
    document = full(guest)
    store.put(document.to_json())
    store.patch(BOOTSTRAP_WIPE)
    left = document.to_json()
    del left["latest"]["meta-data"]["Bootstrap"]
    assert store.get("") == left
    assert "PRIVATE KEY" not in str(store.get(""))


def test_a_document_that_fits_passes_the_check(guest: TLSMaterial) -> None:
    full(guest).check_size()


def test_a_document_that_does_not_fit_is_refused_before_it_is_sent(guest: TLSMaterial) -> None:
    document = MetadataDocument(env={"BIG": "x" * 60_000}, vmm_id="v")
    with pytest.raises(InputError) as refused:
        document.check_size()
    assert "51200 fit" in refused.value.message
    assert "the largest member is Env with 60010 bytes" in refused.value.message
    assert "xxx" not in str(refused.value)
    document.check_size(limit=70_000)


def test_the_key_does_not_show_in_a_repr(guest: TLSMaterial) -> None:
    assert "PRIVATE KEY" not in repr(full(guest))


def test_the_block_is_what_a_guest_decodes(guest: TLSMaterial) -> None:
    block = bootstrap_block(guest, host_port="h:1")
    assert BootstrapBlock.from_json(block.as_json()) == block
    assert block.host_time is None
