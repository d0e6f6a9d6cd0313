"""Which way a block is computed where both `fast` and `plain` would do, as measured.

A row serves blocks of its kinds, and inputs of its dtypes and of at most so many numbers.
"""

from typing import TYPE_CHECKING

import torch

from nlkernels._arguments import autocast

if TYPE_CHECKING:
    from nlkernels.modules.base import NonLocalBlock

TABLE = {
    "cpu": (
        {
            "kinds": ("softmax", "dot_product"),
            "dtypes": (torch.float32,),
            "numbers_up_to": 2**17,
            "because": "the input is small: fewer passes take longer than layers do, which take "
            "0.5 to 0.93 of the time where B C N <= 2**17 (AVX-512-BF16, 2 cores)",
        },
    ),
}


def small(block: "NonLocalBlock", x: torch.Tensor) -> str:
    """Why layer after layer is faster for an input; "" where it is not, or must not be taken.

    Compiled and exported graphs have no calls to spare, and sizes that are not known; who has
    operands computed again wants less to be kept.
    """
    rows = TABLE.get(x.device.type, ())
    if not rows or block.fused or block.recompute or torch.compiler.is_compiling():
        return ""
    (computed,) = autocast(x[:0])
    for row in rows:
        serves = block.kind in row["kinds"] and computed.dtype in row["dtypes"]
        if serves and x.numel() <= row["numbers_up_to"]:
            return row["because"]
    return ""
