"""Exported programs with our ops inside, for AOTInductor packages: of a model, and of a serving engine's step."""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.passes.infra.pass_base import PassResult
from torch.torch_version import TorchVersion

from hstu_compile.capture import placeholders
from hstu_compile.ops.hstu_attention import PARAMETERS
from hstu_compile.passes import apply, paged_attention
from hstu_compile.passes.graph import argument, aten, shape, value
from hstu_compile.passes.inplace import make_out_of_place
from hstu_compile.passes.report import Report, source_line
from hstu_compile.serving import Engine
from hstu_compile.serving.padding import Rows
from hstu_compile.serving.step import Step

log = logging.getLogger("hstu_compile")

# A package of torch 2.11 (2.12: not tried) hands a dtype to an op by the wrong number, and the output's op has one:
# pytorch/pytorch#173562.
HAS_DTYPES = not TorchVersion(torch.__version__) < "2.13"
PASSES = ("attention", "uvqk", "output") if HAS_DTYPES else ("attention", "uvqk")


def fuse(program: ExportedProgram) -> ExportedProgram:
    """The same program with its attention, and what follows it, as fused ops, for `aoti_compile_and_package`.

        with torch.no_grad():
            program = torch.export.export(model.eval(), args, dynamic_shapes=...)
        torch._inductor.aoti_compile_and_package(hstu_compile.fuse(program), package_path="model.pt2")

    The process that loads the package is one of Python, and has to `import hstu_compile`: docs/export.md.

    Raises:
        RuntimeError: no attention was fused, or one that a package can't hold; the message says why.
    """
    report = Report()

    def rewrite(gm: fx.GraphModule) -> PassResult:
        gm = copy.deepcopy(gm)
        parts = [part for part in gm.modules() if isinstance(part, fx.GraphModule)]  # autocast, another grad mode
        return PassResult(gm, bool(sum([_rewrite(part, report) for part in parts])))

    fused = program._transform_do_not_use(rewrite)  # keeps the signature in step; private: torch 2.11, 2.13
    log.info("%s", report)
    if not report.fused("attention"):
        raise RuntimeError(f"fuse: no attention was fused, expected one at least\n{report}")
    for part in fused.graph_module.modules():
        if isinstance(part, fx.GraphModule):
            _check_divisors(part.graph)
    return fused


def _rewrite(gm: fx.GraphModule, report: Report) -> int:
    make_out_of_place(gm)
    # Export asserts the dtype of whatever is cast: of the scores, that is no use that needs them.
    checks = {n: n.args for n in gm.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default)}
    for check in checks:
        check.args = ()
    count = apply(gm, report, PASSES)
    gm.graph.eliminate_dead_code(lambda node: node in checks or node.is_impure())
    alive: set[Any] = set(gm.graph.nodes)
    for check, args in checks.items():
        if alive.issuperset(args):
            check.args = args
        else:
            gm.graph.erase_node(check)
    gm.recompile()
    return count


def _check_divisors(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=paged_attention.ATTENTION):
        if isinstance(argument(node, 3 + PARAMETERS.index("scaling_seq_len"), "scaling_seq_len"), fx.Node):
            raise RuntimeError(
                f"fuse: the attention at {source_line(node)} divides by what is dynamic, which AOTInductor can't "
                "pass to an op; expected a number, or that size to be static"
            )


def step_program(engine: Engine, *args: Any, **kwargs: Any) -> ExportedProgram:
    """What an engine computes for a request, as a program of (pools, plan, args, kwargs).

    pools: one of each layer, of any number of pages, written in place. plan: `rows`, `row_offsets`, `page_table`,
    `cached_lengths` and `valid_lengths`, as `paged_attention.INPUTS` has them. It returns what the engine's graph does,
    in a tuple.

    Args:
        engine: of which one request was answered.
        *args, **kwargs: the model's own, of a request of two sequences and two tokens at least, on the engine's
            device. Its numbers become constants.

    Raises:
        RuntimeError: packages of this torch can't hold it, or the engine has captured nothing yet.
    """
    if not HAS_DTYPES:
        raise RuntimeError(f"step_program: torch is {torch.__version__}, expected 2.13 or later")
    step = engine._step
    if step is None:
        raise RuntimeError("step_program: the engine has answered no request, expected one at least")
    pools, plan = _example(step, step.prepare(args, kwargs).inputs)
    sizes = {id(x): n for n, x in zip(step.inputs, step._call.inputs(args, kwargs), strict=True)}

    def dynamic(x: Any) -> Any:
        """Of an argument that the model reads, the sizes that the engine's graph has as symbols."""
        if not isinstance(x, Tensor):
            return None
        known = shape(sizes[id(x)]) if id(x) in sizes else x.shape
        return {dim: Dim.DYNAMIC for dim, size in enumerate(known) if not isinstance(size, int)}

    of_pages, of_plan = ([{0: Dim.DYNAMIC}] * len(given) for given in (pools, plan))
    shapes = (of_pages, of_plan, *pytree.tree_map(dynamic, (args, kwargs)))
    with torch.no_grad():
        return torch.export.export(_Step(step), (pools, plan, args, kwargs), dynamic_shapes=shapes)


def _example(step: Step, inputs: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Pools of any number of pages, and a plan, of which only the sizes matter."""
    offsets = step.offsets(inputs)
    tokens, batch = offsets[-1], len(offsets) - 1
    sizes = (tokens + 1, batch + 1, batch, batch, batch)
    nodes = placeholders(step.graph)[-len(sizes) :]
    plan = [
        torch.zeros(n, *shape(node)[1:], dtype=value(node).dtype, device=step.device)
        for n, node in zip(sizes, nodes, strict=True)
    ]
    return [pool.new_zeros(2, *pool.shape[1:]) for pool in _pools(step.graph).values()], plan


def _pools(gm: fx.GraphModule) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in gm.named_buffers() if name.startswith("hstu_compile_pool_")}


class _Step(nn.Module):
    """An engine's graph with its pools as inputs, and the model's arguments as the model has them."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        graph = copy.deepcopy(step.graph.graph)
        first = next(iter(graph.nodes))
        for name in _pools(step.graph):
            (buffer,) = (node for node in graph.find_nodes(op="get_attr") if node.target == name)
            with graph.inserting_before(first):
                buffer.replace_all_uses_with(graph.placeholder(f"{name}_input"))
            graph.erase_node(buffer)
        self.call, self.padding, self.rows = step._call, step.padding, fx.GraphModule(step.graph, graph)
        for name, parameter in list(self.rows.named_parameters()):  # packages are made with autograd on
            setattr(self.rows, name, nn.Parameter(parameter.detach(), requires_grad=False))

    def forward(
        self, pools: list[Tensor], plan: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        inputs = self.padding.at_rows(self.call.inputs(args, kwargs), Rows(plan[0], plan[0]))
        return tuple(self.rows(*pools, *inputs, *plan))
