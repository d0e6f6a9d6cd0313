"""Random batch norms, and how a backend's statistics, results and gradients are judged."""

import torch
from torch.nn import functional as F

from nlkernels.ops._tiles import accumulator_dtype
from nlkernels.ops.norm import op
from nlkernels.ops.norm.reference import norm
from tests.helpers import assert_not_worse
from tests.ops.pointwise import laid_out

EPS = 1e-5
DEPTH = 12
# (B, N, C): tails of vectors and of blocks; one position of several items; one channel; several
# sums of a channel and several parts; more channels than are written at once.
CASES = [(2, 101, 50), (5, 1, 130), (1, 700, 1), (3, 1100, 7), (1, 17, 600), (2, 64, 64)]


class Problem:
    """Random operands of a norm: a product's, or z itself, and the gradient of what comes of it."""

    def __init__(self, case, dtype, maps=False, layout="rows", mean=0.0, seed=0, device="cpu"):
        self.case, self.dtype, self.maps, self.layout, self.mean = case, dtype, maps, layout, mean
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        batch, positions, channels = case
        self.features = self.drawn(batch, positions, DEPTH)
        self.weight = self.drawn(channels, DEPTH) * DEPTH**-0.5
        self.shift = (self.drawn(channels) + mean).to(accumulator_dtype(dtype))
        self.gamma, self.beta = self.drawn(channels), self.drawn(channels)
        self.base, self.grad = (laid_out(self.drawn(*case), layout) for _ in range(2))

    def drawn_again(self, seed):
        options = self.layout, self.mean, 1000 + seed, self.device
        return Problem(self.case, self.dtype, self.maps, *options)

    def drawn(self, *size):
        drawn = torch.randn(size, generator=self.generator, dtype=torch.float64)
        return drawn.to(self.dtype).to(self.device)

    def product(self, backend):
        name = backend.__name__.rpartition(".")[2]
        given = self.features, self.weight, self.shift, self.maps, name
        return torch.ops.nlkernels.norm_product(*given)

    def judged(self, z):
        """Output, gradients of z, gamma and beta by torch in z's dtype, and by the definition."""
        same = by_torch(self, z)
        leaves = [t.double().requires_grad_() for t in (z, self.gamma, self.beta)]
        out = norm(*leaves, EPS) + self.base.double()
        return same, [out.detach(), *torch.autograd.grad(out, leaves, self.grad.double())]

    def results(self, backend, z, moments):
        """The same by a backend."""
        out = backend.forward(z, moments, self.gamma, self.beta, self.base, EPS)
        d_z, sums = backend.backward(self.grad, z, self.gamma, moments, EPS)
        for made in (out, d_z):
            assert (made.mT if op.are_maps(z) else made).is_contiguous()
        return [out, d_z, *sums.to(self.dtype)]


def by_torch(problem, z):
    """Output and gradients of torch's batch norm of maps, or of channels last.

    All operands lie alike, one channel's too: torch sums in another order where they do not.
    """
    form = torch.contiguous_format if problem.maps else torch.channels_last

    def laid_alike(rows):
        features = rows.mT[..., None]
        return features.new_empty(features.shape).to(memory_format=form).copy_(features)

    features = laid_alike(z).requires_grad_()
    leaves = [features, problem.gamma.requires_grad_(), problem.beta.requires_grad_()]
    out = F.batch_norm(features, None, None, *leaves[1:], True, 0.0, EPS) + laid_alike(problem.base)
    d_z, *others = torch.autograd.grad(out, leaves, laid_alike(problem.grad))
    for parameter in leaves[1:]:
        parameter.requires_grad_(False)
    return [out.detach().squeeze(-1).mT, d_z.squeeze(-1).mT, *others]


def assert_right(backend, problem):
    """Hold statistics and results to the rule; return them.

    Where channels are few, over several draws: that PyTorch's sum is right by luck says nothing.
    """
    problems = [problem]
    if problem.case[2] < 16:
        problems += [problem.drawn_again(seed) for seed in range(1, 8)]
    found = [(each, *assert_moments_right(backend, each)) for each in problems]
    got = [each.results(backend, z, moments) for each, z, moments in found]
    judged = [each.judged(z) for each, z, _ in found]
    for number in range(4):
        same, exact = (torch.stack([pair[which][number] for pair in judged]) for which in range(2))
        own = torch.stack([results[number] for results in got])
        assert_not_worse(f"result {number}", own, same, exact, 3 if number else 2)
    return [*found[0][1:], *got[0]]


def assert_moments_right(backend, problem):
    """Hold a product's statistics to float64; return both."""
    z, moments = problem.product(backend)
    dtype = moments.dtype
    assert dtype == accumulator_dtype(problem.dtype) and moments.shape == (2, z.shape[2])
    truth = torch.var_mean(z.double(), (0, 1), correction=0)
    close = {torch.float32: 2e-6, torch.float64: 1e-11}[dtype]
    for got, exact in zip(moments.flip(0), truth, strict=True):
        assert (got - exact).abs().max() <= close * exact.abs().max() + close
    return z, moments
