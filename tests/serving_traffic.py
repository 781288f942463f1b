"""Users with histories that grow, and requests of them, for tests of serving."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hstu_compile.serving import Answer
from tests.error_budget import FORWARD, assert_within_budget
from tests.fbgemm_stand_ins import in_plain_pytorch
from tests.models.ranking import ITEMS

MAX_SEQ_LEN = 48


class Traffic:
    """Requests to a Ranking, and what the answers should be."""

    def __init__(self, model: nn.Module, device: str = "cpu") -> None:
        self.model, self.device = model, device
        self._ids: dict[Any, Tensor] = {}
        self._others: Any = None

    def ids(self, user: Any) -> Tensor:
        if user not in self._ids:
            self._ids[user] = torch.randint(0, ITEMS, (MAX_SEQ_LEN,))
        return self._ids[user]

    def request(self, users: Sequence[Any], histories: Sequence[int], targets: Sequence[int]) -> tuple[Any, ...]:
        """The arguments of a model: ids, offsets, num_targets, max_seq_len and timestamps."""
        pieces, times = [], []
        for user, history, count in zip(users, histories, targets, strict=True):
            pieces += [self.ids(user)[:history], torch.randint(0, ITEMS, (count,))]
            times += [torch.arange(history) * 3, torch.full((count,), history * 3 + 1)]
        lengths = torch.tensor(histories) + torch.tensor(targets)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        args = torch.cat(pieces), offsets, torch.tensor(targets), MAX_SEQ_LEN, torch.cat(times)
        return tuple(x.to(self.device) if isinstance(x, Tensor) else x for x in args)

    def check(self, answer: Answer, args: Sequence[Any]) -> None:
        """Against the model without a cache, in its own dtype and in float64.

        Of few numbers eager may happen to get all right, and products of few rows lose more: eager's error is that of
        requests of many sizes besides.
        """
        state = [parameter._version for parameter in self.model.parameters()]
        if self._others is None or self._others[0] != state:
            sizes = [1, 2, 3] * 4 + [MAX_SEQ_LEN - 2]
            others = [self._both(self.request([f"other {k}"], [n], [2])) for k, n in enumerate(sizes)]
            self._others = state, *(torch.cat([x.flatten() for x in xs]) for xs in zip(*others, strict=True))
        _, *others = self._others
        eager, exact = self._both(args)
        if eager.shape[0] == args[0].shape[0]:
            eager, exact = eager[answer.rows], exact[answer.rows]
        assert answer.output.shape == eager.shape
        pairs = zip((answer.output, eager, exact), (others[0], *others), strict=True)
        assert_within_budget(*(torch.cat([x.flatten(), other]) for x, other in pairs), m=FORWARD)

    def _both(self, args: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Without a cache, in the model's own dtype and in float64."""
        with torch.no_grad(), in_plain_pytorch():
            return self.model(*args), copy.deepcopy(self.model).double()(*args)
