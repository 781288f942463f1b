"""Which kernel attention runs on, and how a benchmark chooses one."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch

from hstu_compile.ops import hstu_attention, kernel_table
from hstu_compile.ops.kernel_table import ATTENTION, PORTABLE, REFERENCE, choose_attention, force

CALL = {"dtype": torch.bfloat16, "attn_dim": 64, "hidden_dim": 64, "has_mask": False, "has_bias": False}
CUDA = torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("hstu_compile.ops.kernels.gluon_compat.PROBLEM", None)
    choose_attention.cache_clear()
    yield
    choose_attention.cache_clear()


def test_choices(hopper: None) -> None:
    assert choose_attention(CUDA, **CALL).name == ATTENTION[9]
    assert choose_attention(CUDA, **CALL | {"dtype": torch.float32}).name == PORTABLE
    assert choose_attention(torch.device("cpu"), **CALL).is_reference


@pytest.mark.parametrize("name", [ATTENTION[9], PORTABLE, REFERENCE])
def test_forced(hopper: None, name: str) -> None:
    with force(name):
        assert choose_attention(CUDA, **CALL).name == name
        with force(REFERENCE):
            assert choose_attention(CUDA, **CALL).is_reference
        assert choose_attention(CUDA, **CALL).name == name
    assert choose_attention(CUDA, **CALL).name == ATTENTION[9]


def test_what_cannot_be_forced(hopper: None) -> None:
    with pytest.raises(ValueError, match="'cutlass'.*attention_sm90.*attention_triton.*plain PyTorch"):
        with force("cutlass"):
            pass
    with force(ATTENTION[9]), pytest.raises(ValueError, match="forced to run on attention_sm90.*float32"):
        choose_attention(CUDA, **CALL | {"dtype": torch.float32})
    with force(PORTABLE), pytest.raises(ValueError, match="forced to run on attention_triton.*device type cpu"):
        choose_attention(torch.device("cpu"), **CALL)
    assert kernel_table.forced is None


def test_calls_that_were_seen_before() -> None:
    """What the op remembers of a call does not outlive a change of the kernel."""
    q, k, v = (torch.randn(5, 2, 16) for _ in range(3))
    arguments: dict[str, Any] = {"seq_offsets": torch.tensor([0, 5]), "max_seq_len": 5, "alpha": 1.0}
    arguments["scaling_seq_len"] = 5.0

    def kernels_chosen() -> int:
        with patch.object(kernel_table, "choose_attention", wraps=choose_attention) as chosen:
            hstu_attention(q, k, v, **arguments)
        return chosen.call_count

    kernels_chosen()
    assert kernels_chosen() == 0
    with force(PORTABLE), pytest.raises(ValueError, match="forced"):
        hstu_attention(q, k, v, **arguments)
    with force(REFERENCE):
        assert kernels_chosen() == 1
    assert kernels_chosen() == 0


@pytest.mark.cuda
def test_forced_on_a_gpu() -> None:
    """Forward and, in autograd's thread, backward."""
    q, k, v = (torch.randn(50, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    arguments: dict[str, Any] = {"seq_offsets": torch.tensor([0, 50], device="cuda"), "max_seq_len": 50, "alpha": 1.0}
    with force(PORTABLE):
        from hstu_compile.ops.kernels import attention_triton as portable

        with patch.object(portable, "forward", wraps=portable.forward) as forward:
            with patch.object(portable, "backward", wraps=portable.backward) as backward:
                hstu_attention(q, k, v, **arguments, scaling_seq_len=50.0).sum().backward()
    assert forward.call_count == backward.call_count == 1
