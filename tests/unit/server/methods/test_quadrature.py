"""The rules along a path: nodes and weights against numpy's, and what they integrate exactly."""

import numpy as np
import pytest
from sidelight_server import Rule


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50, 300])
def test_gauss_legendre_nodes_are_numpys(n: int) -> None:
    expected, weights = np.polynomial.legendre.leggauss(n)
    ours = Rule.GAUSS_LEGENDRE.nodes(n)
    # Double precision; numpy's weights, by way of eigenvalues, have lost some digits of their own by n = 300.
    np.testing.assert_allclose(ours[0], (1 + expected) / 2, rtol=0, atol=1e-15)
    np.testing.assert_allclose(ours[1], weights / 2, rtol=1e-10, atol=0)


@pytest.mark.parametrize("n", [1, 2, 5, 20, 4000])
def test_gauss_legendre_integrates_polynomials_of_degree_2n_less_1(n: int) -> None:
    nodes, weights = map(np.array, Rule.GAUSS_LEGENDRE.nodes(n))
    degree = 2 * n - 1
    # n terms, each good to double precision.
    np.testing.assert_allclose(weights.sum(), 1, rtol=0, atol=n * 1e-15)
    np.testing.assert_allclose((weights * nodes**degree).sum(), 1 / (degree + 1), rtol=1e-11, atol=0)


@pytest.mark.parametrize("rule", [Rule.MIDPOINT, Rule.TRAPEZOID], ids=lambda rule: rule.value)
def test_the_rules_of_equal_steps_integrate_a_line(rule: Rule) -> None:
    for n in (2, 3, 50):
        nodes, weights = map(np.array, rule.nodes(n))
        np.testing.assert_allclose([weights.sum(), (weights * nodes).sum()], [1, 0.5], rtol=0, atol=1e-14)
        np.testing.assert_allclose(np.diff(nodes), 1 / (n - (rule is Rule.TRAPEZOID)), rtol=0, atol=1e-14)
