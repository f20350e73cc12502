"""The driver `external`: the machine is started by the operator's own tool (docs/external.md)."""
