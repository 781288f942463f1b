"""The mask family of HSTU attention: which key a query may attend to, as one formula.

Every implementation of the mask (reference, kernels, recogniser) is tested against this one.
"""

import torch
from torch import Tensor

IntOrTensor = int | Tensor  # an int may be symbolic


def attention_mask(
    rows: Tensor,
    cols: Tensor,
    lengths: Tensor,
    *,
    causal: bool,
    contextual: IntOrTensor,
    num_targets: IntOrTensor,
    target_group_size: IntOrTensor,
    max_attn_len: IntOrTensor,
    min_full_attn_seq_len: IntOrTensor,
    targets_share_position: bool,
) -> Tensor:
    """True where query `rows` attends to key `cols`; all integer arguments broadcast against each other.

    A sequence of `lengths` tokens holds `contextual` tokens, then history, then `num_targets` candidates. All counts
    are >= 0.

    - causal: a token attends to itself and what stands before it; else to all. Contextual tokens share position 0.
    - candidates attend to history, themselves, and (causally) to their group of `target_group_size`.
    - contextual tokens attend to all contextual tokens and all history.
    - max_attn_len > 0: to at most so many positions back; with `targets_share_position` every candidate stands at the
      end of history (Meta generative-recommenders), else at its own position (NVIDIA recsys-examples). The last
      `min_full_attn_seq_len` positions of history, and the candidates, are exempt when it is > 0.

    A sequence with contextual + num_targets > lengths has no history, and its tokens are candidates at their positions:
    in groups of 1 each attends to itself alone. Both public codes do so, with their different ways to count (groups are
    NVIDIA's alone); `lengths` 0, or fewer tokens than targets, are no special cases either.
    """
    shift = torch.clamp(torch.as_tensor(contextual, device=rows.device) - 1, min=0)
    row_pos, col_pos = torch.clamp(rows - shift, min=0), torch.clamp(cols - shift, min=0)
    history_end = lengths - num_targets - shift  # as a position

    ordered = (rows == cols) | (row_pos > col_pos if causal else row_pos != col_pos)
    both_targets = (row_pos >= history_end) & (col_pos >= history_end)
    row_group = torch.div(row_pos - history_end, target_group_size, rounding_mode="floor")
    col_group = torch.div(col_pos - history_end, target_group_size, rounding_mode="floor")
    live = ordered & (~both_targets | (row_group == col_group))

    if not (isinstance(max_attn_len, int) and max_attn_len == 0):
        if targets_share_position:
            row_at, col_at = torch.minimum(row_pos, history_end), torch.minimum(col_pos, history_end)
        else:
            row_at, col_at = row_pos, col_pos
        exempt = (torch.as_tensor(min_full_attn_seq_len, device=row_at.device) > 0) & (
            row_at >= history_end - min_full_attn_seq_len
        )
        unlimited = torch.as_tensor(max_attn_len, device=row_at.device) == 0
        live = live & (((row_at - col_at).abs() <= max_attn_len) | exempt | unlimited)

    live = live | ((rows < contextual) & (col_pos < history_end))
    return live & (0 <= rows) & (rows < lengths) & (0 <= cols) & (cols < lengths)
