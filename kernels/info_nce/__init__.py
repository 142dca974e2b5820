"""InfoNCE over ranks and Matryoshka dims: in Triton (launch.py, tiles.py, rows.py), in PyTorch (chunked.py, own.py)."""

from conan_kernels.info_nce.api import InfoNCE, Known, Margin, info_nce, log_sum_exp_of_documents
from conan_kernels.info_nce.gather import gather_documents

__all__ = ["InfoNCE", "Known", "Margin", "gather_documents", "info_nce", "log_sum_exp_of_documents"]
