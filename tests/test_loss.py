"""The loss of a step: the release's numbers, the formulas, gradients, guidance, invariances."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn

import oracle
from drifting_pytorch import (
    DriftField,
    FeatureDriftLoss,
    GradientField,
    SharpField,
    SinkhornField,
    drift_loss,
    drifting,
    plain_drift_loss,
)
from drifting_pytorch.drifting import DriftProblems, effective_neighbors
from helpers import REFERENCE, raises_one_line, relative

ARRAYS = np.load(REFERENCE / 'drift_loss.npz')
TEMPERATURES = (0.02, 0.05, 0.2)

def case(name):
    keys = [key for key in ARRAYS.files if key.startswith(f'{name}/')]
    arrays = {key.split('/', 1)[1]: torch.from_numpy(ARRAYS[key]) for key in keys}
    return arrays, tuple(round(float(t), 6) for t in arrays['temps'])

@pytest.mark.parametrize('name', ['plain', 'cfg', 'spatial', 'single_temp'])
def test_loss_equals_the_release(name):
    ref, temperatures = case(name)
    gen = ref['gen'].requires_grad_()

    options = dict(uncond_weight = ref.get('weight_neg'), temperatures = temperatures)
    loss, stats = drift_loss(gen, ref['pos'], ref.get('neg'), **options)
    loss.mean().backward()

    assert relative(loss, ref['loss']) < 1e-5
    assert relative(gen.grad, ref['grad']) < 1e-4
    assert relative(stats.scale, ref['scale']) < 1e-4

    for temperature in temperatures:
        assert relative(stats.drift_rms[temperature] ** 2, ref[f'drift_sq_{temperature}']) < 1e-4

def random_problem(rng, dtype = torch.float64, b = 2, g = 4, p = 3, u = 2, d = 5, size = 1.):
    def draw(n):
        return size * torch.randn(b, n, d, generator = rng, dtype = dtype)

    gen, pos, uncond = draw(g), draw(p) + size, draw(u)
    return gen, pos, uncond, 2 * torch.rand(b, u, generator = rng, dtype = dtype)

@pytest.mark.parametrize('shape', [
    dict(),
    dict(b = 1, g = 2, p = 1, u = 1, d = 1),
    dict(b = 3, g = 3, p = 6, u = 4, d = 2),
    dict(size = 100.),
    dict(size = 1e-5),
    dict(d = 20),
])
@pytest.mark.parametrize('guided, options', [
    (True, dict()),
    (True, dict(kind = 'gaussian')),
    (True, dict(normalize = 'y')),
    (True, dict(floor = 0.)),
    (True, dict(a = 1.5)),
    (False, dict()),
])
def test_loss_equals_the_formula(rng, shape, guided, options):
    samples = list(random_problem(rng, **shape))
    if not guided:
        samples[2:] = None, None

    arrays = [None if t is None else t.numpy() for t in samples]
    V, S, unit, mean_squares = oracle.drift(*arrays, TEMPERATURES, **options)

    gen, pos, uncond, weight = samples
    gen.requires_grad_()
    field = DriftField(
        kernel = options.get('kind', 'laplace'),
        normalize = options.get('normalize', 'both'),
        attraction = options.get('a', 1.)
    )
    loss, stats = drift_loss(
        gen, pos, uncond, uncond_weight = weight, field = field, affinity_floor = options.get('floor', 1e-6)
    )
    loss.mean().backward()

    assert relative(loss, (V ** 2).mean(axis = (1, 2))) < 1e-7          # value: mean of V^2
    assert relative(gen.grad, -2 * V / V.size / unit) < 1e-7            # gradient: -2 V / n, in units of the feature
    assert relative(stats.scale, np.asarray(S)) < 1e-9

    for temperature, mean_square in mean_squares.items():
        assert relative(stats.drift_rms[temperature] ** 2, np.asarray(mean_square)) < 1e-7

# the limit where samples coincide: 1e-11 for fields whose coefficients there are 1e4 and more times the others, so that
# what is left of sum_y W y - sum_y W x has four digits less

@pytest.mark.parametrize('field, limit', [
    (DriftField(), 1e-12),
    (DriftField(kernel = 'gaussian'), 1e-12),
    (DriftField(normalize = 'y'), 1e-12),
    (DriftField(normalize = 'none'), 1e-11),
    (DriftField(attraction = 1.5), 1e-12),
    (DriftField(kernel = 'gaussian', normalize = 'y', repulsion = 0.5), 1e-12),
    (GradientField(), 1e-11),
    (SharpField(), 1e-12),
])
@pytest.mark.parametrize('floor', [0., 1e-6])
@pytest.mark.parametrize('coincident', [False, True])
@pytest.mark.parametrize('guided', [False, True])
@pytest.mark.parametrize('d', [3, 80])      # in 80 dimensions fields add up as coefficients
def test_the_fast_loss_is_the_plain_one(rng, monkeypatch, d, guided, coincident, floor, field, limit):
    gen, pos, uncond, weight = random_problem(rng, b = 7, g = 5, p = 6, u = 4, d = d)
    options = dict(field = field, affinity_floor = floor, temperatures = (0.05, 0.3, 1.))

    if coincident:
        gen[:, 2:] = gen[:, :1]
        pos[0, 0] = gen[0, 0]
        uncond[:, 1] = pos[:, 3]
    if not guided:
        uncond, weight = uncond[:, :0], weight[:, :0]

    plain_gen, fast_gen = (gen.clone().requires_grad_() for _ in range(2))
    plain = plain_drift_loss(plain_gen, pos, uncond, weight, **options)
    plain.mean().backward()

    if not guided:
        uncond = weight = None

    # in parts of two problems, the last of one

    num_samples = 15 if guided else 11
    monkeypatch.setitem(drifting.PART_NUMBERS, 'cpu', 2 * num_samples * max(d, 3 * 5))
    problems = DriftProblems(gen, pos, uncond, **options)
    assert len(problems.parts) == 4
    assert problems.keeps_W == (field.zero_sum and d == 80)

    fast, _ = drift_loss(fast_gen, pos, uncond, uncond_weight = weight, **options)
    fast.mean().backward()

    most = limit if coincident else 1e-12
    assert relative(fast, plain) < most
    assert relative(fast_gen.grad, plain_gen.grad) < most

@pytest.mark.parametrize('d', [3, 40])
@pytest.mark.parametrize('size', [1e-2, 1e-4, 1e-6])
def test_the_clamps_are_the_plain_ones(rng, d, size):
    """Of distances, S, S / sqrt(d) and lambda: the smaller the samples, the more of them."""
    gen, pos, uncond, weight = random_problem(rng, b = 3, g = 5, p = 6, u = 4, d = d, size = size)
    plain_gen, fast_gen = (gen.clone().requires_grad_() for _ in range(2))
    plain = plain_drift_loss(plain_gen, pos, uncond, weight)
    fast, stats = drift_loss(fast_gen, pos, uncond, uncond_weight = weight)
    plain.mean().backward()
    fast.mean().backward()

    assert (stats.scale < 1e-3) == (size < 1e-3)
    assert relative(fast, plain) < 1e-12
    assert relative(fast_gen.grad, plain_gen.grad) < 1e-12

def test_float32_against_float64(rng):
    gen, pos, uncond, weight = random_problem(rng, torch.float32, b = 4, g = 24, p = 32, u = 8, d = 64)
    gen, pos, uncond = (t + 50. for t in (gen, pos, uncond))            # features far from the origin

    exact, exact_stats = drift_loss(gen.double(), pos.double(), uncond.double(), uncond_weight = weight.double())
    loss, stats = drift_loss(gen, pos, uncond, uncond_weight = weight)

    assert relative(loss, exact) < 1e-5
    assert relative(stats.scale, exact_stats.scale) < 1e-5

def ill_conditioned(rng):
    """Problems of more dimensions than points, where the length of V comes from distances instead of V."""
    def points(n, scale = 1.):
        return torch.randn(4, n, 160, generator = rng, dtype = torch.float64) * scale

    gen, pos, uncond = points(24), points(32), points(8)
    far, line = points(1, 10.), points(1)

    def every_other(n):
        return (torch.arange(n) % 2)[:, None]

    first = (torch.arange(24) == 0)[:, None]

    yield 'far from the origin', gen + 1e3, pos + 1e3, uncond + 1e3
    yield 'near equilibrium', pos[:, :24] + points(24, 1e-3), pos, uncond
    yield 'two far clusters', gen + far * every_other(24), pos + far * every_other(32), uncond
    yield 'an outlier', gen + 10 * far * first, pos, uncond
    yield 'on a line', *(line * points(n)[..., :1] for n in (24, 32, 8))
    yield 'tiny', gen * 1e-4, pos * 1e-4, uncond * 1e-4
    yield 'collapsed', pos[:, :1] + points(24, 1e-3), pos, uncond

def test_length_of_the_drift_from_distances_is_as_good(rng, monkeypatch):
    class ByVectors(DriftField):
        def __init__(self):
            super().__init__()
            self.zero_sum = False       # so that V is computed, for every temperature

    monkeypatch.setitem(drifting.PART_NUMBERS, 'cpu', 2 * 64 * 160)        # two of the four problems

    def numbers(samples, field):
        assert DriftProblems(*samples, field = field).keeps_W == field.zero_sum
        loss, stats = drift_loss(*samples, field = field)
        return torch.cat((loss, torch.stack(list(stats.drift_rms.values()))))

    for name, *samples in ill_conditioned(rng):
        exact = numbers(samples, DriftField())
        assert relative(exact, numbers(samples, ByVectors())) < 1e-9, name

        in_float32 = [t.float() for t in samples]
        by_distances = relative(numbers(in_float32, DriftField()), exact)
        by_vectors = relative(numbers(in_float32, ByVectors()), exact)
        print(f'{name}: {by_distances:.1e} {by_vectors:.1e}')
        assert by_distances < 1e-5 or by_distances < 1.5 * by_vectors, (name, by_distances, by_vectors)

def test_gradient_is_that_of_a_frozen_target_by_finite_differences(rng):
    gen, pos, uncond, weight = random_problem(rng)
    V, _, unit, _ = oracle.drift(gen.numpy(), pos.numpy(), uncond.numpy(), weight.numpy(), TEMPERATURES)
    target = gen.numpy() / unit + V

    def frozen(x):
        return np.mean((x / unit - target) ** 2)

    gen.requires_grad_()
    drift_loss(gen, pos, uncond, uncond_weight = weight)[0].mean().backward()

    x, largest = gen.detach().numpy(), gen.grad.abs().max().item()

    for index in np.ndindex(*gen.shape):
        bump = np.zeros(gen.shape)
        bump[index] = 1e-5
        numeric = (frozen(x + bump) - frozen(x - bump)) / 2e-5
        assert abs(numeric - gen.grad[index].item()) < 1e-6 * max(1., largest)

def test_gradient_of_any_sum_of_the_problems(rng):
    gen, pos, _, _ = random_problem(rng, torch.float64)
    gen.requires_grad_()
    loss, _ = drift_loss(gen, pos)
    factors = torch.rand(len(loss), generator = rng, dtype = torch.float64)

    def gradient(value):
        return torch.autograd.grad(value, gen, retain_graph = True)[0]

    mean, total = gradient(loss.mean()), gradient(loss.sum())
    assert relative(mean * len(loss), total) < 1e-12
    assert relative(total * factors[:, None, None], gradient(loss @ factors)) < 1e-12

    (loss.mean() + 2 * loss.mean()).backward(retain_graph = True)
    loss.mean().backward()
    loss, _ = drift_loss(gen, pos)
    loss.mean().backward()
    assert relative(gen.grad, 5 * mean) < 1e-12

@pytest.mark.parametrize('d', [5, 20])
def test_backward_can_be_repeated(rng, d):
    """Also where gen.grad is taken over from the backward pass, through a view of the leaf."""
    gen, pos, _, _ = random_problem(rng, torch.float64, d = d)
    gen.requires_grad_()
    loss, _ = FeatureDriftLoss()(gen, pos)
    expected, = torch.autograd.grad(loss, gen, retain_graph = True)

    for i in range(3):
        loss.backward(retain_graph = i < 2)
        assert relative(gen.grad, (i + 1) * expected) < 1e-12

@pytest.mark.parametrize('group_chunk_size', [None, 1])
def test_second_derivatives_are_refused(rng, group_chunk_size):
    gen, pos, *_ = random_problem(rng)
    gen.requires_grad_()
    losses = drift_loss(gen, pos)[0], FeatureDriftLoss(group_chunk_size = group_chunk_size)(gen, pos)[0]

    for loss in losses:
        with raises_one_line('the drifting loss has no second derivative'):
            torch.autograd.grad(loss.sum(), gen, create_graph = True)
        torch.autograd.grad(loss.sum(), gen)                        # the first one it has

def test_unweighted_unconditional_samples_are_plain_negatives(rng):
    gen, pos, uncond, _ = random_problem(rng)
    ones = torch.ones(uncond.shape[:2], dtype = torch.float64)
    weighted, _ = drift_loss(gen, pos, uncond, uncond_weight = ones)
    assert torch.equal(weighted, drift_loss(gen, pos, uncond)[0])

def test_half_precision_features_are_compared_in_float32(rng):
    gen, pos, *_ = random_problem(rng, torch.float32)
    gen, pos = gen.bfloat16().requires_grad_(), pos.bfloat16()

    with torch.autocast('cpu', dtype = torch.bfloat16):
        loss, _ = drift_loss(gen, pos)
    loss.mean().backward()

    assert loss.dtype == torch.float32
    assert gen.grad.dtype == torch.bfloat16
    assert relative(loss, drift_loss(gen.float(), pos.float())[0]) < 1e-6

def test_degenerate_input_stays_finite():
    ones = torch.ones(2, 3, 4)
    problems = (
        (ones, ones),
        (ones[:, :1], ones),
        (ones, ones[:, :1] * 2),
        (ones * 1e-6, ones * 2e-6),
        (torch.randn(2, 3, 4) * 1e6, ones),
    )

    for gen, pos in problems:
        gen = gen.clone().requires_grad_()
        loss, stats = drift_loss(gen, pos)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert gen.grad.isfinite().all()
        assert stats.scale.isfinite()

# groups, locations, features and guidance

def test_raw_loss_is_the_loss_on_flattened_samples(rng):
    gen, pos = (torch.randn(3, n, 1, 4, 4, generator = rng) for n in (5, 6))
    loss, breakdown = FeatureDriftLoss()(gen, pos)
    expected, stats = drift_loss(gen.flatten(2), pos.flatten(2))

    assert torch.equal(loss, expected.mean())
    assert list(breakdown.losses) == ['global']
    assert torch.equal(breakdown.stats['global'].scale, stats.scale)

def test_guidance_weight(rng):
    gen, pos, uncond = (torch.randn(3, n, 4, generator = rng) for n in (5, 6, 2))
    alpha = torch.tensor([1., 2., 3.5])

    loss, _ = FeatureDriftLoss()(gen, pos, uncond, alpha)
    weight = ((alpha - 1) * (5 - 1) / 2)[:, None].expand(3, 2)           # w = (alpha - 1) (g - 1) / u
    expected, _ = drift_loss(gen, pos, uncond, uncond_weight = weight)
    assert torch.equal(loss, expected.mean())

def test_features_sum_and_locations_share_their_statistics(rng):
    gen, pos = (torch.randn(2, n, 3, 4, 4, generator = rng) for n in (5, 6))
    gen.requires_grad_()

    def encoder(x):
        return dict(pixels = x.flatten(2).mT, mean = x.mean(dim = (2, 3))[:, None])      # [b 16 3], [b 1 3]

    loss, breakdown = FeatureDriftLoss(encoder)(gen, pos)
    assert set(breakdown.losses) == {'pixels', 'mean', 'global'}
    assert relative(loss, sum(breakdown.losses.values())) < 1e-6

    locations = [rearrange(t, 'c n d h w -> (c h w) n d') for t in (gen, pos)]
    expected, stats = drift_loss(*locations)
    assert relative(breakdown.losses['pixels'], expected.mean()) < 1e-6
    assert relative(breakdown.stats['pixels'].scale, stats.scale) < 1e-6

    assert set(FeatureDriftLoss(encoder, raw = False)(gen, pos)[1].losses) == {'pixels', 'mean'}

def test_gradient_goes_through_a_frozen_encoder(rng):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.seen = []

        def features(self, x):
            self.seen.append(torch.is_grad_enabled())
            return dict(linear = self.linear(x)[:, None])

    encoder = Encoder()
    loss_fn = FeatureDriftLoss(encoder, raw = False).train()
    gen, pos = (torch.randn(2, n, 4, generator = rng) for n in (5, 6))

    gen.requires_grad_()
    loss_fn(gen, pos)[0].backward()

    assert gen.grad.abs().sum() > 0
    assert not encoder.training
    assert encoder.linear.weight.grad is None
    assert not encoder.linear.weight.requires_grad
    assert encoder.seen == [True, False]         # generated with a graph, real without

    method = Encoder().features                  # of a module
    FeatureDriftLoss(method)
    assert not method.__self__.training
    assert not method.__self__.linear.weight.requires_grad

# fields of later work in the loss

def test_transport_with_guidance_equals_the_formula(rng):
    """W-Flow: V = T_pos - T_neg + (alpha - 1) (T_pos - T_uncond), in units of the root mean square distance."""
    gen, pos, uncond, neg = (torch.randn(2, n, 3, generator = rng, dtype = torch.float64) for n in (5, 6, 4, 7))
    alpha, R = torch.tensor([1.5, 3.], dtype = torch.float64), 0.05

    weight = ((alpha - 1) * 4 / 4)[:, None].expand(2, 4)
    field = SinkhornField()
    loss, stats = drift_loss(gen, pos, uncond, uncond_weight = weight, neg = neg, temperatures = (R,), field = field)

    y = torch.cat((pos, neg, uncond), dim = 1)
    w = torch.cat((torch.ones(2, 13), weight), dim = 1)
    dist_sq = ((gen[:, :, None] - y[:, None]) ** 2).sum(dim = -1)
    S = ((dist_sq * w[:, None]).mean() / w.mean()).sqrt()
    unit = S / 3 ** 0.5

    def transport(cost, points):
        n, m = cost.shape
        log_k, u, v = -cost / (R * 3), torch.zeros(n, 1), torch.zeros(1, m)        # eps = R d
        for _ in range(10):
            u = math.log(1 / n) - (log_k + v).logsumexp(dim = 1, keepdim = True)
            v = math.log(1 / m) - (log_k + u).logsumexp(dim = 0, keepdim = True)
        plan = (log_k + u + v).exp()
        return plan @ points / plan.sum(dim = 1, keepdim = True)

    V = []
    for i in range(2):
        costs = [0.5 * torch.cdist(gen[i], t[i]) ** 2 / unit ** 2 for t in (pos, neg, uncond)]
        to_pos = transport(costs[0], pos[i] / unit)
        to_neg = transport(costs[1], neg[i] / unit)
        to_uncond = transport(costs[2], uncond[i] / unit)
        V.append(to_pos - to_neg + (alpha[i] - 1) * (to_pos - to_uncond))
    V = torch.stack(V)

    assert relative(stats.scale, S) < 1e-9
    assert relative(stats.drift_rms[R], V.square().mean().sqrt()) < 1e-7
    assert relative(loss, (V ** 2).mean(dim = (1, 2)) / V.square().mean()) < 1e-7

def test_other_generated_samples_as_negatives(rng):
    gen, pos, neg = (torch.randn(2, n, 3, generator = rng) for n in (4, 5, 3))
    _, stats = drift_loss(gen, pos, neg = neg, affinity_floor = 0., temperatures = (0.5,))
    S = torch.cdist(gen, torch.cat((pos, neg), dim = 1)).mean()
    V = DriftField()(gen / S, pos / S, neg / S, temperature = 0.5) * 3 ** 0.5
    assert relative(stats.scale, S) < 1e-5
    assert relative(stats.drift_rms[0.5], V.square().mean().sqrt()) < 1e-4

    options = dict(field = SinkhornField(), temperatures = (0.05,))
    loss_fn = FeatureDriftLoss(**options)
    assert loss_fn.needs_neg
    assert not FeatureDriftLoss().needs_neg
    direct, _ = drift_loss(gen, pos, neg = neg, **options)
    assert relative(loss_fn(gen, pos, neg = neg)[0], direct.mean()) < 1e-6

@pytest.mark.parametrize('field', [GradientField(), SharpField()])
def test_weights_count_like_repeated_samples_where_positives_and_negatives_are_apart(rng, field):
    gen, pos, uncond, _ = random_problem(rng)
    twos = torch.full((2, 2), 2., dtype = torch.float64)
    weighted, _ = drift_loss(gen, pos, uncond, uncond_weight = twos, field = field)
    twice, _ = drift_loss(gen, pos, torch.cat((uncond, uncond), dim = 1), field = field)
    assert relative(weighted, twice) < 1e-9

@pytest.mark.parametrize('field', [GradientField(), SharpField()])
def test_weightless_samples_are_not_there_where_positives_and_negatives_are_apart(rng, field):
    gen, pos = (torch.randn(1, n, 2, generator = rng) for n in (16, 16))
    gen[0, 0] = 8.                                              # an outlier, beside samples without weight
    weightless = gen[:, :1].expand(-1, 4, -1) + 0.1

    _, plain = drift_loss(gen, pos, field = field)
    _, stats = drift_loss(gen, pos, weightless, uncond_weight = torch.zeros(1, 4), field = field)

    for temperature in plain.drift_rms:
        assert relative(stats.drift_rms[temperature], plain.drift_rms[temperature]) < 1e-5
        assert stats.uncond_share[temperature] == 0

    for temperature in plain.potential:
        assert relative(stats.potential[temperature], plain.potential[temperature]) < 1e-5

def test_sharp_potential_is_a_loss_that_falls(rng):
    data = torch.randn(1, 64, 2, generator = rng)
    x = 0.3 * torch.randn(1, 64, 2, generator = rng) + 2.
    field, potentials = SharpField(), []

    for _ in range(60):
        x = x.requires_grad_()
        loss, stats = drift_loss(x, data, field = field, temperatures = (0.5,))
        gradient, = torch.autograd.grad(loss.sum(), x)
        potentials.append(stats.potential[0.5].item())
        x = x.detach() - 4. * gradient

    assert potentials[0] > 1
    assert potentials[-1] < 0.3 * potentials[0]
    assert drift_loss(x, data)[1].potential == {}

# invariances

def encoder(x):
    """Locations and a pooled vector of [b 3 2 2], curved so that gradients are not trivial."""
    x = x + 0.3 * x.sin()
    return dict(pixels = x.flatten(2).mT, mean = x.mean(dim = (2, 3))[:, None])

def loss_and_gradient(gen, pos, uncond, alpha, **kwargs):
    gen = gen.clone().requires_grad_()
    loss, breakdown = FeatureDriftLoss(encoder, **kwargs)(gen, pos, uncond, alpha)
    loss.backward()
    return loss.detach(), gen.grad, breakdown

@pytest.fixture
def step(rng):
    gen, pos, uncond = (torch.randn(3, n, 3, 2, 2, generator = rng, dtype = torch.float64) for n in (5, 6, 4))
    return gen, pos + 0.5, uncond, torch.tensor([1., 1.7, 3.], dtype = torch.float64)

def test_order_does_not_matter(step, rng):
    gen, pos, uncond, alpha = step
    loss, grad, _ = loss_and_gradient(*step)

    g, p, u, c = (torch.randperm(n, generator = rng) for n in (5, 6, 4, 3))
    shuffled_loss, shuffled_grad, _ = loss_and_gradient(gen[:, g], pos[:, p], uncond[:, u], alpha)
    assert relative(shuffled_loss, loss) < 1e-6
    assert relative(shuffled_grad, grad[:, g]) < 1e-6

    groups_loss, groups_grad, _ = loss_and_gradient(gen[c], pos[c], uncond[c], alpha[c])
    assert relative(groups_loss, loss) < 1e-6
    assert relative(groups_grad, grad[c]) < 1e-6

    flipped_loss, flipped_grad, _ = loss_and_gradient(gen.flip(-1), pos.flip(-1), uncond.flip(-1), alpha)
    assert relative(flipped_loss, loss) < 1e-6
    assert relative(flipped_grad, grad.flip(-1)) < 1e-6

def assert_equal_breakdowns(a, b):
    """In every number."""
    assert a.stats.keys() == b.stats.keys()

    for name, stats in a.stats.items():
        assert relative(a.losses[name], b.losses[name]) < 1e-9, name

        for kind, value in stats._asdict().items():
            other = getattr(b.stats[name], kind)
            if kind == 'scale':
                value, other = dict(S = value), dict(S = other)

            assert value.keys() == other.keys(), (name, kind)
            for key in value:
                assert relative(value[key], other[key]) < 1e-9, (name, kind, key)

@pytest.mark.parametrize('field', [DriftField(), DriftField(attraction = 1.5), SharpField()])
@pytest.mark.parametrize('num_problems', [1, 5, 8, 100])
def test_parts_do_not_matter(step, monkeypatch, field, num_problems):
    loss, grad, breakdown = loss_and_gradient(*step, field = field)

    of_one_problem = 15 * 15        # of the locations: 15 samples, each with 5 coefficients at 3 temperatures
    monkeypatch.setitem(drifting.PART_NUMBERS, 'cpu', num_problems * of_one_problem)
    parted_loss, parted_grad, parted = loss_and_gradient(*step, field = field)

    assert relative(parted_loss, loss) < 1e-9
    assert relative(parted_grad, grad) < 1e-9
    assert_equal_breakdowns(breakdown, parted)

@pytest.mark.parametrize('group_chunk_size', [1, 2, 100])
def test_chunks_of_groups_do_not_matter(step, group_chunk_size):
    loss, grad, breakdown = loss_and_gradient(*step)
    chunked_loss, chunked_grad, chunked = loss_and_gradient(*step, group_chunk_size = group_chunk_size)
    assert relative(chunked_loss, loss) < 1e-9
    assert relative(chunked_grad, grad) < 1e-9
    assert_equal_breakdowns(breakdown, chunked)

def test_scale_of_a_feature_does_not_matter(step, monkeypatch):
    monkeypatch.setattr(DriftProblems, 'min_dist_sq', 0.)      # the clamp has a unit
    gen, pos, uncond, _ = (t.flatten(2) if t.ndim > 2 else t for t in step)
    losses, grads = [], []

    for factor in (1., 1e-2, 1e5):
        x = (gen * factor).requires_grad_()
        loss, _ = drift_loss(x, pos * factor, uncond * factor)
        loss = loss.mean()
        loss.backward()
        losses.append(loss.detach())
        grads.append(x.grad * factor)

    for i in (1, 2):
        assert relative(losses[i], losses[0]) < 1e-6
        assert relative(grads[i], grads[0]) < 1e-6

def test_no_guidance_is_no_unconditional_samples(step):
    gen, pos, uncond, alpha = step
    # the release multiplies after the softmax, in whose sums weightless samples still are: each V keeps its direction,
    # not its length

    gen, pos, uncond = (t.flatten(2) for t in (gen, pos, uncond))
    options = dict(temperatures = (0.2,), affinity_floor = 0.)
    _, after = drift_loss(gen, pos, uncond, uncond_weight = torch.zeros(3, 4, dtype = torch.float64), **options)
    _, plain = drift_loss(gen, pos, **options)
    assert relative(after.scale, plain.scale) < 1e-12
    assert after.drift_rms[0.2] < plain.drift_rms[0.2]

def test_diagnostics(step):
    _, _, breakdown = loss_and_gradient(*step, affinity_floor = 0.)
    _, _, without = loss_and_gradient(*step, affinity_floor = 0., diagnostics = False)

    for name, stats in breakdown.stats.items():
        assert without.stats[name].neighbors == {}
        assert without.stats[name].drift_rms == stats.drift_rms
        for temperature in TEMPERATURES:
            assert 1 <= stats.neighbors[temperature] <= 6
            assert 0 < stats.uncond_share[temperature] < 1
        assert stats.neighbors[0.02] < stats.neighbors[0.2]      # a small temperature listens to the nearest only

    floored = loss_and_gradient(*step)[2].stats['global']
    assert floored.neighbors[0.02] > 2 * stats.neighbors[0.02]     # with the floor it listens to everyone

    affinity = torch.tensor([[1., 1., 1., 1.], [5., 0., 0., 0.], [2., 2., 0., 0.]])
    assert relative(effective_neighbors(affinity), [4., 1., 2.]) < 1e-6

class Wrapper(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return dict(a = self.net(x)[:, None])

X = torch.zeros(2, 3, 4).normal_(generator = torch.Generator().manual_seed(1))
NUMBERS = itertools.count()

@pytest.mark.parametrize('call, says', [
    (lambda: drift_loss(X[0], X), 'gen has shape (3, 4)'),
    (lambda: drift_loss(X, X[:1]), 'nothing is broadcast'),
    (lambda: drift_loss(X, X[..., :2]), 'like gen: nothing is broadcast'),
    (lambda: drift_loss(X, X[:, :0]), 'empty set'),
    (lambda: drift_loss(X, X / 0), 'non-finite'),
    (lambda: drift_loss(X, X, X, uncond_weight = torch.ones(2)), 'uncond_weight has shape (2,), expected (2, 3)'),
    (
        lambda: drift_loss(X, X, X, uncond_weight = -torch.ones(2, 3)),
        'uncond_weight must be finite and in 0 .. 1000000000, got -1.0 .. -1.0'
    ),
    (lambda: drift_loss(X, X, uncond_weight = torch.ones(2, 3)), 'expected (2, 0), one for each of uncond'),
    (lambda: drift_loss(X, X, temperatures = ()), 'temperatures'),
    (lambda: drift_loss(X, X, temperatures = (0.1, -1.)), 'temperatures'),
    (lambda: drift_loss(X, X, temperatures = (0.1, float('nan'))), 'temperatures'),
    (lambda: drift_loss(X, X, temperatures = (0.1, 0.1)), 'temperatures must be different'),
    (lambda: drift_loss(X, X, temperatures = np.array([0.1, -1.])), 'temperatures must be'),
    (lambda: drift_loss(X, X, temperatures = 'warm'), "finite numbers above 0, got 'warm'"),
    (lambda: drift_loss(X, X, temperatures = True), 'finite numbers above 0, got True'),
    (lambda: drift_loss(X, X, temperatures = [[0.1]]), 'temperatures must be'),
    (lambda: drift_loss(X, X, temperatures = torch.ones(2, device = 'meta')), 'temperatures must be'),
    (lambda: drift_loss(X, X, field = 'laplace'), "field must be a DriftField, got 'laplace'"),
    (lambda: drift_loss(X, X, affinity_floor = float('nan')), 'affinity_floor must be a number in 0 .. 1, got nan'),
    (lambda: drift_loss(X, X, X, uncond_weight = [1.]), 'uncond_weight must be a tensor, got list'),
    (lambda: drift_loss(X * 1e30, X), 'gen has values up to'),
    (lambda: FeatureDriftLoss(lambda x: dict(a = 1e25 * x[:, None]))(X, X), "gen of feature 'a' has values up to"),
    (lambda: FeatureDriftLoss()(X.tolist(), X), 'gen must be a tensor, got list'),
    (lambda: FeatureDriftLoss()(X, None), 'pos must be a tensor, got NoneType'),
    (lambda: drift_loss(X.numpy(), X), 'gen must be a tensor, got ndarray'),
    (lambda: FeatureDriftLoss(temperature = (0.1,)), "unknown arguments ['temperature']"),
    (lambda: FeatureDriftLoss(lambda x: {})(X, X), 'an encoder must return a dict'),
    (
        lambda: FeatureDriftLoss(lambda x: {str(next(NUMBERS)): x[:, None]})(X, X),
        'features of generated or of real samples alone: ['
    ),
    (
        lambda: FeatureDriftLoss(lambda x: {'global': x[:, None]})(X, X),
        "features of the same name: ['global']"
    ),
    (
        lambda: FeatureDriftLoss(lambda x: {'a': x[:1, None]})(X, X),
        "feature 'a' has shape (1, 1, 4), expected (6, locations, feature dim)"
    ),
    (lambda: FeatureDriftLoss()(X, X, X, 2.), 'alpha has shape (), expected (2,), one per group'),
    (lambda: FeatureDriftLoss(group_chunk_size = 0), 'group_chunk_size must be a whole number from 1 on'),
    (lambda: FeatureDriftLoss(chunk_size = 5), "unknown arguments ['chunk_size']"),
    (lambda: FeatureDriftLoss(pos = X), "unknown arguments ['pos']"),
    (lambda: drift_loss(X, X, field = SinkhornField()), 'SinkhornField needs neg'),
    (lambda: FeatureDriftLoss(raw = False), 'raw = False'),
    (lambda: FeatureDriftLoss('resnet'), "callable or have .features(x), got 'resnet'"),
    (lambda: FeatureDriftLoss()(X, X[:1]), '(1, 3, 4), expected (2, samples, 4) like gen: nothing is broadcast'),
    (lambda: FeatureDriftLoss()(X, X[..., :2]), 'expected (2, samples, 4) like gen'),
    (lambda: FeatureDriftLoss()(X[0], X), 'gen has shape (3, 4)'),
    (lambda: FeatureDriftLoss()(X, X[:, :0]), 'no empty set'),
    (lambda: FeatureDriftLoss()(X, X, X), 'uncond needs alpha'),
    (
        lambda: FeatureDriftLoss()(X, X, X, torch.tensor([0.5, 1.])),
        'alpha must be finite and in 1 .. 1000000, got 0.5 .. 1.0'
    ),
    (lambda: FeatureDriftLoss()(X, X, X, torch.tensor([float('nan'), 1.])), 'alpha must be'),
    (
        lambda: FeatureDriftLoss()(X, X, X, torch.ones(3)),
        'alpha has shape (3,), expected (2,), one per group'
    ),
    (lambda: FeatureDriftLoss()(X, X, None, torch.full((2,), 2.)), 'alpha above 1 needs uncond'),
    (lambda: FeatureDriftLoss(lambda x: dict(a = x))(X, X), "feature 'a' has shape"),
])
def test_bad_input_is_one_clear_line(call, says):
    with raises_one_line(says):
        call()

def test_without_a_gradient():
    loss_fn = FeatureDriftLoss()
    with torch.inference_mode():
        loss, _ = loss_fn(X, X + 1)
    assert torch.equal(loss, loss_fn(X, X + 1)[0])
    with torch.no_grad():
        assert relative(FeatureDriftLoss(group_chunk_size = 1)(X, X + 1)[0], loss) < 1e-6

def test_one_temperature_may_be_a_number():
    loss, stats = drift_loss(X, X + 1, temperatures = 0.1)
    assert torch.equal(loss, drift_loss(X, X + 1, temperatures = (0.1,))[0])
    assert list(stats.drift_rms) == [0.1]
    assert torch.equal(loss, drift_loss(X, X + 1, temperatures = np.array(0.1))[0])
    whole = drift_loss(X, X + 1, temperatures = np.array([1, 2]))[0]
    assert torch.equal(whole, drift_loss(X, X + 1, temperatures = (1., 2.))[0])

@pytest.mark.parametrize('b, g, p, d, field', [
    (256, 64, 64, 64, DriftField()),
    (64, 64, 64, 640, GradientField()),
    (1, 16, 16, 196_608, DriftField()),
])
def test_many_numbers_are_added_without_losing_digits(b, g, p, d, field):
    """lambda is a mean over all problems, and the loss over all dimensions of a sample."""
    generator = torch.Generator().manual_seed(0)
    gen, pos = (torch.randn(b, num, d, generator = generator) for num in (g, p))
    loss, stats = drift_loss(gen, pos + 0.5, field = field, diagnostics = False)
    exact, exact_stats = drift_loss(gen.double(), pos.double() + 0.5, field = field, diagnostics = False)
    assert relative(loss, exact) < 1e-5
    assert relative(stats.drift_rms[0.2], exact_stats.drift_rms[0.2]) < 1e-5

GLOBAL = torch.nn.Linear(4, 5)

class Plain:
    """An encoder that is no Module."""

    def __init__(self, net):
        self.net = net
        self.generator = torch.nn.Linear(4, 4)

    def features(self, x):
        return dict(a = self.encode(x)[:, None])

    def encode(self, x):
        return self.net(x)

def calling(helper):
    return lambda x: dict(a = helper(x))

@pytest.mark.parametrize('around', [
    lambda module: lambda x: dict(a = module(x)[:, None]),
    lambda module: functools.partial(lambda net, x: dict(a = net(x)[:, None]), module),
    lambda module: functools.partial(Wrapper(module).forward),
    lambda module: Wrapper(module).forward,
    lambda module: functools.partial(lambda x, net: dict(a = net(x)[:, None]), net = module),
    lambda module: calling(lambda x: module(x)[:, None]),
    Plain,
    lambda module: Plain(module).features,
    lambda module: functools.partial(Plain(module).features),
    lambda module: torch.autocast('cpu', enabled = False)(lambda x: dict(a = module(x)[:, None])),
])
def test_modules_inside_of_functions_are_frozen(around):
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Dropout())
    encoder = around(module)
    loss, _ = FeatureDriftLoss(encoder)(X.clone().requires_grad_(), X + 1)
    loss.backward()
    assert not module.training
    assert all(not p.requires_grad and p.grad is None for p in module.parameters())

def test_what_an_encoder_does_not_use_is_not_frozen():
    encoder = Plain(torch.nn.Linear(4, 5))
    FeatureDriftLoss(encoder.features)
    FeatureDriftLoss(encoder)
    assert encoder.generator.training and encoder.generator.weight.requires_grad

def test_global_modules_inside_of_functions_are_frozen():
    FeatureDriftLoss(lambda x: dict(a = GLOBAL(x)[:, None]))
    assert not GLOBAL.training and not GLOBAL.weight.requires_grad

INSIDE = torch.nn.Linear(4, 5)

@pytest.mark.parametrize('encoder', [
    lambda x: {f'a{i}': INSIDE(x * i)[:, None] for i in (1, 2)},
    lambda x: dict(a = next(INSIDE(t)[:, None] for t in [x])),
    lambda x: dict(a = (lambda t: INSIDE(t)[:, None])(x)),
])
def test_global_modules_of_functions_within_functions_are_frozen(encoder):
    INSIDE.train().requires_grad_(True)
    FeatureDriftLoss(encoder)
    assert not INSIDE.training and not INSIDE.weight.requires_grad

@pytest.mark.parametrize('chunk', [None, 1])
def test_encoders_without_a_gradient_are_refused(chunk):
    encoder = torch.no_grad()(lambda x: dict(a = 2 * x[:, None], b = x[:, None].square()))
    loss_fn = FeatureDriftLoss(encoder, group_chunk_size = chunk)

    with raises_one_line("encoder or decoder gives no gradient to ['a', 'b']"):
        loss_fn(X.clone().requires_grad_(), X + 1)

    expected, _ = FeatureDriftLoss(encoder)(X, X + 1)           # the loss alone
    assert relative(loss_fn(X, X + 1)[0], expected) < 1e-5

    with torch.no_grad():
        assert relative(loss_fn(X.clone().requires_grad_(), X + 1)[0], expected) < 1e-5

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_negatives_of_half_precision(dtype):
    gen, pos, neg = X.to(dtype), (X + 1).to(dtype), X.flip(0).to(dtype)
    options = dict(field = SinkhornField(), temperatures = (0.1,))
    loss, _ = drift_loss(gen, pos, neg = neg, **options)
    expected, _ = drift_loss(gen.float(), pos.float(), neg = neg.float(), **options)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64, torch.bool, torch.long])
def test_alpha_of_other_dtypes(dtype):
    alpha = torch.tensor([1, 3]).to(dtype)
    loss, _ = FeatureDriftLoss()(X, X + 1, X.flip(1), alpha)
    assert torch.equal(loss, FeatureDriftLoss()(X, X + 1, X.flip(1), alpha.float())[0])
