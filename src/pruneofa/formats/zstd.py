"""zstd from Python's standard library (3.14), or its backport, which is a tenth of the size of other packages."""

import sys

if sys.version_info >= (3, 14):
    from compression.zstd import (
        CompressionParameter,
        DecompressionParameter,
        ZstdCompressor,
        ZstdError,
        ZstdFile,
        get_frame_info,
    )
else:
    from backports.zstd import (
        CompressionParameter,
        DecompressionParameter,
        ZstdCompressor,
        ZstdError,
        ZstdFile,
        get_frame_info,
    )

__all__ = ["CompressionParameter", "DecompressionParameter", "ZstdCompressor", "ZstdError", "ZstdFile",
           "get_frame_info", "window_size"]  # fmt: skip


def window_size(frame: bytes) -> int:
    """Window size in bytes of a frame, from its header (RFC 8878, 3.1.1.1).

    `frame` begins with a header that `get_frame_info` accepts. libzstd applies its own window limit only when it
    needs the window, not for a frame that is decompressed in one piece.
    """
    if frame[4] & 0x20:  # a single segment: the window is the content, whose size is then stated
        return get_frame_info(frame).decompressed_size or 0
    power = 1 << (10 + (frame[5] >> 3))
    return power + power // 8 * (frame[5] & 7)
