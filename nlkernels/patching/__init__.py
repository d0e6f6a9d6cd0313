"""Non-local blocks in models of other packages: replaced where they are, inserted where not."""

from nlkernels.patching.insert import FramesBlock, insert_nonlocal
from nlkernels.patching.replace import replace_nonlocal, restore_nonlocal
from nlkernels.patching.report import Report, Row

__all__ = [
    "FramesBlock",
    "Report",
    "Row",
    "insert_nonlocal",
    "replace_nonlocal",
    "restore_nonlocal",
]
