"""Non-local blocks as modules."""

from torch import nn

from nlkernels._spec import BACKENDS, check_choice
from nlkernels.modules.base import NonLocalBlock


class NonLocalBlock1d(NonLocalBlock):
    """Non-local block for sequences (B, dim, L); arguments as for `NonLocalBlock3d`.

    Keys and values are pooled by (2,) unless `pool` says otherwise; there is no `temporal_group`.

    Example:
        >>> import torch, nlkernels
        >>> x = torch.randn(2, 64, 100)
        >>> torch.equal(nlkernels.NonLocalBlock1d(64)(x), x)
        True

    Source:
        AlexHex7/Non-local_pytorch and mmcv have blocks of one dimension.
    """

    dims = 1


class NonLocalBlock2d(NonLocalBlock):
    """Non-local block for images (B, dim, H, W); arguments as for `NonLocalBlock3d`.

    Keys and values are pooled by (2, 2) unless `pool` says otherwise; there is no `temporal_group`.

    Example:
        >>> import torch, nlkernels
        >>> x = torch.randn(2, 64, 14, 14)
        >>> torch.equal(nlkernels.NonLocalBlock2d(64)(x), x)
        True

    Source:
        AlexHex7/Non-local_pytorch and mmcv have blocks of two dimensions.
    """

    dims = 2


class NonLocalBlock3d(NonLocalBlock):
    """Non-local block for video features: every position attends to all positions of all frames.

    z = x + norm(out(attention(theta(x), phi(x'), g(x')))), x' being x pooled ("before"); or with
    phi and g pooled after their projection ("after"). Positions are flattened in (T, H, W) order.
    Kind "gaussian" has no theta and phi: query is x and key is pooled x, of `dim` channels. The
    kinds "region_softmax" and "region_relu" have neither phi nor g: value is theta(x), and query
    and key are both region(theta(x)), a depthwise correlation with learned weights.

    Args:
        dim: channels of the input and the output.
        inner: channels D of the projections; None is dim // 2.
        kind: affinity: "softmax", "gaussian", "dot_product", "relu", "concat", "region_softmax" or
            "region_relu"; see `nonlocal_attention` and `nonlocal_concat`.
        pool: kernel and stride of the max pooling of keys and values, one size for each dimension;
            None for none, "default" for (1, 2, 2), in two dimensions (2, 2), in one (2,).
        pool_order: "before" or "after" the projections; two different functions of equal weights.
            None is "before", and "after" for the region kinds, which have no other.
        scale: factor of the scores; None is D**-0.5 for softmax and 1 for the other kinds. Kind
            "concat" has none.
        qkv_bias: biases of theta, phi and g.
        out_bias: bias of out.
        norm: what follows out: "batch" for a batch norm, "affine" for a weight and a bias for each
            channel, a function from dim to a module (such as torch.nn.SyncBatchNorm), or None.
        norm_eps: epsilon of the batch norm.
        norm_momentum: momentum of the batch norm; None averages over all steps.
        zero_init: what makes a new block the identity: "gamma" (weight and bias of the norm are 0),
            "weight" (weight and bias of out are 0), or None for a block that changes its input
            from the start. A zero still receives a gradient at the first step, and after it all
            others do.
        init: weights of the projections: "normal" (std 0.01, biases 0), a standard deviation
            (biases 0), "kaiming" (normal, fan out, biases 0) or "default" (torch's; for the region
            weight that of the published code). The region's weight follows it.
        out_init: the same for out and `concat_weight`; None is `init`.
        temporal_group: frames of a group that attends to itself only, as a clip of its own; None
            for all frames. T must be a multiple of it, or smaller. Only in three dimensions.
        region_kernel: odd sizes of the region kinds' neighbourhood; None is (3, 7, 7), in two
            dimensions (7, 7), in one (7,). With all sizes 1 nothing is aggregated.
        region_l2norm: divide the aggregated features by their length over the channels.
        input_size: (T, H, W), or (B, dim, T, H, W): the block's repr then says what the attention
            of such an input takes.
        backend: as for `nonlocal_attention`; None defers to NLKERNELS_BACKEND, then to "auto".

    Shape:
        (B, dim, T, H, W) -> the same, any memory format. With forward(x, return_map=True) also the
        normalised affinity (B, N, M).

    Memory:
        The scores are never stored whole, unless the backend is "reference" or a map is asked for;
        see `nonlocal_attention`. Region kinds compute, keep and save query and key once.

    Determinism:
        As that of the operations, and of torch's convolutions, pooling and normalisation.

    Raises:
        ValueError: unknown option or two that exclude each other; wrong rank or channels; clip
            smaller than the pool; T no multiple of `temporal_group`.
        TypeError: input of another dtype; a norm that is a module or makes none.

    Example:
        >>> import torch, nlkernels
        >>> block = nlkernels.NonLocalBlock3d(64)
        >>> x = torch.randn(2, 64, 4, 14, 14)
        >>> torch.equal(block(x), x)
        True

    Source:
        "Non-local Neural Networks" (CVPR 2018), figure 2; facebookresearch/video-nonlocal-net.
        Blocks of other systems: `nlkernels.modules.presets`.
    """

    dims = 3


def set_nonlocal_backend(model: nn.Module, backend: str) -> int:
    """Switch every non-local block and channel gate of a model to one backend.

    Args:
        model: any module that contains non-local blocks or channel gates, or is one.
        backend: as for `nonlocal_attention`.

    Returns:
        How many were switched.

    Raises:
        ValueError: unknown backend, or a model without a block.
        TypeError: no module.

    Example:
        >>> import nlkernels
        >>> nlkernels.set_nonlocal_backend(nlkernels.NonLocalBlock3d(64), "chunked")
        1
    """
    check_choice("set_nonlocal_backend", "backend", backend, BACKENDS)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"set_nonlocal_backend: expected a module, got {type(model).__name__}; "
            "pass the model whose blocks are to be switched"
        )
    blocks = [module for module in model.modules() if getattr(module, "is_nonlocal", False)]
    if not blocks:
        raise ValueError(
            "set_nonlocal_backend: expected a model with non-local blocks, got "
            f"{type(model).__name__} without any; build it with blocks"
        )
    for block in blocks:
        block.set_backend(backend)
    return len(blocks)
