"""tools/benchmark.py ops on a small case."""

from __future__ import annotations

import functools
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bevperception.benchmarks.ops_cases import CASES, AttentionCase, LocationKind
from bevperception.benchmarks.ops_worker import competitor_call, disagreement
from bevperception.benchmarks.roofline import Machine, Work, forward_work, measure_machine
from bevperception.benchmarks.timing import median_ms, peak_extra_bytes, sample_seconds
from bevperception.ops import ms_deform_attn_reference
from tests.ops.problems import needs_native

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Exit code, output and errors of the program in this process, which saves the imports."""
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *arguments])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    return (int(left.value.code or 0), *capsys.readouterr())


@needs_native
def test_prints_times_and_ratios_and_writes_json(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "ops.json"
    done = run(
        *("ops", "--cases", "s4", "--competitors", "native,reference", "--threads", "1"),
        *("--rounds", "1", "--seconds", "0", "--json", str(target)),
    )
    assert done.returncode == 0, done.stderr
    assert "dcnv3, InternImage-T stage 4" in done.stdout
    assert "smallest ratios" in done.stdout
    content = json.loads(target.read_text())
    native, reference = content["results"]["s4"]["native"], content["results"]["s4"]["reference"]
    assert len(native["forward_s"]["as it is"]) >= 3
    assert 0 < native["forward_ms"] < reference["forward_ms"]
    assert "bound by" in done.stdout
    assert content["bound_ms"]["s4"] > 0
    assert "bound by the cache" in done.stdout
    assert content["cache_bound_ms"]["s4"] > 0
    assert content["machine"]["bytes_per_s"] > 1e8


@pytest.mark.parametrize("key", ["ii", "c1", "s4"])
def test_work_of_a_case_is_that_of_its_tensors(key: str) -> None:
    """Bytes are those of arguments and result; flops those of four corners a sample and channel."""
    case = CASES[key]
    call = competitor_call("reference", case)
    assert call is not None
    arguments = case.inputs("local", torch.float32)
    numbers = sum(t.numel() for t in arguments) + call(*arguments).numel()
    work = forward_work(case)
    if key == "c1":  # and the reference points of its entries
        entries = int(case.seen(torch.float64)[1].any(-1).sum())
        numbers += 2 * 4 * entries
        assert work.flops == entries * 8 * 8 * 32 * 8
    elif key == "ii":
        assert work.flops == arguments[2].numel() * 32 * 8
    else:
        assert work.flops == arguments[2].numel() * 16 * 8
    assert work.bytes == 4 * numbers


@pytest.mark.parametrize("kind", ["local", "uniform"])
def test_cells_that_no_point_looks_at(kind: LocationKind) -> None:
    """They are those whose value has no gradient."""
    case = AttentionCase("small", "some unseen", 2, 4, ((11, 9), (6, 5)), 2, "random")
    value, locations, weights = case.inputs(kind, torch.float64)
    value.requires_grad_()
    output = ms_deform_attn_reference(value, case.shapes, locations, weights)
    (gradient,) = torch.autograd.grad(output.sum(), value)
    unseen = case.cells_unseen(kind)
    assert 0 < unseen == int((gradient == 0).all(-1).sum())


def test_the_bound_by_the_cache_leaves_out_what_no_point_looks_at() -> None:
    machine = Machine(bytes_per_s=1e9, flops_per_s=1e10, cached_bytes_per_s=2e9)
    assert machine.cache_bound_ms(Work(bytes=5_000_000, flops=1, looked_at_bytes=4_000_000)) == 2.0
    assert machine.cache_bound_ms(Work(bytes=5_000_000, flops=1)) is None
    decoder = forward_work(CASES["v"])
    assert decoder.looked_at_bytes is not None
    assert decoder.looked_at_bytes < decoder.bytes / 3
    assert forward_work(CASES["iii"]).looked_at_bytes is None  # no cache holds it
    assert forward_work(CASES["s4"]).looked_at_bytes == forward_work(CASES["s4"]).bytes


def test_the_bound_is_the_longer_of_memory_and_arithmetic() -> None:
    machine = Machine(bytes_per_s=1e9, flops_per_s=1e10, cached_bytes_per_s=1e10)
    assert machine.bound_ms(Work(bytes=2_000_000, flops=1)) == pytest.approx(2.0)
    assert machine.bound_ms(Work(bytes=1, flops=50_000_000)) == pytest.approx(5.0)
    assert machine.limit(Work(bytes=2_000_000, flops=1)) == "memory"
    assert machine.limit(Work(bytes=1, flops=50_000_000)) == "arithmetic"
    measured = measure_machine(1)
    assert 1e8 < measured.bytes_per_s < 1e13
    assert 1e8 < measured.flops_per_s < 1e14
    assert 1e8 < measured.cached_bytes_per_s < 1e13


def test_impossible_options_are_refused_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (("ops", "--cases", "i,nine"), "unknown ['nine']"),
        (("ops", "--rounds", "0"), "--rounds must be 1 to 1000000, got 0"),
        (("speed",), "no subcommand 'speed'"),
    ):
        code, _, err = leave(monkeypatch, capsys, *arguments)
        assert code == 2
        assert message in err
        assert "Traceback" not in err


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = leave(monkeypatch, capsys, "ops", "--help")
    assert code == 0
    for words in ("THP_MEM_ALLOC_ENABLE", "examples:", "Deformable-DETR encoder", "--locations"):
        assert words in out


@pytest.mark.parametrize("key", ["i", "ii", "v", "c1", "s4"])
@pytest.mark.parametrize("kind", ["local", "uniform"])
def test_inputs_fit_their_operator(key: str, kind: str) -> None:
    case = CASES[key]
    tensors = case.inputs(kind, torch.float32)  # type: ignore[arg-type]
    call = competitor_call("reference", case)
    assert call is not None
    assert torch.isfinite(call(*tensors)).all()
    if isinstance(case, AttentionCase):
        inside = ((tensors[1] > 0) & (tensors[1] < 1)).all(-1).float().mean()
        assert inside > 0.4


@needs_native
@pytest.mark.parametrize("operator", ["ms_deform_attn", "dcnv3", "deform_conv2d", "spatial_cross_attn"])
def test_competitors_are_checked_before_they_are_timed(operator: str) -> None:
    assert disagreement("native", operator) < 1e-5


@needs_native
def test_the_published_scheme_computes_the_same_and_needs_more_memory() -> None:
    assert disagreement("published", "spatial_cross_attn") < 1e-5
    case = CASES["c1"]
    tensors = case.inputs("local", torch.float32)
    bytes_of = {}
    for competitor in ("native", "published"):
        call = competitor_call(competitor, case)
        assert call is not None
        call(*tensors)
        bytes_of[competitor] = peak_extra_bytes(functools.partial(call, *tensors))
    if bytes_of["native"] is not None and bytes_of["published"] is not None:
        assert bytes_of["native"] < bytes_of["published"]


def test_peak_memory_of_a_call() -> None:
    if not Path("/proc/self/clear_refs").is_file():
        pytest.skip("only Linux tells")
    measured = peak_extra_bytes(lambda: torch.ones(50_000_000, dtype=torch.uint8))
    assert measured is not None
    assert 45e6 < measured < 80e6


def test_sample_seconds_calls_often_enough() -> None:
    calls: list[int] = []
    samples = sample_seconds(lambda: calls.append(1), at_least_s=0.0, at_least_calls=4)
    assert len(samples) == len(calls) == 4
    assert median_ms([0.002, 0.001, 0.5]) == pytest.approx(2.0)
