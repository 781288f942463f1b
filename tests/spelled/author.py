"""Who writes a layer: picks among the ways to spell a part, and remembers what was picked."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

Way = TypeVar("Way")


class Setting(NamedTuple):
    """Sizes of layers and their arguments, the dtypes that are picked from, and where they are."""

    embedding: int = 16
    head_dim: int = 4
    longest: int = 9
    dtypes: tuple[str, ...] = ("float32",) * 12 + ("bfloat16",)
    device: str = "cpu"


@dataclass(frozen=True)
class Layer:
    """The source of a module `Layer`, and which way each part is spelled."""

    source: str
    choices: dict[str, str]
    jagged: bool
    dtype: str  # of parameters and x: "float32" or "bfloat16"
    setting: Setting
    mutation: str | None = None

    @property
    def is_gated(self) -> bool:
        """Whether it has a gate together with a norm."""
        gate, norm = self.choices.get("gate"), self.choices.get("output norm of")
        return gate == "norm(a * u)" or (gate not in (None, "no gate") and norm != "nothing")


class Author:
    """Text so far: `setup` are the lines of __init__, `lines` those of forward.

    Setting in the text: b, n; h heads, d wide (q and k) and w wide (u and v). `split` says whether u, v, q and k are
    still [..., h * d] or already [..., h, d].
    """

    def __init__(self, rng: random.Random, mutation: str | None = None) -> None:
        self.rng, self.mutation = rng, mutation
        self.mutated = False
        self.choices: dict[str, str] = {}
        self.setup: list[str] = []
        self.lines: list[str] = []
        self.heads, self.split = 2, False
        self.half = False  # x and the parameters are bfloat16
        self.dense = True  # as what the tokens lie: [b, n, ...], or [t, ...]

    def pick(self, part: str, ways: Sequence[str]) -> str:
        """One of the ways, often a template in which {} stands for the input."""
        self.choices[part] = way = self.rng.choice(list(ways))
        return way

    def named(self, part: str, ways: Mapping[str, Way]) -> Way:
        """One of the ways that have a name of their own."""
        return ways[self.pick(part, list(ways))]

    def sometimes(self, part: str, chance: float) -> bool:
        happens = self.rng.random() < chance
        self.choices[part] = "yes" if happens else "no"
        return happens

    def mutates(self, mutation: str) -> bool:
        """Whether this is the place to write something else."""
        if self.mutation == mutation:
            self.mutated = True
        return self.mutation == mutation

    def let(self, name: str, text: str) -> str:
        self.lines.append(f"{name} = {text}")
        return name

    def parameter(self, name: str, *shape: str | int, scale: float = 1.0) -> str:
        sizes = ", ".join(map(str, shape))
        self.setup.append(f"self.{name} = nn.Parameter(torch.randn({sizes}) * {scale})")
        return f"self.{name}"

    def module(self, name: str, text: str) -> str:
        self.setup.append(f"self.{name} = {text}")
        return f"self.{name}"
