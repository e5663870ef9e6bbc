"""A thread that computes. It can be abandoned: a call that hangs holds up nobody but itself."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

from server.interrupt import Interrupt

Job = Callable[[], None]

# How often one that waits looks up: for another lock, and for who cancels the calibration.
_LOOK_S = 1.0


class Worker:
    """One daemon thread that runs jobs in order. Jobs see to their own errors."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Run `job` after those before it."""
        self._jobs.put(job)

    def stop(self) -> None:
        """End the thread after the jobs that it has; does not wait."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class Turns:
    """Who computes now: serving first, and one trial of a calibration at a time in between.

    A request that comes during a trial interrupts it. One that was put off for long enough runs to
    its end, so that a server that is never idle gets calibrated too.
    """

    # Of the time, for trials that requests have to wait for: few enough to stay out of their p95.
    UNYIELDING_SHARE = 0.02
    PATIENCE_S = 1.0  # with a trial of unknown length
    # While requests come in, trials take this share of the time at most, so that few meet one.
    TRIAL_SHARE = 0.5
    LONGEST_PAUSE_S = 1.0
    TRAFFIC_S = 2.0  # since the last request

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_request_s = -math.inf
        self._computing = threading.Lock()
        self._idle = threading.Event()
        self._idle.set()
        self._trial: Interrupt | None = None  # the one under way that may be interrupted
        self._tried_since_s: float | None = None  # for the trial to come

    def set_idle(self, idle: bool) -> None:
        """Say whether requests wait or run."""
        if not idle:
            self.note_request()
        if idle and not self._idle.is_set():
            self._idle.set()
        elif not idle and self._idle.is_set():
            self._idle.clear()
            if trial := self._trial:
                trial.set()

    def note_request(self) -> None:
        """Say that there is traffic."""
        self._last_request_s = self._clock()

    def is_quiet(self, seconds: float) -> bool:
        """Return whether no request came for so long, and nothing computes."""
        return not self._computing.locked() and self._clock() - self._last_request_s >= seconds

    def replace_lock(self) -> None:
        """Leave the lock to a batch that hangs, and go on with another."""
        self._computing = threading.Lock()

    @property
    def computing(self) -> threading.Lock:
        """Return the lock that a batch holds while it computes."""
        return self._computing

    def pause_s(self, seconds: float) -> float:
        """Return how long to leave to requests before a trial that takes `seconds`."""
        if self._clock() - self._last_request_s > self.TRAFFIC_S:
            return 0.0
        return min(self.LONGEST_PAUSE_S, seconds * (1 / self.TRIAL_SHARE - 1))

    def patience_s(self, seconds: float) -> float:
        """Return how long to put off a trial that takes `seconds`, 0 if that is not known."""
        return seconds / self.UNYIELDING_SHARE if seconds else self.PATIENCE_S

    @contextmanager
    def trial(self, seconds: float, most_s: float = math.inf) -> Iterator[Interrupt]:
        """Compute one trial inside, once no request waits or it was put off for long enough.

        It takes `seconds` (0: unknown), and may be put off for `most_s` at most, the times that it
        was interrupted included. Where requests leave no gap for a second it is interrupted before
        it begins, so that its caller can give up.
        """
        time.sleep(min(most_s, self.pause_s(seconds)))
        if self._tried_since_s is None:
            self._tried_since_s = self._clock()
        gives_way_until_s = self._tried_since_s + min(most_s, self.patience_s(seconds))
        self._idle.wait(min(_LOOK_S, max(0.0, gives_way_until_s - self._clock())))
        while not (lock := self._computing).acquire(timeout=_LOOK_S):
            pass  # another may have taken the place of one that hangs
        interrupt = Interrupt()
        if self._clock() < gives_way_until_s:
            self._trial = interrupt
            if not self._idle.is_set():  # a request came meanwhile
                interrupt.set()
        try:
            yield interrupt
        finally:
            self._trial = None
            if not interrupt.is_set:
                self._tried_since_s = None
            lock.release()
