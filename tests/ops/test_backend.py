"""Choosing a backend: names, environment, messages, the warning, the report."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from bevperception.errors import ConfigError
from bevperception.ops import Backend, backend, backend_report, native, set_backend, use_backend
from tests.ops.problems import AttentionProblem, needs_native

NOT_BUILT = native.LibraryStatus(None, "the native operators are not built (_C.abi3.so is missing)")


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backend._State, "requested", None)
    monkeypatch.setattr(backend._State, "warned", False)
    return


def run() -> torch.Tensor:
    problem = AttentionProblem()
    return problem.run(*problem.tensors())


def test_use_backend_restores_also_after_an_error() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backend.requested_backend() == "auto"
    with use_backend("reference"):
        assert backend.choose_backend("dcnv3", torch.device("cpu")) is Backend.REFERENCE


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'fast': must be 'auto', 'reference' or 'native'"):
        set_backend("fast")  # type: ignore[arg-type]
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "quick")
    with pytest.raises(ConfigError, match="BEVPERCEPTION_OPS='quick'"):
        run()


def test_environment_chooses_and_code_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "reference")
    assert backend_report().requested == "reference"
    assert all(entry.backend is Backend.REFERENCE for entry in backend_report().operators)
    set_backend("auto")
    assert backend_report().requested == "auto"


def test_auto_warns_once_and_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "STATUS", NOT_BUILT)
    with pytest.warns(UserWarning, match="not built.*plain PyTorch, about 10 times slower.*pip install"):
        run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


def test_native_without_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "STATUS", NOT_BUILT)
    with pytest.raises(ConfigError, match=r"not built.*\n.*pip install"):
        set_backend("native")
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "native")
    with pytest.raises(ConfigError, match="not built"):
        run()
    report = backend_report()
    assert report.isa is None
    assert report.problem == NOT_BUILT.problem
    assert all("pip install" in entry.reason for entry in report.operators)


@needs_native
def test_report_names_library_and_instruction_set() -> None:
    report = backend_report()
    assert report.library is not None
    assert Path(report.library).is_file()
    assert report.isa in native.available_cpu_isas()
    assert {entry.operator for entry in report.operators} == set(backend.OPERATORS)
    assert all(entry.backend is Backend.NATIVE for entry in report.operators)


@needs_native
def test_native_without_kernel_for_the_device() -> None:
    device = torch.device("xpu")
    with use_backend("native"), pytest.raises(ConfigError, match="no kernel for xpu tensors"):
        backend.choose_backend("dcnv3", device)
    with pytest.warns(UserWarning, match="no kernels for xpu"):
        assert backend.choose_backend("dcnv3", device) is Backend.REFERENCE


@needs_native
def test_unknown_instruction_set() -> None:
    with pytest.raises(RuntimeError, match=r"no instruction set 'mmx'.*it has: .*baseline"):
        native.select_cpu_isa("mmx")


def _run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    variables = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=120
    )


@needs_native
def test_instruction_set_by_environment() -> None:
    code = (
        "from bevperception.ops import backend_report; print(backend_report().isa, backend_report().problem)"
    )
    assert _run_python(code, BEVPERCEPTION_CPU_ISA="baseline").stdout.split() == ["baseline", "None"]
    assert "no instruction set 'mmx'" in _run_python(code, BEVPERCEPTION_CPU_ISA="mmx").stdout


@needs_native
def test_the_environment_limits_the_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a smaller processor: nothing above the limit is there, by name or by itself."""
    everything = native.available_cpu_isas()
    best = native.cpu_isa()
    assert best == everything[0]
    assert everything[-1] == "baseline"
    try:
        for k, limit in enumerate(everything):
            monkeypatch.setenv(native.ISA_VARIABLE, limit)
            assert native.available_cpu_isas() == everything[k:]
            native.select_cpu_isa(None)
            assert native.cpu_isa() == limit
            for better in everything[:k]:
                with pytest.raises(RuntimeError, match=f"no instruction set '{better}'; it has: {limit}"):
                    native.select_cpu_isa(better)
    finally:
        native.select_cpu_isa("baseline")
        monkeypatch.undo()
        native.select_cpu_isa(None)
    assert native.cpu_isa() == best
    monkeypatch.setenv(native.ISA_VARIABLE, "mmx")
    with pytest.raises(RuntimeError, match=r"no instruction set 'mmx' \(BEVPERCEPTION_CPU_ISA\); it has: "):
        native.available_cpu_isas()


def test_damaged_library_leaves_the_reference(tmp_path: Path) -> None:
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"not a library")
    status = native._load(library)
    assert not status.loaded
    assert "_C.abi3.so cannot be used" in str(status.problem)
