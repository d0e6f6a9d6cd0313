"""The definitions of a block's two halves, by torch's own operations.

project   query, key and value as rows of positions: pointwise convolutions of x, and of x pooled
          ("before") or pooled themselves ("after")
merge     z = x + norm(weight y + bias), where norm is nothing, a scale and a shift of each channel,
          or a batch norm by the statistics of this batch
"""

import torch
from torch.nn import functional as F

Optional = torch.Tensor | None


def project(
    x: torch.Tensor,
    query_weight: Optional,
    query_bias: Optional,
    key_weight: Optional,
    key_bias: Optional,
    value_weight: Optional,
    value_bias: Optional,
    window: list[int],
    after: bool,
) -> tuple[torch.Tensor, ...]:
    """x (B,C,T,H,W), weights (P,C), biases (P,) -> query (B,N,Q), key (B,M,K), value (B,M,V).

    What has no weight is x itself, as rows: a view. Without a window nothing is pooled.
    """
    before = F.max_pool3d(x, window) if window and not after else x

    def rows(source, weight, bias, pools):
        if weight is not None:
            source = F.conv3d(source, weight[..., None, None, None], bias)
        return (F.max_pool3d(source, window) if pools else source).flatten(2).mT

    pools = bool(window) and after
    return (
        rows(x, query_weight, query_bias, False),
        rows(before, key_weight, key_bias, pools),
        rows(before, value_weight, value_bias, pools),
    )


def merge(
    y: torch.Tensor,
    x: Optional,
    weight: torch.Tensor,
    bias: Optional,
    gamma: Optional,
    beta: Optional,
    mean: Optional,
    var: Optional,
    eps: float,
    batch: bool,
) -> torch.Tensor:
    """y (B,N,V), x (B,C,*positions), weight (C,V), others (C,) -> (B,C,*positions), or (B,C,N).

    With `batch` the norm is by the mean and the biased variance of this batch, else by mean and
    var; where these are None, gamma and beta alone are its factors, where there is no gamma none.
    """
    z = torch.einsum("cv,bnv->bcn", weight, y)
    if bias is not None:
        z = z + bias[:, None]
    if batch:
        z = F.batch_norm(z, None, None, gamma, beta, True, 0.0, eps)
    elif mean is not None:
        z = F.batch_norm(z, mean, var, gamma, beta, False, 0.0, eps)
    elif gamma is not None:
        z = z * gamma[:, None] + beta[:, None]
    return z if x is None else x + z.view(x.shape)
