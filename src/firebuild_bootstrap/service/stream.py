"""The session with a guest of our own version: one stream, on which the host says what is to be done next."""

from __future__ import annotations

from typing import Protocol


class LayerSink(Protocol):
    """Takes what each step has changed, as soon as the step is done. One call at a time."""

    def wanted(self, step: int, /) -> bool:
        """Say whether the guest has to send the layer of this step."""
        ...

    def write(self, step: int, data: bytes, /) -> None:
        """Take the next bytes of the layer's tar stream, at most 1 MiB; they come from an untrusted guest.

        Raises:
            InputError: there is more than the sink takes.
        """
        ...

    def finished(self, step: int, /) -> None:
        """The layer is complete; where it was not wanted: the step is done.

        Raises:
            FirebuildError: the layer can't be used.
        """
        ...


class NoLayers:
    """Wants no layer of any step."""

    def wanted(self, _step: int, /) -> bool:
        """Say no."""
        return False

    def write(self, step: int, data: bytes) -> None:
        """Take nothing."""

    def finished(self, step: int) -> None:
        """Take no note."""
