"""A whole layer: norm, projections, padding, attention, gate and output; and the module that its text makes."""

import functools
import itertools
import linecache
import random
import re
from typing import Any

import torch
from torch import Tensor, nn

import tests.fbgemm_stand_ins  # noqa: F401
from tests.spelled.attention import SILU, write_attention
from tests.spelled.author import Author, Layer, Setting

MUTATIONS = (
    *("causal + 1", "causal - 1", "anticausal", "a hole", "half the mask", "padding + 1", "divisor by column"),
    *("fill with -30", "fill with -inf", "fill with 1", "softmax", "gelu", "relu", "sigmoid", "silu twice", "silu(-s)"),
    *("tanh of the weights", "weights + 0.1", "square of the weights", "dropout on weights", "sum over queries"),
    *("q shifted", "norm over tokens", "norm of u", "norm without mean", "gate with tanh", "gate of v"),
)
SPLIT_INTO_HEADS = ("view, unbind", "by head", "by head, unbind")
CREATIONS = re.compile(r"\btorch\.(arange|ones|zeros|eye|full|tensor|linspace)\(")
HEADER = """\
import math
import torch
import torch.nn.functional as F
from torch import nn

h, d, w, e, longest = {heads}, {attn_dim}, {hidden_dim}, {embedding}, {longest}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.drop, self.longest = nn.SiLU(), nn.Dropout(0.3), longest
{setup}

    def forward(self, x, {second}, mask, times, num_targets, past=None):
{lines}
"""


def write(rng: random.Random, mutation: str | None = None, setting: Setting | None = None) -> Layer:
    """A layer; with a mutation, one in which that could take place."""
    while True:
        author = Author(rng, mutation)
        layer = _write(author, setting or Setting())
        if mutation is None or author.mutated:
            return layer


def _write(author: Author, setting: Setting) -> Layer:
    layout = author.pick("layout", ["dense"] * 5 + ["jagged, fbgemm", "jagged, own indices", "jagged, x padded"])
    jagged = layout != "dense"
    author.heads = author.rng.choice([1, 2, 2, 2, 2, 3])
    author.choices["number of heads"] = str(author.heads)
    dtype = author.pick("dtype", setting.dtypes)
    equal = author.sometimes("q as wide as v", 0.75)
    attn_dim, hidden_dim = setting.head_dim, setting.head_dim * (1 if equal else 2)
    author.half = dtype == "bfloat16"
    lines = author.lines
    _sizes(author, layout)
    normed = author.sometimes("pre-norm", 0.85)
    if author.mutates("norm over tokens"):
        lines.append("z = F.layer_norm(x.mT, x.shape[-2:-1]).mT")
    else:
        author.let("z", write_norm(author, "input", "x", "e") if normed else "x")
    clear = author.pick("padding cleared", ["not", "z", "result"]) if author.dense and layout == "dense" else "not"
    if clear == "z":
        lines.append("z = z * real[..., None].to(z.dtype)")
    _projections(author, equal)
    if author.sometimes("cache", 0.1):
        lines += ["if past is not None:", "    k = torch.cat([past, k], 1)"]
    with_autocast = dtype == "float32" and author.sometimes("autocast", 0.05)
    before = len(lines)
    if not author.dense:
        for name in "qkv":
            _pad(author, layout, name)
        author.split = False
    a = write_attention(author)
    if author.sometimes("recorded", 0.1):
        lines[before:] = ['with torch.profiler.record_function("attention"):', *_indented(lines[before:])]
    if not author.dense:
        author.let("a", _unpad(author, layout, a))
    _output(author)
    if layout == "jagged, x padded":
        author.let("x", _unpad(author, layout, "x"))
    if clear == "result":
        lines.append("x = x * real[..., None].to(x.dtype)")
    if with_autocast:
        lines[:] = ['with torch.autocast("cpu", dtype=torch.bfloat16):', *_indented(lines)]
    lines.append("return x")
    source = HEADER.format(
        heads=author.heads,
        attn_dim=attn_dim,
        hidden_dim=hidden_dim,
        embedding=setting.embedding,
        longest=setting.longest,
        setup="\n".join(_indented(author.setup, 8)),
        lines="\n".join(_indented(lines, 8)),
        second="offsets" if jagged else "lengths",
    )
    return Layer(source, author.choices, jagged, dtype, setting, author.mutation)


def _indented(lines: list[str], by: int = 4) -> list[str]:
    return [" " * by + line for line in lines]


def _sizes(author: Author, layout: str) -> None:
    lines = author.lines
    if layout == "dense":
        lines += ["b, n = x.shape[0], x.shape[1]", "real = torch.arange(n) < lengths[:, None]"]
        return
    author.dense = False
    lines += ["n, total = longest, x.shape[0]", "lengths = offsets[1:] - offsets[:-1]", "b = lengths.shape[0]"]
    if layout == "jagged, fbgemm":
        return
    lines += [
        "column = torch.arange(n)",
        "token = offsets[:-1, None] + column",
        "real = column < lengths[:, None]",
        "index = token.clamp(max=total - 1)",
        "sequence = torch.searchsorted(offsets, torch.arange(total), right=True) - 1",
        "within = torch.arange(total) - offsets[sequence]",
    ]
    if layout == "jagged, x padded":
        _pad(author, layout, "x")
        author.dense = True


def _pad(author: Author, layout: str, name: str) -> None:
    flat = f"{name}.flatten(1)" if author.split and name != "x" else name
    if layout == "jagged, fbgemm":
        author.let(name, f"torch.ops.fbgemm.jagged_to_padded_dense({flat}, [offsets], [n], 0.0)")
        return
    author.let(
        name,
        author.pick(
            "padded by",
            [
                "{}[index] * real[..., None]",
                "torch.where(real[..., None], {}[index], 0.0)",
                "{}.index_select(0, index.flatten()).view(b, n, -1) * real.unsqueeze(-1)",
                "{}[index].masked_fill(~real.unsqueeze(-1), 0.0)",
            ],
        ).format(flat),
    )


def _unpad(author: Author, layout: str, name: str) -> str:
    if layout == "jagged, fbgemm":
        return f"torch.ops.fbgemm.dense_to_jagged({name}, [offsets], total)[0]"
    return author.pick(
        "unpadded by",
        [
            "{}[sequence, within]",
            "{}.flatten(0, 1)[sequence * n + within]",
            "{}.reshape(b * n, -1).index_select(0, sequence * n + within)",
        ],
    ).format(name)


def write_norm(author: Author, name: str, x: str, width: str) -> str:
    """The norm of x along its last dimension."""
    if author.mutates("norm without mean"):
        return f"{x} / ({x}.abs().mean(-1, keepdim=True) + 1e-5)"
    weight, bias = f"self.{name}_weight", f"self.{name}_bias"
    wide, affine = f"{x}.float()", f"({width},), {weight}.float(), {bias}.float(), eps=1e-5"
    ways = {
        "nn.LayerNorm": f"self.{name}({x})",
        "no affine": f"F.layer_norm({x}, ({width},))",
        "functional": f"F.layer_norm({x}, [{width}], {weight}, {bias}, 1e-6)",
        "normalized_shape": f"F.layer_norm({x}, normalized_shape={x}.shape[-1:], eps=1e-6)",
        "float": f"F.layer_norm({x}.float(), ({width},)).to({x}.dtype)",
        "float, affine": f"F.layer_norm({x}.float(), {affine}).type_as({x})",
        "nn.RMSNorm": f"self.{name}({x})",
        "rms functional": f"F.rms_norm({x}, ({width},), eps=1e-6)",
        "rms written": f"{x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-6) * {weight}",
        "rms by division": f"{weight} * ({x} / torch.sqrt(torch.mean({x} * {x}, dim=-1, keepdim=True) + 1e-6))",
        "rms, float": f"{weight} * ({wide} * torch.rsqrt({wide}.square().mean(-1, keepdim=True) + 1e-6)).to({x}.dtype)",
        "written": f"({x} - {x}.mean(-1, keepdim=True)) / torch.sqrt({x}.var(-1, unbiased=False, keepdim=True) + 1e-5)",
    }
    text = author.named(f"{name} norm", ways)
    for kind in ("LayerNorm", "RMSNorm"):
        if author.choices[f"{name} norm"] == f"nn.{kind}":
            author.module(name, f"nn.{kind}({width}, eps=1e-6)")
    for kind in ("weight", "bias"):
        if f"self.{name}_{kind}" in text:
            author.parameter(f"{name}_{kind}", width)
    return text


def _projections(author: Author, equal: bool) -> None:
    """Lines from z to u, v, q and k."""
    order = author.pick("order", ["".join(p) for p in itertools.permutations("uvqk")] + ["uvqk", "qkvu"] * 6)
    active = author.pick("activated", ["all at once"] * 3 + ["uvqk", "u", "uv", "uqk", "none"])
    silu = author.pick("silu of projections", SILU)
    sizes = {"u": "h * w", "v": "h * w", "q": "h * d", "k": "h * d"}
    kind = author.pick("projections", ["one"] * 4 + ["four"])
    if kind == "four":
        bias = author.pick("projection bias", ["", ", bias=False"])
        for name in order:
            author.module(f"to_{name}", f"nn.Linear(e, {sizes[name]}{bias})")
            author.let(name, f"self.to_{name}(z)")
            if active == "all at once" or name in active:
                author.let(name, silu.format(name))
        return
    total = "2 * h * (d + w)"
    flat, shape = ("z.reshape(-1, e)", ".view(b, n, -1)") if author.dense else ("z", "")
    text = author.named(
        "projection",
        {
            "nn.Linear": "self.uvqk(z)",
            "nn.Linear, no bias": "self.uvqk(z)",
            "F.linear": "F.linear(z, self.uvqk_in)",
            "F.linear, bias": "F.linear(z, self.uvqk_in, self.uvqk_bias)",
            "z @ w": "z @ self.uvqk_out",
            "matmul + bias": "torch.matmul(z, self.uvqk_out) + self.uvqk_bias",
            "mm": f"torch.mm({flat}, self.uvqk_out){shape}",
            "addmm": f"torch.addmm(self.uvqk_bias, {flat}, self.uvqk_out){shape}",
        },
    )
    if "self.uvqk(" in text:
        author.module(
            "uvqk", f"nn.Linear(e, {total}{', bias=False' if 'no bias' in author.choices['projection'] else ''})"
        )
    for name, shape_of in (("uvqk_in", (total, "e")), ("uvqk_out", ("e", total)), ("uvqk_bias", (total,))):
        if f"self.{name}" in text:
            author.parameter(name, *shape_of, scale=0.25 if len(shape_of) == 2 else 1.0)
    author.let("z", text)
    if active == "all at once":
        author.let("z", silu.format("z"))
    rest = "b, n" if author.dense else "total"
    names = ", ".join(order)
    ways = {
        "split": f"{names} = torch.split(z, [{', '.join(sizes[name] for name in order)}], dim=-1)",
        "z.split": f"{names} = z.split([{', '.join(sizes[name] for name in order)}], -1)",
        "slices": "",
    }
    if equal:
        ways |= {
            "chunk": f"{names} = z.chunk(4, dim=-1)",
            "torch.chunk": f"{names} = torch.chunk(z, 4, -1)",
            "unflatten": f"{names} = z.unflatten(-1, (4, h * d)).unbind(-2)",
            "view, unbind": f"{names} = z.view({rest}, 4, h, d).unbind(-3)",
            "by head": f"{names} = z.view({rest}, h, 4 * d).split(d, dim=-1)",
            "by head, unbind": f"{names} = z.reshape({rest}, h, 4, d).unbind(dim=-2)",
        }
    line = author.named("split", ways)
    author.split = author.choices["split"] in SPLIT_INTO_HEADS
    if line:
        author.lines.append(line)
    else:
        author.lines.append("begin = 0")
        for name in order:
            author.lines += [f"{name} = z[..., begin : begin + {sizes[name]}]", f"begin += {sizes[name]}"]
    for name in order:
        if name in active:
            author.let(name, silu.format(name))


def _output(author: Author) -> None:
    lines = author.lines
    if author.choices.get("split") in SPLIT_INTO_HEADS:
        lines.append("u = u.flatten(-2)")
    u = "u"
    if author.mutates("gate of v"):
        u = "a"
    if author.mutates("gate with tanh"):
        u = "torch.tanh(u)"
    elif author.sometimes("silu of the gate", 0.1):
        u = "F.silu(u)"
    per_head = author.pick("output norm of", ["rows"] * 3 + ["heads", "group_norm", "nothing"])
    if author.mutates("norm of u"):
        author.let("g", f"a * {write_norm(author, 'output', 'u', 'h * w')}")
    else:
        if per_head == "rows":
            norm = write_norm(author, "output", "a", "h * w")
        elif per_head == "heads":
            author.let("a", "a.unflatten(-1, (h, w))")
            author.let("c", write_norm(author, "output", "a", "w"))
            author.let("a", "a.flatten(-2)")
            norm = "c.flatten(-2)"
        elif per_head == "group_norm":
            norm = "F.group_norm(a.reshape(-1, h * w), h, eps=1e-6).view_as(a)"
        else:
            norm = "a"
        author.let("c", norm)
        author.let(
            "g",
            author.named(
                "gate",
                {
                    "u * c": f"{u} * c",
                    "c * u": f"c * {u}",
                    "torch.mul": f"torch.mul({u}, c)",
                    "norm(a * u)": f"F.layer_norm(a * {u}, (h * w,))",
                    "cat[u, a, .]": f"torch.cat([u, a, {u} * c], dim=-1)",
                    "cat[u, c, .]": f"torch.cat([{u}, c, {u} * c], -1)",
                    "no gate": "c",
                },
            ),
        )
    if author.sometimes("dropout before", 0.4):
        author.let(
            "g",
            author.pick(
                "dropout",
                ["F.dropout(g, 0.2, self.training)", "self.drop(g)", "F.dropout(g, p=0.1, training=self.training)"],
            ),
        )
    wide = "3 * h * w" if "cat" in author.choices.get("gate", "") else "h * w"
    way = author.pick("output", ["nn.Linear", "nn.Linear, no bias", "F.linear", "g @ w", "g @ w + bias"])
    if "nn" in way:
        author.module("o", f"nn.Linear({wide}, e{', bias=False' if 'no' in way else ''})")
        author.let("y", "self.o(g)")
    else:
        author.parameter("o", *(("e", wide) if way == "F.linear" else (wide, "e")), scale=0.25)
        author.let("y", {"F.linear": "F.linear(g, self.o)", "g @ w": "g @ self.o"}.get(way, "g @ self.o + self.o_bias"))
        if way == "g @ w + bias":
            author.parameter("o_bias", "e")
    if author.sometimes("dropout after", 0.2):
        author.let("y", "self.drop(y)")
    author.let("x", author.pick("residual", ["y + x", "x + y", "x.add(y)", "y"]))
    if author.sometimes("post-norm", 0.1):
        author.let("x", write_norm(author, "post", "x", "e"))


def build(layer: Layer, *, double: bool = False) -> nn.Module:
    """The module, in eval mode, with parameters of its dtype; or the same one that computes in float64 throughout."""
    device = layer.setting.device
    source = layer.source.replace('autocast("cpu"', f'autocast("{device}"')
    if device != "cpu":  # the text names none
        source = CREATIONS.sub(r"created(torch.\1, ", source)
    if double:
        for narrow in (".float()", "torch.float32", "dtype=torch.bfloat16"):
            wide = {".float()": ".double()", "torch.float32": "torch.float64"}.get(narrow, "enabled=False")
            source = source.replace(narrow, wide)
    filename = f"<spelling {hash(source):x}>"
    linecache.cache[filename] = len(source), None, source.splitlines(True), filename
    namespace: dict[str, Any] = {"__name__": "tests.spelled.written", "created": functools.partial(_created, device)}
    exec(compile(source, filename, "exec"), namespace)
    module: nn.Module = namespace["Layer"]()
    return module.to(device, torch.float64 if double else getattr(torch, layer.dtype)).eval()


def _created(where: str, create: Any, *args: Any, **kwargs: Any) -> Tensor:
    return create(*args, **{"device": where, **kwargs})


def arguments(layer: Layer, batch: int, seed: int) -> tuple[Tensor, ...]:
    """x, lengths or offsets, mask, times, num_targets for a batch of so many sequences."""
    dice, longest = torch.Generator().manual_seed(seed), layer.setting.longest
    if batch > 1:
        lengths = torch.randint(2, longest + 1, (batch,), generator=dice)
        lengths[0] = longest
    else:  # two tokens would be taken for as many as there are offsets
        lengths = torch.randint(3, longest + 1, (batch,), generator=dice)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    shape = (int(offsets[-1]),) if layer.jagged else (batch, longest)
    x = torch.randn(*shape, layer.setting.embedding, generator=dice).to(getattr(torch, layer.dtype))
    real = torch.arange(longest) < lengths[:, None]
    mask = torch.ones(longest, longest).tril() * real[:, None] * real[:, :, None]
    times = torch.randint(0, 1000, (batch, longest), generator=dice).sort(1).values
    num_targets = torch.randint(0, 3, (batch,), generator=dice)
    given = x, offsets if layer.jagged else lengths, mask, times, num_targets
    return tuple(t.to(layer.setting.device) for t in given)
