"""Blocks whose every parameter matters, and the block written out with einsum."""

import itertools

import torch
from torch.nn import functional as F

from nlkernels import NonLocalBlock1d, NonLocalBlock2d, NonLocalBlock3d
from nlkernels.modules.options import BLOCK_KINDS as KINDS
from nlkernels.modules.options import REGION_KINDS

BLOCKS = {1: NonLocalBlock1d, 2: NonLocalBlock2d, 3: NonLocalBlock3d}
# Small positions that no pool divides, by the number of dimensions.
POSITIONS = {1: (11,), 2: (5, 7), 3: (4, 5, 7)}
REGIONS = {1: (5,), 2: (3, 5), 3: (3, 1, 5)}

__all__ = ["BLOCKS", "KINDS", "POSITIONS", "REGIONS", "REGION_KINDS"]


def block(dims=3, device="cpu", dtype=torch.float64, **options):
    """A block whose every parameter and statistic matters; regions are small."""
    if options.get("kind") in REGION_KINDS:
        options = {"region_kernel": REGIONS[dims], **options}
    made = BLOCKS[dims](6, **{"zero_init": None, "init": "default", **options})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if hasattr(made.norm, "running_var"):
        torch.nn.init.uniform_(made.norm.running_var, 0.5, 2)
        torch.nn.init.normal_(made.norm.running_mean)
    return made.to(device, dtype)


def features(*shape, device="cpu", dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, device=device)


def by_hand(made, x):
    """Output and normalised affinity (B, N, M) of a block."""
    before = made.pool_order == "before"

    def project(conv, t):
        weight = conv.weight.flatten(1)
        bias = 0 if conv.bias is None else conv.bias[:, None]
        flat = torch.einsum("oc,bcn->bon", weight, t.flatten(2)) + bias
        return flat.unflatten(2, t.shape[2:])

    def pool(t):
        pooling = (None, F.max_pool1d, F.max_pool2d, F.max_pool3d)[made.dims]
        return t if made.pool_size is None else pooling(t, made.pool_size)

    if made.kind in REGION_KINDS:
        g = project(made.theta, x)
        theta = g if made.region is None else aggregated(g, made.region.weight)
        if made.region_l2norm:
            theta = theta / theta.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
        phi, g = pool(theta), pool(g)
    elif made.kind == "gaussian":
        theta, phi = x, pool(x)
        g = project(made.g, pool(x)) if before else pool(project(made.g, x))
    else:
        theta = project(made.theta, x)
        phi = project(made.phi, pool(x)) if before else pool(project(made.phi, x))
        g = project(made.g, pool(x)) if before else pool(project(made.g, x))
    weights = normalised(made, theta.flatten(2), phi.flatten(2))
    y = torch.einsum("bnm,bdm->bdn", weights, g.flatten(2)).unflatten(2, x.shape[2:])
    z = project(made.out, y)
    return x + (z if made.norm is None else made.norm(z)), weights


def normalised(made, theta, phi):
    """Affinity of theta (B, D, N) to phi (B, D, M)."""
    if made.kind == "concat":
        pairs = torch.cat(
            [
                theta[:, :, :, None].expand(-1, -1, -1, phi.shape[2]),
                phi[:, :, None, :].expand(-1, -1, theta.shape[2], -1),
            ],
            dim=1,
        )
        scores = torch.einsum("c,bcnm->bnm", made.concat_weight.flatten(), pairs)
        return scores.clamp(min=0) / phi.shape[2]
    scores = torch.einsum("bdn,bdm->bnm", theta, phi)
    if made.scale is not None:
        scores = scores * made.scale
    elif made.kind == "softmax":
        scores = scores / made.inner**0.5
    if made.kind == "dot_product":
        return scores / phi.shape[2]
    if made.kind in ("relu", "region_relu"):
        return scores.clamp(min=0) / phi.shape[2]
    return scores.softmax(-1)


def aggregated(u, weight):
    """The sum of shifted features, tap by tap."""
    kernel = weight.shape[1:]
    padding = [size // 2 for size in reversed(kernel) for _ in range(2)]
    padded, out = F.pad(u, padding), 0
    for tap in itertools.product(*(range(size) for size in kernel)):
        window = tuple(slice(k, k + n) for k, n in zip(tap, u.shape[2:], strict=True))
        factor = weight[(slice(None), *tap)].view(-1, *(1,) * len(kernel))
        out = out + factor * padded[(slice(None), slice(None), *window)]
    return out
