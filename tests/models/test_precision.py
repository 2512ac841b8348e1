"""Under autocast on a CPU, norms and attention train in float32 and predict in autocast's precision."""

from __future__ import annotations

import os
import platform
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from bevperception.models import precision
from bevperception.models.precision import LayerNorm, attend, resolve_precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_trains_in_single_precision(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 7).to(dtype).requires_grad_()
    norm = LayerNorm(7)
    nn.init.normal_(norm.weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    expected = functional.layer_norm(x.float(), (7,), norm.weight, norm.bias, norm.eps)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    gradient = torch.randn_like(found)
    wanted = torch.autograd.grad(expected, (x, norm.weight), gradient)
    for mine, other in zip(torch.autograd.grad(found, (x, norm.weight), gradient), wanted, strict=True):
        assert torch.equal(mine, other)


def test_layer_norm_is_the_usual_one_elsewhere() -> None:
    x = torch.randn(2, 7, dtype=torch.bfloat16)
    mine, usual = LayerNorm(7), nn.LayerNorm(7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert mine(x).dtype == usual(x).dtype
        assert torch.equal(mine(x), usual(x))
    double = x.double().requires_grad_()
    assert torch.equal(mine.double()(double), usual.double()(double))


def test_a_frozen_layer_norm_is_the_one_that_predicts() -> None:
    x, norm = torch.randn(5, 3, 7, dtype=torch.bfloat16), LayerNorm(7).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
        below = norm(x.clone().requires_grad_())
        with torch.no_grad():
            predicted = norm(x)
    assert found.dtype == predicted.dtype == torch.bfloat16
    assert torch.equal(found, predicted)
    assert below.dtype == torch.float32, "what is below it trains"


@pytest.mark.parametrize("masked", [False, True])
def test_attention_trains_in_single_precision(masked: bool) -> None:
    query, key, value = (torch.randn(2, 3, n, 5, dtype=torch.bfloat16, requires_grad=True) for n in (4, 6, 6))
    mask = torch.rand(2, 1, 1, 6) > 0.3 if masked else None
    if mask is not None:
        mask[..., 0] = True
    expected = functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(query, key, value, mask, 0.0)
        with torch.no_grad():
            predicted = attend(query, key, value, mask, 0.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert predicted.dtype == torch.bfloat16
    torch.testing.assert_close(predicted.float(), expected, atol=0.03, rtol=0.03)


def test_auto_takes_half_precision_only_where_the_processor_computes_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    for able, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(precision, "computes_bfloat16", lambda device, able=able: able)
        assert resolve_precision("auto", cpu) == expected
    with pytest.warns(UserWarning, match="does not compute in bfloat16"):
        assert resolve_precision("bf16-mixed", cpu) == "bf16-mixed"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_precision("32-true", cpu) == "32-true"
        assert resolve_precision("bf16-mixed", torch.device("meta")) == "bf16-mixed"


def test_the_processor_is_asked() -> None:
    if platform.machine() in ("x86_64", "AMD64") and Path("/proc/cpuinfo").is_file():
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].splitlines()[0].split())
        limited = os.environ.get("ONEDNN_MAX_CPU_ISA", "").startswith(("SSE", "AVX2"))
        expected = bool(flags & {"avx512_bf16", "amx_tile"}) and not limited
        assert precision.computes_bfloat16(torch.device("cpu")) == expected
    assert isinstance(precision.computes_bfloat16(torch.device("cpu")), bool)
    assert not precision.computes_bfloat16(torch.device("meta"))


@pytest.mark.parametrize("processor", [False, True])
@pytest.mark.parametrize("library", [False, True])
def test_processor_and_library_must_compute_in_it(
    processor: bool, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "ONEDNN_HAS_BFLOAT16", library)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: processor)
    assert precision.computes_bfloat16(torch.device("cpu")) == (processor and library)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert precision.computes_bfloat16(torch.device("cpu")) == library
