"""Where a build runs. The seam is `machine.base.Machine`; `machine.local` is the driver `local`."""
