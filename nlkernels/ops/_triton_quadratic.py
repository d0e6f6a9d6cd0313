"""Attention without a softmax in Triton: which kernels run, for kinds "relu" and "dot_product".

  forward   `_triton_quadratic_fused`, in memory linear in N and M, where D and V are 256 at most or
            workspace_mib is 0; `_triton_quadratic_staged`, tiles of weights and a library's
            product, for wider channels;
  backward  `_triton_quadratic_staged`.

Bitwise repeatable. Memory beyond inputs and outputs: what the docstrings of those files say.

Unverified: no GPU has run these kernels.
"""

import torch

from nlkernels.ops import _triton_quadratic_fused as fused
from nlkernels.ops import _triton_quadratic_staged as staged

# The widest channels whose output tile and scores share the registers of one program.
FUSED_DEPTH = 256
CANDIDATES = {"quadratic_fused": fused.candidates, **staged.CANDIDATES}

backward = staged.backward


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
    *,
    rectify: bool,
) -> torch.Tensor:
    """Return out (B,N,V); zeros without keys."""
    if workspace_mib == 0 or max(query.shape[2], value.shape[2]) <= FUSED_DEPTH:
        return fused.forward(query, key, value, scale, rectify=rectify)
    return staged.forward(query, key, value, scale, workspace_mib, rectify=rectify)
