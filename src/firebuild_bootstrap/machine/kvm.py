"""Whether virtual machines run under KVM here: what the device says, then a trial with a guest of five bytes.

/dev/kvm may exist, open and make virtual processors on hosts where no guest ever executes an instruction,
such as some nested ones. Run as a program, this module runs that guest, because KVM_RUN may never return.
"""

from __future__ import annotations

import ctypes
import fcntl
import grp
import mmap
import os
import stat
import struct
import sys
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.programs import LimitExceeded, NotStarted, run_program
from firebuild_pki.display import counted

KVM: Final = Path("/dev/kvm")
# linux/kvm.h; the numbers of ioctl(2) are those of x86-64
_GET_API_VERSION: Final = 0xAE00
_CREATE_VM: Final = 0xAE01
_GET_VCPU_MMAP_SIZE: Final = 0xAE04
_CREATE_VCPU: Final = 0xAE41
_SET_TSS_ADDR: Final = 0xAE47
_RUN: Final = 0xAE80
_SET_USER_MEMORY_REGION: Final = 0x4020AE46
_SET_REGS: Final = 0x4090AE82
_GET_SREGS: Final = 0x8138AE83
_SET_SREGS: Final = 0x4138AE84
_API: Final = 12
_EXIT_IO: Final = 2
_PAGE: Final = 4096
_START: Final = 0x1000
# Below 4 GiB and outside of the guest's memory, where Intel's processors want three pages of their own.
_TSS: Final = 0xFFFBD000 - (1 << 32)
_CODE: Final = b"\xb0\x2a\xe6\x10\xf4"  # mov al, 42; out 0x10, al; hlt
_SREGS_BYTES: Final = 312
_SECONDS: Final = 5.0


def check_kvm(device: Path = KVM) -> None:
    """Make sure that this user can make virtual machines.

    Raises:
        MachineError: there is no KVM, this user may not use it, or it does not work.
    """
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise MachineError(
            f"{device} does not exist, and Firecracker needs KVM",
            hint="modprobe kvm_intel or kvm_amd, and switch virtualisation on (in a VM: nested); "
            "the drivers local and qemu do without",
        ) from error
    except PermissionError as error:
        raise MachineError(
            f"{device}: user {os.geteuid()} may not open it",
            hint=how_to_open(device),
        ) from error
    except OSError as error:
        raise MachineError(
            f"{device} can't be opened: {error.strerror}",
            hint="modprobe kvm_intel or kvm_amd; the drivers local and qemu do without",
        ) from error
    try:
        _check_working(device, descriptor)
    finally:
        os.close(descriptor)


def how_to_open(device: Path) -> str:
    """Say how a user gets to open the device: its group is kvm with udev, and often root without."""
    found = device.stat()
    if found.st_gid == 0 or found.st_mode & 0o060 != 0o060:
        return f"it is open to root only; as root: setfacl -m u:$USER:rw {device}"
    try:
        group = grp.getgrgid(found.st_gid).gr_name
    except KeyError:
        return f"its group {found.st_gid} has no name here: start firebuild with that group"
    return f"add the user to its group: usermod -aG {group} $USER, and log in again"


def _check_working(device: Path, descriptor: int) -> None:
    try:
        if not stat.S_ISCHR(os.fstat(descriptor).st_mode):
            raise MachineError(
                f"{device} is not a device",
                hint="remove it; `modprobe kvm_intel` or `modprobe kvm_amd` makes the device",
            )
        if (found := fcntl.ioctl(descriptor, _GET_API_VERSION, 0)) != _API:
            raise MachineError(f"{device}: expected version {_API} of the API of KVM, found {found}")
        os.close(fcntl.ioctl(descriptor, _CREATE_VM, 0))
    except OSError as error:
        raise MachineError(
            f"{device} opens, but makes no virtual machine: {error.strerror}",
            hint="is virtualisation switched on, and not taken by another hypervisor?",
        ) from error


def guest_problem(seconds: float = _SECONDS) -> str:
    """Run a guest of a few bytes and return what went wrong, empty when it ran; x86-64 only.

    Args:
        seconds: how long it may take.
    """
    command = [sys.executable, "-P", "-m", __name__]  # nothing of the current directory
    try:
        done = run_program(command, seconds=seconds)
    except LimitExceeded:
        return f"nothing of a guest was seen within {counted(seconds, 'second')}"
    except NotStarted as error:
        return error.message
    words = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return "" if done.returncode == 0 else words[-1] if words else f"status {done.returncode}"


def run_guest(device: Path = KVM) -> None:
    """Run the guest in this process; does not return where KVM runs none.

    Raises:
        OSError: KVM refused something.
        MachineError: the guest ended in another way than by writing to its port.
    """
    kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, _CREATE_VM, 0)
    fcntl.ioctl(vm, _SET_TSS_ADDR, _TSS)
    memory = mmap.mmap(-1, _PAGE)
    memory[: len(_CODE)] = _CODE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(vm, _SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", 0, 0, _START, _PAGE, address))
    processor = fcntl.ioctl(vm, _CREATE_VCPU, 0)
    shared = mmap.mmap(processor, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0))
    special = bytearray(_SREGS_BYTES)
    fcntl.ioctl(processor, _GET_SREGS, special)
    struct.pack_into("=QIH", special, 0, 0, 0xFFFF, 0)  # the code segment: base, limit, selector
    fcntl.ioctl(processor, _SET_SREGS, special)
    registers = [0] * 18
    registers[16:] = [_START, 2]  # instruction pointer, flags
    fcntl.ioctl(processor, _SET_REGS, struct.pack("=18Q", *registers))
    fcntl.ioctl(processor, _RUN, 0)
    (reason,) = struct.unpack_from("=I", shared, 8)
    if reason != _EXIT_IO:
        raise MachineError(f"a guest of five bytes ended with KVM's exit reason {reason}")


if __name__ == "__main__":
    try:
        run_guest()
    except (OSError, MachineError) as error:
        sys.exit(str(error))
