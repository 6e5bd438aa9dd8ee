"""The generator's training: the loop, its settings, and errors before the first step."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset

from drifting_pytorch import DriftingGenerator, FeatureDriftLoss, SharpField, SinkhornField, Trainer
from drifting_pytorch.drifting import Breakdown
from helpers import (
    CENTERS,
    DATA,
    Net,
    PlainNet,
    X,
    Y,
    averaged_weights,
    checkpoint_names,
    dataset,
    flat_gradients,
    json_lines,
    picture_generator,
    raises_one_line,
    relative,
    rows,
    trainer,
    weights,
)

# what is learned

def samples_and_means(t):
    """200 samples of each class, and the mean of each."""
    labels = torch.arange(3).repeat_interleave(200)
    samples = t.sample(labels, seed = 0).view(3, 200, 2)
    return samples, samples.mean(dim = 1)

def test_training_moves_every_class_to_its_data(tmp_path):
    t = trainer(tmp_path, num_train_steps = 300, ema_decay = 0.9)
    t.train()
    samples, means = samples_and_means(t)
    assert (means - CENTERS).norm(dim = -1).max() < 0.2
    assert 0.03 < samples[0].std(dim = 0).mean() < 0.3                  # data: 0.1

def test_transport_trains_with_a_second_batch(tmp_path):
    loss_fn = FeatureDriftLoss(field = SinkhornField(), temperatures = (0.05,))
    t = trainer(tmp_path, num_train_steps = 200, ema_decay = 0.9, loss_fn = loss_fn, alpha_range = (1., 1.5))
    t.train()
    _, means = samples_and_means(t)
    assert (means - CENTERS).norm(dim = -1).max() < 0.25

def test_a_folder_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    t = trainer('~/run', num_train_steps = 2, save_every = 1)
    t.train()
    assert t.results_folder == tmp_path / 'run'
    resumed = trainer('~/run', num_train_steps = 2, resume_from_checkpoint = '~/run/checkpoints/step-00000001')
    assert resumed.step == 1

    model = picture_generator()
    data = TensorDataset(torch.rand(96, 1, 8, 8) * 2 - 1, torch.arange(96) % 3)
    trainer('~/pictures', model, data, num_train_steps = 1).save_pretrained('~/model')
    assert torch.equal(DriftingGenerator.from_pretrained('~/model').to_patch.weight, model.to_patch.weight)

def test_samples_may_come_alone(tmp_path):
    trained = []

    for i, data in enumerate((TensorDataset(X, Y), TensorDataset(X), [*X])):
        torch.manual_seed(0)
        t = trainer(tmp_path / str(i), Net(num_classes = None), data, num_train_steps = 2)
        t.train()
        trained.append(weights(t))

    assert torch.equal(trained[0], trained[1]) and torch.equal(trained[0], trained[2])

def test_unconditional_training_ignores_labels_and_guidance(tmp_path):
    t = trainer(tmp_path, Net(num_classes = None))
    t.train()
    assert t.num_uncond == 0
    assert t.step == 20
    assert rows(tmp_path)[-1]['alpha/mean'] == 1
    assert t.sample(num_samples = 4, seed = 0).shape == (4, 2)

# what is logged

def test_metrics_tell_the_drift(tmp_path):
    t = trainer(tmp_path)
    t.train()
    log = json_lines(tmp_path / 'metrics.jsonl')
    assert [row['step'] for row in log] == [5, 10, 15, 20]

    for row in log:
        for temperature in (0.02, 0.05, 0.2):
            assert row[f'drift/{temperature}'] == row[f'feature/global/drift_rms/{temperature}'] > 0
        assert row['loss'] == row['feature/global/loss']
        assert row['feature/global/scale'] > 0
        assert 1 <= row['alpha/mean'] <= 4
        assert row['spread'] > 0
        assert row['machine/steps_per_second'] > 0
        assert 'machine/memory_mib' not in row      # of a GPU

    assert [row['learning_rate'] for row in log] == [pytest.approx(1e-2)] * 4
    assert all(0 < row['grad_norm'] < math.inf for row in log)

def test_a_loss_of_ones_own_is_logged_with_what_it_tells(tmp_path):
    drifting = FeatureDriftLoss()

    def loss_fn(gen, pos, uncond, alpha):
        loss, breakdown = drifting(gen, pos, uncond, alpha)
        size = gen.square().mean()
        return loss + 1e-3 * size, Breakdown({'size': size, 'squares': gen ** 2}, breakdown.stats)

    t = trainer(tmp_path, loss_fn = loss_fn, num_train_steps = 5)
    t.train()
    row, = json_lines(tmp_path / 'metrics.jsonl')
    assert row['feature/size/loss'] == pytest.approx(row['feature/squares/loss'], rel = 1e-4)
    assert row['feature/size/loss'] > 0
    assert row['feature/global/scale'] > 0
    assert 'feature/global/loss' not in row

def test_images_of_the_averaged_model(tmp_path):
    data = TensorDataset(torch.rand(96, 1, 8, 8) * 2 - 1, torch.arange(96) % 3)
    t = trainer(tmp_path, picture_generator(), data, num_train_steps = 4, sample_every = 2)
    t.train()
    pictures = sorted((tmp_path / 'samples').iterdir())
    assert [path.name for path in pictures] == ['step-00000002.png', 'step-00000004.png']
    assert Image.open(pictures[0]).size == (10 * 10 * 6, 3 * 10 * 6)    # 3 rows of 10, each 8 + 2 pixels, magnified 6 x

def image_trainer(folder, model = None, **kwargs):
    data = TensorDataset(torch.rand(96, 1, 8, 8) * 2 - 1, torch.arange(96) % 3)
    settings = {**dict(num_train_steps = 4, sample_every = 2), **kwargs}
    return trainer(folder, model or picture_generator(), data, **settings)

class Tracker(GeneralTracker):
    requires_logging_directory = False
    tracker = None

    def __init__(self, name):
        self.name = name
        self.images = []
        super().__init__()

    def store_init_configuration(self, values):
        pass

    def log(self, values, step, **kwargs):
        pass

    def log_images(self, values, step, **kwargs):
        (name, images), = values.items()
        self.images.append((name, images.shape, step, kwargs))

def test_trackers_see_the_pictures(tmp_path):
    trackers = [Tracker(name) for name in ('tensorboard', 'wandb', 'mlflow')]
    t = image_trainer(tmp_path, log_with = trackers)
    t.train()
    shape = 1, 180, 600, 3                          # the files have these sides
    of_tensorboard, of_wandb, of_others = (tracker.images for tracker in trackers)
    assert of_tensorboard == [('samples', shape, step, dict(dataformats = 'NHWC')) for step in (2, 4)]
    assert of_wandb == [('samples', shape, step, {}) for step in (2, 4)]
    assert of_others == []                          # which take no arrays

def test_random_numbers_go_on_after_a_training(tmp_path):
    def drawn(name, seed):
        t = trainer(tmp_path / name, num_train_steps = 2)
        torch.manual_seed(seed)
        t.train()
        return torch.rand(()).item(), random.random(), np.random.rand()

    first, again, other = drawn('a', 1), drawn('b', 1), drawn('c', 2)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict = True))

def test_pictures_from_0_to_1_are_noticed(tmp_path):
    data = TensorDataset(torch.rand(96, 1, 8, 8), torch.arange(96) % 3)
    with pytest.warns(UserWarning, match = r'the first picture has nothing below 0: is it in \[-1, 1\]\?'):
        trainer(tmp_path, picture_generator(), data, num_train_steps = 1, sample_every = 1).train()

@pytest.mark.parametrize('settings', [dict(lr_warmup_steps = 21), dict(ema_decay = 0.96), {}])
def test_too_few_steps_for_the_settings_are_noticed(tmp_path, settings):
    t = trainer(tmp_path, **{**dict(num_train_steps = 20, ema_decay = 0.9), **settings})

    with warnings.catch_warnings(record = True) as caught:
        warnings.simplefilter('always')
        t.train()

    says = ['lr_warmup_steps and ema_decay are for more than 20 steps'] * bool(settings)
    assert [str(each.message) for each in caught if 'ema_decay' in str(each.message)] == says

def test_a_frozen_model_is_refused(tmp_path):
    model = picture_generator()
    FeatureDriftLoss(lambda x: dict(a = model(x)[:, None]))
    with raises_one_line('the model is frozen, as encoders of a loss are'):
        image_trainer(tmp_path, model = model)

@pytest.mark.parametrize('to_image, says', [
    (lambda x: x[:, 0], 'what to_image returns has shape (30, 8, 8), expected (30, channels, height, width)'),
    (lambda x: x[:7], 'what to_image returns has shape (7, 1, 8, 8)'),
    (lambda x: x.expand(-1, 2, -1, -1), 'a picture has 1 or 3 channels, got 2'),
    (lambda x: x.mul(255).byte(), 'a picture must be floating point, got torch.uint8: expected numbers in [0, 1]'),
    (lambda x: x / 0 * 0, 'a picture has non-finite values (nan or inf)'),
    (lambda x: x.numpy(), 'what to_image returns must be a tensor, got ndarray'),
])
def test_what_is_no_picture_is_refused_before_the_first_step(tmp_path, to_image, says):
    t = image_trainer(tmp_path, to_image = to_image)
    with raises_one_line(says):
        t.train()
    assert t.step == 0

def test_pictures_cost_no_checkpoint(tmp_path):
    t = image_trainer(tmp_path, save_every = 2)
    t.to_image = lambda x: x / (t.step < 2)
    with raises_one_line('a picture has non-finite values'):
        t.train()
    assert checkpoint_names(tmp_path) == ['step-00000002']

# the loop

def test_learning_rate_falls_from_the_step_that_was_asked_for(tmp_path):
    t = trainer(tmp_path, lr_decay_start = 10)
    t.train()
    expected = [pytest.approx(1e-2 * min(1, 10 / step) ** 0.5) for step in (5, 10, 15, 20)]
    assert [row['learning_rate'] for row in rows(tmp_path)] == expected

def test_warmup_and_ema_are_the_plain_ones(tmp_path):
    t = trainer(tmp_path, ema_decay = 0.9)
    batches, average, rates = t.batches(), weights(t).clone(), []
    t.before_training(batches)

    for _ in range(6):
        t.train_step(batches)
        average = 0.9 * average + 0.1 * weights(t)                      # from the initial weights, every step
        rates.append(t.optimizer.param_groups[0]['lr'])

    assert relative(averaged_weights(t), average) < 1e-6
    assert np.allclose(rates, [1e-6 + (1e-2 - 1e-6) * min(1, k / 4) for k in range(6)])

def test_draws_depend_on_the_step_alone(tmp_path):
    t = trainer(tmp_path, num_groups = 20)
    t.before_training(t.batches())
    newest = torch.tensor([0] * 4 + [1] * 4 + [2] * 8)

    labels, alpha, pos, uncond = t.draw(newest, 0)
    torch.manual_seed(123)
    again = t.draw(newest, 0)
    for a, b in zip((labels, alpha, pos, uncond), again, strict = True):
        assert a is None or torch.equal(a, b)

    t.step += 1
    assert not torch.equal(alpha, t.draw(newest, 0)[1])

    # classes as often as in the data: 16 of 20 groups are one full turn through the newest labels

    assert (labels.bincount(minlength = 3) >= newest.bincount()).all()

    for label, positives in zip(labels, pos, strict = True):
        assert ((positives - CENTERS[label]).norm(dim = -1) < 0.6).all()

def test_gradient_accumulation_averages_the_micro_steps(tmp_path):
    def accumulating():
        torch.manual_seed(0)
        t = trainer(tmp_path, PlainNet(), gradient_accumulation_steps = 2, max_grad_norm = 1e9)
        batches = t.batches()
        t.before_training(batches)
        return t, batches

    t, batches = accumulating()
    gradients = []

    for micro_step in range(2):
        labels, alpha, pos, uncond = t.draw(t.push(batches), micro_step)
        gen = t.generate(*t.inputs(labels, alpha, micro_step))
        loss, _ = t.loss_fn(gen, pos, uncond, alpha)
        t.unwrapped.zero_grad()
        loss.backward()
        gradients.append(flat_gradients(t.unwrapped))

    t, batches = accumulating()
    norm = t.train_step(batches)[2]
    assert relative(norm, ((gradients[0] + gradients[1]) / 2).norm()) < 1e-5

def test_gradients_of_an_aborted_step_have_no_effect(tmp_path):
    straight, again = trainer(tmp_path / 'a'), trainer(tmp_path / 'b')
    straight.train()
    for p in again.unwrapped.parameters():
        p.grad = torch.full_like(p, math.nan)
    again.train()
    assert torch.equal(weights(again), weights(straight))

def fails_once(fn, at = 6):
    """fn, which raises once, at its call of that number."""
    calls = []

    def call(*args, **kwargs):
        calls.append(0)
        if len(calls) == at:
            raise OSError('once')
        return fn(*args, **kwargs)
    return call

def test_interrupted_while_the_queue_is_filled(tmp_path, monkeypatch):
    t, pushed, push = trainer(tmp_path, num_pos = 16), [], Trainer.push

    def interrupted(self, batches):
        pushed.append(0)
        if len(pushed) == 2:
            self.read(batches)
            raise KeyboardInterrupt
        return push(self, batches)

    monkeypatch.setattr(Trainer, 'push', interrupted)
    with pytest.raises(KeyboardInterrupt):
        t.train()
    monkeypatch.undo()
    assert t.queues['positives'].filled.min() < t.settings.num_pos

    t.train()
    straight = trainer(tmp_path / 'straight', num_pos = 16)
    straight.train()
    assert t.step == 20
    assert torch.equal(weights(t), weights(straight))

def test_a_step_that_failed_halfway_is_not_built_upon(tmp_path):
    t = trainer(tmp_path, loss_fn = fails_once(FeatureDriftLoss(affinity_floor = 0.)))
    with pytest.raises(OSError, match = 'once'):
        t.train()
    with raises_one_line('step 6 failed halfway: make the trainer again, and resume'):
        t.train()

def test_an_error_between_steps_can_be_caught(tmp_path):
    straight, t = trainer(tmp_path / 'a'), trainer(tmp_path / 'b', save_every = 1)
    straight.train()
    t.save = fails_once(t.save)
    with pytest.raises(OSError, match = 'once'):
        t.train()
    t.train()
    assert torch.equal(weights(t), weights(straight))

def test_two_trainers_at_once_do_not_disturb_each_other(tmp_path):
    settings = dict(num_train_steps = 3, gradient_accumulation_steps = 2)
    alone = trainer(tmp_path / 'a', **settings)
    alone.train()
    first = trainer(tmp_path / 'b', **settings)
    trainer(tmp_path / 'c')
    first.train()
    assert torch.equal(weights(alone), weights(first))

# settings

TABLE_8 = dict(
    learning_rate = (2e-4, 4e-4, 4e-4, 2e-4, 4e-4),
    weight_decay = (0.01, 0., 0.01, 0.01, 0.01),
    lr_warmup_steps = (5_000, 10_000, 10_000, 10_000, 10_000),
    num_train_steps = (30_000, 200_000, 200_000, 100_000, 100_000),
    num_groups = (64, 128, 128, 128, 128),
    num_pos = (64, 64, 64, 128, 128),
    num_gen = (64, 64, 64, 64, 64),
    num_uncond = (16, 32, 32, 32, 32),
    alpha_power = (3., 5., 3., 5., 5.),
    no_cfg_frac = (0., 0., 0.5, 0., 0.),
    push_size = (64, 128, 64, 128, 128),
)

def test_presets_are_the_columns_of_table_8(tmp_path):
    """The release's values, read off the table."""
    for column, name in enumerate(('ablation', 'B/2', 'L/2', 'B/16', 'L/16')):
        folder = tmp_path / name.replace('/', '-')
        t = Trainer.from_preset(name, Net(), None, dataset(), results_folder = folder, cpu = True)

        for setting, values in TABLE_8.items():
            assert getattr(t.settings, setting) == values[column], (name, setting)

        assert t.settings.ema_decay == 0.999
        assert t.settings.alpha_range == (1., 4.)
        assert t.settings.max_grad_norm == 2.

    settings = dict(num_groups = 3, results_folder = tmp_path / 'other', cpu = True)
    assert Trainer.from_preset('L/2', Net(), None, dataset(), **settings).settings.num_groups == 3
    with pytest.raises(ValueError, match = "unknown preset 'XL'"):
        Trainer.from_preset('XL', Net(), None, dataset())

def test_compiled_models_are_refused(tmp_path):
    with raises_one_line('pass compile = True, and the model as it was'):
        trainer(tmp_path, torch.compile(Net(), backend = 'eager'))

def test_queue_of_half_precision_elsewhere(tmp_path):
    t = trainer(tmp_path, queue_dtype = torch.float16, queue_device = 'cpu', num_train_steps = 2, save_every = 2)
    t.train()
    _, _, pos, _ = t.draw(torch.tensor([0, 1, 2]), 0)
    assert t.queues['positives'].samples.dtype == torch.float16
    assert pos.dtype == torch.float32

    with pytest.warns(UserWarning, match = r'queue_dtype torch.float16 -> torch.float32'):
        resumed = trainer(tmp_path, queue_dtype = torch.float32, resume_from_checkpoint = 'latest')
    assert resumed.queues['positives'].samples.dtype == torch.float32

def test_pictures_of_another_range_are_refused(tmp_path):
    bytes_of_pictures = torch.arange(256.).view(1, 1, 16, 16).repeat(40, 1, 1, 1)
    with raises_one_line('pictures are not in [-1, 1]: scale them, or pass to_image'):
        trainer(tmp_path, data = TensorDataset(bytes_of_pictures, Y[:40]), sample_every = 5).train()

@pytest.mark.parametrize('has_gpu', [False, True])
def test_what_is_passed_in_is_not_changed(tmp_path, monkeypatch, has_gpu):
    """Chunks and compilation are of this training: loss and field may be in another one too."""
    model, field = Net(), SharpField()
    loss_fn = FeatureDriftLoss(field = field)
    before = [dict(vars(module)) for module in (loss_fn, field)]

    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, 'is_available', lambda: has_gpu)       # where the field is compiled too
        t = trainer(tmp_path, model, loss_fn = loss_fn, group_chunk_size = 2, compile = True)

    assert t.loss_fn.group_chunk_size == 2
    assert ('coefficients' in vars(t.loss_fn.drift_loss_kwargs['field'])) == has_gpu

    assert [dict(vars(module)) for module in (loss_fn, field)] == before
    assert loss_fn.group_chunk_size is None
    assert loss_fn.drift_loss_kwargs == dict(field = field)
    assert all(module._compiled_call_impl is None for module in (model, loss_fn, field))

def test_settings_of_another_name_are_refused(tmp_path):
    with pytest.raises(TypeError, match = 'max_skipped_steps'):
        trainer(tmp_path, max_skipped_steps = 1)

@pytest.mark.parametrize('settings, says', [
    (dict(max_grad_norm = 0.), 'max_grad_norm must be a number in 1e-20 .. 1e+20, got 0.0'),
    (dict(max_grad_norm = -1), 'max_grad_norm must be a number in 1e-20 .. 1e+20, got -1'),
    (dict(max_grad_norm = math.nan), 'max_grad_norm must be a number in 1e-20 .. 1e+20, got nan'),
    (dict(ema_decay = 1.1), 'ema_decay must be a number in 0 .. 1, got 1.1'),
    (dict(ema_decay = -0.1), 'ema_decay must be a number in 0 .. 1, got -0.1'),
    (dict(lr_warmup_steps = -1), 'lr_warmup_steps must be a number in 0 .. 1e+20, got -1'),
    (dict(lr_warmup_steps = math.inf), 'lr_warmup_steps must be int, got inf'),
    (dict(lr_decay_start = 2.5), 'lr_decay_start must be int | None, got 2.5'),
    (dict(num_train_steps = 10.5), 'num_train_steps must be int, got 10.5'),
    (dict(num_groups = '6'), "num_groups must be int, got '6'"),
    (dict(queue_dtype = torch.int32), 'queue_dtype must be floating point, got torch.int32'),
    (dict(learning_rate = math.nan), 'learning_rate must be a number in 0 .. 1e+20, got nan'),
    (dict(learning_rate = None), 'learning_rate must be float | int, got None'),
    (dict(weight_decay = math.inf), 'weight_decay must be a number in 0 .. 1e+20, got inf'),
    (dict(num_train_steps = np.float64(10.)), 'num_train_steps must be int, got 10.0'),
    (dict(num_groups = np.int64(0)), 'num_groups must be a number in 1 .. 1e+20, got 0'),
    (dict(mixed_precision = 'fp16'), 'mixed_precision = fp16 is not supported: use bf16'),
])
def test_settings_that_ruin_a_training_are_refused(tmp_path, settings, says):
    with raises_one_line(says):
        trainer(tmp_path, **settings)

def test_numbers_of_numpy_are_numbers(tmp_path):
    """And the same ones in a manifest: a resumed run is not told of a change."""
    numbers = dict(num_groups = np.int64(6), learning_rate = np.float32(0.5), ema_decay = np.float64(0.9))
    t = trainer(tmp_path, num_train_steps = np.int32(2), save_every = 2, **numbers)
    assert [type(getattr(t.settings, name)) for name in numbers] == [int, float, float]
    t.train()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plain = dict(num_groups = 6, learning_rate = 0.5, ema_decay = 0.9)
        trainer(tmp_path, resume_from_checkpoint = 'latest', **plain)

def test_precision_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'fp16')
    with raises_one_line('mixed_precision = fp16 is not supported: use bf16'):
        trainer(tmp_path)

def test_no_clipping(tmp_path):
    t = trainer(tmp_path, max_grad_norm = None, num_train_steps = 2)
    t.train()
    assert weights(t).isfinite().all()

def test_half_precision(tmp_path):
    t = trainer(tmp_path, mixed_precision = 'bf16', num_train_steps = 3)
    t.train()
    assert weights(t).isfinite().all()
    assert weights(t).dtype == torch.float32

# errors

class Wrong(Net):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)[:, :1]

class Returning(Net):
    def __init__(self, changed):
        super().__init__()
        self.changed = changed

    def forward(self, *args, **kwargs):
        return self.changed(super().forward(*args, **kwargs))

class Endless(IterableDataset):
    def __iter__(self):
        return iter(DATA)

    def __len__(self):
        return 120

NOTHING = Breakdown({}, {})

ONE_NAN = X.index_fill(0, torch.tensor(3), float('nan'))
ONE_LONGER = [(torch.zeros(2 + (i == 7)), 0) for i in range(20)]

@pytest.mark.parametrize('kwargs, says', [
    (dict(data = TensorDataset(X[:10], Y[:10])), 'the dataset has 10 samples, fewer than the 16 read per step'),
    (
        dict(data = TensorDataset(X.long(), Y)),
        'sample 0 of the dataset must be floating point, got torch.int64: convert it with .float()'
    ),
    (dict(data = [(0., 0)] * 20), 'sample 0 of the dataset must be a tensor, got float'),
    (dict(data = TensorDataset(X, Y + 1)), 'labels must be finite and in 0 .. 2'),
    (
        dict(data = TensorDataset(X, Y.clamp(max = 1))),
        'one pass over the data left 1 classes with fewer than num_pos = 8 samples (class: samples): {2: 0}.'
    ),
    (dict(data = TensorDataset(ONE_NAN, Y)), 'real samples must be finite'),
    (dict(num_pos = 20), 'does not fit into class_queue_size = 16'),
    (dict(num_uncond = 50), 'unconditional samples (dataset, uncond_queue_size), got num_uncond = 50'),
    (dict(data = TensorDataset(X)), 'sample 0 of the dataset must be (sample, label), got tuple'),
    (dict(data = [*X]), 'sample 0 of the dataset must be (sample, label), got Tensor'),
    (dict(betas = (0.9,)), 'betas cannot be 1 numbers, got (0.9,)'),
    (dict(betas = ('a', 1.)), "betas must be a number in 0 .. 1, got 'a'"),
    (dict(alpha_range = (1., 2., 3.)), 'alpha_range cannot be 3 numbers, got (1.0, 2.0, 3.0)'),
    (dict(alpha_range = (1., None)), 'alpha_range must be a number in 0 .. 1e+20, got None'),
    (dict(num_uncond = 0), 'unconditional samples (dataset, uncond_queue_size), got num_uncond = 0'),
    (dict(no_cfg_frac = 2.), 'no_cfg_frac must be a number in 0 .. 1, got 2.0'),
    (dict(num_groups = 0), 'num_groups must be a number in 1 .. 1e+20, got 0'),
    (dict(num_gen = 1), 'num_gen must be a number in 2 .. 1e+20, got 1'),
    (dict(data = iter([])), 'the dataset must be map-style and not empty, got list_iterator'),
    (
        dict(data = ONE_LONGER, model = Net(num_classes = None)),
        'sample 7 of the dataset has shape (3,), expected (2,) like the first one'
    ),
    (dict(loss_fn = lambda gen, *_: gen.mean()), 'loss_fn must return (loss, Breakdown)'),
    (dict(alpha_range = (0.5, 2.)), 'alpha_range must be'),
    (dict(model = Wrong()), 'what the generator returns has shape (48, 1), expected (48, 2) like the dataset'),
    (dict(model = Returning(lambda x: (x, x))), 'what the generator returns must be a tensor, got tuple'),
    (dict(model = Returning(torch.detach)), 'the loss has no gradient'),
    (dict(data = Endless()), 'the dataset must be map-style and not empty, got Endless'),
    (dict(data = [(x, 'a cat') for x in X]), "sample 0 of the dataset has the label 'a cat', expected an integer"),
    (dict(data = [(x, None) for x in X]), 'sample 0 of the dataset has the label None, expected an integer'),
    (dict(data = TensorDataset(X, Y + 0.5)), 'has the label tensor(0.5000), expected an integer'),
    (dict(model = Net(None), data = [(x, [0.1, 0.2]) for x in X]), 'expected an integer, or tensors as a condition'),
    (dict(alpha_power = -1000.), 'alpha_power must be a number in -9 .. 9'),
    (dict(seed = 2 ** 64), 'seed must be a number in 0 .. 9223372036854775808'),
    (dict(data = [(x.numpy(), 0) for x in X]), 'sample 0 of the dataset must be a tensor, got ndarray'),
    (dict(data = [(x.byte(), 0) for x in X]), 'sample 0 of the dataset must be floating point, got torch.uint8'),
    (dict(data = ONE_LONGER, num_workers = 1, alpha_range = (1., 1.)), 'sample 7 of the dataset has shape (3,)'),
    (dict(loss_fn = FeatureDriftLoss), 'loss_fn must be a function or an instance as FeatureDriftLoss(), got <class'),
    (dict(loss_fn = lambda gen, *_: (gen.mean(dim = (1, 2)), NOTHING)), 'the loss has shape (6,), expected ()'),
    (dict(loss_fn = lambda *_: (1., NOTHING)), 'the loss must be a tensor, got float'),
    (dict(loss_fn = lambda gen, *_: (gen.mean().detach(), NOTHING)), 'the loss has no gradient'),
])
def test_trainer_errors_come_before_the_first_step(tmp_path, kwargs, says):
    with raises_one_line(says):
        trainer(tmp_path, **kwargs).train()
