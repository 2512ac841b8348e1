"""Write pictures as PNG and MP4 files, with OpenCV's encoders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from bevperception.errors import BevError
from bevperception.files import write_bytes, writing
from bevperception.visualization.text import Image

_CODECS: Final = ("mp4v", "avc1")


class VideoError(BevError):
    """A picture or a video could not be written."""


def write_picture(path: str | Path, picture: Image) -> None:
    """Write a picture as a PNG file, which appears under its name only when it is complete.

    Args:
        path: of the file, ending in ``.png``; its folder is made.
        picture: (height, width, 3) uint8 RGB.

    Raises:
        VideoError: if the name does not end in ``.png``.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise VideoError(f"{target}: pictures are written as PNG; give the file a name that ends in .png.")
    done, encoded = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))
    if not done:
        raise VideoError(f"{target}: a picture of shape {picture.shape} could not be encoded as PNG.")
    write_bytes(target, encoded.tobytes())


def write_video(path: str | Path, pictures: Iterable[Image], frames_per_second: float) -> int:
    """Write pictures as an MP4 file, which appears under its name only when it is complete.

    Args:
        path: of the file; its folder is made.
        pictures: (height, width, 3) uint8 RGB, all of one size, taken one at a time. An odd last row or
            column is left out, since the codec wants even sizes.
        frames_per_second: how fast the pictures are shown; nuScenes key frames come at 2 a second.

    Returns:
        Number of pictures written.

    Raises:
        VideoError: if there is no picture, their sizes differ, no codec is there or the disk is full.
    """
    target = Path(path)
    with writing(target) as partial:
        count = _encode(partial, pictures, frames_per_second)
        kept = _frames_in(partial) if _is_finished(partial) else 0
        if kept != count:
            raise VideoError(
                f"{target}: the encoder kept {kept} of {count} pictures.\n"
                "The disk is probably full: free some space and run again."
            )
    return count


def _encode(path: Path, pictures: Iterable[Image], frames_per_second: float) -> int:
    writer: cv2.VideoWriter | None = None
    shape: tuple[int, ...] = ()
    count = 0
    try:
        for picture in pictures:
            if writer is None:
                shape = picture.shape
                writer = _open(path, shape, frames_per_second)
            if picture.shape != shape:
                raise VideoError(
                    f"{path.name}: picture {count} is {picture.shape[1]}x{picture.shape[0]}, the first was "
                    f"{shape[1]}x{shape[0]}; all pictures of a video must have one size."
                )
            even = picture[: shape[0] // 2 * 2, : shape[1] // 2 * 2]
            writer.write(np.ascontiguousarray(even[..., ::-1]))
            count += 1
    finally:
        if writer is not None:
            writer.release()
    if count == 0:
        raise VideoError("a video needs at least one picture, got none.")
    return count


def _open(path: Path, shape: tuple[int, ...], frames_per_second: float) -> cv2.VideoWriter:
    size = (shape[1] // 2 * 2, shape[0] // 2 * 2)
    for codec in _CODECS:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), frames_per_second, size)
        if writer.isOpened():
            return writer
        writer.release()
    raise VideoError(
        f"{path.name}: no MP4 could be opened for writing with the codecs {', '.join(_CODECS)}.\n"
        "Check that the folder is writable and that opencv-python-headless was built with FFmpeg."
    )


def _is_finished(path: Path) -> bool:
    """Whether an MP4 file has the index (moov) that is written last; FFmpeg reports its absence on stderr.

    Source: ISO/IEC 14496-12, 4.2: a box begins with its size (32 bits; 1 says that 64 follow the name).
    """
    with path.open("rb") as file:
        while len(head := file.read(16)) >= 8:
            size = int.from_bytes(head[:4], "big")
            if head[4:8] == b"moov":
                return True
            size = int.from_bytes(head[8:], "big") if size == 1 else size
            if size < 8:
                return False
            file.seek(size - len(head), 1)
    return False


def _frames_in(path: Path) -> int:
    reader = cv2.VideoCapture(str(path))
    try:
        return int(reader.get(cv2.CAP_PROP_FRAME_COUNT))
    finally:
        reader.release()
