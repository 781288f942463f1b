"""Masks, biases and divisors of the scores, written for scores in any layout."""

from tests.spelled.author import Author

TRIANGLES = (  # {e}: 0, or what a mutation moves the diagonal by
    "torch.tril(torch.ones(n, n), {e})",
    "torch.ones(n, n, dtype=torch.bool).tril({e})",
    "torch.ones(n, n).tril(diagonal={e}).bool()",
    "~torch.triu(torch.ones(n, n, dtype=torch.bool), diagonal={e} + 1)",
    "torch.triu(torch.ones(n, n), diagonal={e} + 1) == 0",
    "1 - torch.triu(torch.ones(n, n), {e} + 1)",
    "place[:, None] >= place[None, :] - {e}",
    "place.unsqueeze(0) <= place.unsqueeze(1) + {e}",
    "(place.view(-1, 1) - place.view(1, -1)) >= -{e}",
    "place[None, :].expand(n, n).le(place[:, None] + {e})",
    "self.causal[:n, :n]",
    "self.later[:n, :n].logical_not()",
    "self.causal4d[0, 0, :n, :n]",
)
VALID = (
    "place < lengths[:, None]",
    "place[None, :] < lengths.unsqueeze(1)",
    "torch.lt(place, lengths.view(-1, 1))",
    "~(place >= lengths[:, None])",
    "1 - (place[None] >= lengths[:, None]).long()",
)


def align(author: Author, text: str, have: str, scores: str) -> str:
    """`text`, which holds the axes `have` in the order b h i j, so that it broadcasts against the scores.

    Scores are "bhij", "hbij", "bijh", "bij" (no heads), or folded, "xij" (b, h) and "yij" (h, b).
    """
    if scores[0] in "xy" and set(have) & set("bh"):
        if have == "bij":
            return f"{text}.repeat_interleave(h, 0)" if scores[0] == "x" else f"{text}.repeat(h, 1, 1)"
        whole = "bhij" if scores[0] == "x" else "hbij"
        sizes = "b, h, n, n" if scores[0] == "x" else "h, b, n, n"
        return f"{align(author, text, have, whole)}.expand({sizes}).reshape(b * h, n, n)"
    order = [axis for axis in scores if axis in have]
    if order != list(have):
        text = f"{_in_brackets(text)}.permute({', '.join(str(have.index(axis)) for axis in order)})"
    aligned = scores[scores.index(order[0]) :]
    if list(aligned) == order:
        return text
    if author.pick("broadcast", ["index", "unsqueeze"]) == "index":
        return f"{_in_brackets(text)}[{', '.join(':' if axis in have else 'None' for axis in aligned)}]"
    for k, axis in enumerate(aligned):
        if axis not in have:
            text = f"{_in_brackets(text)}.unsqueeze({k})"
    return text


def _in_brackets(text: str) -> str:
    return (
        text
        if text.replace("_", "").replace(".", "").isalnum() or text[0] == "(" == text[0] and text[-1] == ")"
        else f"({text})"
    )


def write_mask(author: Author) -> tuple[str, str] | None:
    """Lines that make `keep`; its axes, "ij" or "bij", and whether it is 1/0 or bool; None without a mask."""
    kind = author.named(
        "mask",
        {
            "causal": "c",
            "causal and padding": "cp",
            "causal, targets": "ct",
            "causal, contextual": "cx",
            "causal, window": "cw",
            "padding": "p",
            "from outside": "o",
            "causal, padding, window": "cpw",
            "causal, padding, targets": "cpt",
            "none": "",
        },
    )
    if not kind:
        return None
    if kind == "o":
        author.let("keep", author.pick("mask from outside", ["mask", "mask.bool()", "mask != 0", "mask.float()"]))
        return _mutated(author, "bij")
    have = "bij" if set(kind) & set("pt") else "ij"
    parts = []
    if "c" in kind:
        e = 1 if author.mutates("causal + 1") else -1 if author.mutates("causal - 1") else 0
        triangle = author.pick("triangle", TRIANGLES[:-3] if e else TRIANGLES).format(e=e)
        _buffers(author, triangle)
        parts.append(author.let("causal", triangle))
    if "w" in kind:
        window = author.pick(
            "window",
            [
                "place[:, None] - place < 4",
                "(place.view(n, 1) - place.view(1, n)).abs() <= 3",
                "torch.triu(torch.ones(n, n), -3)",
            ],
        )
        parts.append(author.let("near", window))
    if "t" in kind:
        history = "(place[None, None, :] < (lengths - num_targets)[:, None, None])"
        own = author.pick("own cell", ["torch.eye(n, dtype=torch.bool)", "(place[:, None] == place[None, :])"])
        parts.append(author.let("seen", f"{history} | {own}"))
    if "p" in kind:
        valid = author.pick("valid", VALID)
        if author.mutates("padding + 1"):
            valid = "place <= lengths[:, None]"
        author.let("valid", valid)
        parts += author.named(
            "padding of",
            {
                "keys": ["valid[:, None, :]"],
                "keys and queries": ["valid[:, None, :]", "valid[:, :, None]"],
                "keys, unsqueezed": ["valid.unsqueeze(1)"],
                "keys and queries, unsqueezed": ["valid.unsqueeze(-2)", "valid.unsqueeze(-1)"],
            },
        )
    joined = author.pick("masks joined", ["{} & {}", "{} * {}", "torch.logical_and({}, {})"])
    text = parts[0]
    for part in parts[1:]:
        text = joined.format(*(f"({t} != 0)" for t in (text, part))) if "&" in joined else joined.format(text, part)
    author.let("keep", text)
    if "x" in kind:
        rows = "(place[:, None] < 2)"
        author.let("keep", author.pick("contextual", [f"(keep != 0) | {rows}", f"torch.where({rows}, 1, keep.int())"]))
    return _mutated(author, have)


def _buffers(author: Author, triangle: str) -> None:
    for name, text in (
        ("causal4d", "torch.tril(torch.ones(longest, longest))[None, None]"),
        ("later", "torch.triu(torch.ones(longest, longest, dtype=torch.bool), 1)"),
        ("causal", "torch.tril(torch.ones(longest, longest, dtype=torch.bool))"),
    ):
        if f"self.{name}[" in triangle:
            persistent = author.pick("buffer", ["", ", persistent=False"])
            author.setup.append(f'self.register_buffer("{name}", {text}{persistent})')


def _mutated(author: Author, have: str) -> tuple[str, str]:
    if author.mutates("a hole"):
        author.let("keep", "(keep != 0) & ~((place[:, None] == 3) & (place == 1))")
    if author.mutates("anticausal"):
        author.let("keep", "keep.transpose(-1, -2)")
    dtype = author.named(
        "mask dtype", {"as it is": "keep", "bool": "keep != 0", "float": "keep.to(x.dtype)", "int": "keep.int()"}
    )
    if author.mutates("half the mask"):
        dtype = "keep * 0.5"
    if dtype != "keep":
        author.let("keep", dtype)
    return "keep", have


AFTER = {
    "p * keep": "p * {m}",
    "keep * p": "{m} * p",
    "p * keep.to": "p * {m}.to(p.dtype)",
    "where(keep, p, 0)": "torch.where({m} != 0, p, 0.0)",
    "where(keep, p, zeros_like)": "torch.where({m}.bool(), p, torch.zeros_like(p))",
    "where(hide, 0, p)": "torch.where({m} == 0, torch.zeros((), dtype=p.dtype), p)",
    "masked_fill(hide, 0)": "p.masked_fill({m} == 0, 0.0)",
    "masked_fill(~keep, 0)": "p.masked_fill(~{m}.bool(), 0)",
    "masked_fill_(~keep, 0)": "p.masked_fill_({m}.bool().logical_not(), 0.0)",
}
BEFORE = {
    "masked_fill -1e9": "s.masked_fill({m} == 0, -1e9)",
    "masked_fill ~keep -1e4": "s.masked_fill(~{m}.bool(), -1e4)",
    "masked_fill finfo.min": "s.masked_fill({m} == 0, torch.finfo(s.dtype).min)",
    "where(keep, s, -1e9)": "torch.where({m} != 0, s, -1e9)",
    "where(keep, s, full -1e9)": "torch.where({m}.bool(), s, torch.full_like(s, -1e9))",
    "s + (1 - keep) * -1e9": "s + (1.0 - {m}.to(s.dtype)) * -1e9",
    "s + zeros.masked_fill": "s + torch.zeros_like({m}, dtype=s.dtype).masked_fill({m} == 0, -1e9)",
    "s * keep": "s * {m}",
    "masked_fill(hide, 0)": "s.masked_fill({m} == 0, 0.0)",
}


def mask_scores(author: Author, keep: str) -> None:
    if author.mutates("fill with -inf"):
        author.let("s", f's.masked_fill({keep} == 0, float("-inf"))')
    elif author.mutates("fill with -30"):
        author.let("s", f"s.masked_fill({keep} == 0, -30.0)")
    else:
        author.let("s", author.named("mask before silu", BEFORE).format(m=keep))


def mask_weights(author: Author, keep: str) -> None:
    ways = {name: way for name, way in AFTER.items() if author.mutation is None or "fill_" not in way}  # p may be saved
    if author.mutates("fill with 1"):
        author.let("p", f"p.masked_fill({keep} == 0, 1.0)")
    else:
        author.let("p", author.named("mask after silu", ways).format(m=keep))


def write_bias(author: Author) -> tuple[str, str] | None:
    """A learned bias of the scores and its axes."""
    kind = author.pick("bias", ["none"] * 4 + ["by position", "by position, embedding", "by time", "by both"])
    if kind == "none":
        return None
    shared = author.heads == 1 or author.sometimes("bias shared by heads", 0.5)
    result, have = [], ""
    if kind != "by time":
        far = author.pick(
            "distance",
            [
                "place[:, None] - place[None, :] + n - 1",
                "place.view(1, n) - place.view(n, 1) + (n - 1)",
                "(place.unsqueeze(1) - place).clamp(-3, 3) + 3",
                "(place.unsqueeze(1) - place).abs()",
            ],
        )
        if kind == "by position, embedding":
            author.module("near", "nn.Embedding(2 * longest, %s)" % ("1" if shared else "h"))
            found = f"self.near({far})" + (".squeeze(-1)" if shared else ".permute(2, 0, 1)")
        else:
            author.parameter("near", "2 * longest", *([] if shared else ["h"]))
            looked_up = author.pick(
                "lookup",
                ["self.near[{}]", "F.embedding({}, self.near)"]
                if not shared
                else ["self.near[{}]", "torch.index_select(self.near, 0, ({}).flatten()).view(n, n)"],
            )
            found = looked_up.format(far) + ("" if shared else ".permute(2, 0, 1)")
        result.append((author.let("by_position", found), "ij" if shared else "hij"))
    if kind in ("by time", "by both"):
        bucket = author.pick(
            "bucket",
            [
                "(torch.log2(gap + 1.0) / 2).long().clamp(max=7)",
                "torch.clamp(gap // 100, 0, 7)",
                "torch.bucketize(gap, torch.tensor([1, 10, 100, 200]))",
            ],
        )
        author.let(
            "gap",
            author.pick(
                "gap",
                [
                    "(times[:, :, None] - times[:, None, :]).abs()",
                    "(times.unsqueeze(-1) - times.unsqueeze(1)).clamp(min=0)",
                ],
            ),
        )
        author.parameter("ages", 8, *([] if shared else ["h"]))
        author.let("by_time", f"self.ages[{bucket}]" + ("" if shared else ".permute(0, 3, 1, 2)"))
        result.append(("by_time", "bij" if shared else "bhij"))
    if len(result) == 1:
        return result[0]
    (near, have), (age, whole) = result
    return f"({align(author, near, have, whole)} + {age})", whole


def write_divisor(author: Author, scores: str, have: str) -> str | None:
    """What the weights are divided by, as a template of them; `have`: the axes of `keep`, if there is a mask."""
    ways = {
        "none": None,
        "/ n": "{} / n",
        "* (1 / n)": "{} * (1.0 / n)",
        "/ longest": "{} / self.longest",
        "/ float": "{} / 50.0",
        "div": "torch.div({}, n)",
        "/ tensor": "{} / torch.tensor(float(n))",
    }
    if author.mutates("divisor by column"):
        return "{} / " + _in_brackets(align(author, "(place[None, :] + 1)", "ij", scores))
    ways["/ row"] = "{} / " + align(author, "(place[:, None] + 1)", "ij", scores)
    if scores[0] not in "xy":
        lengths = align(author, "lengths[:, None, None]", "bij", scores)
        ways["/ lengths"] = "{} / " + lengths + ".clamp(min=1)"
        ways["* 1 / lengths"] = "{} * (1.0 / " + lengths + ".clamp(min=1).to(x.dtype))"
        if have:
            count = "(keep != 0).sum(-1, keepdim=True).clamp(min=1)"
            ways["/ visible keys"] = "{} / " + align(author, count, have, scores)
    return author.named("divisor", ways)
