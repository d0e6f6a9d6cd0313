"""What a block's repr says. Printing never fails: a part that cannot be told is left out."""

from typing import TYPE_CHECKING

from nlkernels.modules.layers import is_identity

if TYPE_CHECKING:
    from nlkernels.modules.base import NonLocalBlock


def line(block: "NonLocalBlock") -> str:
    """The block's design and whether it is still the identity; behind it, its memory's line."""
    pooled = f"pool={block.pool_size} {block.pool_order}" if block.pool_size else "no pool"
    parts = [f"{block.dim}, inner={block.inner}, kind={block.kind}", pooled]
    if block.region_kernel:
        parts.append(f"region={block.region_kernel}" + ", l2norm" * block.region_l2norm)
    if block.temporal_group:
        parts.append(f"temporal_group={block.temporal_group}")
    parts.append(f"backend={block.backend or 'auto'}")
    if (identity := is_identity(block.out, block.norm)) is not None:
        parts.append("output still zero" if identity else "output not zero")
    return ", ".join(parts) + _memory(block)


def _memory(block: "NonLocalBlock") -> str:
    if block.input_size is None:
        return ""
    try:
        return f"\n{block.footprint(block.input_size)}"
    except (ValueError, TypeError):  # size, dtype or backend are refused when the block runs
        return ""
