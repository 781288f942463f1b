"""Problems with a relative bias."""

import torch

TIMES = (torch.int32, torch.int64, torch.float32, torch.float64)


def relative_bias(
    batch: int,
    heads: int,
    N: int,
    dtype: torch.dtype = torch.int64,
    *,
    device: str = "cpu",
    shared: bool = False,
    one_sequence: bool = False,
    symmetric: bool = False,
    num_boundaries: int = 20,
) -> dict:
    """The op's arguments. Times of the rows are those of the columns, shifted by one: what comes next."""
    gaps = torch.exp(torch.rand(1 if one_sequence else batch, N + 1, device=device) * 10)
    times = (gaps.cumsum(1) - 1000).to(dtype)
    bounds = torch.exp(torch.linspace(0, 12, num_boundaries)) - 5
    table = 1 if shared else heads
    return {
        "position_bias": torch.randn(table, 2 * N - 1, device=device),
        "time_bias": torch.randn(table, num_boundaries + 1, device=device),
        "row_times": times[:, 1:],
        "col_times": times[:, :-1],
        "time_boundaries": bounds.to(dtype).to(device).sort().values,
        "time_symmetric": symmetric,
    }
