"""Where u, q, k and v lie in one x, [T, W] or [B, N, W], and which of them are its silu."""

from typing import NamedTuple

from torch import Tensor

from hstu_compile.ops.validation import expect, expect_same

ROLES = "uqkv"

# After the attention's parameters. The order is the contract of the ops with the passes.
PLACES = (*(f"{role}_at" for role in ROLES), *(f"{role}_head_stride" for role in ROLES), "activated")
PLACES_SCHEMA = ", ".join([*(f"int {name}" for name in PLACES[:-1]), "str activated"])


class Slice(NamedTuple):
    """[.., H, D] of x [.., W]: column at + h * head_stride + d. Heads side by side: head_stride = D."""

    at: int
    head_stride: int
    activated: bool  # the slice is one of silu(x)

    def of(self, x: Tensor, heads: int, dim: int) -> Tensor:
        """A view of these columns, [.., heads, dim]."""
        begin = self.first(heads, x.shape[-1])
        steps = x.narrow(-1, begin, heads * self.head_stride).unflatten(-1, (heads, self.head_stride))
        return steps if self.head_stride == dim else steps.narrow(-1, self.at - begin, dim)

    def is_in(self, columns: int, heads: int, dim: int) -> bool:
        """Whether x has these columns, and no head has those of another."""
        end = self.at + (heads - 1) * self.head_stride + dim
        return self.at >= 0 and end <= columns and self.head_stride >= dim and heads * self.head_stride <= columns

    def first(self, heads: int, columns: int) -> int:
        """At which column so many steps from head to head begin that hold the slice, of as many columns as x has."""
        return min(self.at, columns - heads * self.head_stride)


def as_arguments(slices: dict[str, Slice]) -> tuple:
    """In the order of PLACES; slices: of each role."""
    of = [slices[role] for role in ROLES]
    activated = "".join(role for role in ROLES if slices[role].activated)
    return *(one.at for one in of), *(one.head_stride for one in of), activated


def from_arguments(places: tuple) -> dict[str, Slice]:
    *numbers, activated = places
    at, strides = numbers[: len(ROLES)], numbers[len(ROLES) :]
    found = zip(ROLES, at, strides, strict=True)
    return {role: Slice(begin, stride, role in activated) for role, begin, stride in found}


def check_slices(x: Tensor, places: tuple, tensors: dict[str, Tensor], **names: str) -> None:
    """Whether the slices are all of x; tensors: by the role, one of its shape; names: of those that are not the role's.

    Raises:
        ValueError: they are not.
    """
    lead, slices = x.shape[:-1], from_arguments(places)
    expect(set(places[-1]) <= set(ROLES), "activated", places[-1], f"some of {ROLES}")
    heads = []
    for role, t in tensors.items():
        name, one = names.get(role, role), slices[role]
        wanted = f"{tuple(lead)} as in x, a head dimension and one more"
        expect(t.dim() == len(lead) + 2, f"the shape of {name}", tuple(t.shape), wanted)
        expect(t.dtype == x.dtype, f"the dtype of {name}", t.dtype, f"that of x, {x.dtype}")
        expect(t.device == x.device, f"the device of {name}", t.device, f"that of x, {x.device}")
        for size, rows in zip(t.shape, lead, strict=False):
            expect_same(size, rows, f"the shape of {name}", tuple(t.shape), lambda: f"{tuple(lead)} as in x")
        number, dim = t.shape[-2:]
        expected = f"at most 1 / {number} of the columns of x, {x.shape[-1]}"
        expect(number * one.head_stride <= x.shape[-1], f"{role}_head_stride", one.head_stride, expected)
        heads += [(one.at + i * one.head_stride, dim, role, i) for i in range(number)]
    end = 0
    for begin, dim, role, i in sorted(heads):
        place, where = (f"{role}_at", begin) if i == 0 else (f"{role}_head_stride", slices[role].head_stride)
        expected = f"head {i} of {role} at column {end}: u, q, k and v are all columns of x, none twice"
        expect(begin == end, place, where, expected)
        end += dim
    expect(x.shape[-1] == end, "the shape of x", tuple(x.shape), f"{end} columns, those of u, q, k and v")
