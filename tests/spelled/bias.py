"""Learned biases of the scores by position, by time, or both, written for scores in any layout."""

from tests.spelled.author import Author
from tests.spelled.masks import align

DISTANCES = (
    "place[:, None] - place[None, :] + n - 1",
    "place.view(1, n) - place.view(n, 1) + (n - 1)",
    "(place[:, None] + (n - 1)) - place",
    "torch.arange(n - 1, -1, -1)[:, None] + place",
    "(place.unsqueeze(1) - place).clamp(-3, 3) + 3",
    "(place.unsqueeze(1) - place).abs()",
    "torch.sub(*torch.meshgrid(place, place, indexing='ij')) + longest - 1",
    "self.apart[:n, :n]",
)
T5 = """\
apart = (place[:, None] - place[None, :]).clamp(min=0)
large = 4 + (torch.log(apart.clamp(min=1).float() / 4) / math.log(16 / 4) * 4).to(torch.long)
far = torch.where(apart < 4, apart, torch.min(large, torch.full_like(large, 7)))"""
PADDED = """\
far = F.pad({near}[..., : 2 * n - 1], [0, n]).repeat({times})
far = far[..., :-n].reshape({heads}, n, 3 * n - 2)
side = (2 * n - 1) // 2
far = far[..., side:-side]"""
VIEWS = {  # of near [2 * longest], or [h, 2 * longest]; the lines make far of [h or 1, n, n]
    "padded": PADDED,
    "stacked": "far = torch.stack([{near}[..., n - 1 - k : 2 * n - 1 - k] for k in range(n)], -2).view({heads}, n, n)",
    "unfolded": "far = {near}[..., : 2 * n - 1].unfold(-1, n, 1).flip(-2).reshape({heads}, n, n)",
}
GAPS = (
    "(times[:, :, None] - times[:, None, :]).abs()",
    "(times.unsqueeze(-1) - times.unsqueeze(1)).clamp(min=0)",
    "(times[:, None, :] - times[:, :, None]).clamp(min=0)",
    "torch.sub(times.unsqueeze(2), times.unsqueeze(1)).abs().clamp(max=300)",
    "(torch.cat([times[:, 1:], times[:, -1:]], 1)[:, :, None] - times[:, None]).abs()",
    "(times.int().unsqueeze(2) - times.int().unsqueeze(1)).abs()",
    "(times[:, :, None].expand(b, n, n) - times[:, None, :].expand(b, n, n)).abs()",
)
BUCKETS = (  # all below 8
    "(torch.log2(gap + 1.0) / 2).long().clamp(max=7)",
    "torch.clamp(gap // 100, 0, 7)",
    "torch.bucketize(gap, torch.tensor([1, 10, 100, 200]))",
    "torch.bucketize(gap, self.bounds, right=True)",
    "torch.clamp((torch.log(torch.abs(gap).clamp(min=1)) / 0.301).long(), min=0, max=7).detach()",
    "gap.clamp(min=0).sqrt().long().clamp(max=7)",
    "(gap > 1).long() + (gap > 10).long() + (gap > 100).long()",
    "(gap.unsqueeze(-1) >= torch.tensor([1, 5, 25, 125])).sum(-1)",
    "torch.log1p(gap.float()).floor().int().clamp(0, 7)",
    "(gap / 60).long().clamp(0, 7)",
)


def write_bias(author: Author) -> tuple[str, str] | None:
    """A learned bias of the scores and its axes."""
    kind = author.pick(
        "bias", ["none"] * 4 + ["by position", "by position, embedding", "by views", "by time", "by both"]
    )
    if kind == "none":
        return None
    shared = author.heads == 1 or author.sometimes("bias shared by heads", 0.5)
    result = []
    if kind != "by time":
        result.append(_by_views(author, shared) if kind == "by views" else _by_position(author, kind, shared))
    if kind in ("by time", "by both"):
        result.append(_by_time(author, shared))
    if len(result) == 1:
        return result[0]
    (near, have), (age, whole) = result
    return f"({align(author, near, have, whole)} + {age})", whole


def _by_position(author: Author, kind: str, shared: bool) -> tuple[str, str]:
    distance = author.pick("distance", [*DISTANCES, "T5"])
    if "self.apart" in distance:
        place = "torch.arange(longest)"
        author.setup.append(f'self.register_buffer("apart", {place}[:, None] - {place} + longest - 1)')
    if author.mutates("bias by i + j"):
        distance = "place[:, None] + place"
    if author.mutates("differences off by one"):
        distance = "(place[:, None] - place + n).clamp(max=2 * n - 2)"
    if author.mutates("distance from the end"):
        distance = "(n - place[:, None]) * (place[:, None] >= place) + place"
    far = "far" if distance == "T5" else distance
    author.lines += T5.splitlines() if distance == "T5" else []
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
    return author.let("by_position", found), "ij" if shared else "hij"


def _by_views(author: Author, shared: bool) -> tuple[str, str]:
    author.parameter("near", *([] if shared else ["h"]), "2 * longest")
    heads, times = ("1", "n") if shared else ("h", "1, n")
    text = author.named("table by views", VIEWS).format(near="self.near", heads=heads, times=times)
    author.lines += text.splitlines()
    if author.mutates("a column late"):
        author.let("far", "torch.cat([far[..., :1], far[..., :-1]], -1)")
    return ("far[0]", "ij") if shared else ("far", "hij")


def _by_time(author: Author, shared: bool) -> tuple[str, str]:
    gap, bucket = author.pick("gap", GAPS), author.pick("bucket", BUCKETS)
    if author.mutates("times swapped"):
        gap, bucket = "times[:, None] - times[:, :, None]", "torch.clamp(gap // 100 + 4, 0, 7)"
    if author.mutates("times added"):
        gap = "(times[:, None] + times[:, :, None]).clamp(min=0)"
    if author.mutates("bucket of the remainder"):
        bucket = "(gap % 8).long()"
    if author.mutates("clamped too soon"):
        bucket = "torch.clamp(gap // 100, 1, 3)"
    if author.mutates("bucket by row"):
        bucket = f"(({bucket}) + place[:, None]).clamp(0, 7).long()"
    if "self.bounds" in bucket:
        author.setup.append('self.register_buffer("bounds", torch.tensor([1, 7, 30, 365]))')
    author.let("gap", gap)
    if author.mutates("a table a sequence"):
        bucket = f"({bucket}) + (lengths % 2)[:, None, None]"
    author.parameter("ages", 9, *([] if shared else ["h"]))
    author.let("by_time", f"self.ages[{bucket}]" + ("" if shared else ".permute(0, 3, 1, 2)"))
    return "by_time", "bij" if shared else "bhij"
