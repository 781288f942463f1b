"""From q, k, v to a: heads, products, scale, activation, and where mask, bias and divisor stand among them."""

from tests.spelled.author import Author
from tests.spelled.masks import align, mask_scores, mask_weights, write_bias, write_divisor, write_mask

SILU = (
    "F.silu({})",
    "self.act({})",
    "{0} * torch.sigmoid({0})",
    "torch.sigmoid({0}) * {0}",
    "{0} * {0}.sigmoid()",
    "torch.nn.functional.silu({})",
    "torch.mul({0}, torch.sigmoid({0}))",
)
TRANSPOSED = ("{}.transpose(-2, -1)", "{}.transpose(-1, -2)", "{}.mT", "{}.swapaxes(-1, -2)")

HEADS = {  # axes of q, k, v; how [b, n, h * d] becomes so; how a comes back; the axes of the scores
    "bhid": (
        [
            "{t}.view(b, n, h, {d}).transpose(1, 2)",
            "{t}.reshape(b, n, h, {d}).permute(0, 2, 1, 3)",
            "{t}.unflatten(-1, (h, {d})).transpose(1, 2)",
            "{t}.view(b, n, h, -1).transpose(1, 2).contiguous()",
        ],
        [
            "a.transpose(1, 2).reshape(b, n, h * w)",
            "a.permute(0, 2, 1, 3).contiguous().view(b, n, -1)",
            "a.transpose(1, 2).flatten(2)",
        ],
        ["bhij"],
    ),
    "bihd": (
        ["{t}.view(b, n, h, {d})", "{t}.unflatten(-1, (h, {d}))", "{t}.reshape(b, n, h, -1)"],
        ["a.reshape(b, n, h * w)", "a.flatten(2)", "a.contiguous().view(b, n, h * w)"],
        ["bhij", "hbij", "bijh"],
    ),
    "hbid": (
        ["{t}.view(b, n, h, {d}).permute(2, 0, 1, 3)", "torch.stack({t}.chunk(h, -1), dim=0)"],
        ["a.permute(1, 2, 0, 3).reshape(b, n, -1)", "torch.cat(a.unbind(0), dim=-1)"],
        ["hbij"],
    ),
    "xid": (
        [
            "{t}.view(b, n, h, {d}).transpose(1, 2).reshape(b * h, n, {d})",
            "{t}.reshape(b, n, h, {d}).permute(0, 2, 1, 3).contiguous().view(-1, n, {d})",
        ],
        [
            "a.view(b, h, n, w).transpose(1, 2).reshape(b, n, -1)",
            "a.reshape(b, h, n, w).permute(0, 2, 1, 3).contiguous().view(b, n, h * w)",
        ],
        ["xij"],
    ),
    "yid": (
        ["torch.cat({t}.chunk(h, dim=-1), dim=0)", "torch.cat(torch.split({t}, {d}, dim=2), dim=0)"],
        ["torch.cat(a.chunk(h, dim=0), dim=-1)", "torch.cat(torch.split(a, b, dim=0), dim=2)"],
        ["yij"],
    ),
    "bid": (["{t}"], ["a"], ["bij"]),
}


def write_attention(author: Author) -> str:
    """Lines from q, k, v, of [b, n, h * d] each (or [b, n, h, d] where split), to a [b, n, h * w]."""
    axes = "bid" if author.heads == 1 else author.pick("heads", [axes for axes in HEADS if axes != "bid"])
    into, back, layouts = HEADS[axes]
    scores = author.pick("scores", layouts)
    split = author.pick("into heads", into)
    for name, size in zip("qkv", "ddw", strict=True):
        flat = f"{name}.flatten(2)" if author.split and author.heads > 1 else name
        flat = f"{name}.squeeze(2)" if author.split and author.heads == 1 else flat
        author.let(name, split.format(t=flat, d=size))
    if author.mutates("q shifted"):
        author.let("q", f"q.roll(1, {axes.index('i')})")
    author.choices.pop("broadcast", None)
    author.lines.append("place = torch.arange(n, device=x.device)")
    mask = write_mask(author)
    keep = None if mask is None else author.let("m", align(author, mask[0], mask[1], scores))
    _write_scores(author, axes, scores, keep)
    _write_weights(author, scores, keep, "" if mask is None else mask[1])
    p, a, values = scores, axes, axes.replace("i", "j")
    if author.mutates("sum over queries"):
        author.let("p", f"p.transpose({p.index('i')}, {p.index('j')})")
    equation = _letters(author, f"{p},{values}->{a}")
    ways = {"einsum": f'torch.einsum("{equation}", p, v)'}
    if p == axes.replace("d", "j"):
        ways |= {"@": "p @ v", "matmul": "torch.matmul(p, v)", "p.matmul": "p.matmul(v)"}
        if len(p) == 3:
            ways |= {"bmm": "torch.bmm(p, v)"}
        else:
            ways |= {"ellipsis": 'torch.einsum("...ij,...jd->...id", p, v)'}
    if len(axes) == 4:
        order = ", ".join(str("bihd".index(axis)) for axis in axes)
        ways |= {"einsum, its layout": f'torch.einsum("{p},{values}->bihd", p, v).permute({order})'}
    author.let("a", author.named("second product", ways))
    if author.choices.get("divisor of a") == "yes":
        author.let("a", "a / n")
    return author.let("a", author.pick("out of heads", back))


def _letters(author: Author, equation: str) -> str:
    """The same equation with other letters."""
    names = author.rng.sample("abcdefghijklmnopqrstuvwxyz", 26)
    return "".join(names["abdhijxy".index(c)] if c.isalpha() else c for c in equation)


def _write_scores(author: Author, axes: str, scores: str, keep: str | None) -> None:
    keys = axes.replace("i", "j")
    scale = author.named(
        "scale value",
        {
            "d ** -0.5": "d**-0.5",
            "1 / sqrt(d)": "1.0 / math.sqrt(d)",
            "self.scale": "self.scale",
            "tensor": "torch.tensor(d**-0.5)",
            "none": "",
        },
    )
    if scale == "self.scale":
        author.setup.append("self.scale = d**-0.5")
    place = author.pick("scale on", ["q", "k", "scores", "scores, divided"]) if scale else ""
    if place in ("q", "k"):
        author.let(place, f"{place} * {scale}")
    transposed = author.pick("transposed", TRANSPOSED).format("k")
    equation = _letters(author, f"{axes},{keys}->{scores}")
    ways = {
        "einsum": f'torch.einsum("{equation}", q, k)',
        "einsum, keys first": f'torch.einsum("{keys},{axes}->{scores}", k, q)',
    }
    if scores == axes.replace("d", "j"):
        ways |= {"@": f"q @ {transposed}", "matmul": f"torch.matmul(q, {transposed})"}
        ways |= {"keys first": "(k @ q.mT).mT"}
        if len(axes) == 3:
            ways |= {"bmm": f"torch.bmm(q, {transposed})", "k.transpose(1, 2)": "torch.bmm(q, k.transpose(1, 2))"}
        else:
            ways |= {"ellipsis": 'torch.einsum("...id,...jd->...ij", q, k)'}
    author.let("s", author.named("first product", ways))
    if author.sometimes("float scores", 0.15):
        author.let("s", author.pick("float", ["s.float()", "s.to(torch.float32)"]))
    if place == "scores":
        author.let("s", author.pick("scale of scores", ["s * {}", "{} * s", "s.mul({})"]).format(scale))
    elif place == "scores, divided":
        author.let("s", author.pick("scale of scores", ["s / math.sqrt(d)", "s / d**0.5", "s.div(math.sqrt(d))"]))
    bias = write_bias(author)
    if bias is not None:
        text = align(author, bias[0], bias[1], scores)
        author.let("s", author.pick("bias added", ["s + {}", "{} + s", "torch.add(s, {})"]).format(text))
    author.choices["masked"] = "not"
    wanted = author.mutation in ("fill with -30", "fill with -inf")
    harmful = author.mutation == "silu(-s)"  # of a fill with -1e9
    if keep and (wanted or author.sometimes("mask before", 0.3)) and not harmful:
        mask_scores(author, keep)
        author.choices["masked"] = "before silu"


def _write_weights(author: Author, scores: str, keep: str | None, have: str) -> None:
    silu = author.pick("silu of scores", SILU)
    silu = {
        "softmax": f"torch.softmax({{}}, dim={scores.index('j')})",
        "gelu": "F.gelu({})",
        "relu": "F.relu({})",
        "silu twice": "F.silu(F.silu({}))",
        "sigmoid": "torch.sigmoid({})",
        "silu(-s)": "F.silu(-({}))",
    }.get(author.mutation, silu)
    author.mutated |= author.mutation in ("softmax", "gelu", "relu", "silu twice", "sigmoid", "silu(-s)")
    author.let("p", silu.format("s"))
    masked = author.choices["masked"] != "before silu"
    divisor = write_divisor(author, scores, have)
    first = author.pick("divided", ["before the mask", "after the mask"]) == "before the mask"
    for step in "dm" if first else "md":
        if step == "d" and divisor:
            author.let("p", divisor.format("p"))
        if step == "m" and keep and masked:
            mask_weights(author, keep)
            author.choices["masked"] = "after silu"
    if author.half or author.choices["float scores"] == "yes":
        author.let("p", author.pick("weights cast", ["p.to(x.dtype)", "p.type_as(v)", "p.to(v.dtype)"]))
    for mutation, text in (
        ("tanh of the weights", "torch.tanh(p)"),
        ("weights + 0.1", "p + 0.1"),
        ("square of the weights", "p * p"),
        ("dropout on weights", "F.dropout(p, 0.5)"),
    ):
        if author.mutates(mutation):
            author.let("p", text)
    if author.sometimes("dropout that does nothing", 0.2):
        author.let(
            "p",
            author.pick(
                "attention dropout", ["F.dropout(p, 0.3, self.training)", "self.drop(p)", "F.dropout(p, p=0.0)"]
            ),
        )
    if scores[0] != "x":
        author.choices["divisor of a"] = "yes" if not divisor and author.rng.random() < 0.3 else "no"
