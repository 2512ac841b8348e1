"""Tell a single wrong stamp from a jump of the clock."""

from __future__ import annotations

from enum import Enum


class Verdict(Enum):
    """Whether a stamp fits the clock so far."""

    GOOD = "good"
    """Near the newest stamp."""
    SUSPECT = "suspect"
    """Far from it: alone, a mistake of the sender."""
    JUMP = "jump"
    """The last of several in a row from several sources, with no good one between: the clock jumped."""


class StampGuard:
    """Classifies every message's stamp as good, suspect or the sign of a jump of the clock.

    One camera, or odometry, with a wrong clock is outvoted by the others; a bag that starts again, or a
    pause, takes all sources along.

    Args:
        jump_s: stamps farther than this from the newest, either way, are suspect.
        votes: so many suspects in a row, near each other and from two sources (where there are two), make
            a jump.

    Attributes:
        newest_ns: newest good stamp; None before the first.
    """

    def __init__(self, jump_s: float = 1.0, votes: int = 3) -> None:
        self.newest_ns: int | None = None
        self._jump_ns = round(jump_s * 1e9)
        self._votes = votes
        self._known: set[str] = set()
        self._streak = 0
        self._streak_ns = 0
        self._streak_sources: set[str] = set()

    def classify(self, stamp_ns: int, source: str) -> Verdict:
        """Compare a new stamp with the newest good one of all sources.

        Args:
            stamp_ns: of a message.
            source: what sent it; few different names.

        Returns:
            JUMP once; the stamp is then the newest one.
        """
        self._known.add(source)
        if self.newest_ns is None or abs(stamp_ns - self.newest_ns) <= self._jump_ns:
            self.newest_ns = stamp_ns if self.newest_ns is None else max(self.newest_ns, stamp_ns)
            self._end_streak()
            return Verdict.GOOD
        if self._streak and abs(stamp_ns - self._streak_ns) > self._jump_ns:
            self._end_streak()
        self._streak_ns = max(stamp_ns, self._streak_ns) if self._streak else stamp_ns
        self._streak += 1
        self._streak_sources.add(source)
        if self._streak < self._votes or len(self._streak_sources) < min(2, len(self._known)):
            return Verdict.SUSPECT
        self.newest_ns = self._streak_ns
        self._end_streak()
        return Verdict.JUMP

    def _end_streak(self) -> None:
        self._streak = 0
        self._streak_sources.clear()

    def offset_s(self, stamp_ns: int) -> float:
        """How far a stamp lies ahead of the newest one, seconds."""
        return 0.0 if self.newest_ns is None else (stamp_ns - self.newest_ns) * 1e-9
