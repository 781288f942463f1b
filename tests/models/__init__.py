"""HSTU as people write it, in our own words: each module one public spelling. Nothing here knows of hstu_compile.

`MODELS` maps a name to a `Case` factory: a model, and arguments for a given number of sequences.
"""

from tests.models.cases import MODELS, Case

__all__ = ["MODELS", "Case"]
