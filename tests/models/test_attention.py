"""Attention modules and projection against slow, readable loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bevperception.models.bev.encoder import BEVEncoder, BEVEncoderLayer, CameraFeatures
from bevperception.models.bev.grid import LearnedPositionalEncoding, pillar_reference_points
from bevperception.models.bev.spatial_attention import SpatialCrossAttention, find_hits, project_pillars
from bevperception.models.bev.temporal_attention import TemporalSelfAttention
from bevperception.models.heads.decoder import DeformableCrossAttention, inverse_sigmoid, refine_code
from tests.models.builders import camera_ring

SHAPES = [(5, 9), (3, 4)]


def bilinear(feature_map: Tensor, x: float, y: float) -> Tensor:
    """One sample of a (h, w, c) map at pixel coordinates, zeros outside."""
    height, width, channels = feature_map.shape
    x0, y0 = math.floor(x), math.floor(y)
    out = torch.zeros(channels, dtype=feature_map.dtype)
    for row, wy in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
        for column, wx in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
            if 0 <= row < height and 0 <= column < width:
                out += wx * wy * feature_map[row, column]
    return out


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)


def slow_spatial(
    module: SpatialCrossAttention, query: Tensor, value: Tensor, points: Tensor, visible: Tensor
) -> Tensor:
    """Spatial cross-attention, one scalar location at a time; see the module for the shapes."""
    batch, queries, channels = query.shape
    heads, levels, samples = module.heads, *module.groups, module.points
    width = channels // heads
    out = torch.zeros_like(query)
    for b in range(batch):
        for q in range(queries):
            offsets = module.sampling_offsets(query[b, q]).view(heads, levels, samples, 2)
            weights = module.attention_weights(query[b, q]).view(heads, -1).softmax(-1)
            weights = weights.view(heads, levels, samples)
            total, seen = torch.zeros(channels, dtype=query.dtype), 0
            for n in range(value.shape[1]):
                if not visible[b, n, q].any():
                    continue
                seen += 1
                projected = module.value_proj(value[b, n])
                start = 0
                for level, (h, w) in enumerate(SHAPES):
                    grid = projected[start : start + h * w].view(h, w, heads, width)
                    start += h * w
                    for head in range(heads):
                        for p in range(samples):
                            anchor = points[b, n, q, p % points.shape[3]]
                            x = float(anchor[0] * w + offsets[head, level, p, 0] - 0.5)
                            y = float(anchor[1] * h + offsets[head, level, p, 1] - 0.5)
                            sampled = bilinear(grid[:, :, head], x, y)
                            total[head * width : (head + 1) * width] += weights[head, level, p] * sampled
            out[b, q] = total / max(seen, 1)
    return query + module.output_proj(out)


@torch.no_grad()
def test_spatial_attention_against_loops() -> None:
    torch.manual_seed(1)
    module = SpatialCrossAttention(12, 3, points=4, levels=2).double()
    randomise(module)
    query = torch.randn(2, 7, 12, dtype=torch.float64)
    value = torch.randn(2, 3, 57, 12, dtype=torch.float64)
    points = torch.rand(2, 3, 7, 2, 2, dtype=torch.float64) * 1.4 - 0.2
    visible = torch.rand(2, 3, 7, 2) > 0.5
    visible[0, :, 3] = False  # a query that no camera sees
    hits = find_hits(points, visible, None, torch.float64)
    expected = slow_spatial(module, query, value, points, visible)
    torch.testing.assert_close(module(query, value, SHAPES, hits), expected)
    torch.testing.assert_close(expected[0, 3], query[0, 3] + module.output_proj.bias)


@torch.no_grad()
def test_temporal_attention_against_loops() -> None:
    torch.manual_seed(2)
    rows, columns, channels, heads, samples = 4, 3, 8, 2, 3
    module = TemporalSelfAttention(channels, heads, samples).double()
    randomise(module)
    batch, cells = 2, rows * columns
    query, position = torch.randn(2, batch, cells, channels, dtype=torch.float64)
    value = torch.randn(batch, 2, cells, channels, dtype=torch.float64)
    points = torch.rand(batch, 2, cells, 1, 2, dtype=torch.float64)
    out = module(query, position, value, points, [(rows, columns)])
    width = channels // heads
    for b in range(batch):
        for q in range(cells):
            both = torch.cat((value[b, 0, q], query[b, q] + position[b, q]))
            offsets = module.sampling_offsets(both).view(heads, 2, samples, 2)
            weights = module.attention_weights(both).view(heads, 2, samples).softmax(-1)
            mean = torch.zeros(channels, dtype=torch.float64)
            for half in range(2):
                grid = module.value_proj(value[b, half]).view(rows, columns, heads, width)
                for head in range(heads):
                    for p in range(samples):
                        x = float(points[b, half, q, 0, 0] * columns + offsets[head, half, p, 0] - 0.5)
                        y = float(points[b, half, q, 0, 1] * rows + offsets[head, half, p, 1] - 0.5)
                        part = weights[head, half, p] * bilinear(grid[:, :, head], x, y)
                        mean[head * width : (head + 1) * width] += part / 2
            torch.testing.assert_close(out[b, q], query[b, q] + module.output_proj(mean))


def test_untrained_attention_looks_where_it_is_told() -> None:
    attention = SpatialCrossAttention(8, 4, 6, 2)
    published = attention.sampling_offsets.bias.view(4, 2, 6, 2)
    assert torch.allclose(published.abs().amax(-1), torch.arange(1.0, 7.0).expand(4, 2, 6))
    with torch.no_grad():
        attention.sampling_offsets.weight.fill_(1.0)
    attention.init_offsets(1.5, anchors=2)  # three points from each of two pillar points
    offsets = attention.sampling_offsets.bias.view(4, 2, 6, 2)
    assert torch.allclose(offsets.abs().amax(-1), torch.tensor([0, 0, 0.75, 0.75, 1.5, 1.5]).expand(4, 2, 6))
    assert torch.allclose(offsets.sum(0), torch.zeros(2, 6, 2), atol=1e-6)  # to all four sides
    assert not attention.sampling_offsets.weight.any()
    attention.init_offsets(2.0, anchors=6)  # one point from each: there is no outermost
    assert not attention.sampling_offsets.bias.any()


def test_projection_against_one_point_at_a_time() -> None:
    size = (45, 80)
    matrices = torch.stack([camera_ring(3, *size)] * 2)
    points_m = pillar_reference_points(4, 5, 8.0, 3) * 60 - 30
    points, visible = project_pillars(points_m, matrices, size, size)
    assert points.shape == (2, 3, 20, 3, 2)
    assert 0 < visible.sum() < visible.numel()
    for n in range(3):
        for q in range(20):
            for d in range(3):
                x, y, depth, _ = (matrices[1, n] @ torch.cat((points_m[d, q], torch.ones(1)))).tolist()
                u, v = x / max(depth, 1e-5) / 80, y / max(depth, 1e-5) / 45
                assert bool(visible[1, n, q, d]) == (depth > 1e-5 and 0 < u < 1 and 0 < v < 1)
                torch.testing.assert_close(points[1, n, q, d], torch.tensor([u, v], dtype=torch.float64))


def test_hits_leave_masked_cameras_out() -> None:
    points = torch.zeros(2, 2, 3, 1, 2)
    visible = torch.ones(2, 2, 3, 1, dtype=torch.bool)
    hits = find_hits(points, visible, torch.tensor([[True, False], [False, False]]), torch.float32)
    assert hits.rows.map_of.tolist() == [0, 0, 0]
    assert hits.rows.row_start.tolist() == [0, 1, 2, 3, 3, 3, 3]


def test_gradients_of_the_attentions() -> None:
    torch.manual_seed(3)
    spatial = SpatialCrossAttention(4, 2, points=2, levels=2).double()
    randomise(spatial)
    query = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    value = torch.randn(1, 2, 57, 4, dtype=torch.float64, requires_grad=True)
    points = torch.rand(1, 2, 3, 2, 2, dtype=torch.float64)
    hits = find_hits(points, torch.rand(1, 2, 3, 2) > 0.3, None, torch.float64)
    assert torch.autograd.gradcheck(lambda q, v: spatial(q, v, SHAPES, hits), (query, value))
    cross = DeformableCrossAttention(4, 2, 2).double()
    randomise(cross)
    bev = torch.randn(1, 12, 4, dtype=torch.float64, requires_grad=True)
    reference = torch.rand(1, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, b, r: cross(q, torch.zeros_like(q), b, r, [(4, 3)]), (query, bev, reference)
    )


def test_encoder_geometry_stays_float64_in_half_precision() -> None:
    layer = BEVEncoderLayer(8, 2, 2, 2, 1, 8)
    encoder = BEVEncoder([layer], 3, 5, (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0), 2)
    before = encoder.pillar_points_m.clone()
    encoder.to(torch.bfloat16)
    assert torch.equal(encoder.pillar_points_m, before)
    assert encoder.layers[0].norm1.weight.dtype == torch.bfloat16
    cameras = CameraFeatures(
        torch.randn(1, 2, 12, 8, dtype=torch.bfloat16),
        [(3, 4)],
        camera_ring(2, 30, 40)[None],
        (30, 40),
        (30, 40),
    )
    out = encoder(torch.randn(1, 15, 8).bfloat16(), torch.randn(1, 15, 8).bfloat16(), cameras)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_temporal_attention_has_heads_of_its_own() -> None:
    layer = BEVEncoderLayer(8, 2, 3, 2, 1, 8, temporal_heads=4)
    assert (layer.temporal_attention.heads, layer.spatial_attention.heads) == (4, 2)
    assert layer.temporal_attention.attention_weights.out_features == 4 * 2 * 3  # heads, halves, points
    assert BEVEncoderLayer(8, 2, 3, 2, 1, 8).temporal_attention.heads == 2


def test_positional_encoding_halves() -> None:
    encoding = LearnedPositionalEncoding(6, 4, 5)
    out = encoding(3, 2).view(3, 2, 6)
    assert torch.equal(out[2, 1, :3], encoding.col_embed.weight[1])
    assert torch.equal(out[2, 1, 3:], encoding.row_embed.weight[2])


def test_refine_code_moves_only_the_centre() -> None:
    code, reference = torch.zeros(1, 2, 10), torch.rand(1, 2, 3)
    code[..., 2:4], code[..., 5:] = 3.0, 4.0
    refined = refine_code(code, reference)
    torch.testing.assert_close(refined[..., [0, 1, 4]], reference)
    assert (refined[..., 2:4] == 3).all()
    assert (refined[..., 5:] == 4).all()
    assert inverse_sigmoid(torch.tensor([0.0, 1.0, 2.0, -1.0])).isfinite().all()
