"""What a request asks of CUDA."""

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import hstu_compile
from tests.models.native_ranking import NativeRanking
from tests.models.ranking import Ranking
from tests.serving_traffic import MAX_SEQ_LEN, Traffic

pytestmark = pytest.mark.cuda


def test_one_copy_before_the_graph() -> None:
    """Of a user who is on the GPU, with arguments on the CPU: no kernel, and no wait for one."""
    model = Ranking(layers=2).to("cuda", torch.bfloat16).eval()
    traffic = Traffic(model, "cuda")
    engine = hstu_compile.serve(model, max_batch=4, max_seq_len=MAX_SEQ_LEN, page_size=16, cuda_graphs=[(2, 16)])
    requests = [traffic.request(["a"], [history], [2]) for history in (9, 12, 15)]
    *before, last = [[x.cpu() if isinstance(x, Tensor) else x for x in args] for args in requests]
    for args in before:
        engine(["a"], *args)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        answer = engine(["a"], *last)
        torch.cuda.synchronize()
    traffic.check(answer, requests[-1])
    events = [e for e in profiler.events() if e.device_type == DeviceType.CPU and e.name.startswith("cuda")]
    names = [e.name for e in sorted(events, key=lambda e: e.time_range.start)]
    calls = names[: names.index("cudaGraphLaunch")]
    assert calls.count("cudaMemcpyAsync") == 1, calls
    others = {"cudaLaunchKernel", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventRecord"}
    assert not others & set(calls), calls
    engine.close()


def test_kernels_of_a_layer() -> None:
    """silu of the projection and what the pages get of it are one launch."""
    model = NativeRanking(MAX_SEQ_LEN, layers=3).to("cuda", torch.bfloat16).eval()
    traffic = Traffic(model, "cuda")
    engine = hstu_compile.serve(model, max_batch=4, max_seq_len=MAX_SEQ_LEN, page_size=16, cuda_graphs=[(2, 16)])
    *before, last = (traffic.request(["a"], [history], [2]) for history in (9, 12, 15))
    for args in before:
        engine(["a"], *args)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        answer = engine(["a"], *last)
        torch.cuda.synchronize()
    traffic.check(answer, last)
    names = [e.name for e in profiler.events() if e.device_type == DeviceType.CUDA]
    assert sum("silu_append_kernel" in name for name in names) == 3, names
    assert not any("append_kernel" in name and "silu" not in name for name in names), names
    engine.close()
