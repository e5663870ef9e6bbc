"""What to expect of requests that haven't come yet, learnt from those that have."""

import math
from collections import deque
from dataclasses import dataclass, field

# An observed burst is expected again until about so many requests have come without one like
# it, or until nothing has come for about so long.
MEMORY = 50_000
MEMORY_S = 10.0
# Windows of a burst envelope, from the shortest batch to the longest.
WINDOWS = 7
# The mean rate looks back over so many times the longest window.
LOOK_BACK = 4.0
# Targets so many times the longest window can wait for any burst to pass.
LOOSE = 8.0


@dataclass(slots=True)
class Envelope:
    """Bursts of the requests whose targets are at most those of one class.

    target_ms: the tightest of the class; bursts (WINDOWS,): the most rows that came within each
    window (an arrival curve, as in network calculus, but measured and slowly forgotten).
    """

    target_ms: float
    bursts: list[float] = field(default_factory=lambda: [0.0] * WINDOWS)
    _counts: list[int] = field(default_factory=lambda: [0] * WINDOWS)
    _late: list[deque[tuple[float, int]]] = field(
        default_factory=lambda: [deque() for _ in range(WINDOWS)]
    )

    def observe(self, now: float, rows: int, windows_ms: list[float]) -> None:
        """Take in one arrival."""
        bursts, counts, arrival = self.bursts, self._counts, (now, rows)
        for j, late in enumerate(self._late):
            late.append(arrival)
            count = counts[j] + rows
            since = now - windows_ms[j] / 1e3
            while late[0][0] <= since:
                count -= late.popleft()[1]
            counts[j] = count
            faded = bursts[j] * (1 - 1 / MEMORY)
            bursts[j] = count if count > faded else faded


class Forecast:
    """Mean rate, and burst envelopes by target: a class for each doubling of the target."""

    __slots__ = (
        "_at",
        "_classes",
        "_newest",
        "_rate",
        "_shortest_ms",
        "_tau_s",
        "envelopes",
        "windows_ms",
    )

    def __init__(self, shortest_ms: float, longest_ms: float) -> None:
        ratio = (longest_ms / shortest_ms) ** (1 / (WINDOWS - 1))
        self.windows_ms = [shortest_ms * ratio**j for j in range(WINDOWS)]
        self.envelopes: list[Envelope] = []  # tightest class first
        self._classes: list[int] = []
        self._shortest_ms = shortest_ms
        self._tau_s = LOOK_BACK * longest_ms / 1e3
        self._rate = 0.0
        self._newest = 0
        self._at = -math.inf

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
            envelope.observe(now, rows, self.windows_ms)

    def rate(self, now: float) -> float:
        """Return the rows a second that came lately, the newest arrival left out of account."""
        return self._rate * math.exp(-max(0.0, now - self._at) / self._tau_s)

    def fading(self, now: float) -> float:
        """Return the part of the bursts that is still expected: less as nothing comes."""
        return math.exp(-max(0.0, now - self._at) / MEMORY_S)
