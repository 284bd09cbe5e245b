"""Chooses the source of the sample at each position of a run: exact proportions, computed from the position alone.

Sources are the leaves of Huffman's tree over their weights: the two lightest nodes are joined until one is left. A
node of weight b gives, of its first x samples, round(x a / b) to its child of weight a (halves up) and the rest to the
other. So position p walks down the tree by one comparison per level, and how many samples a source has given before p
is known without anything that was counted, listed or stored. Weights are whole numbers of any size: nothing is rounded.

*Bound.* Of any L samples in a row of a node, its child of weight a has L a / b, give or take less than one, and so has
the other. From the root down: in any window of any length N, the number of samples of a source with the share q differs
from N q by less than

    B = w_0 / w_0 + w_0 / w_1 + ... + w_0 / w_k,

w_0 its weight and w_1 .. w_k those of the nodes above it, without the root. With two sources B = 1, and no order has
less for all weights. With any number B < 3.36, the sum of the inverse Fibonacci numbers: on the way up, a node's
neighbour is at least as heavy as the node's own children. The best order known keeps every beginning of a run within
1 - 1 / (2n - 2) and so every window within 2 - 1 / (n - 1) (Tijdeman 1980), but is found from its first sample on only,
and repeats after as many samples as the weights have in all: this one trades at most 1.36 samples for a formula.

Source: D. A. Huffman 1952 (the tree); R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm


@dataclass(frozen=True)
class _Node:
    """Two children, each a source or a node, and how the samples are shared between them.

    Attributes:
        first, second: the children.
        first_weight: weight of ``first``, a.
        weight: sum of both children's weights, b.
    """

    first: "int | _Node"
    second: "int | _Node"
    first_weight: int
    weight: int

    def given_to_first(self, count: int) -> int:
        """Of the first ``count`` samples of this node: round(count a / b)."""
        return (2 * count * self.first_weight + self.weight) // (2 * self.weight)


class Blend:
    """The source of every position, from 0.

    Attributes:
        shares: of each source, their sum is 1.
        bounds: B of each source.
    """

    def __init__(self, weights: Sequence[Fraction | int]) -> None:
        """Joins the sources.

        Args:
            weights: of each source, in any unit, each above 0. Equal ones are ordered by their position.
        """
        assert weights and all(weight > 0 for weight in weights)
        total = sum(weights)
        self.shares = [Fraction(weight) / total for weight in weights]
        unit = lcm(*(share.denominator for share in self.shares))
        # The number keeps the order definite where weights are equal, and nodes out of comparisons.
        nodes: list[tuple[int, int, int | _Node]] = [
            (int(share * unit), number, number) for number, share in enumerate(self.shares)
        ]
        heapq.heapify(nodes)
        number = len(nodes)
        while len(nodes) > 1:
            (a, _, first), (b, _, second) = heapq.heappop(nodes), heapq.heappop(nodes)
            heapq.heappush(nodes, (a + b, number, _Node(first, second, first_weight=a, weight=a + b)))
            number += 1
        self._root = nodes[0][2]
        self.bounds = [Fraction(0)] * len(weights)
        self._set_bounds(self._root, Fraction(0))

    def sources_at(self, start: int, count: int) -> list[int]:
        """Number of the source at positions ``start`` .. ``start`` + ``count`` - 1."""
        return [self._source_at(position) for position in range(start, start + count)]

    def consumed(self, position: int) -> list[int]:
        """How many samples each source has given before a position."""
        found = [0] * len(self.shares)
        nodes = [(self._root, position)]
        while nodes:
            node, count = nodes.pop()
            if isinstance(node, int):
                found[node] = count
            else:
                of_first = node.given_to_first(count)
                nodes += [(node.first, of_first), (node.second, count - of_first)]
        return found

    def _source_at(self, position: int) -> int:
        node = self._root
        while not isinstance(node, int):
            before = node.given_to_first(position)
            if node.given_to_first(position + 1) > before:
                node, position = node.first, before
            else:
                node, position = node.second, position - before
        return node

    def _set_bounds(self, node: "int | _Node", above: Fraction) -> None:
        """Computes B from the root down: of a child with the share r of its node, 1 + r x B of the node."""
        if isinstance(node, int):
            self.bounds[node] = above
            return
        for child, weight in ((node.first, node.first_weight), (node.second, node.weight - node.first_weight)):
            self._set_bounds(child, 1 + Fraction(weight, node.weight) * above)
