"""The arithmetic headers as device code: what CUDA kernels will share with the CPU kernels."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

COMMON = Path(__file__).resolve().parents[2] / "ops" / "csrc" / "common"
KERNEL = """
#include "dcnv3.h"
#include "ms_deform_attn.h"
using namespace bevperception;
__global__ void probe(const float* in, float* out, Dcnv3Sizes sizes) {
  const Tap tap = kernel_tap(sizes, int32_t(threadIdx.x));
  const float x = tap_position<float>(in[0], float(tap.x), in[1], in[2]);
  const float y = location_to_position<float>(in[3], 7.0f);
  const auto along_x = sample_axis<float, int32_t>(x, 5.0f, 5);
  const auto along_y = sample_axis<float, int32_t>(y, 7.0f, 7);
  const auto gradient = point_gradient<float, int32_t>(along_x, along_y, in[4], in[5], in[6], in[7], in[8]);
  out[threadIdx.x] = gradient.weight + gradient.x + gradient.y + float(sizes.points());
}
"""


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.skipif(find_nvcc() is None, reason="no CUDA compiler (nvcc)")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_headers_compile_as_device_code_without_pytorch(architecture: str, tmp_path: Path) -> None:
    source, target = tmp_path / "probe.cu", tmp_path / "probe.cubin"
    source.write_text(KERNEL)
    command = [
        find_nvcc(),
        "-std=c++17",
        f"-arch={architecture}",
        "-cubin",
        f"-I{COMMON}",
        "-o",
        target,
        source,
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"probe" in target.read_bytes()
