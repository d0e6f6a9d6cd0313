"""Triton's interpreter, mended: its bfloat16 is computed as integers, its maximum keeps NaN."""

import numpy as np


def mend() -> None:
    """Make the interpreter compute as a GPU would, where it does not.

    - bfloat16, which it holds as 16-bit integers, is converted to nearest even, multiplied with
      float32 accumulation, and added, compared and so on as the floating-point number it is;
    - `tl.maximum` and `tl.minimum` return the number when one argument is NaN.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    convert_float = interpreter._convert_float
    cast, binary, total = builder.cast_impl, builder.binary_op, interpreter.ReduceOps.sum
    toward_zero = interpreter._ir.ROUNDING_MODE.RTZ

    def is_brain(operand) -> bool:
        return operand.dtype.scalar == tl.bfloat16

    def widened(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def narrowed(numbers, rounding_mode=None):
        bits = np.ascontiguousarray(numbers).view(np.uint32).reshape(np.shape(numbers))
        if rounding_mode != toward_zero:
            bits = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
        return np.where(np.isnan(numbers), 0x7FC0, bits >> 16).astype(np.uint16)

    def as_float32(operand):
        return handle(widened(operand.data), tl.float32) if is_brain(operand) else operand

    def convert(data, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(data).view(np.uint32)
        if (source, target) == (tl.float32, tl.bfloat16):
            return narrowed(data, rounding_mode)
        return convert_float(data, source, target, rounding_mode)

    def cast_impl(self, source, target_type):
        target = target_type.scalar
        if tl.bfloat16 in (source.dtype.scalar, target) and source.dtype.scalar != target:
            wide = cast(self, as_float32(source), tl.float32 if target == tl.bfloat16 else target)
            return handle(narrowed(wide.data), target) if target == tl.bfloat16 else wide
        return cast(self, source, target_type)

    def binary_op(self, left, right, operation):
        if not is_brain(left):
            return binary(self, left, right, operation)
        result = operation(widened(left.data), widened(right.data))
        # A comparison stays boolean.
        return handle(narrowed(result) if result.dtype == np.float32 else result, tl.bfloat16)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(as_float32(a).data, as_float32(b).data, dtype=d.data.dtype)
        return handle(product + d.data, d.dtype.scalar)

    def sum_of(self, operand):
        if not is_brain(operand):
            return total(self, operand)
        wide = np.sum(widened(operand.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(narrowed(wide), operand.dtype)

    interpreter._convert_float = convert
    interpreter.ReduceOps.sum = sum_of
    builder.cast_impl = cast_impl
    builder.binary_op = binary_op
    builder.create_dot = create_dot
    builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
