"""The driver `external`: the machine is started by somebody else's tool (docs/external.md)."""
