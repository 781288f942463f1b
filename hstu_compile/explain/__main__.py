"""python -m hstu_compile.explain pkg.mod:factory, where factory() returns (model, args) or (model, args, kwargs)."""

import argparse
import importlib
import os
import sys

from hstu_compile.explain import explain


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hstu_compile.explain", description=__doc__)
    parser.add_argument("factory", metavar="pkg.mod:factory", help="returns (model, args) or (model, args, kwargs)")
    name = parser.parse_args(argv).factory
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        parser.error(f"{name!r} is not of the form pkg.mod:factory")
    sys.path.insert(0, os.getcwd())
    model, args, *rest = getattr(importlib.import_module(module), function)()
    print(explain(model, *args, **(rest[0] if rest else {})))


if __name__ == "__main__":
    main()
