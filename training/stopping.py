"""Ending a run on request: SIGTERM, or SIGINT (Ctrl-C) once, saves and exits with code 0.

Schedulers of clusters send SIGTERM before they take a machine away. The signal is only noted; the
loop looks at it between two steps, and long waits and tests are left at once. A second Ctrl-C
interrupts wherever the run is.
"""

import functools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

_active: list["StopSignals"] = []


class Stopped(SystemExit):
    """The run was asked to stop; the process exits with code 0 when it has saved.

    Args:
        where: How far the run came.
    """

    def __init__(self, where: str = "a signal came") -> None:
        super().__init__(0)
        self.where = where

    def __str__(self) -> str:
        return self.where


class StopSignals:
    """Notes SIGTERM and SIGINT while it is entered; elsewhere they keep their meaning.

    Attributes:
        asked: Whether a signal came.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.asked = False
        self._waiting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Handlers belong to the main thread.
        if threading.current_thread() is threading.main_thread():
            _guard_children()
            self._before = {one: signal.signal(one, self._note) for one in self._SIGNALS}
            _active.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        if self._before:
            _active.remove(self)

    @contextmanager
    def waiting(self, *, at_once: bool = True) -> Iterator[None]:
        """What can be left in the middle: a signal raises ``Stopped`` here.

        Args:
            at_once: False notes the signal only, as everywhere else.
        """
        if at_once and self.asked:
            raise Stopped
        self._waiting = at_once
        try:
            yield
        finally:
            self._waiting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._waiting:
            raise Stopped


@functools.cache
def _guard_children() -> None:
    """Loader processes leave signals to the process that saves, whose own SIGTERM ends them.

    In process groups of their own: torchrun signals the group of each process that it started.
    """

    def reset() -> None:
        if _active:
            os.setpgid(0, 0)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    os.register_at_fork(after_in_child=reset)
