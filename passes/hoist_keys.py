"""Keys and values are computed for those tokens only whose keys are read.

Where an axis has thinned the keys, everything between the tokens and their keys acts on each token by itself: the
projection, norms, rotary embedding. So tokens are taken out before it. A fused projection of queries, keys and values
becomes two, one of all tokens and one of those that are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.fx import Graph, Node

from vggt_compile.graph.edit import Editor
from vggt_compile.graph.projection import Projection, project, readers
from vggt_compile.graph.region import Above, Readers, above, after, along, rerun
from vggt_compile.registry import region
from vggt_compile.site import Lowered, Outcome, Skip, Taken


@region
def hoist_keys(graph: Graph, lowered: Sequence[Lowered], edit: Editor) -> Outcome:
    """Keys and values are projected, normalised and rotated for kept tokens only, where `keys` has thinned them."""
    count, left = 0, {}
    only = Readers(graph)
    order = {node: index for index, node in enumerate(graph.nodes)}
    for one in lowered:
        if one.state.taken is None:
            continue
        hoist = _plan(one.state.taken, only)
        if isinstance(hoist, Skip):
            left[one.site.path] = hoist.reason
        else:
            hoist.run(edit, order)
            count += 1
    return Outcome(count, "attentions with keys and values of kept tokens only", left)


def _plan(taken: Taken | Skip, only: Readers) -> _Hoist | Skip:
    if isinstance(taken, Skip):
        return taken
    if not all(only.only(whole, part) for whole, part in taken.parts.items()):
        return Skip("the keys of all tokens are read elsewhere")
    regions = {part: above(whole, 2, only) for whole, part in taken.parts.items()}
    if not all(found.projections for found in regions.values()):
        return Skip("its keys and values do not come from a linear map of its tokens")
    hoist = _Hoist(taken, regions)
    for linear in hoist.linears():
        others = readers(linear, lambda node: any(only.only(node, part) for part in regions))
        if others is None:
            return Skip("what its keys are projected with is read as a whole elsewhere")
        hoist.others[linear] = others
    return hoist


class _Hoist:
    """What to do at one site: the region above each of its keys and values, and who else reads their projections."""

    def __init__(self, taken: Taken, regions: dict[Node, Above]) -> None:
        self.taken, self.regions = taken, regions
        self.others: dict[Node, list[Projection]] = {}

    def linears(self) -> dict[Node, tuple[list[Projection], int]]:
        """Each linear map, with what keys and values read of it, and the axis of tokens in its input."""
        found: dict[Node, tuple[list[Projection], int]] = {}
        for projection, axis in self._starts():
            found.setdefault(projection.linear, ([], axis))[0].append(projection)
        return found

    def _starts(self) -> Iterator[tuple[Projection, int]]:
        for above_ in self.regions.values():
            yield from above_.projections

    def run(self, edit: Editor, order: dict[Node, int]) -> None:
        given: dict[Node, Node] = {}
        for linear, (projections, axis) in self.linears().items():
            source = linear.all_input_nodes[0]
            kept = self._take(edit, source, axis, given)
            self._project(edit, projections, kept, order, given)
        for found in self.regions.values():
            for leaf, axis in found.leaves.items():
                self._take(edit, leaf, axis, given)
        for part, found in self.regions.items():
            steps = sorted(found.steps, key=order.__getitem__)
            edit.replace(part, rerun(edit, steps, found.steps, given)[found.value])
        for linear, others in self.others.items():
            if others:
                now: dict[Node, Node] = {}
                self._project(edit, others, linear.all_input_nodes[0], order, now)
                for old, new in now.items():
                    edit.replace(old, new)

    def _take(self, edit: Editor, x: Node, axis: int, given: dict[Node, Node]) -> Node:
        if x not in given:
            with edit.before(after(x)):
                given[x] = along(edit, x, axis, self.taken.take)
        return given[x]

    def _project(
        self, edit: Editor, projections: Sequence[Projection], x: Node, order: dict[Node, int], given: dict[Node, Node]
    ) -> None:
        """Several values by one linear map, before the first of them."""
        with edit.before(min((projection.node for projection in projections), key=order.__getitem__)):
            values = project(edit, projections, x)
        given |= {projection.node: value for projection, value in zip(projections, values, strict=True)}
