"""Attention by rectified scores in Triton, bitwise repeatable.

Which kernels run, and the memory they take, stands in nlkernels/ops/_triton_quadratic.py.

Unverified: no GPU has run these kernels.
"""

from functools import partial

from nlkernels.ops import _triton_quadratic

KERNELS = _triton_quadratic.CANDIDATES

# (query, key, value, scale, workspace_mib=None) -> out
forward = partial(_triton_quadratic.forward, rectify=True)
# (grad, query, key, value, scale, workspace_mib=None) -> d_query, d_key, d_value
backward = partial(_triton_quadratic.backward, rectify=True)
