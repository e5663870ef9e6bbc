"""What to expect of requests that haven't come yet, learnt from those that have."""

import math
from dataclasses import dataclass, field

from server.tables import MS

# An observed burst is expected again until about so many requests have come without one like it;
# while nothing comes, less and less: hardly after about so long.
MEMORY = 50_000
MEMORY_S = 10.0
FADING = 1 - 1 / MEMORY
# Windows of a burst envelope, from the shortest batch to the longest.
WINDOWS = 7
# The mean rate looks back over so many times the longest window.
LOOK_BACK = 4.0
# Targets so many times the longest window can wait for any burst to pass.
LOOSE = 8.0
# Arrivals that every window has passed are let go when there are so many of them.
PASSED = 64
# Requests lost so many targets apart are of one overload.
PAUSE = 1.0


@dataclass(slots=True)
class Envelope:
    """Bursts of the requests whose targets are at most those of one class.

    target_ms: the tightest of the class; bursts (WINDOWS,): the most rows that came within each
    window twice (an arrival curve, as in network calculus, but measured and slowly forgotten). What
    came once is not waited for: as where this process was held up, and then read all at once.
    """

    target_ms: float
    bursts: list[float] = field(default_factory=lambda: [0.0] * WINDOWS)
    _peaks: list[float] = field(default_factory=lambda: [0.0] * WINDOWS)  # what came once
    _peaked_s: list[float] = field(default_factory=lambda: [-math.inf] * WINDOWS)
    _total: int = 0
    _times_s: list[float] = field(default_factory=list)
    _before: list[int] = field(default_factory=list)  # rows that came before each of them
    _firsts: list[int] = field(default_factory=lambda: [0] * WINDOWS)  # of each window

    def twin(self) -> "Envelope":
        """Return one that knows the same, and learns apart from this."""
        return Envelope(
            self.target_ms,
            self.bursts[:],
            self._peaks[:],
            self._peaked_s[:],
            self._total,
            self._times_s[:],
            self._before[:],
            self._firsts[:],
        )

    def observe(self, now: float, rows: int, windows_s: list[float]) -> None:
        """Take in one arrival."""
        times_s, before, firsts = self._times_s, self._before, self._firsts
        if times_s and times_s[-1] <= now - windows_s[-1]:  # alone in every window
            times_s.clear()
            before.clear()
            firsts[:] = [0] * WINDOWS
        times_s.append(now)
        before.append(self._total)
        self._total += rows
        for j, window_s in enumerate(windows_s):
            since, first = now - window_s, firsts[j]
            while times_s[first] <= since:
                first += 1
            firsts[j] = first
            count = float(self._total - before[first])
            burst, peak = FADING * self.bursts[j], FADING * self._peaks[j]
            is_new = self._peaked_s[j] <= since - window_s  # not of the burst that peaked last
            if count > peak:
                if is_new:
                    burst = peak
                peak, self._peaked_s[j] = count, now
            elif is_new and count > burst:
                burst = count
            self.bursts[j], self._peaks[j] = burst, peak
        if firsts[-1] > PASSED:
            self._let_go()

    def _let_go(self) -> None:
        passed = self._firsts[-1]
        del self._times_s[:passed]
        del self._before[:passed]
        self._firsts[:] = [first - passed for first in self._firsts]


class Forecast:
    """Mean rate, and burst envelopes by target: a class for each doubling of the target."""

    __slots__ = (
        "_at",
        "_classes",
        "_longest_ms",
        "_losing_since_s",
        "_lost_ms",
        "_lost_s",
        "_newest",
        "_rate",
        "_shortest_ms",
        "_tau_s",
        "_windows_s",
        "envelopes",
        "windows_ms",
    )

    def __init__(self, shortest_ms: float, longest_ms: float) -> None:
        ratio = (longest_ms / shortest_ms) ** (1 / (WINDOWS - 1))
        self.windows_ms = [shortest_ms * ratio**j for j in range(WINDOWS)]
        self._windows_s = [window_ms / MS for window_ms in self.windows_ms]
        self.envelopes: list[Envelope] = []  # tightest class first
        self._classes: list[int] = []
        self._shortest_ms, self._longest_ms = shortest_ms, longest_ms
        self._tau_s = LOOK_BACK * longest_ms / MS
        self._rate = 0.0
        self._newest = 0
        self._at = -math.inf
        self._lost_s = self._losing_since_s = -math.inf
        self._lost_ms = 0.0

    def twin(self) -> "Forecast":
        """Return one that knows the same, and learns apart from this."""
        twin = Forecast(self._shortest_ms, self._longest_ms)
        twin.envelopes = [envelope.twin() for envelope in self.envelopes]
        twin._classes = self._classes
        twin._rate, twin._newest, twin._at = self._rate, self._newest, self._at
        twin._lost_ms, twin._lost_s = self._lost_ms, self._lost_s
        twin._losing_since_s = self._losing_since_s
        return twin

    def observe(self, now: float, rows: int, target_ms: float) -> None:
        """Take in one arrival; target_ms is inf without a target.

        Targets that no batch makes count as arrivals, but nothing is kept free for them.
        """
        self._rate = self.rate(now) + self._newest / self._tau_s
        self._newest = rows
        self._at = now
        if not self._shortest_ms <= target_ms <= LOOSE * self.windows_ms[-1]:
            return
        kind = math.frexp(target_ms)[1]
        if kind not in self._classes:
            self._classes = sorted([*self._classes, kind])
            self.envelopes.insert(self._classes.index(kind), Envelope(target_ms))
        place = self._classes.index(kind)
        own = self.envelopes[place]
        own.target_ms = min(target_ms, own.target_ms * (1 + 1 / MEMORY))
        for envelope in self.envelopes[place:]:
            envelope.observe(now, rows, self._windows_s)

    def rate(self, now: float) -> float:
        """Return the rows a second that came lately, the newest arrival left out of account."""
        return self._rate * math.exp(-max(0.0, now - self._at) / self._tau_s)

    def fading(self, now: float) -> float:
        """Return the part of the bursts that is still expected: less as nothing comes."""
        return math.exp(-max(0.0, now - self._at) / MEMORY_S)

    def lost(self, now: float, target_ms: float) -> None:
        """Take in that a request was refused, or given up, as it would be late."""
        if not self._is_losing(now):
            self._losing_since_s = now
        self._lost_s, self._lost_ms = now, target_ms

    def overloaded(self, now: float) -> bool:
        """Return whether requests have been lost for the time of a target, that of the last, and
        without a pause of one. Bursts pass sooner."""
        lasted_ms = MS * (self._lost_s - self._losing_since_s)
        return self._is_losing(now) and lasted_ms >= self._lost_ms

    def _is_losing(self, now: float) -> bool:
        return MS * (now - self._lost_s) <= PAUSE * self._lost_ms
