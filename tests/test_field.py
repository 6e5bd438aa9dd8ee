"""The drift field against its formulas, and what must hold of it whatever the points are."""

import os
import sys

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

import oracle
from drifting_pytorch import DriftField, GradientField, SharpField, SinkhornField
from helpers import raises_one_line, relative, run

FIELDS = [
    DriftField(),
    DriftField(normalize = 'y'),
    DriftField(normalize = 'none'),
    GradientField(),
    GradientField(kernel = 'gaussian'),
    SharpField(),
    SinkhornField(),
]

def name_of(field):
    """As the test's name."""
    return f'{type(field).__name__}-{field.kernel}-{field.normalize}'

def points(rng, *shape):
    return torch.randn(*shape, generator = rng, dtype = torch.float64)

# Algorithm 2

@pytest.mark.parametrize('kernel', ['laplace', 'gaussian'])
@pytest.mark.parametrize('normalize', ['both', 'y', 'none'])
@pytest.mark.parametrize('own_negatives', [False, True])
def test_field_equals_the_formula(rng, kernel, normalize, own_negatives):
    x, y_pos = points(rng, 5, 3), points(rng, 7, 3)
    y_neg = y_neg_array = None
    if not own_negatives:
        y_neg = points(rng, 4, 3)
        y_neg_array = y_neg.numpy()

    v = DriftField(kernel = kernel, normalize = normalize)(x, y_pos, y_neg, temperature = 0.8)
    expected = oracle.field(x.numpy(), y_pos.numpy(), y_neg_array, 0.8, kernel, normalize)

    assert relative(v, expected) < 1e-9

def test_float32_is_as_good_as_float32_gets(rng):
    x, y_pos = (100. + points(rng, n, 16).float() for n in (32, 40))        # a common offset must not cost digits
    exact = oracle.field(x.double().numpy(), y_pos.double().numpy(), None, 0.5)
    assert relative(DriftField()(x, y_pos, temperature = 0.5), exact) < 1e-5

def test_positives_are_not_rounded_to_half_precision(rng):
    x, y_pos = points(rng, 5, 3).half(), 1e5 + points(rng, 7, 3).float()        # above all of float16
    exact = oracle.field(x.double().numpy(), y_pos.double().numpy(), None, 1e4)
    assert relative(DriftField()(x, y_pos, temperature = 1e4), exact) < 1e-5

@pytest.mark.parametrize('autocast', [False, True])
def test_distances_far_above_the_temperature_stay_exact(rng, autocast):
    modes = 10. * torch.tensor([[-1., 0.], [1., 0.]]).repeat(8, 1)
    x, y_pos = (modes + 0.1 * torch.randn(16, 2, generator = rng) for _ in range(2))

    with torch.autocast('cpu', dtype = torch.bfloat16, enabled = autocast):
        v = DriftField()(x, y_pos, temperature = 0.05)

    assert relative(v, oracle.field(x.double().numpy(), y_pos.double().numpy(), None, 0.05)) < 1e-4

@pytest.mark.parametrize('dtype, rtol', [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize('spread', [1., 60., 90., 119., 300., 1e4])
def test_affinities_are_softmaxes_however_far_a_pair_is(rng, monkeypatch, spread, dtype, rtol):
    far = torch.linspace(0, spread, 7)                                      # from all that are less far
    logits = -torch.maximum(far[:, None], far) - 4 * torch.rand(2, 3, 7, 7, generator = rng)
    logits = logits.to(dtype)
    expected = (logits.double().softmax(dim = -1) * logits.double().softmax(dim = -2)).sqrt()

    if spread <= 90:                                                        # 1.8 mean distances at 0.02
        monkeypatch.setattr(torch.Tensor, 'softmax', None)                  # one exponential does for both

    torch.testing.assert_close(DriftField().affinity(logits).double(), expected, rtol = rtol, atol = 1e-12)

def test_own_negatives_are_the_points_without_themselves(rng):
    x, y_pos = points(rng, 2, 3), points(rng, 4, 3)

    # two points: each one's only negative is the other one

    field = DriftField(normalize = 'y')
    v = field(x, y_pos, temperature = 0.7)
    alone = [field(x[i:i + 1], y_pos, x[1 - i:2 - i], temperature = 0.7) for i in range(2)]
    assert relative(v, torch.cat(alone)) < 1e-9

    # and x given by hand is not masked

    field = DriftField()
    assert relative(field(x, y_pos, x, temperature = 0.7), field(x, y_pos, temperature = 0.7)) > 1e-2

@pytest.mark.parametrize('field', FIELDS, ids = name_of)
def test_antisymmetry(rng, field):
    x, a, b = points(rng, 6, 4), points(rng, 5, 4), points(rng, 8, 4)

    forward = field(x, a, b, temperature = 0.5)
    backward = field(x, b, a, temperature = 0.5)
    assert relative(forward, -backward) < 1e-9
    assert forward.norm() > 1e-3

@pytest.mark.parametrize('field', FIELDS, ids = name_of)
def test_no_drift_at_equilibrium(rng, field):
    x, a = points(rng, 6, 4), points(rng, 5, 4)
    assert field(x, a, a, temperature = 0.5).abs().max() < 1e-9

@pytest.mark.parametrize('factors', [(1., 1.), (2., 1.)])
def test_translation_invariance(rng, factors):
    x, a = points(rng, 6, 4), points(rng, 5, 4)
    field = DriftField(attraction = factors[0], repulsion = factors[1])
    assert relative(field(x + 3., a + 3., temperature = 0.5), field(x, a, temperature = 0.5)) < 1e-9

def test_attraction_and_repulsion_factors(rng):
    x, a = points(rng, 6, 4), points(rng, 5, 4)
    v = DriftField(attraction = 1.5, repulsion = 0.5)(x, a, temperature = 0.5)

    assert relative(v, oracle.field(x.numpy(), a.numpy(), None, 0.5, a = 1.5, b = 0.5)) < 1e-9

    pull = DriftField(repulsion = 0.)(x, a, temperature = 0.5)
    push = DriftField(attraction = 0.)(x, a, temperature = 0.5)
    assert relative(v, 1.5 * pull + 0.5 * push) < 1e-9

    # attraction alone pulls a far away point towards the data

    far = torch.full((3, 4), 10., dtype = torch.float64) + x[:3]
    pull = DriftField(repulsion = 0.)(far, a, temperature = 5.)
    assert ((a.mean(dim = 0) - far) * pull).sum(dim = -1).min() > 0

# fields of later work

@pytest.mark.parametrize('kernel', ['laplace', 'gaussian'])
def test_gradient_field_is_the_gradient_of_the_log_kernel_sums(rng, kernel):
    """sum grad k / sum k over positives minus the same over negatives = grad (log sum k+ - log sum k-)."""
    x, y_pos, y_neg = (points(rng, n, 3) for n in (5, 7, 4))
    x.requires_grad_()

    def log_density(y):
        dist = (x[:, None] - y[None]).norm(dim = -1)
        return oracle.log_kernel(dist, 0.7, kernel).logsumexp(dim = -1)

    expected, = torch.autograd.grad((log_density(y_pos) - log_density(y_neg)).sum(), x)
    field = GradientField(kernel = kernel)
    assert relative(field(x, y_pos, y_neg, temperature = 0.7), expected) < 1e-9

def test_sharp_field_is_the_gradient_of_its_potential(rng):
    x, y_pos, y_neg = (points(rng, n, 3) for n in (5, 7, 4))
    field = SharpField()
    v = field(x, y_pos, y_neg, temperature = 0.7)

    def potential(x, y_neg = y_neg):
        dist = torch.cdist(x, torch.cat((y_pos, y_neg)))
        return field.potential(dist, 7, 0.7, torch.ones(7 + len(y_neg), dtype = torch.float64))

    # the formula, with loops

    for i in range(5):
        sums = []
        for y in (y_pos, y_neg):
            r = (y - x[i]).norm(dim = -1)
            k = torch.exp(-r / 0.7)
            sums.append((k[:, None] * (y - x[i])).sum(dim = 0) / (0.7 * (r + 0.7) * k).sum())
        assert relative(v[i], sums[0] - sums[1]) < 1e-9

        # and finite differences of the scalar

        for j in range(3):
            bump = torch.zeros(1, 3, dtype = torch.float64)
            bump[0, j] = 1e-5
            up, down = (potential(x[i:i + 1] + sign * bump) for sign in (1, -1))
            assert abs(-(up - down).item() / 2e-5 - v[i, j].item()) < 1e-6

    assert potential(x, y_pos).abs().max() < 1e-12

def test_sinkhorn_plans_have_the_marginals(rng):
    dist = torch.cdist(points(rng, 2, 6, 3), points(rng, 2, 4, 3))
    log_kernel = -dist ** 2 / 0.5
    rows = SinkhornField(iters = 200).barycenter(dist, 0.25)
    assert (rows.sum(dim = -1) - 1).abs().max() < 1e-9
    plan = rows / 6
    assert (plan.sum(dim = -2) - 1 / 4).abs().max() < 1e-9

    # the optimal entropic plan is the kernel, scaled by rows and columns: its log is the kernel's plus two vectors

    residual = plan.log() - log_kernel
    residual = residual - residual[:, :1] - residual[:, :, :1] + residual[:, :1, :1]
    assert residual.abs().max() < 1e-9

@pytest.mark.parametrize('iters', [1, 2, 20])
def test_sinkhorn_field_moves_to_barycenters(rng, iters):
    x, y_pos, y_neg = (points(rng, n, 3) for n in (5, 7, 4))
    v = SinkhornField(iters = iters)(x, y_pos, y_neg, temperature = 0.8)

    targets = []
    for y in (y_pos, y_neg):
        dist_sq = ((x[:, None] - y[None]) ** 2).sum(dim = -1).numpy()
        K = np.exp(-0.5 * dist_sq / 0.8)
        u, w = np.ones(5), np.ones(len(y))
        for _ in range(iters):
            u = 1 / 5 / (K @ w)
            w = 1 / len(y) / (K.T @ u)
        plan = u[:, None] * K * w
        assert abs(plan.sum(axis = 0) - 1 / len(y)).max() < 1e-12       # columns are exact, rows are divided by
        targets.append(plan @ y.numpy() / plan.sum(axis = 1, keepdims = True))

    assert relative(v, targets[0] - targets[1]) < 1e-9

def test_leading_dimensions_are_independent_problems(rng):
    x, a, b = (points(rng, 2, 3, n, 4) for n in (6, 5, 7))
    v = DriftField()(x, a, b, temperature = 0.5)
    assert v.shape == x.shape

    for index in np.ndindex(2, 3):
        alone = DriftField()(x[index], a[index], b[index], temperature = 0.5)
        assert relative(v[index], alone) < 1e-9

def test_single_points_duplicates_and_magnitudes_stay_finite(rng):
    x = points(rng, 1, 4)
    assert torch.equal(DriftField()(x, x + 1, temperature = 0.5), torch.zeros_like(x))     # no negative, no drift

    same = torch.ones(4, 3)
    assert DriftField()(same, same, temperature = 0.1).isfinite().all()

    for magnitude in (1e-6, 1e6):
        x, y_pos = points(rng, 2, 8, 4) * magnitude
        v = DriftField()(x, y_pos, temperature = 0.5 * magnitude)
        assert v.isfinite().all()
        assert 1e-3 < v.norm() / magnitude < 1e3

def test_no_gradient_flows_through_the_field(rng):
    x = points(rng, 4, 2).requires_grad_()
    assert not DriftField()(x, points(rng, 4, 2), temperature = 0.5).requires_grad

@pytest.mark.parametrize('call, says', [
    (lambda x, a: DriftField()(x[0], a, temperature = 1.), 'x has shape'),
    (lambda x, a: DriftField()(x, a[:, :2], temperature = 1.), 'like x: nothing is broadcast'),
    (lambda x, a: DriftField()(x, a.expand(2, 4, 3), temperature = 1.), 'nothing is broadcast'),
    (lambda x, a: DriftField()(x, a[:0], temperature = 1.), 'empty set'),
    (lambda x, a: DriftField()(x, a, x[:0], temperature = 1.), 'y_neg has shape (0, 3)'),
    (lambda x, a: DriftField()(x, a * float('nan'), temperature = 1.), 'y_pos has non-finite'),
    (lambda x, a: DriftField()(x.long(), a, temperature = 1.), 'floating point'),
    (lambda x, a: DriftField()(x, a, temperature = 0.), 'temperature must be a number in 1e-30 .. 1e+30, got 0.0'),
    (lambda x, a: DriftField()(x, a, temperature = float('inf')), 'temperature must be a number'),
    (lambda x, a: DriftField()(x, a, temperature = '1'), 'temperature must be a number'),
    (lambda x, a: DriftField()(x, a.tolist(), temperature = 1.), 'y_pos must be a tensor, got list'),
    (lambda x, a: DriftField(kernel = 'cosine'), 'kernel must be'),
    (lambda x, a: DriftField(normalize = 'x'), "normalize must be 'both', 'y' or 'none'"),
    (lambda x, a: DriftField(normalize = 'gradient'), "GradientField"),
    (lambda x, a: DriftField(normalize = 'sharp'), "SharpField and SinkhornField"),
    (lambda x, a: DriftField(normalize = 'sinkhorn'), "SinkhornField"),
    (lambda x, a: DriftField(repulsion = float('nan')), 'repulsion must be a number in 0 .. 1000000, got nan'),
    (lambda x, a: DriftField(attraction = '1'), "attraction must be a number in 0 .. 1000000, got '1'"),
    (lambda x, a: DriftField()(x, a * 1e200, temperature = 1.), 'y_pos has values up to'),
    (lambda x, a: SinkhornField(iters = 0), 'iters must be a whole number from 1 on'),
    (lambda x, a: SinkhornField(iters = 2.5), 'iters must be a whole number from 1 on, got 2.5'),
    (lambda x, a: SinkhornField(attraction = float('inf')), 'attraction must be a number in 0'),
    (lambda x, a: GradientField(attraction = float('nan')), 'attraction must be a number in 0'),
    (lambda x, a: SharpField(repulsion = '1'), 'repulsion must be a number in 0'),
])
def test_bad_input_is_one_clear_line(rng, call, says):
    with raises_one_line(says):
        call(points(rng, 5, 3), points(rng, 4, 3))

def test_gradient_field_where_points_coincide():
    """The kernel's slope is infinite there: it may not meet the rounding of float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator = generator)
    y = torch.cat((x, torch.randn(5, 3, generator = generator)))
    v = GradientField()(x, y, temperature = 0.5)
    exact = GradientField()(x.double(), y.double(), temperature = 0.5)
    assert relative(v, exact) < 1e-2

# shapes in signatures

def test_shapes_are_checked_when_switched_on(rng):
    with pytest.raises(TypeCheckError):
        DriftField().coefficients(points(rng, 3, 7), 2, 5, 0.5, weight = points(rng, 6))

IS_CHECKED = """
from drifting_pytorch.drifting import DriftField, squared_distances
print(squared_distances.__module__, hasattr(DriftField.coefficients, '__wrapped__'))
"""

def test_shape_checks_are_off_by_default():
    env = {name: value for name, value in os.environ.items() if name != 'DRIFTING_TYPECHECK'}

    def is_checked(**more):
        return run(sys.executable, '-c', IS_CHECKED, env = {**env, **more}).split()

    assert is_checked() == ['drifting_pytorch.drifting', 'False']
    assert is_checked(DRIFTING_TYPECHECK = '1')[1] == 'True'
