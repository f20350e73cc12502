"""The stages of a build in their order, side by side where they do not need each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from firebuild_bootstrap.dockerfile.graph import Stage, StageRef
from firebuild_bootstrap.errors import StageCancelled


class Schedule:
    """Runs the stages of one build.

    Args:
        at_once: how many may run side by side.
    """

    def __init__(self, at_once: int = 1) -> None:
        self._at_once = at_once
        self._failed = threading.Event()

    def check(self) -> None:
        """Take note, in a stage that waits for something, that it need not go on.

        Raises:
            StageCancelled: another one has failed.
        """
        if self._failed.is_set():
            raise StageCancelled("another stage of the build has failed")

    def run(
        self,
        stages: Sequence[Stage],
        work: Callable[[Stage], None],
        maker: Callable[[int], Stage] | None = None,
    ) -> None:
        """Call `work` for each stage once it has returned for all that the stage needs.

        Args:
            stages: each after those that it needs.
            work: builds a stage; called from several threads.
            maker: returns which stage makes what the one with an index is; itself by default.

        Raises:
            BaseException: what the first stage that failed raised; the others have ended by then.
        """
        if self._at_once == 1 or len(stages) == 1:
            for stage in stages:
                work(stage)
            return
        try:
            self._side_by_side(stages, work, maker)
        finally:
            self._failed.clear()

    def _side_by_side(
        self,
        stages: Sequence[Stage],
        work: Callable[[Stage], None],
        maker: Callable[[int], Stage] | None,
    ) -> None:
        wanted = {stage.index for stage in stages}
        made = {
            stage.index: {maker(each).index if maker else each for each in needs(stage)} for stage in stages
        }
        waiting = {stage.index: (stage, made[stage.index] & wanted) for stage in stages}
        running: dict[Future[None], int] = {}
        first: BaseException | None = None
        with ThreadPoolExecutor(self._at_once, thread_name_prefix="stage") as pool:
            while waiting or running:
                done = {index for index in wanted if index not in waiting and index not in running.values()}
                for index, (stage, needed) in sorted(waiting.items()):
                    if first is None and needed <= done:
                        del waiting[index]
                        running[pool.submit(work, stage)] = index
                if not running:
                    break
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    del running[future]
                    error = future.exception()
                    if error is not None and first is None:
                        first = error
                        self._failed.set()
        if first is not None:
            raise first


def needs(stage: Stage) -> set[int]:
    """Return the indexes of the stages that `stage` refers to."""
    return {tree.index for tree in stage.trees() if isinstance(tree, StageRef)}
