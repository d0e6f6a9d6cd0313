"""Region aggregation in plain PyTorch, by the convolutions that are fast on CPUs; any device.

forward   out = conv3d(x, weight, groups=C), on CPUs with x in channels_last_3d, whatever it was:
          torch's kernel takes a quarter of the time there
backward  d_x = conv3d(grad, flipped weight), likewise; torch's own takes thirty times the time
          d_weight[:, i] = sum_t conv2d(frame t+i-(kt-1)/2 of x, frame t of grad as its kernel):
          a depthwise 2-D convolution of C*T channels whose result has kh x kw positions; frames of
          more than 448 positions in strips, as a convolution adds one product after another

16-bit dtypes are computed in float32. The frames of one item are a view where x and grad are
contiguous in NCDHW and at least float32, and are copied item by item otherwise.

Memory beyond inputs and outputs, A = max(bytes an element, 4), X = C T H W elements of an item,
K = C kt kh kw of the weight:
  forward   : + A B X for x in channels_last_3d, on CPUs, unless it is that and not 16-bit,
              + A B X for the result in it, unless that is out, + A X for one item of 16 bits,
              + A K for a copy of weight;
  backward  : the same for grad and d_x, or, if more, 4 A X (5 of 16 bits) for the frames of one
              item and torch's copies in another order, + 3 A C T kh kw + A K; where frames are cut
              into strips, + A X (1 + (kh - 1) / H);
  float64   : + A B X (kt kh kw + 1) on CPUs, where torch's convolutions unfold x.
"""

import torch

from nlkernels.ops._tiles import accumulator_dtype
from nlkernels.ops.region.problem import like

# Products that are added in a chain: more, and d_weight is less exact than 3 times torch's own.
CHAIN = 448


def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B,C,T,H,W), (C,kt,kh,kw) -> (B,C,T,H,W)."""
    return _correlate(x, weight, x)


def backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and weight, in their dtypes."""
    return _correlate(grad, weight.flip(1, 2, 3), x), _weight_gradient(grad, x, weight)


def _correlate(x: torch.Tensor, weight: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """The correlation of x, laid out like `model`."""
    if x.numel() == 0:
        return like(model)
    dtype = accumulator_dtype(x.dtype)
    x = x.to(dtype)
    if x.device.type == "cpu":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    padding = [size // 2 for size in weight.shape[1:]]
    result = torch.conv3d(x, weight.to(dtype).unsqueeze(1), padding=padding, groups=weight.shape[0])
    if result.dtype == model.dtype and result.stride() == like(model.to("meta")).stride():
        return result
    out = like(model)
    for one, item in zip(out, result, strict=True):
        _copy(one, item)
    return out


def _weight_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    dtype = accumulator_dtype(x.dtype)
    total = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    if x.numel():
        for item, item_grad in zip(x, grad, strict=True):
            _add_item(total, _frames(item, dtype), _frames(item_grad, dtype), x.shape[2])
    return total.to(weight.dtype)


def _add_item(total: torch.Tensor, images: torch.Tensor, kernels: torch.Tensor, frames: int):
    """Add the weight's gradient of one item, from (C*T,H,W) of x and of grad."""
    channels, kt, kh, kw = total.shape
    height, width = images.shape[1:]
    strips = -(-height * width // CHAIN)
    rows = -(-height // strips)
    # Rows of padding: around the frames of several strips, else left to the convolution.
    inner = kh // 2 if rows < height else 0
    if inner:
        images = torch.nn.functional.pad(images, (0, 0, inner, inner))
    for i in range(kt):
        # Frame n of grad meets frame n + shift of x, whose channel may be the next one's ...
        shift = i - kt // 2
        if abs(shift) >= frames:
            continue
        last = len(images) - abs(shift)
        first = max(shift, 0)
        for row in range(0, height, rows):
            end = min(row + rows, height)
            pairs = torch.conv2d(
                images[first : first + last, row : end + 2 * inner].unsqueeze(0),
                kernels[first - shift : first - shift + last, row:end].unsqueeze(1),
                padding=(kh // 2 - inner, kw // 2),
                groups=last,
            )
            # ... and is then left out: of each channel's T, the first T - |shift| belong to it.
            own = pairs.as_strided(
                (channels, frames - abs(shift), kh, kw), (frames * kh * kw, kh * kw, kw, 1)
            )
            total[:, i] += own.sum(dim=1)


def _frames(item: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(C,T,H,W) -> (C*T,H,W), contiguous."""
    if item.dtype != dtype or not item.is_contiguous():
        item = _copy(torch.empty(item.shape, dtype=dtype, device=item.device), item)
    return item.flatten(0, 1)


def _copy(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Copy (C,T,H,W) into other memory or another dtype: torch is fast at that for matrices."""
    if target.is_contiguous() and source.stride(0) == 1 and source.shape[0] > 1:
        positions = source.permute(1, 2, 3, 0).to(target.dtype)
        if positions.is_contiguous():
            target.flatten(1).copy_(positions.flatten(0, 2).t())
            return target
    return target.copy_(source)
