"""Files in .gz and .zst, decompressed while they are read."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO

from conan_engine.errors import UserError


def opened(path: Path, raw: BinaryIO) -> Any:
    """An open file, decompressed."""
    if path.suffix == ".gz":
        return gzip.open(raw, "rb")
    return io.BufferedReader(_Zstd(path, raw), 1 << 20) if path.suffix == ".zst" else raw


class _Zstd(io.RawIOBase):
    """A .zst file of any number of frames, decompressed while it is read.

    Raises UserError if it is damaged or cut off, which zstandard's own reader does not notice.
    """

    def __init__(self, path, file):
        try:
            import zstandard
        except ImportError:
            raise UserError(
                f"{path}: reading .zst needs zstandard, which is not installed; pip install zstandard"
            ) from None
        self.path, self.file, self.error = path, file, zstandard.ZstdError
        self.frame = lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
        self.unpacking, self.packed, self.ready = None, b"", b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            self.packed = self.packed or self.file.read(1 << 16)
            if not self.packed:
                if self.unpacking:
                    self.damaged("the file ends within a frame")
                return 0
            self.unpacking = self.unpacking or self.frame()
            try:
                self.ready = memoryview(self.unpacking.decompress(self.packed))
            except self.error as error:
                self.damaged(error)
            self.packed = b""
            if self.unpacking.eof:
                self.packed, self.unpacking = self.unpacking.unused_data, None
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def damaged(self, error):
        raise UserError(f"{self.path}: damaged or cut-off zstd file ({error}); compress it again")
