"""A single wrong stamp is refused; a clock that jumped is followed."""

from __future__ import annotations

from bevperception.streaming.stamps import StampGuard, Verdict

S = 10**9
GOOD, SUSPECT, JUMP = Verdict.GOOD, Verdict.SUSPECT, Verdict.JUMP


def classify(guard: StampGuard, *stamps_s: float) -> list[Verdict]:
    """Verdicts on stamps of two sources in turn."""
    return [guard.classify(round(s * S), "ab"[index % 2]) for index, s in enumerate(stamps_s)]


def test_small_steps_either_way_are_good() -> None:
    assert classify(StampGuard(1.0), 100.0, 100.2, 99.9, 101.1, 100.2) == [GOOD] * 5


def test_a_wrong_stamp_among_good_ones_stays_suspect() -> None:
    guard = StampGuard(1.0)
    assert classify(guard, 100, 160, 100.2, 160.2, 100.4, 40, 100.6) == [
        *(GOOD, SUSPECT, GOOD, SUSPECT, GOOD, SUSPECT, GOOD),
    ]
    assert guard.newest_ns == round(100.6 * S)


def test_three_in_a_row_are_a_jump_back_or_ahead() -> None:
    guard = StampGuard(1.0)
    assert classify(guard, 100, 50, 50.01, 50.02, 50.03) == [GOOD, SUSPECT, SUSPECT, JUMP, GOOD]
    assert classify(guard, 500, 500, 500, 500.1) == [SUSPECT, SUSPECT, JUMP, GOOD]


def test_three_wrong_stamps_that_disagree_are_no_jump() -> None:
    assert classify(StampGuard(1.0), 100, 50, 500, 50, 900, 100.1) == [
        *(GOOD, SUSPECT, SUSPECT, SUSPECT, SUSPECT, GOOD),
    ]


def test_offset_is_against_the_newest_good_stamp() -> None:
    guard = StampGuard()
    assert guard.offset_s(5 * S) == 0.0
    guard.classify(5 * S, "a")
    assert guard.offset_s(3 * S) == -2.0


def test_one_source_among_several_makes_no_jump_but_a_lone_one_does() -> None:
    guard = StampGuard(1.0)
    assert classify(guard, 100, 100) == [GOOD, GOOD]
    assert {guard.classify(40 * S, "a") for _ in range(50)} == {SUSPECT}
    assert guard.classify(40 * S, "b") is JUMP
    lone = StampGuard(1.0)
    assert [lone.classify(s * S, "a") for s in (100, 40, 40, 40)] == [GOOD, SUSPECT, SUSPECT, JUMP]
