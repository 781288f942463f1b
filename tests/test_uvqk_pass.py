"""norm -> projection -> silu -> split: recognised by where the slices flow, tagged, and left to cuBLAS and Inductor."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_compile.ops import hstu_attention
from hstu_compile.passes import uvqk
from hstu_compile.passes.report import Report
from tests.tracing import traced

B, N, H, D, E = 2, 8, 2, 4, 16
W = H * D
SIZES = [E, 4 * W]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(B, N, H, -1) for t in (q, k, v))
    p = F.silu(torch.einsum("bnhd,bmhd->bhnm", q, k) * 0.5) / N
    return torch.einsum("bhnm,bmhd->bnhd", p.tril(), v).reshape(B * N, W)


def attend_with_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(B, N, H, -1).transpose(1, 2) for t in (q * 0.5, k, v))
    scores = q @ k.mT
    return ((scores * torch.sigmoid(scores) / N) @ v).transpose(1, 2).reshape(B * N, W)


def attend_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(B, N, H, -1) for t in (q, k, v))
    return hstu_attention(q, k, v, max_seq_len=N, alpha=0.5, scaling_seq_len=N).reshape(B * N, W)


def attend_with_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(B, N, H, -1) for t in (q, k, v))
    p = F.softmax(torch.einsum("bnhd,bmhd->bhnm", q, k), dim=-1)
    return torch.einsum("bhnm,bmhd->bnhd", p, v).reshape(B * N, W)


def gated(u: Tensor, a: Tensor) -> Tensor:
    return u * F.layer_norm(a, (W,))


def meta(x: Tensor, weight: Tensor, bias: Tensor, attend=attend) -> Tensor:
    z = torch.addmm(bias, F.layer_norm(x, (E,)), weight)
    u, v, q, k = torch.split(z, [W] * 4, dim=1)
    return gated(F.silu(u), attend(q, k, v))


def research(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    q, k, v, u = F.silu(torch.mm(F.layer_norm(x, (E,)), weight)).chunk(4, dim=1)
    return gated(u, attend_with_matmul(q, k, v))


def nvidia(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    z = F.silu(F.linear(F.rms_norm(x, (E,)), weight.t(), bias)).view(-1, H, 4 * D)
    u, v, q, k = torch.split(z, [D] * 4, dim=-1)
    return gated(u.reshape(-1, W), attend_fused(q, k, v))


def sliced(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    z = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) @ weight
    k, q, v, u = (z[:, i * W : (i + 1) * W] for i in range(4))
    return gated(u, attend(q, k, v))


def four_linears(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    n = F.layer_norm(x, (E,))
    u, v, q, k = (F.silu(F.linear(n, w)) for w in weight.t().reshape(4, W, E).unbind(0))
    return gated(u, attend(q, k, v))


def no_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    u, v, q, k = F.silu(x @ weight).view(-1, 4, W).unbind(1)
    return gated(u, attend(q, k, v))


def one_key_head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    u, v, q, k = F.silu(x @ weight).chunk(4, dim=1)
    k = k[:, None, :D].expand(-1, H, D).reshape(-1, W)
    return gated(u, attend(q, k, v))


# name -> (model, what the report says, how many norm, projection and silu nodes are tagged)
FOUND = {
    "Meta": (meta, "layer_norm -> addmm 16x32 with bias -> silu on u -> split u, v, q, k", (1, 1, 1)),
    "research": (research, "layer_norm -> mm 16x32 -> silu -> split q, k, v, u", (1, 1, 1)),
    "NVIDIA": (nvidia, "rms_norm -> linear 16x32 with bias -> silu -> split u, v, q, k", (1, 1, 1)),
    "sliced": (sliced, "rms_norm (written out) -> matmul 16x32 -> split k, q, v, u", (5, 1, 0)),
    "four linears": (four_linears, "layer_norm -> 4 times linear 16x8 -> silu -> split u, v, q, k", (1, 4, 4)),
    "one key head": (one_key_head, "matmul 16x32 -> silu -> split u, v, q, k", (0, 1, 1)),
    "no norm": (no_norm, "matmul 16x32 -> silu -> split u, v, q, k", (0, 1, 1)),
}


def arguments() -> list[Tensor]:
    return [torch.randn(B * N, E)]


def parameters() -> list[Tensor]:
    return [torch.randn(*SIZES), torch.randn(SIZES[1])]


def graph_of(model):
    return traced(lambda weight, bias, x: model(x, weight, bias), arguments(), fixed=parameters())


@pytest.mark.parametrize("name", FOUND)
def test_found_and_tagged(name):
    model, says, tags = FOUND[name]
    gm = graph_of(model)
    before, report = str(gm.graph), Report()
    assert uvqk.run(gm, report) == 1
    assert [r.what for r in report.recognised("uvqk")] == [says] and not report.fused() and not report.missed()
    roles = [node.meta.get(uvqk.ROLE) for node in gm.graph.nodes]
    assert tuple(roles.count(r) for r in ("input_layernorm", "uvqk_projection", "input_silu")) == tags
    assert str(gm.graph) == before
    assert uvqk.run(gm, Report()) == 0


def test_two_layers():
    gm = graph_of(lambda x, w, b: meta(F.linear(meta(x, w, b), torch.ones(E, W)) + x, w, b))
    assert uvqk.run(gm, Report()) == 2


def test_a_scale_that_is_a_symbolic_number():
    def model(x, weight, bias):
        scale = x.size(0) ** -0.5
        return meta(x, weight, bias, lambda q, k, v: attend(q * scale, k, v))

    gm = graph_of(model)
    assert any(isinstance(node.meta.get("val"), torch.SymFloat) for node in gm.graph.nodes)
    assert uvqk.run(gm, Report()) == 1


def test_near_miss_softmax():
    gm, report = graph_of(lambda x, w, b: meta(x, w, b, attend_with_softmax)), Report()
    assert uvqk.run(gm, report) == 0
    assert not any(uvqk.ROLE in node.meta for node in gm.graph.nodes)
    assert "no HSTU attention was found that takes its k, q, v" in report.missed("uvqk")[0].reason


def test_an_mlp_is_no_layer():
    def mlp(x, w, b):
        up, gate = (F.layer_norm(x, (E,)) @ w).chunk(2, dim=1)
        return F.silu(gate) * up

    report = Report()
    assert uvqk.run(graph_of(mlp), report) == 0 and not report.regions
