"""Attention by rectified scores in plain PyTorch, one tile of the score matrix at a time.

Only query, key and value are kept for the backward. How the tiles are computed, and the memory they
take, stands in nlkernels/ops/_quadratic.py.
"""

from functools import partial

from nlkernels.ops import _quadratic

# (query, key, value, scale, workspace_mib=None) -> out
forward = partial(_quadratic.forward, rectify=True)
# (grad, query, key, value, scale, workspace_mib=None) -> d_query, d_key, d_value
backward = partial(_quadratic.backward, rectify=True)
