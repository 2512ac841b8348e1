"""What a camera sees is found at its place in the feature maps, whatever the size of the images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bevperception.config_model import BackboneConfig, ModelConfig, NeckConfig, PerspectiveConfig
from bevperception.errors import ConfigError
from bevperception.models.bev.encoder import BEVEncoder, BEVEncoderLayer
from bevperception.models.bev.spatial_attention import project_pillars
from bevperception.models.bevformer import BEVFormer
from bevperception.models.image_padding import pad_images, padded_size
from bevperception.structures import CameraFrames
from tests.models.builders import random_frames, tiny_config, tiny_model

CHANNELS, ROWS, COLUMNS = 4, 6, 5


class PixelBackbone(nn.Module):
    """Maps that hold the image at the centres of their cells, as an ideal backbone's would.

    Args:
        strides: of the levels in pixels.
    """

    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.strides = strides

    def forward(self, images: Tensor) -> list[Tensor]:
        levels = []
        for stride in self.strides:
            bottom, right = (-side % stride for side in images.shape[-2:])
            whole = nn.functional.pad(images, (0, right, 0, bottom))
            half = stride // 2
            # A cell's centre lies between four pixels.
            near, far = slice(half - 1, None, stride), slice(half, None, stride)
            corners = [whole[..., a, b] for a in (near, far) for b in (near, far)]
            maps = torch.stack(corners).mean(0)  # (M, 3, h, w)
            levels.append(torch.cat((maps, torch.zeros_like(maps[:, :1])), dim=1))
        return levels


class Unchanged(nn.Module):
    """Stands where temporal attention stands and hands the queries on."""

    def forward(self, query: Tensor, *others: object) -> Tensor:
        return query


def reading_model(levels: int, first_stage: int, size_divisor: int | None = None) -> BEVFormer:
    """A model whose BEV features are what its cells' points see: the mean over cameras of (u, v, 1, 0).

    Args:
        levels: feature levels.
        first_stage: of the backbone, whose stride is 4 * 2**first_stage.
        size_divisor: of the neck.
    """
    base = tiny_config(
        channels=CHANNELS,
        rows=ROWS,
        columns=COLUMNS,
        layers=1,
        heads=1,
        x_range_m=(-1.0, 1.0),
        y_range_m=(-1.0, 1.0),
        z_range_m=(-0.5, 0.5),
    )
    config = replace(
        base,
        backbone=BackboneConfig("internimage_micro", out_indices=(first_stage,)),
        neck=NeckConfig(levels, size_divisor),
    )
    model = BEVFormer(config)
    # One point a pillar, one sampling point.
    layer = BEVEncoderLayer(
        channels=CHANNELS, heads=1, temporal_points=1, spatial_points=1, levels=levels, feedforward_channels=4
    )
    model.bev_transformer.encoder = BEVEncoder([layer], ROWS, COLUMNS, config.bev.range_m, pillar_points=1)
    model = model.double().eval()
    model.backbone = PixelBackbone(tuple(4 * 2 ** (first_stage + level) for level in range(levels)))
    model.neck = nn.Identity()
    layer.temporal_attention = Unchanged()
    layer.norm1 = layer.norm2 = layer.norm3 = layer.feed_forward = nn.Identity()
    with torch.no_grad():
        for parameter in (model.bev_queries.weight, model.bev_transformer.level_embeds):
            parameter.zero_()
        attention = layer.spatial_attention
        for linear in (attention.sampling_offsets, attention.attention_weights):
            linear.weight.zero_()
            linear.bias.zero_()
        for linear in (attention.value_proj, attention.output_proj):
            linear.weight.copy_(torch.eye(CHANNELS))
            linear.bias.zero_()
    return model


def pixel_frames(size: tuple[int, int], batch: int, cameras: int, seed: int) -> CameraFrames:
    """Images of their own pixel coordinates; cameras that look at the plane from all sides and heights."""
    height, width = size
    v, u = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) + 0.5,
        torch.arange(width, dtype=torch.float64) + 0.5,
        indexing="ij",
    )
    images = torch.stack((u, v, torch.ones_like(u))).expand(batch, cameras, 3, height, width)
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.zeros(batch, cameras, 4, 4, dtype=torch.float64)
    draw = torch.rand(batch, cameras, 2, 2, generator=generator, dtype=torch.float64) - 0.5
    matrices[:, :, :2, :2] = draw * torch.tensor([width, height])[:, None]
    matrices[:, :, 0, 3], matrices[:, :, 1, 3] = width / 2, height / 2
    matrices[:, :, 2, 3] = matrices[:, :, 3, 3] = 1.0  # everything at depth 1
    poses = torch.eye(4, dtype=torch.float64).expand(batch, 4, 4)
    return CameraFrames(images, matrices, poses, torch.zeros(batch, dtype=torch.float64))


def check_places(model: BEVFormer, frames: CameraFrames, margin: float) -> int:
    """Compare every cell with the pixels that its point projects to, one at a time.

    Args:
        model: of :func:`reading_model`.
        frames: of :func:`pixel_frames`.
        margin: cells with a projection nearer than this to an image's edge are left out, pixels.

    Returns:
        how many cells were compared.
    """
    height, width = frames.images.shape[-2:]
    with torch.no_grad():
        bev = model.encode(model.image_features(frames), frames, None)
    compared = 0
    for b in range(frames.batch_size):
        for row in range(ROWS):
            for column in range(COLUMNS):
                x, y = (column + 0.5) / COLUMNS * 2 - 1, (row + 0.5) / ROWS * 2 - 1
                point = torch.tensor([x, y, 0.0, 1.0], dtype=torch.float64)
                projected = [frames.bev_to_image[b, n] @ point for n in range(frames.images.shape[1])]
                pixels = [(float(p[0]), float(p[1])) for p in projected]
                seen = [(u, v) for u, v in pixels if 0 < u < width and 0 < v < height]
                if any(min(u, width - u, v, height - v) < margin for u, v in seen):
                    continue
                wanted = torch.zeros(CHANNELS, dtype=torch.float64)
                if seen:
                    wanted[:2] = torch.tensor(seen, dtype=torch.float64).mean(0)
                    wanted[2] = 1.0
                torch.testing.assert_close(bev[b, :, row, column], wanted, rtol=0, atol=1e-9)
                compared += 1
    return compared


@given(
    height=st.integers(97, 330),
    width=st.integers(97, 330),
    levels=st.integers(1, 4),
    first_stage=st.integers(0, 2),
    batch=st.integers(1, 3),
    cameras=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_pixels_are_found_at_any_size_and_stride(
    height: int, width: int, levels: int, first_stage: int, batch: int, cameras: int, seed: int
) -> None:
    model = reading_model(levels, first_stage)
    frames = pixel_frames((height, width), batch, cameras, seed)
    check_places(model, frames, margin=4.0 * 2 ** (first_stage + levels - 1))


@pytest.mark.parametrize("size", [(225, 400), (450, 800), (900, 1600), (224, 400), (231, 413)])
@pytest.mark.parametrize("levels", [3, 4])
def test_pixels_are_found_at_the_sizes_of_nuscenes(size: tuple[int, int], levels: int) -> None:
    frames = pixel_frames(size, batch=2, cameras=2, seed=5)
    assert check_places(reading_model(levels, first_stage=1), frames, margin=2.0 ** (levels + 2)) > 20


def test_a_missing_camera_changes_no_other_place() -> None:
    frames = pixel_frames((129, 257), batch=2, cameras=2, seed=1)
    mask = torch.tensor([[True, False], [False, True]])
    present = replace(
        frames,
        images=torch.stack([frames.images[0, :1], frames.images[1, 1:]]),
        bev_to_image=torch.stack([frames.bev_to_image[0, :1], frames.bev_to_image[1, 1:]]),
    )
    model = reading_model(2, first_stage=2)
    with torch.no_grad():
        masked = replace(frames, camera_mask=mask)
        got = model.encode(model.image_features(masked), masked, None)
        wanted = model.encode(model.image_features(present), present, None)
    torch.testing.assert_close(got, wanted)
    assert check_places(model, present, margin=32.0) > 20


def test_padding_is_not_visible() -> None:
    points = torch.zeros(1, 3, 3, dtype=torch.float64)
    points[0, :, 0] = torch.tensor([32.5, 32.99, 33.01])
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[2] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    matrix[1, 3] = 7.0
    fractions, visible = project_pillars(points, matrix[None, None], (20, 33), (32, 64))
    assert visible.flatten().tolist() == [True, True, False]
    torch.testing.assert_close(fractions[0, 0, :, 0, 0], points[0, :, 0] / 64)
    torch.testing.assert_close(fractions[0, 0, :, 0, 1], torch.full((3,), 7 / 32, dtype=torch.float64))


def test_size_divisor_follows_the_coarsest_level_that_is_sampled() -> None:
    def divisor(stages: tuple[int, ...], levels: int, feature_levels: int | None = None) -> int:
        config = replace(
            ModelConfig(),
            backbone=BackboneConfig(out_indices=stages),
            neck=NeckConfig(levels),
        )
        return replace(config, bev=replace(config.bev, feature_levels=feature_levels)).size_divisor

    assert divisor((1, 2, 3), 3) == 32
    assert divisor((1, 2, 3), 4) == 64
    assert divisor((1, 2, 3), 5, feature_levels=4) == 64
    assert divisor((0, 1), 2) == 32
    assert divisor((0, 3), 2) == 32
    assert divisor((0, 3), 3) == 64
    assert divisor((0, 3), 3, feature_levels=2) == 32
    assert replace(ModelConfig(), neck=NeckConfig(4, size_divisor=32)).size_divisor == 32
    with pytest.raises(ConfigError, match="size_divisor"):
        NeckConfig(4, size_divisor=16)


def test_strides_of_levels_are_those_of_stages_that_are_not_neighbours() -> None:
    base = tiny_config()
    config = replace(
        base,
        backbone=replace(base.backbone, out_indices=(0, 3)),
        neck=NeckConfig(levels=3),
        perspective=PerspectiveConfig(enabled=True),
    )
    model = tiny_model(config)
    assert config.level_strides == (4, 32, 64)
    assert model.perspective is not None
    assert model.perspective.strides == (4, 32, 64)
    with torch.no_grad():
        features = model.image_features(random_frames(size=(67, 101)))  # padded to 128 x 128
    assert [tuple(level.shape[-2:]) for level in features] == [(32, 32), (4, 4), (2, 2)]


def test_published_models_keep_their_fractions_of_levels_beyond_stride_32() -> None:
    # 928 rows are 14.5 cells of 64 pixels: published weights know 15, and fractions of 928.
    frames = pixel_frames((928, 320), batch=1, cameras=1, seed=3)
    model = reading_model(4, first_stage=1, size_divisor=32)
    features = model.image_features(frames)
    cameras = model.bev_transformer.camera_features(features, frames)
    assert cameras.spatial_shapes == [(116, 40), (58, 20), (29, 10), (15, 5)]
    assert cameras.image_size == cameras.padded_size == (928, 320)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (1, 1), (64, 96), (33, 95)])
def test_padding_of_images(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    padded = pad_images(images, 32)
    assert tuple(padded.shape[-2:]) == padded_size(size, 32)
    assert all(side % 32 == 0 for side in padded.shape[-2:])
    height, width = size
    assert torch.equal(padded[..., :height, :width], images)
    assert not padded[..., height:, :].any()
    assert not padded[..., width:].any()
    if tuple(padded.shape) == tuple(images.shape):
        assert padded.data_ptr() == images.data_ptr()


def test_blank_rows_below_change_nothing_beyond_them() -> None:
    """An image that the data padded by whole cells and one that the model pads are the same."""
    model = tiny_model()
    frames = random_frames(size=(67, 101))
    blank = replace(frames, images=nn.functional.pad(frames.images, (0, 27, 0, 29)))
    with torch.no_grad():
        got, wanted = model.image_features(frames), model.image_features(blank)
    for level, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(level, other)
