"""SIGTERM and Ctrl-C as a wish to stop: the first one lets a run save its state, a second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Signals so close after the first one are the same wish: `timeout` and job schedulers signal a process and its whole group.
_SAME_SECONDS = 1.0


class Interrupts:
    """Catch SIGTERM and SIGINT while it is open, in the main thread.

    The first signal raises KeyboardInterrupt, or SystemExit for SIGTERM, but within `deferred` it is only noted. A second one
    ends the process, with status 128 plus its number, even while XLA compiles: a thread of its own reads them.

    Attributes:
      signal: number of the first signal, 0 before.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._deferred = self._saves = False

    def __enter__(self) -> Interrupts:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous: list[Any] = [signal.signal(number, self._raise) for number in SIGNALS]
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in zip(SIGNALS, self._previous):
            signal.signal(number, handler)
        self._writer.close()  # ends the thread, once it has said what it read
        self._thread.join()

    @contextlib.contextmanager
    def deferred(self, deferred: bool = True) -> Iterator[None]:
        """Only note signals in a block, or, in a block within that, raise them again."""
        before = self._deferred, self._saves
        self._deferred, self._saves = deferred, self._saves or deferred
        try:
            yield
        finally:
            self._deferred, self._saves = before

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if not self._deferred:
            raise SystemExit(128 + number) if number == signal.SIGTERM else KeyboardInterrupt

    def _watch(self) -> None:
        first = None
        with self._reader:
            while read := self._reader.recv(1):
                number, now = read[0], time.monotonic()
                if number not in SIGNALS:
                    continue
                name = signal.Signals(number).name
                if first is None:
                    self.signal, first = self.signal or number, now
                    if self._saves:
                        print(f"{name}: saving a checkpoint, then stopping; once more ends at once", file=sys.stderr, flush=True)
                elif now - first > _SAME_SECONDS:
                    print(f"{name} once more: ended at once", file=sys.stderr, flush=True)
                    os._exit(128 + number)
