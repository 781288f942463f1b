"""Sizes of a captured call's tensors: numbers of its symbols, which are others in every call."""

from collections.abc import Mapping
from typing import Any

import sympy

from hstu_compile.passes.batch_sizes import expression


class Size:
    """A constant, a symbol and a constant, or another expression of symbols."""

    def __init__(self, size: Any) -> None:
        self._expression = expression(size)
        self.is_constant = not self._expression.free_symbols
        self._symbol: str | None = None
        self._constant = 0
        if self.is_constant:
            self._constant = int(self._expression)
        elif len(self._expression.free_symbols) == 1:
            (symbol,) = self._expression.free_symbols
            if (self._expression - symbol).is_Integer:
                self._symbol, self._constant = symbol.name, int(self._expression - symbol)

    def of(self, symbols: Mapping[str, int]) -> int | None:
        """The size where symbols are these; None: it is of others too."""
        if self.is_constant:
            return self._constant
        if self._symbol is not None:
            return symbols[self._symbol] + self._constant if self._symbol in symbols else None
        free = self._expression.free_symbols
        known = self._expression.xreplace({s: sympy.Integer(symbols[s.name]) for s in free if s.name in symbols})
        return int(known) if known.is_Integer else None

    def check(self, name: str, actual: int, symbols: dict[str, int]) -> None:
        """It must be this for the symbols that are known; one that is not, is from here on.

        Raises:
            ValueError: it is another.
        """
        if self._symbol is not None:
            symbol = symbols.setdefault(self._symbol, actual - self._constant)
            if symbol + self._constant != actual:
                expected = f"{symbol + self._constant} as in the others"
                raise ValueError(f"serve: a size of {name} is {actual}, expected {expected}")
        elif (known := self.of(symbols)) is not None and known != actual:
            raise ValueError(f"serve: a size of {name} is {actual}, expected {known}")
