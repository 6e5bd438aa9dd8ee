"""Trained and sampled with a condition that is more than a class: vectors, pictures, dicts of tensors."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from drifting_pytorch import DriftingGenerator, FeatureDriftLoss, SinkhornField, drift_loss
from helpers import (
    averaged_weights,
    awake,
    flat_gradients,
    flat_parameters,
    launch,
    raises_one_line,
    relative,
    rows,
    tiny_generator,
    trainer,
    weights,
)

# rows: a point in the plane near a direction, which is the condition

def directions(num, seed = 0):
    angle = 2 * torch.pi * torch.rand(num, generator = torch.Generator().manual_seed(seed))
    return torch.stack((angle.cos(), angle.sin()), dim = 1)

CONDITIONS = directions(120)
POINTS = CONDITIONS + 0.1 * torch.randn(120, 2, generator = torch.Generator().manual_seed(1))
ROWS = TensorDataset(POINTS, CONDITIONS)

class Net(nn.Module):
    """(noise [b 2], condition [b 2] or {direction, more}, alpha [b]) -> [b 2]"""

    def __init__(self, dropout = 0.1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 32), nn.SiLU(), nn.Dropout(dropout), nn.Linear(32, 2))

    def forward(self, noise, condition, alpha, styles = None):
        if isinstance(condition, dict):
            condition = condition['direction'] + condition['more'].to(noise)
        return self.net(torch.cat((noise, condition, alpha[:, None]), dim = -1))

def rows_trainer(folder, model = None, data = ROWS, **kwargs):
    torch.manual_seed(0)
    return trainer(folder, model or Net(), data, **{**dict(num_pos = 1, num_groups = 6), **kwargs})

class Dicts(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        return POINTS[i], dict(direction = CONDITIONS[i], more = torch.tensor([0, i]))

# a step

@pytest.mark.parametrize('num_pos', [1, 3])
@pytest.mark.parametrize('guided', [False, True])
def test_a_step_is_the_loss_on_its_rows(tmp_path, num_pos, guided):
    points = torch.stack([POINTS + i for i in range(num_pos)], dim = 1)
    data = TensorDataset(POINTS if num_pos == 1 else points, CONDITIONS)
    settings = {} if guided else dict(alpha_range = (1., 1.))
    t = rows_trainer(tmp_path, Net(0.), data, num_pos = num_pos, **settings)
    assert t.sample_shape == (2,)
    assert list(t.queues) == (['unconditional'] if guided else [])
    batches = t.batches()

    if guided:
        t.before_training(batches)

    newest = t.push(batches)
    condition, alpha, pos, uncond = t.draw(newest, 0)
    assert condition.shape == (6, 2) and pos.shape == (6, num_pos, 2)
    places = [(CONDITIONS == row).all(dim = 1).nonzero().item() for row in condition]       # a row and its own samples
    assert torch.equal(pos, points[places])

    weight = None
    if guided:
        assert uncond.shape == (6, 4, 2)
        distance = torch.cdist(uncond.flatten(0, 1), points.flatten(0, 1))
        assert (distance.amin(dim = 1) < 1e-3).all()                                        # real samples of any row
        weight = ((alpha - 1) * 7 / 4)[:, None].expand(-1, 4)
    else:
        assert uncond is None and (alpha == 1).all()

    noise, labels, alpha, styles = t.inputs(condition, alpha, 0)
    flat = [x.repeat_interleave(8, dim = 0) for x in (labels, alpha)]
    gen = t.unwrapped(noise.flatten(0, 1), *flat).unflatten(0, (6, 8))
    loss, _ = drift_loss(gen, pos, uncond, uncond_weight = weight, affinity_floor = 0.)
    expected = torch.autograd.grad(loss.mean(), list(t.unwrapped.parameters()))

    t.push = lambda batches: newest
    t.backward(batches, 0, sync = True)
    assert relative(flat_gradients(t.unwrapped), torch.cat([grad.flatten() for grad in expected])) < 1e-5

def gradient_of_step(folder, chunk = None, **kwargs):
    torch.manual_seed(0)
    t = rows_trainer(folder, Net(0.), group_chunk_size = chunk, alpha_range = (1., 1.), num_groups = 4, **kwargs)
    t.model.train()
    t.backward(t.batches(), 0, sync = True)
    return flat_gradients(t.unwrapped).numpy()

@pytest.mark.parametrize('data', [ROWS, Dicts()])
def test_chunks_have_the_gradient_of_the_whole(tmp_path, data):
    whole = gradient_of_step(tmp_path / 'whole', data = data)
    assert relative(gradient_of_step(tmp_path / 'chunks', 3, data = data), whole) < 1e-5

@pytest.mark.parametrize('world', [2, 4])
def test_processes_share_the_rows(tmp_path, world):
    """Each row meets the noise that it has in one process."""
    whole = gradient_of_step(tmp_path / 'one')
    parts = launch(gradient_of_step, world, tmp_path / 'many')
    assert all(relative(part, whole) < 1e-5 for part in parts)

# a run

def train(folder, num_train_steps = 10, **kwargs):
    t = rows_trainer(folder, num_train_steps = num_train_steps, save_every = 5, **kwargs)
    t.train()
    return weights(t).numpy(), averaged_weights(t).numpy()

def train_resumed(folder):
    return train(folder, resume_from_checkpoint = 'latest')

@pytest.mark.parametrize('world', [1, 2])
def test_a_resumed_run_is_as_if_nothing_had_been(tmp_path, world):
    straight = launch(train, world, tmp_path / 'a')
    launch(train, world, tmp_path / 'b', 5)
    resumed = launch(train_resumed, world, tmp_path / 'b')
    for before, after in zip(straight, resumed, strict = True):
        assert all((a == b).all() for a, b in zip(before, after, strict = True))
    assert rows(tmp_path / 'a')[-1] == rows(tmp_path / 'b')[-1]

def test_transport_and_accumulation(tmp_path):
    loss_fn = FeatureDriftLoss(field = SinkhornField(), temperatures = (0.1,))
    t = rows_trainer(tmp_path, loss_fn = loss_fn, gradient_accumulation_steps = 2, num_train_steps = 3)
    t.train()
    assert t.samples_read >= 3 * 2 * 6

def sliced_wasserstein(a, b, num = 64):
    angle = torch.pi * torch.arange(num) / num
    lines = torch.stack((angle.cos(), angle.sin()))
    a, b = ((t @ lines).sort(dim = 0).values for t in (a, b))
    return (a - b).square().mean().sqrt().item()

def two_modes(condition, generator):
    """Points [n 2] at plus or minus (cos c, sin c), by a coin, of deviation 0.1."""
    side = 2. * torch.randint(2, (len(condition), 1), generator = generator) - 1
    center = torch.cat((condition.cos(), condition.sin()), dim = 1)
    return side * center + 0.1 * torch.randn(len(condition), 2, generator = generator)

class Moving(nn.Module):
    noise_shape = (4,)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
        )

    def forward(self, noise, condition, alpha, styles = None):
        return self.net(torch.cat((noise, condition.cos(), condition.sin()), dim = -1))

def test_modes_follow_a_condition_that_was_never_trained_on(tmp_path):
    """One sample per condition, of which two modes are learned, in between the conditions too."""
    rng = torch.Generator().manual_seed(0)
    condition = 3 * torch.rand(4_000, 1, generator = rng)
    condition = condition[(condition % 0.6 < 0.5).flatten()]                            # with gaps
    t = rows_trainer(
        tmp_path, Moving(), TensorDataset(two_modes(condition, rng), condition),
        loss_fn = FeatureDriftLoss(affinity_floor = 0., temperatures = (0.05, 0.2, 0.5, 1.)),
        num_train_steps = 1_000, num_groups = 32, alpha_range = (1., 1.), learning_rate = 4e-3,
        lr_warmup_steps = 50, lr_decay_start = 300, ema_decay = 0.99
    )
    t.train()
    new = torch.tensor([[0.55], [1.15], [1.75], [2.35]])                                # in the gaps
    samples = t.sample(new, num_samples_each = 1_000, seed = 0)
    assert samples.shape == (4, 1_000, 2)

    for c, found in zip(new, samples, strict = True):
        real = [two_modes(c.expand(1_000, 1), torch.Generator().manual_seed(seed)) for seed in range(6)]
        between_real = np.mean([sliced_wasserstein(a, b) for a, b in zip(real, real[1:], strict = False)])
        assert sliced_wasserstein(found, real[0]) < 2 * between_real

# samples and pictures

def test_samples_of_each_row(tmp_path):
    t = rows_trainer(tmp_path)
    samples = t.sample(CONDITIONS[:3], num_samples_each = 4, seed = 0, alpha = [1., 2., 3.])
    assert samples.shape == (3, 4, 2)
    assert torch.equal(samples, t.sample(CONDITIONS[:3], num_samples_each = 4, seed = 0, alpha = [1., 2., 3.]))
    repeated = CONDITIONS[:3].repeat_interleave(4, dim = 0)
    flat = t.sample(repeated, seed = 0, alpha = torch.tensor([1., 2., 3.]).repeat_interleave(4), batch_size = 5)
    assert relative(flat, samples.flatten(0, 1)) < 1e-6
    assert t.sample(CONDITIONS[:3]).shape == (3, 2)

def test_conditions_of_numpy(tmp_path):
    t = rows_trainer(tmp_path)
    again = t.sample(CONDITIONS[:3].double().numpy(), seed = 0)
    assert torch.equal(again, t.sample(CONDITIONS[:3], seed = 0))

def test_samples_without_a_seed_follow_that_of_torch():
    model, samples = awake(tiny_generator()), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples += [model.sample([0, 1]), model.sample([0, 1])]
    first, second, *again = samples
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, second) and not torch.equal(first, again[2])

    state = torch.get_rng_state()
    model.sample([0, 1], seed = 0)
    assert torch.equal(torch.get_rng_state(), state)

def test_samples_of_each_class():
    model = awake(tiny_generator())
    samples = model.sample([1, 4], num_samples_each = 3, seed = 0)
    assert torch.equal(samples.flatten(0, 1), model.sample([1, 1, 1, 4, 4, 4], seed = 0))

class Pictures(Dataset):
    """Pictures of three classes, with a small version, a vector, and the class as an integer."""

    def __init__(self, with_class = True):
        self.with_class = with_class
        self.images = torch.rand(12, 1, 8, 8, generator = torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self):
        return 12

    def __getitem__(self, i):
        condition = dict(image = self.images[i, :, ::2, ::2], vector = self.images[i].flatten()[:3])
        if self.with_class:
            condition['labels'] = i % 3
        return self.images[i], condition

KINDS = dict(image_size = 8, channels = 1, dim_condition = 3, condition_channels = 1)

@pytest.mark.parametrize('num_classes', [3, None])
def test_a_generator_with_every_kind_of_condition_trains(tmp_path, num_classes):
    model = tiny_generator(**KINDS, num_classes = num_classes)
    data = Pictures(with_class = num_classes is not None)
    t = rows_trainer(tmp_path, model, data, num_train_steps = 2, sample_every = 2, num_gen = 3)
    before = flat_parameters(t.unwrapped)
    t.train()
    assert not torch.equal(flat_parameters(t.unwrapped), before)
    assert (tmp_path / 'samples' / 'step-00000002.png').is_file()
    logged = rows(tmp_path)[-1]
    assert logged['drift/0.05'] > 0 and 'spread' not in logged                  # one positive has no spread

# the generator

def conditions(num = 4):
    rng = torch.Generator().manual_seed(0)
    return dict(
        labels = torch.arange(num) % 5,
        vector = torch.randn(num, 3, generator = rng),
        image = torch.randn(num, 1, 8, 8, generator = rng)
    )

def test_the_output_depends_on_every_kind():
    model = awake(tiny_generator(**KINDS)).eval()
    noise, given = torch.randn(4, 1, 8, 8), conditions()
    styles = model.draw_styles(4)
    first = model(noise, given, 1.5, styles)

    for name, t in given.items():
        other = model(noise, {**given, name: t.roll(1, dims = 0)}, 1.5, styles)
        assert relative(other, first) > 1e-3, name

    with torch.no_grad():
        model.vector_embed.weight.zero_()
        model.vector_embed.bias.zero_()
        model.image_embed.weight.zero_()
        model.image_embed.bias.zero_()
    classes_alone = awake(tiny_generator(image_size = 8, channels = 1)).eval()
    classes_alone.load_state_dict(model.state_dict(), strict = False)
    expected = classes_alone(noise, given['labels'], 1.5, styles)
    assert torch.equal(model(noise, given, 1.5, styles), expected)

@pytest.mark.parametrize('name', ['vector', 'image'])
def test_the_only_condition_needs_no_name(name):
    other = dict(vector = 'condition_channels', image = 'dim_condition')[name]
    kinds = {**KINDS, 'num_classes': None, other: None}
    model = awake(tiny_generator(**kinds)).eval()
    noise, given = torch.randn(4, 1, 8, 8), conditions()[name]
    styles = model.draw_styles(4)
    assert torch.equal(model(noise, given, 1., styles), model(noise, {name: given}, 1., styles))
    assert model.sample(given, num_samples_each = 2).shape == (4, 2, 1, 8, 8)

def test_pictures_are_resized():
    model = awake(tiny_generator(image_size = 8, channels = 1, num_classes = None, condition_channels = 2)).eval()
    noise, styles = torch.randn(2, 1, 8, 8), model.draw_styles(2)

    def samples(picture):
        return model(noise, picture, 1., styles)

    small = torch.randn(2, 2, 4, 4)
    large = nn.functional.interpolate(small, size = (8, 8), mode = 'bilinear')
    assert relative(samples(small), samples(large)) < 1e-6
    constant = torch.ones(2, 2, 32, 16)
    assert relative(samples(constant), samples(constant[..., :8, :8])) < 1e-5

def test_a_conditional_generator_is_saved(tmp_path):
    model = awake(tiny_generator(**KINDS)).eval()
    model.save_pretrained(tmp_path)
    loaded = DriftingGenerator.from_pretrained(tmp_path)
    noise, styles = torch.randn(4, 1, 8, 8), model.draw_styles(4)
    assert torch.equal(loaded(noise, conditions(), 2., styles), model(noise, conditions(), 2., styles))

def test_without_conditions_nothing_is_added():
    names = tiny_generator().state_dict().keys()
    assert not any('vector' in name or 'condition' in name for name in names)

# refusals

@pytest.mark.parametrize('given, says', [
    (None, 'labels are needed: labels and vector and image'),
    (conditions()['labels'], "got ['labels']"),
    ({**conditions(), 'text': torch.ones(4)}, "'text'"),
    ({**conditions(), 'vector': torch.ones(4, 2)}, 'vector has shape (4, 2), expected (4, 3)'),
    ({**conditions(), 'vector': torch.ones(3, 3)}, 'vector has shape (3, 3), expected (4, 3)'),
    ({**conditions(), 'vector': [1., 2., 3.]}, 'vector must be a tensor, got list'),
    ({**conditions(), 'image': torch.ones(4, 1, 12)}, 'image has shape (4, 1, 12), expected (4, 1, height, width)'),
    ({**conditions(), 'image': torch.ones(4, 3, 8, 8)}, 'image has shape (4, 3, 8, 8), expected (4, 1, height, width)'),
    ({**conditions(), 'image': torch.full((4, 1, 8, 8), torch.nan)}, 'image must be finite'),
    ({**conditions(), 'labels': torch.full((4,), 5)}, 'labels must be finite and in 0 .. 4'),
])
def test_a_condition_that_does_not_fit_is_refused(given, says):
    model = tiny_generator(**KINDS)
    with raises_one_line(says):
        model(torch.randn(4, 1, 8, 8), given)

@pytest.mark.parametrize('asked, says', [
    (dict(labels = CONDITIONS[:2], num_samples = 3), 'pass num_samples, no labels'),
    (dict(labels = dict(a = torch.ones(2, 3), b = torch.ones(3, 3))), 'of equal length'),
    (dict(labels = dict(a = torch.tensor(1.))), 'must be tensors [rows, ...]'),
    (dict(labels = {}), 'must be tensors [rows, ...]'),
    (dict(labels = CONDITIONS[:2], num_samples_each = 0), 'num_samples_each must be a whole number from 1 on'),
    (dict(labels = CONDITIONS[:2], alpha = [1., 1., 1.]), 'alpha has shape (3,), expected a number or (2,)'),
])
def test_samples_of_what_does_not_fit_are_refused(tmp_path, asked, says):
    with raises_one_line(says):
        rows_trainer(tmp_path).sample(**asked)

class Broken(Dicts):
    """The third row is another one."""

    def __init__(self, condition):
        self.condition = condition

    def __getitem__(self, i):
        return (POINTS[2], self.condition) if i == 2 else super().__getitem__(i)

@pytest.mark.parametrize('condition, says', [
    (CONDITIONS[2], 'sample 2 of the dataset has a condition of shape'),
    (dict(direction = CONDITIONS[2]), 'sample 2 of the dataset has a condition of shape'),
    (dict(direction = CONDITIONS[2], more = torch.ones(3)), 'sample 2 of the dataset has a condition of shape'),
    (dict(direction = CONDITIONS[2], more = 'a cat'), 'the condition of sample 2 of the dataset must be numbers'),
    (7, 'sample 2 of the dataset has a condition of shape'),
    (None, 'sample 2 of the dataset has a condition of shape'),
    (dict(direction = CONDITIONS[2] * torch.nan, more = torch.tensor([0, 2])), 'the condition must be finite'),
])
def test_a_row_that_differs_is_named(tmp_path, condition, says):
    t = rows_trainer(tmp_path, data = Broken(condition), alpha_range = (1., 1.))
    with raises_one_line(says):
        t.train()

@pytest.mark.parametrize('kwargs, says', [
    (dict(num_pos = 8), 'set num_pos = 1 where a row has one sample'),
    (dict(model = tiny_generator(num_classes = None)), 'labels must be None'),
    (dict(num_groups = 200), 'the dataset has 120 samples, fewer than the 200 read per step'),
])
def test_settings_that_do_not_fit_rows(tmp_path, kwargs, says):
    with raises_one_line(says):
        rows_trainer(tmp_path, **kwargs).train()

@pytest.mark.parametrize('of_row', [float, np.float32, lambda i: np.array([i, i])])
def test_numbers_are_conditions_too(tmp_path, of_row):
    data = [(point, of_row(i / 120)) for i, point in enumerate(POINTS)]
    t = rows_trainer(tmp_path, data = data)
    _, condition = t.dataset[[(0, 0), (1, 60)]]
    assert t.has_conditions and condition.dtype == torch.float32
    assert condition.flatten()[-1] == 0.5

def test_rows_may_have_more_positives_than_a_queue_of_classes_holds(tmp_path):
    """They come with their row: there is no such queue."""
    rows = TensorDataset(POINTS[:, None].repeat(1, 20, 1), POINTS)
    t = rows_trainer(tmp_path, data = rows, num_pos = 20, class_queue_size = 16, num_train_steps = 1)
    t.train()
    assert t.step == 1 and 'positives' not in t.queues

def test_nan_of_a_row_is_found_before_the_step_also_without_guidance(tmp_path):
    points = POINTS.clone()
    points[7] = float('nan')
    t = rows_trainer(tmp_path, data = TensorDataset(points, points), alpha_range = (1., 1.))
    with raises_one_line('real samples must be finite'):
        t.train()

def test_integers_are_still_labels(tmp_path):
    """Of a model without classes they are ignored, whatever the data have."""
    labels = torch.arange(120)
    t = rows_trainer(tmp_path, data = TensorDataset(POINTS, labels), num_pos = 4)
    assert not t.has_conditions and list(t.queues) == ['positives']
