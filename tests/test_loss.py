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

@pytest.mark.parametrize('shape', [dict(), dict(b = 1, g = 2, p = 1, u = 1, d = 1), dict(b = 3, g = 3, p = 6, u = 4, d = 2), dict(size = 100.), dict(size = 1e-5)])
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
    (lambda: FeatureDriftLoss(raw = False), 'raw = False'),
    (lambda: FeatureDriftLoss('resnet'), 'encoder must be'),
    (lambda: FeatureDriftLoss()(X, X[:1]), 'pos has shape (1, 3, 4) but gen has shape (2, 3, 4)'),
    (lambda: FeatureDriftLoss()(X, X[..., :2]), 'groups and sample shape must be equal'),
    (lambda: FeatureDriftLoss()(X[0], X), 'gen has shape (3, 4)'),
    (lambda: FeatureDriftLoss()(X, X[:, :0]), 'at least one of each'),
    (lambda: FeatureDriftLoss()(X, X, X), 'without alpha'),
    (lambda: FeatureDriftLoss()(X, X, X, torch.tensor([0.5, 1.])), 'alpha must be finite and in 1 .. inf, got 0.5 .. 1.0'),
    (lambda: FeatureDriftLoss()(X, X, X, torch.tensor([float('nan'), 1.])), 'alpha must be'),
    (lambda: FeatureDriftLoss()(X, X, X, torch.ones(3)), 'alpha has shape (3,), expected (2,)'),
    (lambda: FeatureDriftLoss()(X, X, None, torch.full((2,), 2.)), 'alpha must be finite and in 1 .. 1, got 2.0'),
    (lambda: FeatureDriftLoss(lambda x: dict(a = x))(X, X), "feature 'a' has shape"),
])
def test_bad_input_is_one_clear_line(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value) and '\n' not in str(error.value)
