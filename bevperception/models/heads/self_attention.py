"""Self-attention of object queries: in groups while training, and with padding."""

from __future__ import annotations

from torch import Tensor, nn


def grouped_self_attention(
    attention: nn.MultiheadAttention,
    query: Tensor,
    query_position: Tensor,
    groups: int = 1,
    padding: Tensor | None = None,
) -> Tensor:
    """Self-attention within equal groups of queries (Group DETR, Chen et al., ICCV 2023).

    Args:
        attention: batch first.
        query, query_position: (B, groups * q, C); a group's queries stand together.
        groups: groups that do not see each other; one in inference.
        padding: (B, groups * q) bool, True for queries that no other looks at. A group of nothing else
            is looked at all the same.

    Returns:
        (B, groups * q, C), without the residual sum.
    """
    shape = query.shape
    positioned = query + query_position
    if groups > 1:
        query, positioned = (
            x.reshape(shape[0] * groups, shape[1] // groups, shape[2]) for x in (query, positioned)
        )
    ignored = None
    if padding is not None:
        ignored = padding.reshape(query.shape[:2])
        # A softmax over nothing is NaN.
        ignored = ignored & ~ignored.all(-1, keepdim=True)
    attended: Tensor = attention(positioned, positioned, query, key_padding_mask=ignored, need_weights=False)[
        0
    ]
    return attended.reshape(shape)
