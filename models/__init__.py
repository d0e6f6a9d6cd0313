"""Video models: a registry of builders, and the layers that they share."""

if __name__ != "nlkernels.models":
    raise ImportError(f"import this package as 'nlkernels.models', not as {__name__!r}")

from nlkernels.models import (  # noqa: F401  (importing them fills the registry)
    c2d,
    i3d_inception,
    i3d_resnet,
    slowonly,
    tsm,
)
from nlkernels.models.blocks import LocalBlock3d
from nlkernels.models.registry import create_model, list_models, register_model

__all__ = ["LocalBlock3d", "create_model", "list_models", "register_model"]
