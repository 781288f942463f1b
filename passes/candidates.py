"""Only the rows that are read: behind the last attention, what nobody reads is not computed.

    x = gate(attention(..)) W_o + x;  head(norm(x))[rows]        ->        head(norm(gate(..)[rows] W_o + x[rows]))

A ranking model trains on the candidates: of what the last layer gives, or of what follows it, it reads their rows. Each
such read is moved towards the inputs, over every call that works row by row (`row_wise`) and whose result nobody needs
whole, as a filter is in a query plan. It comes to rest at what is needed whole (the residual, from which keys and
values come), at what mixes rows (the attention), and at dropout, whose random numbers stay what they were. The backward
follows: a gradient is scattered where rows were picked, and before that there are only the rows.
"""

import math

import torch
from torch import fx

from hstu_compile.passes import unread_rows
from hstu_compile.passes.graph import SIZE_OF, is_call, shape, total, value
from hstu_compile.passes.idle_dropout import remove_idle_dropout
from hstu_compile.passes.index_space import symbol_hints, symbols_of
from hstu_compile.passes.moved_reads import MovedReads, alive, move
from hstu_compile.passes.report import Misfit, Region, Report, source_line, spoken
from hstu_compile.passes.row_reads import RowRead, row_read
from hstu_compile.passes.uvqk import PRODUCTS, PROJECTIONS

NAME = "candidates"
WHAT = "behind the last attention, only rows that are read"
OPS = torch.ops.hstu_compile
ATTENTIONS = {OPS.hstu_attention.default, OPS.silu_attention.default, OPS.gated_silu_attention.default}


def run(gm: fx.GraphModule, report: Report) -> int:
    """Move the reads behind the last attention; returns how many."""
    last = _last_attentions(gm.graph)
    if not last:
        return 0
    remove_idle_dropout(gm.graph)
    fused: list[Region] = []
    while not isinstance(found := _move_first(gm.graph, last), Region):
        fused += found  # what is read of the rows read is next
    for attention in filter(unread_rows.skip, last):
        fused.append(
            Region(NAME, f"attention of blocks of {unread_rows.BLOCK} rows that are read", source_line(attention))
        )
    report.regions += fused or [found]
    return len(fused)


def _move_first(graph: fx.Graph, last: list[fx.Node]) -> list[Region] | Region:
    """Move the reads that are behind no other; what was done, or why nothing was."""
    behind = _behind(last)
    vain: dict[fx.Node, Misfit] = {}  # reads that were not moved over a projection
    while reads := _first_reads(graph, behind, vain):
        moved = move(graph, reads)
        idle = {read.node: _obstacle(moved, read, behind) for read in reads if not _projections(moved, read)}
        try:
            if not idle:
                moved.check_order()
                _check_number(moved)
                regions = [_fused(moved, read) for read in reads]
                moved.commit()
                return regions
        except Misfit as misfit:
            idle = {read.node: misfit for read in reads}
        moved.discard()
        vain |= idle
    change = "read the rows that the loss needs by an index or a slice"
    nothing = Misfit("no call behind it reads some rows and leaves out others", change)
    where, why = next(iter(vain.items()), (last[-1], nothing))
    return Region(NAME, WHAT, source_line(where), why.reason, change=why.change)


def _fused(moved: MovedReads, read: RowRead) -> Region:
    names = ", ".join(spoken(node) for node in reversed(_projections(moved, read)))
    return Region(NAME, f"{WHAT}: {names}", source_line(read.node), kernel="cuBLAS and Inductor")


def _last_attentions(graph: fx.Graph) -> list[fx.Node]:
    """Those behind which there is no other."""
    needed = alive(graph)  # what another pass replaced may still be there
    found = [node for node in graph.nodes if is_call(node, *ATTENTIONS) and node in needed]
    return [node for node in found if not any(is_call(n, *ATTENTIONS) for n in _behind([node]) if n is not node)]


def _behind(nodes: list[fx.Node]) -> set[fx.Node]:
    """These, and what is computed from them."""
    seen, todo = set(), list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen and not is_call(node, *SIZE_OF):
            seen.add(node)
            todo += node.users
    return seen


def _first_reads(graph: fx.Graph, behind: set[fx.Node], but: dict[fx.Node, Misfit]) -> list[RowRead]:
    """The reads behind the last attention of what is behind no other."""
    found: list[RowRead] = []
    covered: set[fx.Node] = set()
    for node in graph.nodes:
        if node in behind and node not in but and node.users:
            read = row_read(node)
            if read is not None and read.source in behind - covered:
                found.append(read)
                covered |= _behind([node])
    return found


def _projections(moved: MovedReads, read: RowRead) -> list[fx.Node]:
    return [node for node in moved.computed(read) if is_call(node, *PROJECTIONS, *PRODUCTS)]


def _obstacle(moved: MovedReads, read: RowRead, behind: set[fx.Node]) -> Misfit:
    """Why a read came to rest with no projection before it."""
    picked = [moved.picked[node] for node in moved.computed(read) if node in moved.picked]
    rest = next((node for node in picked if node in behind), read.source)
    readers = [n for n in rest.users if n is not read.node and moved.stays(n) and not is_call(n, *SIZE_OF)]
    if torch.Tag.nondeterministic_seeded in getattr(rest.target, "tags", ()):
        change = f"{spoken(rest)} before the output projection, or of the rows that are read"
        return Misfit(f"{spoken(rest)} draws random numbers for all rows, at {source_line(rest)}", change)
    if readers:
        change = f"let {spoken(readers[0])} read these rows only"
        return Misfit(f"{spoken(readers[0])} reads all rows, at {source_line(readers[0])}", change)
    if rest in moved.reasons and not is_call(rest, *ATTENTIONS):
        return Misfit(str(moved.reasons[rest]), f"read the rows before {spoken(rest)}, not after it")
    return Misfit("no projection stands between the last attention and the rows that are read")


def _check_number(moved: MovedReads) -> None:
    """At the sizes of this compilation; several reads may be of the same rows.

    Raises:
        Misfit: the rows are no fewer than all.
    """
    hints = symbol_hints(moved.graph)
    sources = [math.prod(shape(read.source)[: read.dims]) for read in moved.reads]
    sizes = [*sources, *(value(numbers[0]).numel() for numbers in moved.numbers)]
    if all(symbols_of(size) <= hints.keys() for size in sizes):
        rows, tokens = total(sizes[len(sources) :], hints), max(total([size], hints) for size in sources)
        if rows >= tokens:
            raise Misfit(f"{rows} rows are read of {tokens}, at the sizes of this compilation")
