"""What golden networks compute, written a second time: by the keys of their weights, in float64."""

import torch
from torch.nn import functional as F


def doubles(case):
    return {key: torch.from_numpy(array).double() for key, array in case.state.items()}


def normed(state, name, x, eps=1e-5):
    """A batch norm by its keys."""
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{name}.{each}"] for each in names), eps=eps)


def of_frames(case, block=lambda state, name, x: x):
    """Logits of every frame by mmaction2's 2-D ResNet; `block` follows each bottleneck."""
    state = doubles(case)

    def unit(x, name, stride=1, padding=0):
        x = F.conv2d(x, state[f"{name}.conv.weight"], None, stride, padding)
        return normed(state, f"{name}.bn", x)

    x = torch.from_numpy(case.inputs["clip"]).double()
    x = F.max_pool2d(unit(x, "backbone.conv1", 2, 3).relu(), 3, 2, 1)
    for layer, depth in enumerate((3, 4, 6, 3), start=1):
        for index in range(depth):
            stride = 2 if layer > 1 and index == 0 else 1
            owner = name = f"backbone.layer{layer}.{index}"
            if f"{name}.block.conv1.conv.weight" in state:
                owner = f"{name}.block"
            y = unit(x, f"{owner}.conv1").relu()
            y = unit(unit(y, f"{owner}.conv2", stride, 1).relu(), f"{owner}.conv3")
            x = (y + (unit(x, f"{owner}.downsample", stride) if index == 0 else x)).relu()
            x = block(state, f"{name}.non_local_block", x)
    classifier = state["cls_head.fc_cls.weight"], state["cls_head.fc_cls.bias"]
    return F.linear(x.mean(dim=(2, 3)), *classifier)


def of_mmcv(state, name, x, norm, *, dot=False, pool=True):
    """mmcv's block by its keys: projections, then pools; `norm` stands behind `conv_out`."""

    def projected(part, pooled):
        key = f"{name}.{part}{'.0' if pooled else ''}.conv"
        y = F.conv3d(x, state[f"{key}.weight"], state[f"{key}.bias"])
        y = F.max_pool3d(y, (1, 2, 2)) if pooled else y
        return y.flatten(2)

    theta, phi, g = projected("theta", False), projected("phi", pool), projected("g", pool)
    scores = theta.transpose(1, 2) @ phi
    weights = scores / scores.shape[-1] if dot else (scores / theta.shape[1] ** 0.5).softmax(-1)
    y = (g @ weights.transpose(1, 2)).view(*theta.shape[:2], *x.shape[2:])
    bias = state.get(f"{name}.conv_out.conv.bias")
    return x + norm(F.conv3d(y, state[f"{name}.conv_out.conv.weight"], bias))


def of_regions(state, name, x, *, relu=False, l2norm=False, pool=False):
    """The region-based block by its keys; of the dense weight only an own channel counts."""
    u = F.conv3d(x, state[f"{name}.theta.weight"], state[f"{name}.theta.bias"])
    s = u
    if f"{name}.penta.weight" in state:
        dense = state[f"{name}.penta.weight"] * state[f"{name}.penta.mask"]
        groups, padding = u.shape[1] // dense.shape[1], [size // 2 for size in dense.shape[2:]]
        s = F.conv3d(u, dense, padding=padding, groups=groups)
    s = F.normalize(s, dim=1) if l2norm else s
    keys, values = (F.max_pool3d(each, (1, 2, 2)) if pool else each for each in (s, u))
    scores = s.flatten(2).transpose(1, 2) @ keys.flatten(2)
    weights = scores.relu() / scores.shape[-1] if relu else scores.softmax(-1)
    y = (values.flatten(2) @ weights.transpose(1, 2)).view_as(u)
    y = F.conv3d(y, state[f"{name}.W.0.weight"], state[f"{name}.W.0.bias"])
    return x + normed(state, f"{name}.W.1", y)
