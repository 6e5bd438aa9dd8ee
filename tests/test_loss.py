import math

import numpy as np
import oracle
import pytest
import torch
from conftest import REFERENCE, relative

from drifting_pytorch import DriftField, FeatureDriftLoss, drift_loss

ARRAYS = np.load(REFERENCE / 'drift_loss.npz')
TEMPERATURES = (0.02, 0.05, 0.2)

def case(name):
    arrays = {key.split('/', 1)[1]: torch.from_numpy(ARRAYS[key]) for key in ARRAYS.files if key.startswith(f'{name}/')}
    return arrays, tuple(round(float(t), 6) for t in arrays['temps'])

@pytest.mark.parametrize('name', ['plain', 'cfg', 'spatial', 'single_temp'])
def test_loss_equals_the_release(name):
    ref, temperatures = case(name)
    gen = ref['gen'].requires_grad_()

    loss, stats = drift_loss(gen, ref['pos'], ref.get('neg'), uncond_weight = ref.get('weight_neg'), temperatures = temperatures)
    loss.mean().backward()

    assert relative(loss, ref['loss']) < 1e-5
    assert relative(gen.grad, ref['grad']) < 1e-4
    assert relative(stats.scale, ref['scale']) < 1e-4

    for temperature in temperatures:
        assert relative(stats.drift_rms[temperature] ** 2, ref[f'drift_sq_{temperature}']) < 1e-4

def random_problem(rng, dtype = torch.float64, b = 2, g = 4, p = 3, u = 2, d = 5, size = 1.):
    draw = lambda n: size * torch.randn(b, n, d, generator = rng, dtype = dtype)
    return draw(g), draw(p) + size, draw(u), 2 * torch.rand(b, u, generator = rng, dtype = dtype)

@pytest.mark.parametrize('shape', [dict(), dict(b = 1, g = 2, p = 1, u = 1, d = 1), dict(b = 3, g = 3, p = 6, u = 4, d = 2), dict(size = 100.), dict(size = 1e-5), dict(d = 20)])
@pytest.mark.parametrize('options', [dict(), dict(kind = 'gaussian'), dict(normalize = 'y'), dict(floor = 0.), dict(a = 1.5), dict(guided = False)])
def test_loss_equals_the_formula(rng, shape, options):
    gen, pos, uncond, weight = random_problem(rng, **shape)
    guided = options.get('guided', True)
    options = {k: v for k, v in options.items() if k != 'guided'}
    if not guided:
        uncond = weight = None

    V, S, unit, mean_squares = oracle.drift(gen.numpy(), pos.numpy(), uncond.numpy() if guided else None, weight.numpy() if guided else None, TEMPERATURES, **options)

    field = DriftField(kernel = options.get('kind', 'laplace'), normalize = options.get('normalize', 'both'), attraction = options.get('a', 1.))
    gen.requires_grad_()
    loss, stats = drift_loss(gen, pos, uncond, uncond_weight = weight, field = field, affinity_floor = options.get('floor', 1e-6))
    loss.mean().backward()

    assert relative(loss, (V ** 2).mean(axis = (1, 2))) < 1e-7          # value: mean of V^2
    assert relative(gen.grad, -2 * V / V.size / unit) < 1e-7            # gradient: -2 V / n, in the units of the feature
    assert relative(stats.scale, np.asarray(S)) < 1e-9

    for temperature, mean_square in mean_squares.items():
        assert relative(stats.drift_rms[temperature] ** 2, np.asarray(mean_square)) < 1e-7

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

    gen, pos, uncond, far = points(24), points(32), points(8), points(1, 10.)
    line = points(1)

    yield 'far from the origin', gen + 1e3, pos + 1e3, uncond + 1e3
    yield 'near equilibrium', pos[:, :24] + points(24, 1e-3), pos, uncond
    yield 'two far clusters', gen + far * (torch.arange(24) % 2)[:, None], pos + far * (torch.arange(32) % 2)[:, None], uncond
    yield 'an outlier', gen + 10 * far * (torch.arange(24) == 0)[:, None], pos, uncond
    yield 'on a line', line * points(24)[..., :1], line * points(32)[..., :1], line * points(8)[..., :1]
    yield 'tiny', gen * 1e-4, pos * 1e-4, uncond * 1e-4
    yield 'collapsed', pos[:, :1] + points(24, 1e-3), pos, uncond

def test_length_of_the_drift_from_distances_is_as_good(rng):
    class ByVectors(DriftField):
        zero_sum = False        # so that V is computed, for every temperature

    def numbers(samples, field):
        loss, stats = drift_loss(*samples, field = field)
        return torch.cat((loss, torch.stack(list(stats.drift_rms.values()))))

    for name, *samples in ill_conditioned(rng):
        exact, by_vectors = (numbers(samples, field) for field in (DriftField(), ByVectors()))
        assert relative(exact, by_vectors) < 1e-9, name

        by_distances, by_vectors = (relative(numbers([t.float() for t in samples], field), exact) for field in (DriftField(), ByVectors()))
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

    for index in np.ndindex(*gen.shape):
        bump = np.zeros(gen.shape)
        bump[index] = 1e-5
        numeric = (frozen(gen.detach().numpy() + bump) - frozen(gen.detach().numpy() - bump)) / 2e-5
        assert abs(numeric - gen.grad[index].item()) < 1e-6 * max(1., gen.grad.abs().max().item())

def test_gradient_of_any_sum_of_the_problems(rng):
    gen, pos, _, _ = random_problem(rng, torch.float64)
    gen.requires_grad_()
    loss, _ = drift_loss(gen, pos)
    factors = torch.rand(len(loss), generator = rng, dtype = torch.float64)

    mean, total, weighted = (torch.autograd.grad(value, gen, retain_graph = True)[0] for value in (loss.mean(), loss.sum(), loss @ factors))
    assert relative(mean * len(loss), total) < 1e-12 and relative(total * factors[:, None, None], weighted) < 1e-12

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

def test_second_derivatives_are_refused(rng):
    gen, pos, _, _ = random_problem(rng, torch.float64)
    gen.requires_grad_()
    grad, = torch.autograd.grad(drift_loss(gen, pos)[0].sum(), gen, create_graph = True)

    with pytest.raises(RuntimeError, match = 'does not require grad'):
        grad.sum().backward()

def test_unweighted_unconditional_samples_are_plain_negatives(rng):
    gen, pos, uncond, _ = random_problem(rng)
    ones = torch.ones(uncond.shape[:2], dtype = torch.float64)
    assert torch.equal(drift_loss(gen, pos, uncond)[0], drift_loss(gen, pos, uncond, uncond_weight = ones)[0])

def test_half_precision_features_are_compared_in_float32(rng):
    gen, pos, *_ = random_problem(rng, torch.float32)
    gen, pos = gen.bfloat16().requires_grad_(), pos.bfloat16()

    with torch.autocast('cpu', dtype = torch.bfloat16):
        loss, _ = drift_loss(gen, pos)
    loss.mean().backward()

    assert loss.dtype == torch.float32 and gen.grad.dtype == torch.bfloat16
    assert relative(loss, drift_loss(gen.float(), pos.float())[0]) < 1e-6

def test_degenerate_input_stays_finite():
    ones = torch.ones(2, 3, 4)
    for gen, pos in ((ones, ones), (ones[:, :1], ones), (ones, ones[:, :1] * 2), (ones * 1e-6, ones * 2e-6), (torch.randn(2, 3, 4) * 1e6, ones)):
        gen = gen.clone().requires_grad_()
        loss, stats = drift_loss(gen, pos)
        loss.sum().backward()
        assert loss.isfinite().all() and gen.grad.isfinite().all() and stats.scale.isfinite()

# groups, locations, features and guidance

def test_raw_loss_is_the_loss_on_flattened_samples(rng):
    gen, pos = (torch.randn(3, n, 1, 4, 4, generator = rng) for n in (5, 6))
    loss, breakdown = FeatureDriftLoss()(gen, pos)
    expected, stats = drift_loss(gen.flatten(2), pos.flatten(2))

    assert torch.equal(loss, expected.mean())
    assert list(breakdown.losses) == ['global'] and torch.equal(breakdown.stats['global'].scale, stats.scale)

def test_guidance_weight(rng):
    gen, pos, uncond = (torch.randn(3, n, 4, generator = rng) for n in (5, 6, 2))
    alpha = torch.tensor([1., 2., 3.5])

    loss, _ = FeatureDriftLoss()(gen, pos, uncond, alpha)
    weight = ((alpha - 1) * (5 - 1) / 2)[:, None].expand(3, 2)           # w = (alpha - 1) (g - 1) / u
    assert torch.equal(loss, drift_loss(gen, pos, uncond, uncond_weight = weight)[0].mean())

def test_features_sum_and_locations_share_their_statistics(rng):
    gen, pos = (torch.randn(2, n, 3, 4, 4, generator = rng) for n in (5, 6))
    gen.requires_grad_()

    def encoder(x):
        return dict(pixels = x.flatten(2).mT, mean = x.mean(dim = (2, 3))[:, None])      # [b 16 3], [b 1 3]

    loss, breakdown = FeatureDriftLoss(encoder)(gen, pos)
    assert set(breakdown.losses) == {'pixels', 'mean', 'global'}
    assert relative(loss, sum(breakdown.losses.values())) < 1e-6

    locations = lambda t: t.flatten(3).permute(0, 3, 1, 2).flatten(0, 1)                 # [(c f) n d]
    expected, stats = drift_loss(locations(gen), locations(pos))
    assert relative(breakdown.losses['pixels'], expected.mean()) < 1e-6
    assert relative(breakdown.stats['pixels'].scale, stats.scale) < 1e-6

    assert set(FeatureDriftLoss(encoder, raw = False)(gen, pos)[1].losses) == {'pixels', 'mean'}

def test_gradient_goes_through_a_frozen_encoder(rng):
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 3)
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
    assert not encoder.training and encoder.linear.weight.grad is None and not encoder.linear.weight.requires_grad
    assert encoder.seen == [True, False]         # generated with a graph, real without

    method = Encoder().features                  # of a module
    FeatureDriftLoss(method)
    assert not method.__self__.training and not method.__self__.linear.weight.requires_grad

# fields of later work in the loss

def test_transport_with_guidance_equals_the_formula(rng):
    """W-Flow: V = T_pos - T_neg + (alpha - 1) (T_pos - T_uncond) on features in units of the root mean square distance."""
    gen, pos, uncond, neg = (torch.randn(2, n, 3, generator = rng, dtype = torch.float64) for n in (5, 6, 4, 7))
    alpha, R = torch.tensor([1.5, 3.], dtype = torch.float64), 0.05

    weight = ((alpha - 1) * 4 / 4)[:, None].expand(2, 4)
    loss, stats = drift_loss(gen, pos, uncond, uncond_weight = weight, neg = neg, temperatures = (R,), field = DriftField(normalize = 'sinkhorn'))

    y, w = torch.cat((pos, neg, uncond), dim = 1), torch.cat((torch.ones(2, 13), weight), dim = 1)
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
        moved = [transport(0.5 * torch.cdist(gen[i], t[i]) ** 2 / unit ** 2, t[i] / unit) for t in (pos, neg, uncond)]
        V.append(moved[0] - moved[1] + (alpha[i] - 1) * (moved[0] - moved[2]))
    V = torch.stack(V)

    assert relative(stats.scale, S) < 1e-9
    assert relative(stats.drift_rms[R], V.square().mean().sqrt()) < 1e-7
    assert relative(loss, (V ** 2).mean(dim = (1, 2)) / V.square().mean()) < 1e-7

def test_other_generated_samples_as_negatives(rng):
    gen, pos, uncond, alpha = (torch.randn(2, n, 3, generator = rng) for n in (4, 5, 3, 1))
    loss, stats = drift_loss(gen, pos, neg = uncond, affinity_floor = 0., temperatures = (0.5,))
    S = torch.cdist(gen, torch.cat((pos, uncond), dim = 1)).mean()
    V = DriftField()(gen / S, pos / S, uncond / S, temperature = 0.5) * 3 ** 0.5
    assert relative(stats.scale, S) < 1e-5 and relative(stats.drift_rms[0.5], V.square().mean().sqrt()) < 1e-4

    loss_fn = FeatureDriftLoss(field = DriftField(normalize = 'sinkhorn'), temperatures = (0.05,))
    assert loss_fn.needs_neg and not FeatureDriftLoss().needs_neg
    direct, _ = drift_loss(gen, pos, neg = uncond, field = DriftField(normalize = 'sinkhorn'), temperatures = (0.05,))
    assert relative(loss_fn(gen, pos, neg = uncond)[0], direct.mean()) < 1e-6

@pytest.mark.parametrize('normalize', ['gradient', 'sharp'])
def test_weights_count_like_repeated_samples_where_positives_and_negatives_are_apart(rng, normalize):
    gen, pos, uncond, _ = random_problem(rng)
    field = DriftField(normalize = normalize)
    weighted, _ = drift_loss(gen, pos, uncond, uncond_weight = torch.full((2, 2), 2., dtype = torch.float64), field = field)
    twice, _ = drift_loss(gen, pos, torch.cat((uncond, uncond), dim = 1), field = field)
    assert relative(weighted, twice) < 1e-9

@pytest.mark.parametrize('normalize', ['gradient', 'sharp'])
def test_weightless_samples_are_not_there_where_positives_and_negatives_are_apart(rng, normalize):
    gen, pos = (torch.randn(1, n, 2, generator = rng) for n in (16, 16))
    gen[0, 0] = 8.                                                                       # an outlier, beside samples without weight
    field = DriftField(normalize = normalize)

    plain = drift_loss(gen, pos, field = field)[1]
    with_weightless = drift_loss(gen, pos, gen[:, :1].expand(-1, 4, -1) + 0.1, uncond_weight = torch.zeros(1, 4), field = field)[1]
    assert all(relative(with_weightless.drift_rms[t], plain.drift_rms[t]) < 1e-5 and with_weightless.uncond_share[t] == 0 for t in plain.drift_rms)
    assert all(relative(with_weightless.potential[t], plain.potential[t]) < 1e-5 for t in plain.potential)

def test_sharp_potential_is_a_loss_that_falls(rng):
    data = torch.randn(1, 64, 2, generator = rng)
    field, x = DriftField(normalize = 'sharp'), 0.3 * torch.randn(1, 64, 2, generator = rng) + 2.
    potentials = []

    for _ in range(60):
        x = x.requires_grad_()
        loss, stats = drift_loss(x, data, field = field, temperatures = (0.5,))
        gradient, = torch.autograd.grad(loss.sum(), x)
        potentials.append(stats.potential[0.5].item())
        x = x.detach() - 4. * gradient

    assert potentials[0] > 1 and potentials[-1] < 0.3 * potentials[0] and drift_loss(x, data)[1].potential == {}

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
    shuffled = loss_and_gradient(gen[:, g], pos[:, p], uncond[:, u], alpha)
    assert relative(shuffled[0], loss) < 1e-6 and relative(shuffled[1], grad[:, g]) < 1e-6

    groups = loss_and_gradient(gen[c], pos[c], uncond[c], alpha[c])
    assert relative(groups[0], loss) < 1e-6 and relative(groups[1], grad[c]) < 1e-6

    locations = loss_and_gradient(*(t.flip(-1) for t in (gen, pos, uncond)), alpha)
    assert relative(locations[0], loss) < 1e-6 and relative(locations[1], grad.flip(-1)) < 1e-6

@pytest.mark.parametrize('chunk_size', [1, 5, 8, 100])
def test_chunks_do_not_matter(step, chunk_size):
    loss, grad, breakdown = loss_and_gradient(*step)
    chunked_loss, chunked_grad, chunked = loss_and_gradient(*step, chunk_size = chunk_size)
    assert relative(chunked_loss, loss) < 1e-9 and relative(chunked_grad, grad) < 1e-9

    for name, stats in breakdown.stats.items():
        for field, value in stats._asdict().items():
            other = getattr(chunked.stats[name], field)
            for a, b in zip(value.values(), other.values()) if isinstance(value, dict) else [(value, other)]:
                assert relative(a, b) < 1e-9, (name, field)

def test_scale_of_a_feature_does_not_matter(step):
    gen, pos, uncond, _ = (t.flatten(2) if t.ndim > 2 else t for t in step)
    losses, grads = [], []

    for factor in (1., 1e-2, 1e5):
        x = (gen * factor).requires_grad_()
        loss = drift_loss(x, pos * factor, uncond * factor, min_dist_sq = 0.)[0].mean()      # the clamp has a unit
        loss.backward()
        losses.append(loss.detach())
        grads.append(x.grad * factor)

    assert relative(losses[1], losses[0]) < 1e-6 and relative(losses[2], losses[0]) < 1e-6
    assert relative(grads[1], grads[0]) < 1e-6 and relative(grads[2], grads[0]) < 1e-6

def test_no_guidance_is_no_unconditional_samples(step):
    gen, pos, uncond, alpha = step
    none = loss_and_gradient(gen, pos, None, None)
    kwargs = dict(weight_in_softmax = True)
    inside = loss_and_gradient(gen, pos, uncond, torch.ones_like(alpha), **kwargs)
    assert relative(inside[0], loss_and_gradient(gen, pos, None, None, **kwargs)[0]) < 1e-6 and relative(inside[1], none[1]) < 1e-6

    # the release multiplies after the softmax, in whose sums weightless samples still are: each V keeps its direction, not its length

    after = drift_loss(gen.flatten(2), pos.flatten(2), uncond.flatten(2), uncond_weight = torch.zeros(3, 4, dtype = torch.float64), temperatures = (0.2,), affinity_floor = 0.)
    plain = drift_loss(gen.flatten(2), pos.flatten(2), temperatures = (0.2,), affinity_floor = 0.)
    assert relative(after[1].scale, plain[1].scale) < 1e-12 and (after[1].drift_rms[0.2] < plain[1].drift_rms[0.2])

def test_weights_inside_the_softmax_are_repeated_samples(rng):
    """A weight of 2 counts like the sample twice, over y. That is what 'inside' means."""
    gen, pos, uncond, _ = random_problem(rng)
    field = DriftField(normalize = 'y')
    twice, _ = drift_loss(gen, pos, torch.cat((uncond, uncond), dim = 1), field = field)
    weighted, _ = drift_loss(gen, pos, uncond, uncond_weight = torch.full((2, 2), 2., dtype = torch.float64), field = field, weight_in_softmax = True, affinity_floor = 0.)
    exact, _ = drift_loss(gen, pos, torch.cat((uncond, uncond), dim = 1), field = field, affinity_floor = 0.)
    assert relative(weighted, exact) < 1e-9 and relative(weighted, twice) > 1e-12

def test_diagnostics(step):
    _, _, breakdown = loss_and_gradient(*step, affinity_floor = 0.)
    _, _, without = loss_and_gradient(*step, affinity_floor = 0., diagnostics = False)

    for name, stats in breakdown.stats.items():
        assert without.stats[name].neighbors == {} and without.stats[name].drift_rms == stats.drift_rms
        for temperature in TEMPERATURES:
            assert 1 <= stats.neighbors[temperature] <= 6 and 0 < stats.uncond_share[temperature] < 1
        assert stats.neighbors[0.02] < stats.neighbors[0.2]                  # a small temperature listens to the nearest only

    floored = loss_and_gradient(*step)[2].stats['global']
    assert floored.neighbors[0.02] > 2 * stats.neighbors[0.02]                    # the floor makes small temperatures listen to everyone

    from drifting_pytorch.drifting import effective_neighbors
    assert relative(effective_neighbors(torch.tensor([[1., 1., 1., 1.], [5., 0., 0., 0.], [2., 2., 0., 0.]])), [4., 1., 2.]) < 1e-6

X = torch.zeros(2, 3, 4).normal_(generator = torch.Generator().manual_seed(1))

@pytest.mark.parametrize('call, says', [
    (lambda: drift_loss(X[0], X), 'gen has shape (3, 4)'),
    (lambda: drift_loss(X, X[:1]), 'leading (group) dimensions'),
    (lambda: drift_loss(X, X[..., :2]), 'feature dimension'),
    (lambda: drift_loss(X, X[:, :0]), 'empty set'),
    (lambda: drift_loss(X, X / 0), 'non-finite'),
    (lambda: drift_loss(X, X, X, uncond_weight = torch.ones(2)), 'uncond_weight has shape (2,), expected (2, 3)'),
    (lambda: drift_loss(X, X, X, uncond_weight = -torch.ones(2, 3)), 'uncond_weight must be finite and in 0 .. inf, got -1.0 .. -1.0'),
    (lambda: drift_loss(X, X, uncond_weight = torch.ones(2, 3)), 'without uncond'),
    (lambda: drift_loss(X, X, temperatures = ()), 'temperatures'),
    (lambda: drift_loss(X, X, temperatures = (0.1, -1.)), 'temperatures'),
    (lambda: drift_loss(X, X, temperatures = (0.1, float('nan'))), 'temperatures'),
    (lambda: drift_loss(X.numpy(), X), 'gen must be a tensor, got ndarray'),
    (lambda: FeatureDriftLoss(temperature = (0.1,)), "unknown arguments ['temperature']"),
    (lambda: FeatureDriftLoss(lambda x: {})(X, X), 'an encoder must return a dict'),
    (lambda: FeatureDriftLoss(lambda x: {'global': x[:, None]})(X, X), "features of the same name: ['global']"),
    (lambda: FeatureDriftLoss(lambda x: {'a': x[:1, None]})(X, X), "feature 'a' has shape (1, 1, 4), expected (6, locations, feature dim)"),
    (lambda: FeatureDriftLoss()(X, X, X, 2.), 'alpha must be a tensor'),
    (lambda: drift_loss(X, X, chunk_size = 0), 'chunk_size must be above 0'),
    (lambda: drift_loss(X, X, field = DriftField(normalize = 'sinkhorn')), "normalize = 'sinkhorn' needs neg"),
    (lambda: DriftField(normalize = 'sharp', kernel = 'gaussian'), 'has a kernel of its own'),
    (lambda: FeatureDriftLoss(raw = False), 'raw = False'),
    (lambda: FeatureDriftLoss('resnet'), 'encoder must be'),
    (lambda: FeatureDriftLoss()(X, X[:1]), 'pos has shape (1, 3, 4) but gen has shape (2, 3, 4)'),
    (lambda: FeatureDriftLoss()(X, X[..., :2]), 'groups and sample shape must be equal'),
    (lambda: FeatureDriftLoss()(X[0], X), 'gen has shape (3, 4)'),
    (lambda: FeatureDriftLoss()(X, X[:, :0]), 'at least one of each'),
    (lambda: FeatureDriftLoss()(X, X, X), 'without alpha'),
    (lambda: FeatureDriftLoss()(X, X, X, torch.tensor([0.5, 1.])), 'alpha must be finite and in 1 .. inf, got 0.5 .. 1.0'),
    (lambda: FeatureDriftLoss()(X, X, X, torch.tensor([float('nan'), 1.])), 'alpha must be'),
    (lambda: FeatureDriftLoss()(X, X, X, torch.ones(3)), 'alpha must be a tensor of shape (2,), one guidance scale per group, got (3,)'),
    (lambda: FeatureDriftLoss()(X, X, None, torch.full((2,), 2.)), 'alpha above 1 needs uncond'),
    (lambda: FeatureDriftLoss(lambda x: dict(a = x))(X, X), "feature 'a' has shape"),
])
def test_bad_input_is_one_clear_line(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value) and '\n' not in str(error.value)
