"""The driver `qemu`: the initramfs's guest in a virtual machine, without root and without Firecracker."""
