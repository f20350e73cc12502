"""The driver `qemu`: the agent's guest in a virtual machine, without root and without Firecracker."""
