"""Parts of a plan that exchange next to no mass: the constants between them."""

from __future__ import annotations

import pytest
import torch

from sbot.compat.geomloss import ot
from sbot.parts import joined


def two_parts(eps):
    return ot.solve(torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64), reg=eps)


@pytest.mark.parametrize("eps", [1.0, 0.1, 0.04, 0.02, 0.001, 1e-4])
def test_two_parts_against_the_exact_solution(eps):
    """By symmetry P_12 = P_21, hence f_1 - f_2 = (C_12 - C_21) / 2 whatever eps is."""
    solution = two_parts(eps)
    f, g = solution.potential_a, solution.potential_b
    assert float(f[0] - f[1]) == pytest.approx(-0.5, abs=1e-9)
    assert float(f.sum()) == pytest.approx(float(g.sum()), abs=1e-12)


@pytest.mark.parametrize("eps", [0.1, 0.02, 0.01, 0.003])
@pytest.mark.parametrize("unequal", [False, True])
def test_swapping_the_sides_swaps_the_potentials(generator, eps, unequal):
    C = 10 * torch.rand(6, 6, generator=generator, dtype=torch.float64)
    w = torch.tensor([1.0, 2, 3, 1, 2, 3], dtype=torch.float64) if unequal else torch.ones(6, dtype=torch.float64)
    there, back = ot.solve(C, a=w, b=w, reg=eps), ot.solve(C.T.contiguous(), a=w, b=w, reg=eps)
    torch.testing.assert_close(there.potential_a, back.potential_b, rtol=0, atol=1e-9)
    torch.testing.assert_close(there.potential_b, back.potential_a, rtol=0, atol=1e-9)
    density = torch.exp((there.potential_a[:, None] + there.potential_b - C) / eps)
    torch.testing.assert_close(w[:, None] * w * density, there.plan, rtol=0, atol=1e-9)


def test_batches_and_zero_weights(generator):
    C = 10 * torch.rand(3, 5, 5, generator=generator, dtype=torch.float64)
    w = torch.ones(3, 5, dtype=torch.float64)
    w[1, 2] = 0
    many = ot.solve_batch(C, a=w, b=w, reg=0.01)
    for k in range(3):
        one = ot.solve(C[k], a=w[k], b=w[k], reg=0.01)
        live = w[k] > 0
        torch.testing.assert_close(many.potential_a[k][live], one.potential_a[live], rtol=0, atol=1e-9)


def test_an_excess_goes_where_it_must():
    """What mu has more in a part leaves it: the masses that parts exchange differ by it."""
    b = torch.full((2,), 0.5, dtype=torch.float64)
    a = torch.tensor([0.5 + 1e-10, 0.5 - 1e-10], dtype=torch.float64)
    log_plan = torch.tensor([[0.5, 1e-30], [1e-40, 0.5]], dtype=torch.float64).log()
    move = joined(log_plan, a, b, 1e-8)
    f, g = move[:2], move[2:]
    plan = (log_plan + f[:, None] - g).exp()
    assert float(plan[0, 1] - plan[1, 0]) == pytest.approx(1e-10, rel=1e-5)
    assert float(plan[0, 1] * plan[1, 0]) == pytest.approx(1e-70, rel=1e-6)


def test_one_piece_is_left_alone(generator):
    plan = torch.rand(4, 6, generator=generator, dtype=torch.float64)
    assert joined(plan.log(), plan.sum(1), plan.sum(0), 1e-9) is None


def test_nothing_between_parts_leaves_them_where_they_are():
    move = joined(torch.eye(3, dtype=torch.float64).log(), *torch.ones(2, 3, dtype=torch.float64), 1e-9)
    assert torch.equal(move, torch.zeros(6, dtype=torch.float64))


def test_an_atom_without_a_partner_settles_nothing():
    """So small a mass where there should be a third, as in a plan far from converged."""
    plan = torch.tensor([[0.5, 1e-9, 0.1], [1e-9, 1e-9, 0.4]], dtype=torch.float64)
    assert joined(plan.log(), *(torch.full((n,), 1 / n, dtype=torch.float64) for n in (2, 3)), 0.2) is None
