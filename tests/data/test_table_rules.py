"""Rules of single columns: what each accepts, and that the bad rows are found among good ones."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bevperception.data.table_rules import (
    MISSING,
    Rule,
    bad_rows,
    box_size,
    column_of,
    file_name,
    file_token,
    flag,
    intrinsics,
    is_good,
    link,
    name,
    names,
    one_of,
    quaternion,
    reference,
    references,
    time_us,
    vector,
    whole_number,
)

NAN, INF = math.nan, math.inf
LENS = [[90.0, 0.0, 80.0], [0, 90, 45], [0, 0, 1]]
CASES: list[tuple[Rule, list[Any], list[Any]]] = [
    (name(), ["a", "über", "n015+0800"], ["", "a\nb", "\ud800", "\0"]),
    (
        file_token(),
        ["a", "ca9a282c9e77", "über.a"],
        ["", "..", ".a", "../../x", "a/b", "a\\b", "x" * 201, "\ud800"],
    ),
    (
        file_name(),
        ["samples/a.jpg", "a..b/..c"],
        ["", ".", "..", "/dev/zero", "a/../b", "../a", "a/..", "a\n"],
    ),
    (link(), ["", "a"], ["\n"]),
    (names(), [[], ["a", ""]], [["\ud800"], [1], [["a"]], "ab"]),
    (one_of(["", "1"]), ["", "1"], ["2"]),
    (reference("x", ["a", "b"]), ["a", "b"], ["", "c"]),
    (references("x", ["a", "b"]), [[], ["a"], ["b", "a"]], [["c"], [["a"]], "a", ["a", None]]),
    (flag(), [True, False], [0, 1]),
    (whole_number(0, 10), [0, 10], [-1, 11, 1.0, True, 10**400]),
    (time_us(), [0, 1_600_000_000_000_000, 0.5], [-1, 2**53, NAN, INF, True, 10**400]),
    (
        vector(3, 1e8),
        [[0, 1.5, -1e8], [0, 0, 0]],
        [[0, 0], [0, 0, 1.1e8], [0, 0, NAN], [0, 0, "1"], [0, 0, True]],
    ),
    (vector(3, 1e8), [[1, 2, 3]], [[0, 0, 10**400], [0, 0, [0]], [[0, 0, 0]], {"x": 0, "y": 0, "z": 0}]),
    (
        quaternion(),
        [[1, 0, 0, 0], [0.6, 0.6, -0.6, 2]],
        [[0, 0, 0, 0], [1, 0, 0], [NAN, 0, 0, 1], [1e300, 0, 0, 0]],
    ),
    (
        box_size(),
        [[1.9, 4.5, 1.5]],
        [[0, 4, 1], [-1, 4, 1], [1, 2], [1, 2, INF], [1e-300, 1, 1], [1e4, 1, 1]],
    ),
    (
        intrinsics(),
        [LENS, [[90, 3, 80], [0, 90, 45], [0, 0, 1]]],
        [
            [],
            LENS[:2],
            [*LENS[:2], [0, 0.001, 1]],
            [*LENS[:2], [0, 0, 2]],
            [*LENS[:2], [0, 0]],
            [[90, 0, 80], [90, 0, 80], [0, 0, 1]],
            [[NAN, 0, 80], *LENS[1:]],
            [[1e300, 0, 80], *LENS[1:]],
            [[0, 0, 0]] * 3,
        ],
    ),
]
STRANGE: list[Any] = [None, MISSING, {}, [None], [[None]], {"a": 1}]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_a_rule_accepts(case: int) -> None:
    rule, good, bad = CASES[case]
    for value in good:
        assert is_good(rule, [value]), value
    for value in [*bad, *STRANGE]:
        assert not is_good(rule, [value]), value
    assert is_good(rule, good)
    assert bad_rows(rule, []) == []
    assert "must be " + rule.wanted


@given(data=st.data(), case=st.integers(0, len(CASES) - 1))
def test_bad_rows_are_found_among_good_ones(data: st.DataObject, case: int) -> None:
    rule, good, bad = CASES[case]
    kinds = data.draw(st.lists(st.booleans(), max_size=20))
    column = [data.draw(st.sampled_from(good if kind else [*bad, *STRANGE])) for kind in kinds]
    assert bad_rows(rule, column) == [row for row, kind in enumerate(kinds) if not kind]


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
        max_leaves=12,
    )
)
def test_no_value_of_json_upsets_a_rule(value: Any) -> None:
    loaded = json.loads(json.dumps(value))
    for rule, good, _ in CASES:
        alone = is_good(rule, [loaded])
        assert is_good(rule, [good[0], loaded]) == alone
        assert isinstance(alone, bool)


def test_missing_fields_are_told_from_null() -> None:
    assert column_of([{"a": 1}, {}, {"a": None}], "a") == [1, MISSING, None]
    assert repr(MISSING) == "nothing (the field is missing)"
