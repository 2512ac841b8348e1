"""Play a bag: its messages in the order and at the times at which they are sent."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bevperception.bags.faults import Fault, FaultInjector, Played, shifted
from bevperception.errors import ConfigError, DataError

_GAP_S = 0.1
"""Between the end of a bag and its next loop, where no camera has a period."""


@dataclass(frozen=True)
class PlayOptions:
    """Loops, topics, faults and start of a playback.

    Args:
        loops: how often; 0 for ever.
        continuous: stamps go on over the loops, instead of jumping back to the bag's own.
        topics: only these; empty for all.
        faults: to inject.
        seed: of random faults.
        start_s: begin so far into the bag.
    """

    loops: int = 1
    continuous: bool = False
    topics: tuple[str, ...] = ()
    faults: Sequence[Fault] = ()
    seed: int = 0
    start_s: float = 0.0

    def __post_init__(self) -> None:
        if self.loops < 0 or self.start_s < 0:
            raise ConfigError("loops and start_s must not be negative")


class Playback:
    """Iterates over a bag's messages as they are to be sent.

    Args:
        reader: an open bag.
        options: see :class:`PlayOptions`.

    Attributes:
        first_ns: the bag's first time.
        length_s: from one loop's beginning to the next one's.
        injector: the faults, with what they have done so far.

    Raises:
        DataError: if the bag has none of the topics.
    """

    def __init__(self, reader: Any, options: PlayOptions) -> None:
        self.options = options
        self.injector = FaultInjector(options.faults, options.seed)
        wanted = options.topics or tuple(c.topic for c in reader.connections)
        connections = [c for c in reader.connections if c.topic in wanted]
        if not connections:
            raise DataError(f"the bag has none of the topics {', '.join(wanted)}")
        messages = [(t, c.topic, c.msgtype, bytes(d)) for c, t, d in reader.messages(connections)]
        if not messages:
            raise DataError("the bag is empty")
        self.first_ns = messages[0][0]
        begin_ns = self.first_ns + round(options.start_s * 1e9)
        self._messages = [m for m in messages if m[0] >= begin_ns or m[1] == "/tf_static"]
        self._begin_ns = begin_ns
        self.length_s = _loop_length_s(self._messages, begin_ns)

    def clock_ns(self, time_s: float) -> int:
        """The time that /clock shows at a time since the beginning."""
        if not self.options.continuous:
            time_s %= self.length_s
        return int(self._begin_ns + round(time_s * 1e9))

    def __iter__(self) -> Iterator[Played]:
        """Messages in the order in which they are to be sent."""
        waiting: list[tuple[float, int, Played]] = []
        number = itertools.count()
        for planned in self._plain():
            for message in self.injector.apply(planned):
                heapq.heappush(waiting, (message.time_s, next(number), message))
            while waiting and waiting[0][0] <= planned.time_s:
                yield heapq.heappop(waiting)[2]
        while waiting:
            yield heapq.heappop(waiting)[2]

    def _plain(self) -> Iterator[Played]:
        rounds = itertools.count() if self.options.loops == 0 else range(self.options.loops)
        for loop in rounds:
            offset_s = loop * self.length_s
            for time_ns, topic, kind, data in self._messages:
                time_s = max(0.0, (time_ns - self._begin_ns) * 1e-9) + offset_s
                message = Played(time_s, topic, kind, data)
                yield shifted(message, offset_s) if self.options.continuous else message


def _loop_length_s(messages: Sequence[tuple[int, str, str, bytes]], begin_ns: int) -> float:
    """Seconds from the beginning of a loop to that of the next: every camera goes on in its own period.

    Args:
        messages: (time in nanoseconds, topic, type, data) in order of time.
        begin_ns: the loop's beginning.
    """
    times: dict[str, list[int]] = {}
    for time_ns, topic, _, _ in messages:
        if "image" in topic:
            times.setdefault(topic, []).append(time_ns)
    periodic = [
        stamps[-1] - stamps[0] + sorted(b - a for a, b in itertools.pairwise(stamps))[len(stamps) // 2 - 1]
        for stamps in times.values()
        if len(stamps) > 1
    ]
    end_ns = messages[-1][0] - begin_ns
    return max(end_ns + (0 if periodic else round(_GAP_S * 1e9)), *periodic, 0) * 1e-9
