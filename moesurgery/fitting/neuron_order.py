"""The order in which the neurons of an FFN are given up: greedy optimal brain surgery on its down-projection.

With h [I] the input of the down-projection W [H, I], each neuron that goes is the one whose removal adds least to
sum |W h - W' h|^2 + lambda |W - W'|^2, W' being the best matrix without it and those that went before: its error is
|w_j|^2 / C_jj, C being the inverse of (sum h h^T + lambda), and the others take over w_j C_j / C_jj (optimal brain
surgeon, Hassibi and Stork 1993; on the output of a layer, arXiv 2208.11580). Each removal is a rank-one update of C and
of W^T W. They are applied a panel at a time, so that most of the work is matrix products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DAMPING = 0.01  # lambda over the mean diagonal of the sum of h h^T
PANEL = 64


def removal_order(
    gram: torch.Tensor, outputs: torch.Tensor, keep: int = 1, size: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the neurons in the order of their removal, until `keep` are left, and the error after each, in float64.

    `gram` [I, I] is the sum of h h^T, `outputs` [I, I] is W^T W, both float64. With `size`, neurons go in whole blocks
    of so many neighbours (I and `keep` are multiples of it): numbers and errors are those of blocks.
    """
    import torch

    width, count = len(gram), (len(gram) - keep) // size
    strength = max(DAMPING * float(gram.diagonal().mean()), 1e-30)
    inverse = _inverse(gram, strength)
    outputs = outputs.clone()
    if size > 1:
        return _by_blocks(inverse, outputs, count, size)
    device = gram.device
    order = torch.empty(count, dtype=torch.int64, device=device)
    errors = torch.empty(count, dtype=torch.float64, device=device)
    spread, squares = inverse.diagonal().clone(), outputs.diagonal().clone()
    gone = torch.zeros(width, dtype=torch.bool, device=device)
    for start in range(0, count, PANEL):
        steps = min(PANEL, count - start)
        # Of the neurons removed in this panel: their columns of the inverse, these over their diagonal, and half of
        # what they take from W^T W, which is symmetric.
        columns, shares, halves = (torch.zeros(width, steps, dtype=torch.float64, device=device) for _ in range(3))
        for step in range(steps):
            scores = (squares / spread).masked_fill_(gone, torch.inf)
            chosen = int(scores.argmin())
            order[start + step], errors[start + step] = chosen, scores[chosen]
            column = inverse[:, chosen] - columns @ shares[chosen]
            share = column / column[chosen]
            output = outputs[:, chosen] - shares @ halves[chosen] - halves @ shares[chosen]
            half = output - 0.5 * output[chosen] * share
            columns[:, step], shares[:, step], halves[:, step] = column, share, half
            spread -= column * share
            squares -= 2 * share * half
            gone[chosen] = True
        inverse -= columns @ shares.T
        both = shares @ halves.T
        outputs -= both + both.T
    return order, errors.cumsum(0)


def _by_blocks(
    inverse: torch.Tensor, outputs: torch.Tensor, count: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `removal_order` does for whole blocks: the error of a block B is tr(W_B^T W_B C_BB^-1)."""
    import torch

    blocks, device = len(inverse) // size, inverse.device
    order = torch.empty(count, dtype=torch.int64, device=device)
    errors = torch.empty(count, dtype=torch.float64, device=device)
    left = list(range(blocks))
    for step in range(count):
        at = torch.arange(blocks, device=device)
        own = (m.view(blocks, size, blocks, size)[at, :, at][left] for m in (inverse, outputs))
        scores = torch.linalg.solve(*own).diagonal(dim1=1, dim2=2).sum(1)
        best = int(scores.argmin())
        order[step], errors[step] = left[best], scores[best]
        rows = slice(left[best] * size, (left[best] + 1) * size)
        column, output = inverse[:, rows].clone(), outputs[:, rows].clone()
        share = torch.linalg.solve(column[rows], column.T).T
        taken = share @ output.T
        outputs += share @ output[rows] @ share.T - taken - taken.T
        inverse -= column @ share.T
        left.pop(best)
    return order, errors.cumsum(0)


def _inverse(gram: torch.Tensor, strength: float) -> torch.Tensor:
    import torch

    damped = gram.clone()
    damped.diagonal().add_(strength)
    factor, info = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_inverse(factor) if int(info) == 0 else torch.linalg.inv(damped)
