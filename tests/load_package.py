"""A process of its own that runs a package: python -m tests.load_package PACKAGE CALLS RESULTS."""

import sys

import torch

import hstu_compile  # noqa: F401  registers the ops


def main(package: str, calls: str, results: str) -> None:
    run = torch._inductor.aoti_load_package(package)
    torch.save([run(*call) for call in torch.load(calls)], results)


if __name__ == "__main__":
    main(*sys.argv[1:])
