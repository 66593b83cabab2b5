"""The grouped GEMM of MegaBlocks (arXiv 2211.15841), an optional package: its CUTLASS kernels.

It takes the counts on the host, so each product waits for the device. Shapes as in `grouped_mm`.
"""

from torch import Tensor


def grouped_mm_by_megablocks(x_RM: Tensor, w_EMN: Tensor, counts_E: Tensor) -> Tensor:
    """Do `grouped_mm`; `w_EMN`, or its transpose, is contiguous and has the dtype of the rows."""
    from megablocks.grouped_gemm_util import backend

    counts, w_ENM = counts_E.cpu(), w_EMN.transpose(1, 2)
    if w_ENM.is_contiguous():
        return backend.gmm(x_RM, w_ENM, counts, trans_b=True)
    return backend.gmm(x_RM, w_EMN.contiguous(), counts)


def grouped_outer_by_megablocks(a_RM: Tensor, b_RN: Tensor, counts_E: Tensor) -> Tensor:
    """Do `grouped_outer`."""
    from megablocks.grouped_gemm_util import backend

    return backend.gmm(a_RM, b_RN, counts_E.cpu(), trans_a=True)
