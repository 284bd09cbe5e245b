"""Prefetches batches in a background thread, for the training loop."""

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Makes batches ahead of their use in one background thread; an iterator and a context manager.

    ``make_batch(start)``, ``make_batch(start + 1)`` and so on, in order. An error in it is raised where the
    batch would have been returned, after the batches before it.

    Attributes:
        waited_seconds: How long the batch returned last was waited for: about zero where making is as fast as using.
    """

    def __init__(self, make_batch: Callable[[int], T], *, start: int, depth: int, stop: int | None = None) -> None:
        """Starts the thread.

        Args:
            make_batch: makes the batch of a number; called by one thread only.
            start: number of the first item, for a run that resumes.
            depth: most batches made and not yet taken, at least 1.
            stop: number to end before; None: never.
        """
        assert depth >= 1
        self.waited_seconds = 0.0
        self._make_batch = make_batch
        self._next = start
        self._stop = stop
        self._depth = depth
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._finished = False
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: a run that ends by an exception elsewhere is not held up by its data.
        self._thread = threading.Thread(target=self._work, name="prefetcher", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while self._stop is None or self._next < self._stop:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
                batch = self._make_batch(self._next)
                with self._changed:
                    self._ready.append(batch)
                    self._next += 1
                    self._changed.notify_all()
        except BaseException as error:  # raised in the thread that asks for the batch
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def __iter__(self) -> "Prefetcher[T]":
        return self

    def __next__(self) -> T:
        """The next batch, waiting for it where it is not ready.

        Raises:
            StopIteration: ``stop`` is reached, or the prefetcher is closed.
            BaseException: whatever ``make_batch`` raised.
        """
        asked = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ready or self._finished)
            self.waited_seconds = time.monotonic() - asked
            if self._ready and not self._closed:
                batch = self._ready.popleft()
                self._changed.notify_all()
                return batch
        if self._error is not None and not self._closed:
            self.close()
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """Ends the thread, after the batch it is making, and drops what is ready. May be called again."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
