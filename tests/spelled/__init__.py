"""Random HSTU layers as source text: every seed picks, part by part, one of the ways in which people write it."""

from tests.spelled.author import Layer, Setting
from tests.spelled.layer import MUTATIONS, arguments, build, write

__all__ = ["MUTATIONS", "Layer", "Setting", "arguments", "build", "write"]
