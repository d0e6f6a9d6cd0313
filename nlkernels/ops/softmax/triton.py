"""Softmax attention in Triton: which of its kernels runs a problem.

forward   fused (triton_fused.py): online softmax, no workspace, for D and V up to 256 and for
          `workspace_mib=0`; staged (triton_staged.py): weights of a tile in a workspace, then a
          matrix product, for wider channels, whose accumulators do not fit beside the scores
backward  staged (triton_backward.py), for every D and V; `workspace_mib=0` is 16 rows there

Memory beyond inputs and outputs: that of the kernel that runs, stated in its file; all of it is
O(N + M) but the workspace, see `nlkernels.ops._tiles.staged_tiles`. Deterministic: no atomics, and
everything is added in an order that sizes, configuration and device fix.

No GPU has run these kernels yet: unverified.
"""

import torch

from nlkernels.ops.softmax import triton_backward, triton_fused, triton_staged

# The widest channels whose output tile and scores share the registers of one program.
FUSED_DEPTH = 256

backward = triton_backward.backward


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V) and stats (2,B,N)."""
    if workspace_mib == 0 or max(query.shape[2], value.shape[2]) <= FUSED_DEPTH:
        return triton_fused.forward(query, key, value, scale)
    return triton_staged.forward(query, key, value, scale, workspace_mib)
