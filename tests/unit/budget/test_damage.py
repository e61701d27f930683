"""Curves of damage against sums over tokens; prices that were put in are found; allocations against all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moesurgery.budget.damage import DamageCurves, DamagePrediction, missing_mass
from moesurgery.budget.shape import MixtureShape


def test_missing_mass_is_what_the_dropped_experts_said() -> None:
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(200, 5, 7)) * rng.random((200, 5, 1))  # g f of each token and expert
    gram = np.einsum("tih,tjh->ij", outputs, outputs)
    curve = missing_mass(gram)
    gone: list[int] = []
    for kept in range(4, -1, -1):
        options = [[*gone, e] for e in range(5) if e not in gone]
        gone = min(options, key=lambda chosen: float((outputs[:, chosen].sum(axis=1) ** 2).sum()))
        lost = (outputs[:, gone].sum(axis=1) ** 2).sum() / (outputs.sum(axis=1) ** 2).sum()
        assert curve[kept] == pytest.approx(min(1, max(lost, curve[kept + 1])))
    assert curve[5] == 0


def test_prices_are_found_again() -> None:
    experts = np.linspace(1, 0, 9)[None] ** 1.5
    width = np.linspace(1, 0, 65)[None] ** 2
    curves = DamageCurves(experts, width, {1: np.array([0.2])})
    true = DamagePrediction(curves, (3.0, 0.5, 2.0, 1.0, 1.0))
    shapes = [MixtureShape(*n) for n in itertools.product((8, 6, 4), (64, 48), (2, 1)) if n != (8, 64, 2)]
    fitted = DamagePrediction(curves).fitted({shape: true.of(shape) for shape in shapes})
    for shape in shapes:
        assert fitted.of(shape) == pytest.approx(true.of(shape), rel=0.05)


def test_what_was_not_measured_keeps_its_proportion() -> None:
    curves = DamageCurves(np.linspace(1, 0, 9)[None], np.linspace(1, 0, 65)[None])
    before = DamagePrediction(curves, (4.0, 1.0, 1.0, 1.0, 1.0))
    after = before.fitted({MixtureShape(4, 64, 2): 2 * before.of(MixtureShape(4, 64, 2))})
    assert after.prices[0] / after.prices[1] == pytest.approx(4)
    assert after.of(MixtureShape(4, 64, 2)) == pytest.approx(2 * before.of(MixtureShape(4, 64, 2)))
