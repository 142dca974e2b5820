"""Send batches to the GPU with 2 or 3 bytes per token, and widen them there (csrc/unpack/unpack.cu)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from conan_engine import _loader
from conan_engine.errors import UserError

if TYPE_CHECKING:
    import numpy as np


class Unpacker:
    """Turns narrow token ids into CUDA tensors, through pinned memory and a stream of its own.

    Args:
        device: a torch.device of type cuda.
        slots: how many batches are on the device at a time.

    Raises:
        UserError: if the extension was built without nvcc.
        RuntimeError: with CUDA's words, if there is no such device.
    """

    def __init__(self, device: Any, slots: int = 4) -> None:
        if not _loader.has_cuda:
            raise UserError("the loader's CUDA part was not built: put nvcc on the PATH and install again")
        self.device = torch.device(device)
        self._ring = _loader.Unpacker(self.device.index or 0, slots)

    def upload(
        self, ids: np.ndarray, width: int, cu_seqlens: np.ndarray, follow: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Send a batch.

        Args:
            ids: uint8 [T * width], little-endian.
            width: 2 or 3 bytes.
            cu_seqlens: int32 [B+1].
            follow: for targets, int32 [B], the target of each sequence's last token or -100.

        All are NumPy arrays, and free again when this returns.

        Returns:
            {"tokens": int32 [T], "cu_seqlens": int32 [B+1], "positions": int32 [T]}, and with follow {"targets": int32
                [T], "mask": bool [T]}. They share memory with the ring. The current stream waits for them, the caller
                does not. Their slot is free again when the last of them is deleted; a stream that used them must have
                joined the current one by then.

        Raises:
            ValueError: for arrays that do not fit together.
            RuntimeError: if all slots are in use.
        """
        stream = torch.cuda.current_stream(self.device).cuda_stream
        arrays = self._ring.upload(ids, width, cu_seqlens, follow, stream)
        return {name: torch.as_tensor(array, device=self.device) for name, array in arrays.items()}
