"""Operators with a plain-PyTorch reference and, where built, a native implementation."""

from bevperception.ops.backend import (
    Backend,
    BackendReport,
    OperatorBackend,
    backend_report,
    set_backend,
    use_backend,
)
from bevperception.ops.deformable_attention import ms_deform_attn, ms_deform_attn_reference
from bevperception.ops.deformable_convolution import dcnv3, dcnv3_reference
from bevperception.ops.fused_attention import CompressedRows, deform_attn, deform_attn_unfused
from bevperception.ops.modulated_convolution import deform_conv2d, deform_conv2d_reference

__all__ = [
    "Backend",
    "BackendReport",
    "CompressedRows",
    "OperatorBackend",
    "backend_report",
    "dcnv3",
    "dcnv3_reference",
    "deform_attn",
    "deform_attn_unfused",
    "deform_conv2d",
    "deform_conv2d_reference",
    "ms_deform_attn",
    "ms_deform_attn_reference",
    "set_backend",
    "use_backend",
]
