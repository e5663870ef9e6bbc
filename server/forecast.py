"""What to expect of requests that haven't come yet, learnt from those that have."""

import math
from collections import deque

# An observed burst is expected again until so many requests have come without one like it,
# or for about so long when nothing comes.
MEMORY = 5000
MEMORY_S = 10.0
# Windows of the burst envelope, from the shortest to the longest batch.
WINDOWS = 7
# The mean rate looks back over so many times the longest window.
LOOK_BACK = 4.0


class Forecast:
    """Mean rate, burst envelope and targets of what arrives.

    `bursts` (WINDOWS,): the most rows that came within `windows_ms` of each other (an arrival
    curve, as in network calculus, but measured and slowly forgotten). `target_ms`: the tightest
    target of late, inf if there was none.
    """

    __slots__ = ("_at", "_bursts", "_counts", "_late", "_rate", "_tau_s", "target_ms", "windows_ms")

    def __init__(self, shortest_ms: float, longest_ms: float) -> None:
        ratio = (longest_ms / shortest_ms) ** (1 / (WINDOWS - 1))
        self.windows_ms = [shortest_ms * ratio**j for j in range(WINDOWS)]
        self.target_ms = math.inf
        self._bursts = [0.0] * WINDOWS
        self._counts = [0] * WINDOWS
        self._late: list[deque[tuple[float, int]]] = [deque() for _ in range(WINDOWS)]
        self._tau_s = LOOK_BACK * longest_ms / 1e3
        self._rate = 0.0
        self._at = -math.inf

    def observe(self, now: float, rows: int, target_ms: float) -> None:
        """Take in one arrival; target_ms is inf without a target."""
        self._rate = self.rate(now) + rows / self._tau_s
        self._at = now
        self.target_ms = min(target_ms, self.target_ms * (1 + 1 / MEMORY))
        bursts, counts = self._bursts, self._counts
        for j, late in enumerate(self._late):
            late.append((now, rows))
            count = counts[j] + rows
            since = now - self.windows_ms[j] / 1e3
            while late[0][0] <= since:
                count -= late.popleft()[1]
            counts[j] = count
            bursts[j] = max(count, bursts[j] * (1 - 1 / MEMORY))

    def rate(self, now: float) -> float:
        """Return the rows a second that came lately; falls to 0 when nothing comes."""
        return self._rate * math.exp(-max(0.0, now - self._at) / self._tau_s)

    def bursts(self, now: float) -> list[float]:
        """Return the most rows to expect within each window."""
        fading = math.exp(-max(0.0, now - self._at) / MEMORY_S)
        return [burst * fading for burst in self._bursts]
