"""Builds as a library user has them: `build_image` with an events callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from firebuild_bootstrap.build import build_image
from firebuild_bootstrap.events import Event, Notice
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.outputs import parse_outputs
from firebuild_bootstrap.image.store import StoredImage
from firebuild_bootstrap.request import BuildRequest
from firebuild_bootstrap.settings import BuildSettings
from support import leftovers, note_of_ids

EventT = TypeVar("EventT", bound=Event)


@dataclass
class Library:
    """Builds Dockerfiles in a directory and keeps the events of all of them."""

    context: Path
    home: Home
    events: list[Event] = field(default_factory=list)
    watch: Callable[[Event], None] = lambda _: None

    def build(self, dockerfile: str, **options: Any) -> StoredImage:
        path = self.context / "Dockerfile"
        path.write_text(dockerfile)
        settings = options.pop("settings", BuildSettings())
        tag = Reference.parse(options.pop("tag", "t/built:1"))
        outputs = parse_outputs(options.pop("outputs", ["tar"]))
        options.setdefault("no_cache", True)  # most tests are about what is executed
        request = BuildRequest(dockerfile=path, context=self.context, tag=tag, outputs=outputs, **options)
        image = build_image(request, settings, self.home, events=self._receive)
        assert image is not None
        return image

    def _receive(self, event: Event) -> None:
        self.events.append(event)
        self.watch(event)

    def of(self, kind: type[EventT]) -> list[EventT]:
        return [event for event in self.events if isinstance(event, kind)]

    def notices(self) -> list[Notice]:
        """The notices, without that to a user who has no subordinate ids."""
        return [event for event in self.of(Notice) if event.message != note_of_ids()]

    def leftovers(self) -> list[str]:
        return leftovers(self.home.root)
