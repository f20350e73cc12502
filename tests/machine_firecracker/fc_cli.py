"""The `firebuild` command on a host without KVM: the emulated Firecracker does not need it."""

from __future__ import annotations

from firebuild_bootstrap.cli import main
from firebuild_bootstrap.machine import kvm

if __name__ == "__main__":
    kvm.check_kvm = lambda *_: None
    main()
