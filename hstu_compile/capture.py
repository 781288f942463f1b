"""Dynamo's graph, in whatever spelling its author chose, as one pre-dispatch ATen graph; and back into its place.

What comes out is pre-autograd ATen in which `aten.layer_norm`, `aten.linear`, `aten.einsum`, `aten.silu` and
`aten.dropout` are single nodes, sizes are symbolic, and autocast, grad mode and buffer mutation are kept. The calls of
a checkpointed region stand among the others, with the tags by which AOTAutograd's partitioner computes them again: a
part of a layer may be checkpointed, and recognisers see the layer.
"""

import contextlib
from traceback import format_list
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

# Private, read in torch 2.11 and 2.13: `track_tensor_tree`, `get_proxy_mode` and `disable_proxy_modes_tracing` are
# what torch's own higher-order ops record themselves with; `_pop_mode_temporarily` suspends the function mode by which
# make_fx records autocast and grad mode.
# `uid` numbers the checkpointed regions of a process.
from torch._higher_order_ops.wrap import tag_activation_checkpoint, uid
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts
from torch.overrides import _pop_mode_temporarily
from torch.utils.checkpoint import CheckpointPolicy

from hstu_compile.passes import CALLS_OF_SUBGRAPHS
from hstu_compile.passes.inplace import make_out_of_place


class NotCaptured(Exception):
    """The graph has to stay as it is; the message says why."""


def placeholders(gm: torch.nn.Module) -> list[fx.Node]:
    graph: Any = gm.graph
    return list(graph.find_nodes(op="placeholder"))


def end_of(gm: fx.GraphModule) -> Any:
    """Why Dynamo ended this graph, and at which of the user's lines; None if that is not known."""
    return getattr(gm, "compile_subgraph_reason", None)  # private; read in torch 2.11 and 2.13


def capture(gm: fx.GraphModule) -> fx.GraphModule:
    """The ATen graph of a graph that Dynamo made; `gm` itself is left alone.

    Call it where the backend is called: autocast and grad mode around the graph are part of its meaning.

    Raises:
        NotCaptured: there is nothing to capture, or capturing would not be faithful.
    """
    inputs = [node.meta.get("example_value") for node in placeholders(gm)]
    if not any(isinstance(x, FakeTensor) for x in inputs):
        raise NotCaptured("the graph has no tensor input")
    if any(True for _ in gm.parameters()) or any(True for _ in gm.buffers()):
        raise NotCaptured(
            "the graph owns parameters or buffers (torch._dynamo.config.inline_inbuilt_nn_modules is off)"
        )
    if any(getattr(n.target, "__name__", "").endswith("_increment_nesting") for n in gm.graph.nodes):
        # The tensors between are of the transform's own kind, without the dimension that it adds, and without memory.
        raise NotCaptured("a transform of torch.func in the graph, such as vmap: write its dimension out")
    captured = _trace(gm, inputs)
    for old, new in zip(placeholders(gm), placeholders(captured), strict=True):
        new._rename(old.name)
        new.target = new.name
        new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    ends = end_of(gm)
    if ends is not None and ends.user_stack:
        captured.graph.output_node().meta["stack_trace"] = "".join(format_list(ends.user_stack))
    captured.recompile()
    for node in captured.graph.nodes:
        if torch.Tag.inplace_view in getattr(node.target, "tags", ()) and node.args[0].op == "placeholder":
            # Dynamo's own trace has already changed the shape of the example value that ours started from.
            raise NotCaptured(f"{node.target} changes the shape of an input in place")
    return captured


def _trace(gm: fx.GraphModule, inputs: list[Any] | tuple[Any, ...]) -> fx.GraphModule:
    # Not detect_fake_mode(): by now Dynamo has installed a fresh mode for the backend.
    mode = next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), contextlib.nullcontext())

    def run(*args: Any) -> Any:
        with traceback.preserve_node_meta():  # the user's own lines
            return _Recorder(gm).run(*args)

    if isinstance(mode, FakeTensorMode):
        # Sizes that come from data (of x[mask]) are new ones, not those that Dynamo remembers (torch 2.11, 2.13, 2.15).
        mode.epoch += 1
    with mode:
        captured = make_fx(run, pre_dispatch=True)(*inputs)
    for node, given in zip(placeholders(captured), inputs, strict=True):
        node.meta["example_value"] = given  # make_fx's own "val" no longer says which inputs require a gradient
    make_out_of_place(captured)
    return captured


class _Recorder(PropagateUnbackedSymInts):
    """Runs Dynamo's graph under make_fx. Higher-order calls are recorded as they are, not entered by dispatch, in which
    they lose metadata; but for checkpointed regions that leave nothing to choose: their body is run in their place."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._autocasts: list[torch.autocast] = []
        self._bodies: dict[fx.GraphModule, str] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().run(*args, **kwargs)
        finally:
            while self._autocasts:  # only where the graph failed
                self._autocasts.pop().__exit__(None, None, None)

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        # The functions would only be recorded; the context manager is recorded and changes the dtypes that follow.
        if target is _enter_autocast:
            region = torch.autocast(*args)
            region.__enter__()
            self._autocasts.append(region)
            return region
        if target is _exit_autocast:
            return self._autocasts.pop().__exit__(None, None, None)
        if not isinstance(target, HigherOrderOperator):
            return super().call_function(target, args, kwargs)
        if "example_value" not in self._node.meta:
            raise NotCaptured(f"{target} without an example value")
        tracer: Any = get_proxy_mode().tracer  # type: ignore[union-attr]
        if target is tag_activation_checkpoint and "_checkpoint_context_fn" not in args[0].meta:
            return self._run_checkpointed(args[0], args[1:], tracer.graph)

        def proxy(arg: Any) -> Any:
            if not isinstance(arg, fx.GraphModule):
                return tracer.unwrap_proxy(arg)
            if arg not in self._bodies:
                self._bodies[arg] = tracer.get_fresh_qualname("subgraph")
                body = _trace_inside(arg, args) if target in CALLS_OF_SUBGRAPHS else arg
                tracer.root.register_module(self._bodies[arg], body)
            return tracer.create_proxy("get_attr", self._bodies[arg], (), {})

        out = tracer.create_proxy("call_function", target, *pytree.tree_map(proxy, (args, kwargs)))
        for key in self._node.meta.keys() - out.node.meta.keys() - {"example_value"}:
            out.node.meta[key] = self._node.meta[key]
        result = self._node.meta["example_value"]
        return track_tensor_tree(result, out, constant=None, tracer=tracer)

    def _run_checkpointed(self, body: fx.GraphModule, args: tuple, graph: fx.Graph) -> Any:
        """Run the body, and tag its calls as the higher-order call would (torch 2.11, 2.13)."""
        known, region = len(graph.nodes), next(uid)
        result = _Recorder(body).run(*args)
        for node in list(graph.nodes)[known:]:
            node.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
            node.meta.setdefault("ac_graph_id", region)  # of regions in it the inner one
        return result


def _trace_inside(body: fx.GraphModule, args: tuple) -> fx.GraphModule:
    """The body of a call at the very place where it is called, in the autocast and grad mode of that place."""
    count = len(placeholders(body))
    with contextlib.ExitStack() as stack:
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(disable_proxy_modes_tracing())
        captured = _trace(body, args[len(args) - count :])
    captured.meta.update(body.meta)
    return captured


def graft(captured: fx.GraphModule, gm: fx.GraphModule) -> None:
    """Put the captured graph into Dynamo's own GraphModule.

    AOTAutograd reads from that object which inputs are parameters (`_param_name_to_source`, `_dynamo_source`); without
    it, CUDA graphs would copy every parameter at each replay.
    """
    for old, new in zip(placeholders(gm), placeholders(captured), strict=True):
        new.meta.update(old.meta)
    for node in captured.graph.find_nodes(op="get_attr"):
        setattr(gm, node.target, getattr(captured, node.target))
    gm.graph = captured.graph
    gm.delete_all_unused_submodules()
