"""What the stand-ins of Non-local_pytorch's four files and of temporal-shift-module's share."""

import torch
from torch import nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {
    1: lambda: nn.MaxPool1d(kernel_size=2),
    2: lambda: nn.MaxPool2d(kernel_size=(2, 2)),
    3: lambda: nn.MaxPool3d(kernel_size=(1, 2, 2)),
}


class Block(nn.Module):
    kind: str

    def __init__(
        self, in_channels, inter_channels=None, dimension=3, sub_sample=True, bn_layer=True
    ):
        super().__init__()
        self.dimension, self.sub_sample = dimension, sub_sample
        self.in_channels = in_channels
        self.inter_channels = inter_channels or max(in_channels // 2, 1)
        convolution, pool = CONVOLUTIONS[dimension], POOLS[dimension]()
        sizes = (in_channels, self.inter_channels)
        self.g = convolution(*sizes, 1)
        if bn_layer:
            norm = NORMS[dimension](in_channels)
            nn.init.zeros_(norm.weight)
            self.W = nn.Sequential(convolution(*sizes[::-1], 1), norm)
        else:
            self.W = convolution(*sizes[::-1], 1)
            nn.init.zeros_(self.W.weight)
            nn.init.zeros_(self.W.bias)
        if self.kind != "gaussian":
            self.theta, self.phi = convolution(*sizes, 1), convolution(*sizes, 1)
        if self.kind == "concatenation":
            layer = nn.Conv2d(2 * self.inter_channels, 1, 1, bias=False)
            self.concat_project = nn.Sequential(layer, nn.ReLU())
        if sub_sample:
            self.g = nn.Sequential(self.g, pool)
            self.phi = pool if self.kind == "gaussian" else nn.Sequential(self.phi, pool)

    def run(self, x):
        value = self.g(x).flatten(2)
        weights = self.weights(x)
        out = self.W((value @ weights.mT).view(x.shape[0], -1, *x.shape[2:]))
        return out + x, weights

    def weights(self, x):
        if self.kind == "gaussian":
            source = self.phi(x) if self.sub_sample else x
            return (x.flatten(2).mT @ source.flatten(2)).softmax(2)
        theta, phi = self.theta(x).flatten(2), self.phi(x).flatten(2)
        if self.kind == "concatenation":
            pairs = [theta[:, :, :, None].expand(-1, -1, -1, phi.shape[2])]
            pairs.append(phi[:, :, None, :].expand(-1, -1, theta.shape[2], -1))
            return self.concat_project(torch.cat(pairs, 1)).squeeze(1) / phi.shape[2]
        scores = theta.mT @ phi
        if self.kind == "dot_product":
            return scores / scores.shape[2]
        return scores.softmax(2)


class Mapping(Block):
    """Non-local_pytorch's blocks return their map on demand."""

    def forward(self, x, return_nl_map=False):
        out, weights = self.run(x)
        return (out, weights) if return_nl_map else out
