"""Checkpoints as files: those of every system read without executing anything, and written.

`read` gives the tensors of a Caffe2 pickle, a torch file, a safetensors file or a MindSpore .ckpt;
`write` makes such files. What the keys mean is no matter of this package.
"""

from nlkernels.models.files._file import File
from nlkernels.models.files._io import read, write

__all__ = ["File", "read", "write"]
