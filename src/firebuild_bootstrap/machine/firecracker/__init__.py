"""The driver `firecracker`: vminit in a microVM (docs/firecracker.md)."""
