"""Self-attention of object queries: in groups while training, and with padding."""

from __future__ import annotations

from torch import Tensor, nn

from bevperception.models.precision import attend
from bevperception.ops.linear import linear


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
            # (B, groups*Q, C) -> (B*groups, Q, C)
            x.reshape(shape[0] * groups, shape[1] // groups, shape[2])
            for x in (query, positioned)
        )
    ignored = None
    if padding is not None:
        ignored = padding.reshape(query.shape[:2])  # (B, groups*Q) -> (B*groups, Q)
        # A softmax over nothing is NaN.
        ignored = ignored & ~ignored.all(-1, keepdim=True)
    channels, by_head = shape[-1], (attention.num_heads, -1)
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query_and_key = linear(positioned, weight[: 2 * channels], bias[: 2 * channels])
    value = linear(query, weight[2 * channels :], bias[2 * channels :])
    # (B, Q, C) -> (B, heads, Q, C/heads)
    heads = [x.unflatten(-1, by_head).transpose(1, 2) for x in (*query_and_key.chunk(2, dim=-1), value)]
    mask = None if ignored is None else ~ignored[:, None, None]
    dropout = attention.dropout if attention.training else 0.0
    attended = attend(heads[0], heads[1], heads[2], mask, dropout)
    out = attention.out_proj
    # (B, heads, Q, C/heads) -> (B, Q, C)
    return linear(attended.transpose(1, 2).flatten(2), out.weight, out.bias).reshape(shape)
