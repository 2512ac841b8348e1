"""Which implementation of each operator is used, and why."""

from __future__ import annotations

import enum
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bevperception.errors import ConfigError
from bevperception.ops import native

BackendName = Literal["auto", "reference", "native"]
ENVIRONMENT_VARIABLE = "BEVPERCEPTION_OPS"
OPERATORS = ("ms_deform_attn", "deform_attn", "dcnv3", "deform_conv2d")
HOW_TO_BUILD_CUDA = "With nvcc, BEVPERCEPTION_CUDA=1 pip install -e . --no-build-isolation builds them"
HOW_TO_BUILD = "install a C++ compiler and run: pip install -e . --no-build-isolation"


class Backend(enum.Enum):
    """An implementation of the operators."""

    REFERENCE = "reference"
    NATIVE = "native"


@dataclass(frozen=True)
class OperatorBackend:
    """The implementation of one operator for CPU tensors, and the reason for it."""

    operator: str
    backend: Backend
    reason: str


@dataclass(frozen=True)
class BackendReport:
    """Describe the implementation of every operator.

    Args:
        operators: one entry an operator.
        requested: "auto", "reference" or "native".
        isa: instruction set that the native kernels use on this CPU; None without the library.
        library: file of the native library, or None if it is not loaded.
        problem: why the native library is not loaded, or None if it is.
    """

    operators: tuple[OperatorBackend, ...]
    requested: BackendName
    isa: str | None
    library: str | None
    problem: str | None


class _State:
    requested: BackendName | None = None  # None: not set by code, the environment decides
    warned: bool = False


def requested_backend() -> BackendName:
    """The backend that code or the environment asks for.

    Raises:
        ConfigError: the environment variable holds an unknown name.
    """
    if _State.requested is not None:
        return _State.requested
    return _known_name(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", f"{ENVIRONMENT_VARIABLE}=")


def predicts_on_cpu(*tensors: Tensor) -> bool:
    """Whether a layer may take its fast path for prediction: eager, on the CPU, without gradients.

    Args:
        tensors: inputs and parameters of the layer.
    """
    return (
        not torch.compiler.is_compiling()
        and requested_backend() != "reference"
        and all(tensor.device.type == "cpu" for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def set_backend(name: BackendName) -> None:
    """Choose the implementation for the whole process; overrides the environment variable.

    Args:
        name: "native" (an error if it is not built), "reference", or "auto": native where it is
            available, else the reference with one warning.

    Raises:
        ConfigError: unknown name, or native was asked for and is not available.
    """
    known = _known_name(name, "backend ")
    if known == "native":
        _require_native()
    _State.requested = known


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Choose the implementation inside a ``with`` block, for all threads; see :func:`set_backend`."""
    before = _State.requested
    set_backend(name)
    try:
        yield
    finally:
        _State.requested = before


def choose_backend(operator: str, device: torch.device) -> Backend:
    """The implementation to run for tensors of a device.

    Raises:
        ConfigError: native was asked for and is not available for the device.
    """
    requested = requested_backend()
    if requested == "reference":
        return Backend.REFERENCE
    if native.STATUS.loaded and device.type in native.DEVICES:
        return Backend.NATIVE
    if requested == "native":
        _require_native()
        raise ConfigError(
            f"the native {operator} has no kernel for {device.type} tensors, only for "
            f"{', '.join(native.DEVICES)}; choose the auto or the reference backend"
        )
    _warn_once(device)
    return Backend.REFERENCE


def backend_report() -> BackendReport:
    """Which implementation runs for each operator on the CPU, and why.

    Raises:
        ConfigError: the environment variable holds an unknown name.
    """
    requested = requested_backend()
    if requested == "reference":
        backend, reason = Backend.REFERENCE, "asked for"
    elif native.STATUS.loaded:
        backend, reason = Backend.NATIVE, f"{native.STATUS.library} with {native.cpu_isa()}"
    else:
        backend, reason = Backend.REFERENCE, f"{native.STATUS.problem}; {HOW_TO_BUILD}"
    return BackendReport(
        operators=tuple(OperatorBackend(name, backend, reason) for name in OPERATORS),
        requested=requested,
        isa=native.cpu_isa() if native.STATUS.loaded else None,
        library=native.STATUS.library,
        problem=native.STATUS.problem,
    )


def _known_name(name: str, origin: str) -> BackendName:
    if name not in ("auto", "reference", "native"):
        raise ConfigError(f"{origin}{name!r}: must be 'auto', 'reference' or 'native'")
    return name  # type: ignore[return-value]


def _require_native() -> None:
    if not native.STATUS.loaded:
        raise ConfigError(
            f"the native operators were asked for, but {native.STATUS.problem}.\n"
            f"To build them {HOW_TO_BUILD}; or choose the auto or the reference backend"
        )


def _warn_once(device: torch.device) -> None:
    if _State.warned or torch.compiler.is_compiling():
        return
    _State.warned = True
    if native.STATUS.loaded:
        why = f"the native operators have no kernels for {device.type} tensors"
        remedy = f" {HOW_TO_BUILD_CUDA}." if device.type == "cuda" else ""
    else:
        why, remedy = f"{native.STATUS.problem}", f" To build them {HOW_TO_BUILD}."
    warnings.warn(
        f"{why}: deformable attention and convolution run as plain PyTorch, about 10 times slower and with "
        f"several times the memory.{remedy}",
        stacklevel=4,
    )
