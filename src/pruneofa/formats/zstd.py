"""zstd from Python's standard library (3.14), or its backport, which is a tenth of the size of other packages."""

import sys
from typing import BinaryIO

if sys.version_info >= (3, 14):
    from compression.zstd import (
        CompressionParameter,
        DecompressionParameter,
        ZstdCompressor,
        ZstdDecompressor,
        ZstdError,
        ZstdFile,
        get_frame_info,
    )
else:
    from backports.zstd import (
        CompressionParameter,
        DecompressionParameter,
        ZstdCompressor,
        ZstdDecompressor,
        ZstdError,
        ZstdFile,
        get_frame_info,
    )

__all__ = ["CompressionParameter", "Frame", "ZstdCompressor", "ZstdError", "ZstdFile",
           "get_frame_info", "window_size"]  # fmt: skip

_CHUNK = 1 << 17  # bytes read at a time


class Frame:
    """Reads the first frame of `raw`, an open file; a `ZstdFile` would go on with every further frame."""

    def __init__(self, raw: BinaryIO, largest_window: int) -> None:
        self._raw = raw
        limit = {int(DecompressionParameter.window_log_max): largest_window.bit_length() - 1}
        self._frame = ZstdDecompressor(options=limit)

    def readinto(self, view: memoryview) -> int:
        """Fill the beginning of `view`; the number of bytes, 0 at the end. Raises ZstdError and EOFError."""
        while not self._frame.eof:
            more = self._raw.read(_CHUNK) if self._frame.needs_input else b""
            if self._frame.needs_input and not more:
                raise EOFError("the frame is cut off")
            if found := self._frame.decompress(more, len(view)):
                view[: len(found)] = found
                return len(found)
        return 0

    def read(self, count: int) -> bytes:
        """At most `count` bytes; after the end of the frame, of what the file has behind it."""
        buffer = bytearray(count)
        if got := self.readinto(memoryview(buffer)):
            return bytes(buffer[:got])
        return self._frame.unused_data[:count] or self._raw.read(count)


def window_size(frame: bytes) -> int:
    """Window size in bytes of a frame, from its header (RFC 8878, 3.1.1.1).

    `frame` begins with a header that `get_frame_info` accepts. libzstd applies its own window limit only when it
    needs the window, not for a frame that is decompressed in one piece.
    """
    if frame[4] & 0x20:  # a single segment: the window is the content, whose size is then stated
        return get_frame_info(frame).decompressed_size or 0
    power = 1 << (10 + (frame[5] >> 3))
    return power + power // 8 * (frame[5] & 7)
