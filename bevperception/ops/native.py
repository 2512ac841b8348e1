"""The native library: loading it, and what its operators need on the Python side.

The library (ops/csrc) defines the operators and their CPU kernels, and if it was built so their CUDA
kernels, in the namespace ``torch.ops.bevperception``; shapes for tracing, gradients and autocast are
registered here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY_PATH = Path(__file__).resolve().parent.parent / "_C.abi3.so"
ISA_VARIABLE = "BEVPERCEPTION_CPU_ISA"


@dataclass(frozen=True)
class LibraryStatus:
    """Whether the native library is loaded: its file, or what is wrong."""

    library: str | None
    problem: str | None

    @property
    def loaded(self) -> bool:
        """True if the native operators can be called."""
        return self.library is not None


def cpu_isa() -> str:
    """Instruction set that the native CPU kernels use: "avx512", "avx2" or "baseline".

    Raises:
        AttributeError: the library is not loaded.
    """
    return str(torch.ops.bevperception.cpu_isa())


def cuda_architectures() -> tuple[str, ...]:
    """Architectures that the CUDA kernels were built for, such as "90"; none without CUDA kernels."""
    if not (STATUS.loaded and hasattr(torch.ops.bevperception, "cuda_architectures")):
        return ()
    return tuple(str(torch.ops.bevperception.cuda_architectures()).split())


def available_cpu_isas() -> list[str]:
    """Instruction sets that this CPU and the library both have, best first.

    ``BEVPERCEPTION_CPU_ISA`` is an upper limit: what is better is left out, as on a smaller processor.

    Raises:
        AttributeError: the library is not loaded.
        RuntimeError: the limit is not among them.
    """
    names = str(torch.ops.bevperception.available_cpu_isas()).split()
    limit = os.environ.get(ISA_VARIABLE)
    if not limit:
        return names
    if limit not in names:
        raise RuntimeError(f"no instruction set {limit!r} ({ISA_VARIABLE}); it has: {' '.join(names)}")
    return names[names.index(limit) :]


def select_cpu_isa(name: str | None) -> None:
    """Make the native CPU kernels use an instruction set; for tests and comparisons.

    Args:
        name: one of :func:`available_cpu_isas`; None selects the best of them again.

    Raises:
        AttributeError: the library is not loaded.
        RuntimeError: the CPU or the library lacks it, or it is above the limit.
    """
    names = available_cpu_isas()
    if name is not None and name not in names:
        raise RuntimeError(f"no instruction set {name!r}; it has: {' '.join(names)}")
    torch.ops.bevperception.select_cpu_isa(name or names[0])


def _load(path: Path) -> LibraryStatus:
    if not path.is_file():
        return LibraryStatus(None, f"the native operators are not built ({path.name} is missing)")
    try:
        torch.ops.load_library(path)
        _register()
        _register_fused()
        torch.library.register_fake("bevperception::layer_norm")(_fake_rows)
        torch.library.register_fake("bevperception::softmax")(_fake_rows)
        select_cpu_isa(None)
    except (OSError, RuntimeError) as error:
        return LibraryStatus(None, f"{path.name} cannot be used ({error})")
    return LibraryStatus(str(path), None)


def _register() -> None:
    for name, fake, setup, backward in (
        ("ms_deform_attn", _fake_ms_deform_attn, _setup_ms_deform_attn, _backward_ms_deform_attn),
        ("dcnv3", _fake_dcnv3, _setup_dcnv3, _backward_dcnv3),
    ):
        operator, gradient = f"bevperception::{name}", f"bevperception::{name}_backward"
        torch.library.register_fake(operator)(fake)
        torch.library.register_fake(gradient)(_fake_gradients)
        torch.library.register_autograd(operator, backward, setup_context=setup)
        torch.library.register_autograd(gradient, _no_second_derivative)
        for device in ("cpu", "cuda"):
            torch.library.register_autocast(operator, device, torch.float32)


def _register_fused() -> None:
    """The fused operator, and the orders of adding that only a GPU has to choose between."""
    operator = "bevperception::deform_attn"
    torch.library.register_fake(operator)(_fake_deform_attn)
    torch.library.register_autograd(operator, _backward_deform_attn, setup_context=_setup_deform_attn)
    torch.library.register_fake("bevperception::deform_attn_backward")(_fake_deform_attn_gradients)
    torch.library.register_autograd("bevperception::deform_attn_backward", _no_second_derivative)
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(operator, device, torch.float32)
    if not hasattr(torch.ops.bevperception, "cuda_architectures"):
        return
    for name in ("ms_deform_attn", "dcnv3"):
        in_order = f"bevperception::{name}_backward_in_order"
        torch.library.register_fake(in_order)(_fake_gradients)
        torch.library.register_autograd(in_order, _no_second_derivative)


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "the native operators have no second derivative; "
        "compute it with bevperception.ops.use_backend('reference')"
    )


def _fake_rows(rows: Tensor, *settings: Any) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _gradient_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _fake_gradients(output_gradient: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    return tuple(t.new_empty(t.shape, dtype=_gradient_dtype(t)) for t in tensors)


def _gradients_by(name: str, like: Tensor) -> Any:
    """The backward operator: on a GPU, if determinism is asked for, the one that adds in a fixed order."""
    in_order = like.is_cuda and torch.are_deterministic_algorithms_enabled()
    return getattr(torch.ops.bevperception, f"{name}_backward_in_order" if in_order else f"{name}_backward")


def _fake_ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


def _setup_ms_deform_attn(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)
    ctx.spatial_shapes = spatial_shapes


def _backward_ms_deform_attn(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    value_gradient, locations_gradient, weights_gradient = _gradients_by("ms_deform_attn", value)(
        gradient, value, ctx.spatial_shapes, sampling_locations, attention_weights
    )
    return value_gradient.to(value.dtype), None, locations_gradient, weights_gradient


def _fake_deform_attn(
    value: Tensor, spatial_shapes: Sequence[int], offsets: Tensor, logits: Tensor, *settings: Any
) -> Tensor:
    return value.new_empty(logits.shape[0], value.shape[2] * value.shape[3])


def _setup_deform_attn(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, offsets, logits, references, ctx.anchors, ctx.groups, *rows = inputs
    ctx.save_for_backward(value, offsets, logits, references, *rows)


def _backward_deform_attn(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    value, offsets, logits, references, *rows = ctx.saved_tensors
    of_references = ctx.needs_input_grad[4]
    value_gradient, offsets_gradient, logits_gradient, found = torch.ops.bevperception.deform_attn_backward(
        gradient,
        value,
        ctx.spatial_shapes,
        offsets,
        logits,
        references,
        ctx.anchors,
        ctx.groups,
        *rows,
        of_references,
    )
    gradients = (offsets_gradient, logits_gradient, found if of_references else None)
    return value_gradient.to(value.dtype), None, *gradients, None, None, None, None


def _fake_deform_attn_gradients(
    output_gradient: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    offsets: Tensor,
    logits: Tensor,
    references: Tensor,
    *settings: Any,
) -> tuple[Tensor, ...]:
    entries = references.shape[0] if settings[-1] else 0
    shapes = (value.shape, offsets.shape, logits.shape, (entries, *references.shape[1:]))
    return tuple(value.new_empty(shape, dtype=_gradient_dtype(value)) for shape in shapes)


def _fake_dcnv3(input: Tensor, offset: Tensor, mask: Tensor, *settings: Any) -> Tensor:
    return input.new_empty(*offset.shape[:3], input.shape[3])


def _setup_dcnv3(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _backward_dcnv3(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once only: activation checkpointing refuses a second time
    input = saved[0]
    of_input, *others = _gradients_by("dcnv3", input)(gradient, *saved, *ctx.settings)
    return (of_input.to(input.dtype), *others, *(None for _ in ctx.settings))


STATUS = _load(LIBRARY_PATH)
DEVICES = ("cpu", "meta", "cuda") if cuda_architectures() else ("cpu", "meta")
"""Types of devices that the library has kernels for."""
