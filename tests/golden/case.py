"""A golden case: inputs, parameters, expected outputs and gradients of a published module.

Everything but the kind is read from the case's own ``meta`` and arrays; see cases/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference allowed, as a share of the largest magnitude of the expected array."""


@dataclass
class Case:
    """One case, to be computed in one dtype."""

    name: str
    meta: dict[str, Any]
    arrays: Mapping[str, np.ndarray]
    dtype: torch.dtype

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype = torch.float64) -> Case:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key != "meta"}
            meta = json.loads(str(file["meta"]))
        return cls(path.stem, meta, arrays, dtype)

    def array(self, key: str) -> Tensor:
        """An array as it is stored, floats in the case's dtype."""
        tensor = torch.from_numpy(np.array(self.arrays[key]))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def input(self, name: str, requires_grad: bool = True) -> Tensor:
        """``in.NAME``; tracks gradients if the case holds an expected gradient for it."""
        tensor = self.array(f"in.{name}").clone()
        return tensor.requires_grad_(requires_grad and f"gin.{name}" in self.arrays)

    def has(self, key: str) -> bool:
        return key in self.arrays

    def parameters(self) -> dict[str, Tensor]:
        """All ``param.*`` by their published names."""
        return {k[len("param.") :]: self.array(k) for k in self.arrays if k.startswith("param.")}

    def load_into(
        self, module: nn.Module, rename: Callable[[str], str | None], skip: Iterable[str] = ()
    ) -> None:
        """Load the published parameters under the project's names; every key must be used on both sides."""
        state = {
            str(rename(k)): v
            for k, v in self.parameters().items()
            if not k.startswith(tuple(skip) or ("\0",))
        }
        module.to(self.dtype).load_state_dict(state, strict=True)

    def load_into_partial(self, module: nn.Module, missing: set[str]) -> None:
        """Load parameters of a part of a module; exactly ``missing`` stays as it was."""
        report = module.to(self.dtype).load_state_dict(self.parameters(), strict=False)
        assert set(report.missing_keys) == missing, report
        assert not report.unexpected_keys, report

    def check(self, key: str, actual: Tensor) -> None:
        """Compare with an expected array of the same shape."""
        expected = torch.from_numpy(np.array(self.arrays[key]))
        assert tuple(actual.shape) == tuple(expected.shape), (
            f"{self.name} {key}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
        if not expected.is_floating_point():
            assert torch.equal(actual.to(expected.dtype).cpu(), expected), f"{self.name} {key}: values differ"
            return
        if expected.numel() == 0:
            return
        a, e = actual.detach().double().cpu(), expected.double()
        assert torch.equal(torch.isnan(a), torch.isnan(e)), f"{self.name} {key}: NaNs in other places"
        a, e = a.nan_to_num(0.0, posinf=1e300, neginf=-1e300), e.nan_to_num(0.0, posinf=1e300, neginf=-1e300)
        scale = max(float(e.abs().max()), 1e-12)
        difference = float((a - e).abs().max()) / scale
        assert difference <= TOLERANCE[self.dtype], (
            f"{self.name} {key}: relative difference {difference:.3g} > {TOLERANCE[self.dtype]:.0e}"
        )

    def check_gradients(
        self,
        outputs: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        module: nn.Module | None = None,
        rename: Callable[[str], str | None] = lambda name: name,
    ) -> None:
        """Backpropagate sum(output * cotangent) and compare every stored gradient.

        Args:
            outputs: by the name after ``cot.``; those without a stored cotangent are left out.
            inputs: by the name after ``gin.``.
            module: whose parameters ``gparam.*`` speak of.
            rename: published parameter name to the module's.
        """
        terms = [(outputs[k] * self.array(f"cot.{k}")).sum() for k in outputs if f"cot.{k}" in self.arrays]
        assert terms, f"{self.name}: no cotangent matches the outputs {sorted(outputs)}"
        torch.stack(terms).sum().backward()
        own = dict(module.named_parameters()) if module is not None else {}
        for key in self.arrays:
            if key.startswith("gin."):
                gradient = inputs[key[len("gin.") :]].grad
            elif key.startswith("gparam."):
                # A part that is switched off has no parameters here; its expected gradient is zero.
                parameter = own.get(str(rename(key[len("gparam.") :])))
                gradient = None if parameter is None else parameter.grad
            else:
                continue
            expected_shape = self.arrays[key].shape
            self.check(key, torch.zeros(expected_shape) if gradient is None else gradient)


Adapter = Callable[[Case], None]


@dataclass(frozen=True)
class Registered:
    """An adapter and whether the native operators matter to it."""

    run: Adapter
    uses_ops: bool
    dtypes: tuple[torch.dtype, ...]


ADAPTERS: dict[str, Registered] = {}


def adapter(
    kind: str, uses_ops: bool = False, dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
) -> Callable[[Adapter], Adapter]:
    """Register the function that runs and checks cases of a kind."""

    def register(function: Adapter) -> Adapter:
        assert kind not in ADAPTERS, f"two adapters for {kind}"
        ADAPTERS[kind] = Registered(function, uses_ops, dtypes)
        return function

    return register


def kind_of(name: str, kinds: Iterable[str]) -> str | None:
    """The longest kind that a case's name starts with (followed by ``_`` or nothing)."""
    fitting = [k for k in kinds if name == k or name.startswith(k + "_")]
    return max(fitting, key=len, default=None)
