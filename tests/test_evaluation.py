"""Evaluation while it trains, the best checkpoint, and several averages of the weights."""

import json
import math

import pytest
import torch

from drifting_pytorch import DriftingGenerator, drift_loss
from helpers import (
    DATA,
    averaged_weights,
    checkpoint_names,
    flat_parameters,
    launch,
    picture_generator,
    raises_one_line,
    rows,
    trainer,
    weights,
)

LABELS = torch.arange(3).repeat(20)

def spread(sample):
    samples = sample(LABELS, seed = 0)
    return dict(mean = samples.mean(), spread = samples.std().item())

class Scripted:
    """The numbers of a list, one after the other."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def __call__(self, sample):
        return dict(fid = self.numbers.pop(0))

def evaluated(folder, evaluate = spread, **kwargs):
    return trainer(folder, evaluate = evaluate, **{**dict(evaluate_every = 5, data = DATA, num_pos = 12), **kwargs})

# numbers

def test_numbers_are_logged_at_their_steps(tmp_path):
    t = evaluated(tmp_path, num_train_steps = 12, log_every = 3)
    t.train()
    found = {row['step']: row['eval/spread'] for row in rows(tmp_path) if 'eval/spread' in row}
    assert list(found) == [5, 10, 12]
    assert sorted(row['step'] for row in rows(tmp_path)) == [3, 5, 6, 9, 10, 12]
    assert math.isclose(found[12], spread(t.sample)['spread'], rel_tol = 1e-6)

def test_numbers_of_a_failed_evaluation_are_not_logged_later(tmp_path):
    t = evaluated(tmp_path, lambda sample: dict(other = 77.), keep_best = 'fid', log_every = 3)
    with pytest.raises(ValueError, match = "keep_best is 'fid'"):
        t.train()
    t.evaluate = lambda sample: dict(fid = 1.)
    t.train()
    after = [row for row in rows(tmp_path) if row['step'] > 5]
    assert after[0]['step'] == 6 and after[-1]['eval/fid'] == 1
    assert not any('eval/other' in row for row in after)

def test_samples_without_a_seed_are_those_of_the_step(tmp_path):
    def mean(sample):
        return dict(mean = sample(LABELS).mean())

    for name in ('a', 'b'):
        evaluated(tmp_path / name, mean, num_train_steps = 10).train()
    (first, second), again = ([row['eval/mean'] for row in rows(tmp_path / name)] for name in ('a', 'b'))
    assert [first, second] == again and first != second

def test_it_has_no_effect_on_the_training(tmp_path):
    def thirsty(sample):
        torch.rand(1_000)
        return spread(sample)

    t, plain = evaluated(tmp_path / 'a', thirsty), trainer(tmp_path / 'b', data = DATA, num_pos = 12)
    t.train()
    plain.train()
    assert torch.equal(weights(t), weights(plain))

def train(folder, **kwargs):
    t = evaluated(folder, keep_best = 'spread', ema_decay = (0.9, 0.99), save_every = 4, **kwargs)
    t.train()
    best, = (path for path in (folder / 'checkpoints').glob('best-*'))
    manifest = json.loads((best / 'manifest.json').read_text())
    averages = [flat_parameters(ema.ema_model).tolist() for ema in t.emas.values()]
    return weights(t).tolist(), averages, best.name, manifest['best']

def train_half(folder):
    return train(folder, num_train_steps = 12)

def train_resumed(folder):
    return train(folder, resume_from_checkpoint = 'latest')

@pytest.mark.parametrize('world', [1, 2])
def test_a_resumed_run_finds_the_same_best(tmp_path, world):
    straight = launch(train, world, tmp_path / 'a')
    launch(train_half, world, tmp_path / 'b')
    assert launch(train_resumed, world, tmp_path / 'b') == straight
    evaluations = [[row for row in rows(tmp_path / name) if row['step'] in (5, 10, 15, 20)] for name in 'ab']
    assert evaluations[0] == evaluations[1]

# the best

@pytest.mark.parametrize('keep_best, numbers, best', [
    ('fid', (4., 2., 3., 2.), 10),
    ('max:fid', (4., 2., 3., 2.), 5),
    ('fid', (4., 3., 2., 1.), 20),
])
def test_the_best_checkpoint_stays(tmp_path, keep_best, numbers, best):
    t = evaluated(tmp_path, Scripted(*numbers), keep_best = keep_best, save_every = 10, keep_checkpoints = 1)
    t.train()
    assert checkpoint_names(tmp_path) == [f'best-{best:08d}', 'step-00000020']

    manifest = json.loads((tmp_path / 'checkpoints' / f'best-{best:08d}' / 'manifest.json').read_text())
    value = numbers[best // 5 - 1]
    assert manifest['best'] == dict(value = value, step = best, ema_decay = t.settings.ema_decay)
    settings = dict(data = DATA, num_pos = 12, save_every = 0)
    from_best = trainer(tmp_path, resume_from_checkpoint = tmp_path / 'checkpoints' / f'best-{best:08d}', **settings)
    assert from_best.step == best

def test_a_best_checkpoint_that_is_gone_is_not_the_best(tmp_path):
    """A run that goes on from before it begins to look for another."""
    settings = dict(keep_best = 'fid', save_every = 5)
    evaluated(tmp_path, Scripted(5., 1., 0.5, 9.), **settings).train()
    assert 'best-00000015' in checkpoint_names(tmp_path)

    at = tmp_path / 'checkpoints' / 'step-00000010'
    t = evaluated(tmp_path, Scripted(8., 9.), resume_from_checkpoint = at, **settings)
    assert t.best is None
    t.train()
    assert t.best['step'] == 15 and 'best-00000015' in checkpoint_names(tmp_path)

# several averages

def test_each_average_is_that_of_a_run_of_its_own(tmp_path):
    several = trainer(tmp_path / 'several', ema_decay = (0.9, 0.99), data = DATA, num_pos = 12)
    several.train()
    for i, decay in enumerate((0.9, 0.99)):
        alone = trainer(tmp_path / str(i), ema_decay = decay, data = DATA, num_pos = 12)
        alone.train()
        assert torch.equal(flat_parameters(several.emas[decay].ema_model), averaged_weights(alone))
    assert several.ema is several.emas[0.9]

def test_the_best_average_is_sampled_and_exported(tmp_path):
    t = evaluated(
        tmp_path, Scripted(3., 2., 4., 1., 5., 6.), model = picture_generator(), keep_best = 'fid',
        ema_decay = (0.5, 0.9, 0.99), num_train_steps = 10, data = pictures(), num_pos = 4
    )
    t.train()
    names = [name for name in rows(tmp_path)[-1] if name.startswith('eval/')]
    assert names == ['eval/fid/0.5', 'eval/fid/0.9', 'eval/fid/0.99']
    assert t.best == dict(value = 1., step = 10, ema_decay = 0.5)
    assert t.ema is t.emas[0.5]

    t.save_pretrained(tmp_path / 'model')
    saved = DriftingGenerator.from_pretrained(tmp_path / 'model')
    assert torch.equal(flat_parameters(saved), averaged_weights(t))

def pictures():
    images = torch.rand(60, 1, 8, 8, generator = torch.Generator().manual_seed(0)) * 2 - 1
    return torch.utils.data.TensorDataset(images, torch.arange(60) % 3)

def test_samples_have_an_alpha_of_the_training(tmp_path):
    """Evaluations, pictures and sample take the least unless they are told."""
    seen = []

    class Noted(torch.nn.Linear):
        num_classes, noise_shape = 3, (2,)

        def forward(self, noise, labels, alpha, styles):
            seen.append(alpha.unique().tolist())
            return super().forward(noise)

    data = torch.utils.data.TensorDataset(torch.randn(60, 2), torch.arange(60) % 3)
    t = trainer(
        tmp_path, Noted(2, 2), data, num_train_steps = 2, alpha_range = (2., 3.), num_uncond = 4,
        evaluate = lambda sample: dict(mean = sample([0, 1]).mean()), evaluate_every = 1
    )

    t.train()
    assert [2.] in seen and min(map(min, seen)) == 2.
    seen.clear()
    t.sample([0, 1])
    t.sample([0, 1], alpha = 2.5)
    t.sample([0, 1], alpha = torch.tensor([1., 3.]))
    assert seen == [[2.], [2.5], [1., 3.]]

# refusals

@pytest.mark.parametrize('kwargs, says', [
    (dict(evaluate = None), 'evaluate_every needs evaluate, a function'),
    (dict(evaluate = 'fid'), 'evaluate_every needs evaluate, a function'),
    (dict(keep_best = 'fid', evaluate = None, evaluate_every = 0), 'keep_best needs evaluate_every'),
    (dict(keep_best = 7), 'keep_best must be str | None, got 7'),
    (dict(ema_decay = (0.9, 1.1)), 'ema_decay must be a number in 0 .. 1, got 1.1'),
    (dict(ema_decay = '0.9'), 'ema_decay must be'),
    (dict(ema_decay = ()), 'ema_decay cannot be 0 numbers, got ()'),
])
def test_settings_that_do_not_fit(tmp_path, kwargs, says):
    with raises_one_line(says):
        evaluated(tmp_path, **kwargs)

@pytest.mark.parametrize('evaluate, keep_best, says', [
    (lambda sample: 1., None, 'evaluate must return {name: number}, it returned 1.0'),
    (lambda sample: dict(fid = 'low'), None, "could not convert string to float: 'low'"),
    (lambda sample: dict(fid = 1.), 'kid', "keep_best is 'kid', evaluate returned ['fid']"),
])
def test_what_evaluate_returns(tmp_path, evaluate, keep_best, says):
    with raises_one_line(says):
        evaluated(tmp_path, evaluate, keep_best = keep_best).train()

# after errors, and on resuming otherwise

def test_an_evaluation_that_fails_costs_no_checkpoint(tmp_path):
    t = evaluated(tmp_path, Scripted(1.), num_train_steps = 10, save_every = 10)
    with pytest.raises(IndexError):
        t.train()
    assert checkpoint_names(tmp_path) == ['step-00000010']

def test_what_a_failed_evaluation_found_is_not_the_best(tmp_path):
    t = evaluated(
        tmp_path, Scripted(3., 4., 1.), num_train_steps = 10, save_every = 10, ema_decay = [0.9, 0.5], keep_best = 'fid'
    )

    with pytest.raises(IndexError):
        t.train()                                   # it has no number for the second average of step 10

    assert t.best == dict(value = 3., step = 5, ema_decay = 0.9) and t.ema is t.emas[0.9]
    assert (tmp_path / 'checkpoints' / 'best-00000005').is_dir()

def test_going_back_forgets_a_later_best(tmp_path):
    t = evaluated(tmp_path, Scripted(4., 1., 3.), num_train_steps = 10, save_every = 4, keep_best = 'fid')
    t.train()
    assert t.best['step'] == 10
    t.load(tmp_path / 'checkpoints' / 'step-00000004')
    t.settings.num_train_steps = 5
    t.train()
    assert t.best == dict(value = 3., step = 5, ema_decay = 0.999)
    assert (tmp_path / 'checkpoints' / 'best-00000005').is_dir()

def test_nan_is_not_the_best(tmp_path):
    t = evaluated(tmp_path, Scripted(math.nan, 3., 4., math.inf), keep_best = 'fid')
    t.train()
    assert t.best['value'] == 3. and t.best['step'] == 10

def test_resumed_with_other_settings(tmp_path):
    settings = dict(ema_decay = (0.9, 0.5), save_every = 10, num_train_steps = 10)
    evaluated(tmp_path, Scripted(1., 2., 3., 4.), keep_best = 'fid', **settings).train()
    settings['resume_from_checkpoint'] = 'latest'
    assert evaluated(tmp_path, keep_best = 'max:fid', **settings).best is None
    assert evaluated(tmp_path, keep_best = 'fid', **settings).best['value'] == 1.
    with raises_one_line('the checkpoint has averages of ema_decay = [0.9, 0.5], got [0.5, 0.9]'):
        evaluated(tmp_path, **{**settings, 'ema_decay': (0.5, 0.9)})

def drift(sample):
    """All processes take part in the loss."""
    loss, stats = drift_loss(sample(LABELS, seed = 0)[None], DATA.tensors[0][None])
    return dict(drift = stats.drift_rms[0.2])

def train_with_drift(folder):
    found = []

    def evaluate(sample):
        found.append(drift(sample))
        return found[-1]

    evaluated(folder, evaluate, num_train_steps = 5).train()
    return float(found[-1]['drift'])

def test_the_loss_is_an_evaluation_too(tmp_path):
    a, b = launch(train_with_drift, 2, tmp_path)
    assert a == b > 0
