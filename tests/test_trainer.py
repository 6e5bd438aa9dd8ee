import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from drifting_pytorch import DriftField, DriftingGenerator, FeatureDriftLoss, LatentMAE, MAETrainer, SampleQueue, Trainer, drift_loss
from drifting_pytorch.drifting import endless_shuffle, image_grid, sample_alpha

# the queue

def labelled(labels, start = 0):
    """Samples [b 1] that tell when they were pushed, and of which class they are: class + 0.001 * time."""
    labels = torch.tensor(labels)
    return (labels + 0.001 * torch.arange(start, start + len(labels))).unsqueeze(-1), labels

def test_queue_keeps_the_newest_of_each_class(rng):
    queue, unconditional = SampleQueue(3, size = 4), SampleQueue(size = 5)
    time, pushed = 0, []

    for _ in range(20):
        labels = torch.randint(3, (7,), generator = rng).tolist()
        samples, y = labelled(labels, time)
        queue.push(samples, y)
        unconditional.push(samples)
        pushed += samples.flatten().tolist()
        time += len(labels)

    for label in range(3):
        newest = [s for s in pushed if int(s) == label][-4:]
        held = queue.draw(torch.tensor([label]), 4).flatten().tolist()
        assert np.allclose(sorted(held), sorted(newest))

    assert np.allclose(sorted(unconditional.draw(torch.tensor([0]), 5).flatten().tolist()), sorted(pushed[-5:]))

def test_queue_takes_more_than_it_holds_at_once():
    queue = SampleQueue(2, size = 3)
    queue.push(*labelled([0] * 10 + [1] * 2))
    assert np.allclose(sorted(queue.draw(torch.tensor([0]), 3).flatten()), [0.007, 0.008, 0.009])
    assert queue.filled.tolist() == [3, 2]

def test_queue_draws_without_replacement_and_uniformly(rng):
    queue = SampleQueue(2, size = 8)
    queue.push(*labelled([0] * 6 + [1] * 6))

    positives = queue.draw(torch.tensor([0, 1] * 2000), 3, rng).squeeze(-1)
    assert (positives[::2] < 1).all() and (positives[1::2] >= 1).all()           # only its own class
    assert all(len(set(row)) == 3 for row in positives.tolist())

    counts = np.unique(positives[::2].flatten().numpy().round(3), return_counts = True)[1]
    assert len(counts) == 6 and abs(counts / counts.sum() - 1 / 6).max() < 0.02   # 6000 draws, 4 standard deviations

    again = (queue.draw(torch.tensor([0, 1]), 3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(*again)

@pytest.mark.parametrize('call, says', [
    (lambda q: q.draw(torch.tensor([0, 1]), 3), '3 samples were asked for, but these classes hold fewer (class: samples): {1: 2}'),
    (lambda q: q.push(*labelled([2])), 'labels must be finite and in 0 .. 1'),
    (lambda q: q.push(torch.zeros(1, 1)), 'a queue of 2 classes needs labels'),
    (lambda q: q.push(torch.zeros(1, 2), torch.tensor([0])), 'samples of shape (2,)'),
    (lambda q: q.push(torch.full((1, 1), float('nan')), torch.tensor([0])), 'real samples must be finite'),
    (lambda q: q.draw(torch.tensor([4]), 1), 'labels must be finite and in 0 .. 1'),
    (lambda q: SampleQueue(2, size = 5).load_state_dict(q.state_dict()), 'the saved queue'),
])
def test_queue_errors(call, says):
    queue = SampleQueue(2, size = 4)
    queue.push(*labelled([0, 0, 0, 1, 1]))
    with pytest.raises(ValueError) as error:
        call(queue)
    assert says in str(error.value) and '\n' not in str(error.value)

# draws

@pytest.mark.parametrize('power', [0., 1., 3., 5.])
def test_alpha_has_the_density_of_the_paper(rng, power):
    alpha = sample_alpha(20_000, power = power, generator = rng).double().numpy()
    assert alpha.min() >= 1 and alpha.max() <= 4

    # Kolmogorov-Smirnov against the integral of the density, by quadrature

    grid = np.linspace(1, 4, 3001)
    density = grid ** -power
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    expected = np.interp(np.sort(alpha), grid, cumulative / cumulative[-1])
    assert abs(expected - np.arange(len(alpha)) / len(alpha)).max() < 1.95 / math.sqrt(len(alpha))    # p = 0.001

def test_alpha_without_guidance(rng):
    alpha = sample_alpha(10_000, power = 3., no_cfg_frac = 0.3, generator = rng)
    assert abs((alpha == 1).float().mean().item() - 0.3) < 0.02
    assert (sample_alpha(100, low = 1., high = 1., generator = rng) == 1).all()

def test_shuffle_covers_every_epoch_and_starts_anywhere():
    from itertools import islice
    order = list(islice(endless_shuffle(7, seed = 1), 21))
    assert all(sorted(order[i:i + 7]) == list(range(7)) for i in (0, 7, 14)) and order[:7] != order[7:14]
    assert list(islice(endless_shuffle(7, seed = 1, start = 9), 12)) == order[9:]

def test_image_grid():
    images = torch.tensor([0., 0.5, 1., 2.]).view(2, 2, 1, 1, 1)
    picture = np.asarray(image_grid(images, min_size = 1))
    assert picture.shape == (6, 6) and picture[1::3, 1::3].tolist() == [[0, 128], [255, 255]] and (picture[::3] == 255).all()
    assert image_grid(torch.zeros(1, 2, 3, 4, 4), min_size = 8).size == (24, 12)

# the trainer

CENTERS = torch.tensor([[-1., 0.], [1., 0.], [0., 1.]])

def dataset(num = 240):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % 3
    return TensorDataset(CENTERS[labels] + 0.1 * torch.randn(num, 2, generator = generator), labels)

class Net(nn.Module):
    """Any module with the call will do."""

    def __init__(self, num_classes = 3):
        super().__init__()
        self.num_classes = num_classes
        self.embed = nn.Embedding(num_classes or 1, 16)
        self.net = nn.Sequential(nn.Linear(2 + 16 + 1, 32), nn.SiLU(), nn.Dropout(0.1), nn.Linear(32, 2))

    def forward(self, noise, labels = None, alpha = None, styles = None):
        labels = torch.zeros(len(noise), dtype = torch.long) if labels is None else labels
        return self.net(torch.cat((noise, self.embed(labels), alpha[:, None]), dim = -1))

def trainer(folder, model = None, data = None, loss_fn = None, **kwargs):
    torch.manual_seed(0)
    settings = dict(
        num_train_steps = 20, num_groups = 6, num_gen = 8, num_pos = 8, num_uncond = 4, push_size = 16, class_queue_size = 16, uncond_queue_size = 40,
        learning_rate = 1e-2, lr_warmup_steps = 4, log_every = 5, sample_every = 0, save_every = 0, results_folder = folder, cpu = True, progress_bar = False
    )
    return Trainer(model or Net(), loss_fn or FeatureDriftLoss(affinity_floor = 0.), data or dataset(), **{**settings, **kwargs})

def rows(folder):
    """What was logged, without what is of the machine."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith('machine/')} for line in lines]

def weights(t):
    return torch.cat([p.detach().flatten() for p in t.unwrapped.parameters()])

def test_learning_rate_falls_from_the_step_that_was_asked_for(tmp_path):
    t = trainer(tmp_path, lr_decay_start = 10)
    t.train()
    assert [row['learning_rate'] for row in rows(tmp_path)] == [pytest.approx(1e-2 * min(1, 10 / step) ** 0.5) for step in (5, 10, 15, 20)]

def test_training_moves_every_class_to_its_data(tmp_path):
    t = trainer(tmp_path, num_train_steps = 300, ema_decay = 0.9)
    t.train()
    labels = torch.arange(3).repeat_interleave(200)
    samples = t.sample(labels, seed = 0)
    means = torch.stack([samples[labels == i].mean(dim = 0) for i in range(3)])
    assert (means - CENTERS).norm(dim = -1).max() < 0.2
    assert 0.03 < samples[labels == 0].std(dim = 0).mean() < 0.3              # data: 0.1

def test_transport_trains_with_a_second_batch(tmp_path):
    t = trainer(tmp_path, num_train_steps = 200, ema_decay = 0.9, loss_fn = FeatureDriftLoss(field = DriftField(normalize = 'sinkhorn'), temperatures = (0.05,)), alpha_range = (1., 1.5))
    t.train()
    labels = torch.arange(3).repeat_interleave(200)
    samples = t.sample(labels, seed = 0)
    assert (torch.stack([samples[labels == i].mean(dim = 0) for i in range(3)]) - CENTERS).norm(dim = -1).max() < 0.25

def test_metrics_tell_the_drift(tmp_path):
    t = trainer(tmp_path)
    t.train()
    rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [5, 10, 15, 20]
    for row in rows:
        for temperature in (0.02, 0.05, 0.2):
            assert row[f'drift/{temperature}'] == row[f'feature/global/drift_rms/{temperature}'] > 0
        assert row['loss'] == row['feature/global/loss'] and row['feature/global/scale'] > 0 and 1 <= row['alpha/mean'] <= row['alpha/max'] <= 4 and row['spread'] > 0
    assert [row['learning_rate'] for row in rows] == [pytest.approx(1e-2)] * 4
    assert rows[0]['grad_norm'] == pytest.approx(math.hypot(rows[0]['grad_norm/embed'], rows[0]['grad_norm/net']), rel = 1e-5)
    assert all(row['machine/samples_per_second'] > 0 and row['machine/memory_mib'] > 10 for row in rows)

    start, = (json.loads(line) for line in (tmp_path / 'starts.jsonl').read_text().splitlines())
    assert start['config']['num_groups'] == 6 and start['versions']['torch'] == torch.__version__ and start['hardware']['device'] == 'cpu'

def test_warmup_and_ema_are_the_plain_ones(tmp_path):
    t = trainer(tmp_path, ema_decay = 0.9)
    batches, average, rates = t.batches(), weights(t).clone(), []
    t.before_training(batches)

    for _ in range(6):
        t.train_step(batches)
        average = 0.9 * average + 0.1 * weights(t)                               # from the initial weights, every step
        rates.append(t.optimizer.param_groups[0]['lr'])

    assert relative(torch.cat([p.detach().flatten() for p in t.ema.ema_model.parameters()]), average) < 1e-6
    assert np.allclose(rates, [1e-6 + (1e-2 - 1e-6) * min(1, k / 4) for k in range(6)])

def test_draws_depend_on_the_step_alone(tmp_path):
    t = trainer(tmp_path, num_groups = 20)
    t.before_training(t.batches())
    newest = torch.tensor([0] * 4 + [1] * 4 + [2] * 8)

    first = t.draw(newest, 0)
    torch.manual_seed(123)
    assert all(torch.equal(a, b) for a, b in zip(first, t.draw(newest, 0)) if a is not None)
    t.step += 1
    assert not torch.equal(first[1], t.draw(newest, 0)[1])

    # classes as often as in the data: 16 of 20 groups are one full turn through the newest labels

    assert (first[0].bincount(minlength = 3) >= newest.bincount()).all()

    for label, positives in zip(first[0], first[2]):
        assert ((positives - CENTERS[label]).norm(dim = -1) < 0.6).all()

def test_resume_is_exact(tmp_path):
    straight = trainer(tmp_path / 'a')
    straight.train()

    trainer(tmp_path / 'b', num_train_steps = 12, save_every = 6).train()
    resumed = trainer(tmp_path / 'b', resume_from_checkpoint = 'latest')
    assert resumed.step == 12
    resumed.train()

    assert torch.equal(weights(straight), weights(resumed))
    for a, b in ((straight.ema.ema_model.state_dict(), resumed.ema.ema_model.state_dict()), *((straight.queues[name].state_dict(), resumed.queues[name].state_dict()) for name in straight.queues)):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    assert rows(tmp_path / 'a')[-1] == rows(tmp_path / 'b')[-1]

def test_checkpoints(tmp_path):
    trainer(tmp_path, num_train_steps = 10, save_every = 2, keep_checkpoints = 2, log_every = 4).train()
    folders = sorted(path.name for path in (tmp_path / 'checkpoints').iterdir())
    assert folders == ['step-00000008', 'step-00000010']

    # the averaged weights are plain safetensors of the module

    model = Net()
    model.load_state_dict(load_file(tmp_path / 'checkpoints' / 'step-00000010' / 'ema.safetensors'))

    with pytest.raises(ValueError, match = 'checkpoints cannot be used: it is not complete'):
        trainer(tmp_path, resume_from_checkpoint = tmp_path / 'checkpoints')
    with pytest.raises(ValueError, match = 'the saved queue has'):
        trainer(tmp_path, class_queue_size = 17, resume_from_checkpoint = 'latest')
    assert trainer(tmp_path / 'empty', resume_from_checkpoint = 'latest').step == 0

    with pytest.warns(UserWarning, match = r'other settings than it had: seed 0 -> 1, betas \[0.9, 0.95\] -> \[0.9, 0.99\]$'):
        trainer(tmp_path, seed = 1, betas = (0.9, 0.99), log_every = 7, resume_from_checkpoint = 'latest')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        trainer(tmp_path, num_train_steps = 12, log_every = 7, resume_from_checkpoint = 'latest')

    # a run that is resumed from further back logs again what came after

    steps = lambda: [json.loads(line)['step'] for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert steps() == [4, 8, 10]
    trainer(tmp_path, num_train_steps = 10, log_every = 4, resume_from_checkpoint = tmp_path / 'checkpoints' / 'step-00000008').train()
    assert steps() == [4, 8, 10]

    # a new run does not mix with an earlier one

    with pytest.raises(ValueError, match = 'holds an earlier run'):
        trainer(tmp_path)
    trainer(tmp_path, num_train_steps = 5, save_every = 5, overwrite = True).train()
    assert steps() == [5] and [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['step-00000005']

def test_presets_are_the_columns_of_table_8(tmp_path):
    """The release's values, read off the table."""
    expected = {                   # lr, weight decay, warmup, steps, groups, positives, generated, unconditional, power, share of alpha = 1, pushed
        'ablation': (2e-4, 0.01, 5_000, 30_000, 64, 64, 64, 16, 3., 0., 64),
        'B/2': (4e-4, 0., 10_000, 200_000, 128, 64, 64, 32, 5., 0., 128),
        'L/2': (4e-4, 0.01, 10_000, 200_000, 128, 64, 64, 32, 3., 0.5, 64),
        'B/16': (2e-4, 0.01, 10_000, 100_000, 128, 128, 64, 32, 5., 0., 128),
        'L/16': (4e-4, 0.01, 10_000, 100_000, 128, 128, 64, 32, 5., 0., 128),
    }

    for name, values in expected.items():
        t = Trainer.from_preset(name, Net(), None, dataset(), results_folder = tmp_path / name.replace('/', '-'), cpu = True)
        assert (t.learning_rate, t.weight_decay, t.lr_warmup_steps, t.num_train_steps, t.num_groups, t.num_pos, t.num_gen, t.num_uncond, t.alpha_power, t.no_cfg_frac, t.push_size) == values
        assert t.ema_decay == 0.999 and t.alpha_range == (1., 4.) and t.max_grad_norm == 2.

    assert Trainer.from_preset('L/2', Net(), None, dataset(), num_groups = 3, results_folder = tmp_path / 'other', cpu = True).num_groups == 3
    with pytest.raises(ValueError, match = "unknown preset 'XL'"):
        Trainer.from_preset('XL', Net(), None, dataset())

def test_going_back_sets_later_checkpoints_aside(tmp_path):
    trainer(tmp_path, num_train_steps = 8, save_every = 2).train()
    names = lambda: sorted(path.name for path in (tmp_path / 'checkpoints').iterdir())
    assert names() == ['step-00000004', 'step-00000006', 'step-00000008']
    trainer(tmp_path, num_train_steps = 5, save_every = 1, resume_from_checkpoint = tmp_path / 'checkpoints' / 'step-00000004').train()
    assert names() == ['left-step-00000006', 'left-step-00000008', 'step-00000004', 'step-00000005']
    assert trainer(tmp_path, resume_from_checkpoint = 'latest').step == 5

class Unused(Net):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.token = nn.Parameter(torch.ones(2))      # has no part in forward

def test_parameter_without_gradient_is_resumed(tmp_path):
    straight = trainer(tmp_path / 'a', Unused())
    straight.train()
    trainer(tmp_path / 'b', Unused(), num_train_steps = 10, save_every = 10).train()
    resumed = trainer(tmp_path / 'b', Unused(), resume_from_checkpoint = 'latest')
    resumed.train()
    assert torch.equal(weights(resumed), weights(straight))

def test_gradients_of_an_aborted_step_have_no_effect(tmp_path):
    straight, again = trainer(tmp_path / 'a'), trainer(tmp_path / 'b')
    straight.train()
    for p in again.unwrapped.parameters():
        p.grad = torch.full_like(p, math.nan)
    again.train()
    assert torch.equal(weights(again), weights(straight))

def test_interrupted_while_the_queue_is_filled(tmp_path, monkeypatch):
    t, pushed, push = trainer(tmp_path, num_pos = 16), [], Trainer.push

    def interrupted(self, batches):
        pushed.append(0)
        if len(pushed) == 2:
            raise KeyboardInterrupt
        return push(self, batches)

    monkeypatch.setattr(Trainer, 'push', interrupted)
    with pytest.raises(KeyboardInterrupt):
        t.train()
    monkeypatch.undo()
    assert t.queues['positives'].filled.min() < t.num_pos

    t.train()
    assert t.step == 20

def test_queue_of_half_precision_elsewhere(tmp_path):
    t = trainer(tmp_path, queue_dtype = torch.float16, queue_device = 'cpu', num_train_steps = 2)
    t.train()
    assert t.queues['positives'].samples.dtype == torch.float16 and t.draw(torch.tensor([0, 1, 2]), 0)[2].dtype == torch.float32

def test_checkpoints_of_a_generator_name_it(tmp_path):
    data = TensorDataset(torch.rand(96, 1, 8, 8) * 2 - 1, torch.arange(96) % 3)
    model = DriftingGenerator(image_size = 8, channels = 1, patch_size = 4, dim = 16, depth = 1, heads = 2, num_classes = 3, num_register_tokens = 1, num_style_tokens = 2)
    t = trainer(tmp_path, model, data, num_train_steps = 2, save_every = 2)
    t.train()
    config = json.loads((tmp_path / 'checkpoints' / 'step-00000002' / 'config.json').read_text())
    DriftingGenerator(**config).load_state_dict(load_file(tmp_path / 'checkpoints' / 'step-00000002' / 'ema.safetensors'))

    with pytest.raises(ValueError, match = 'save_pretrained is for the models of this package'):
        trainer(tmp_path / 'other').save_pretrained(tmp_path / 'other')

    t.save_pretrained(tmp_path / 'export')
    assert torch.equal(DriftingGenerator.from_pretrained(tmp_path / 'export').sample([0, 1], seed = 0), t.sample([0, 1], seed = 0))

def test_images_of_the_averaged_model(tmp_path):
    data = TensorDataset(torch.rand(96, 1, 8, 8) * 2 - 1, torch.arange(96) % 3)
    model = DriftingGenerator(image_size = 8, channels = 1, patch_size = 4, dim = 16, depth = 1, heads = 2, num_classes = 3, num_register_tokens = 1, num_style_tokens = 2)
    t = trainer(tmp_path, model, data, num_train_steps = 4, sample_every = 2)
    t.train()
    pictures = sorted((tmp_path / 'samples').iterdir())
    assert [path.name for path in pictures] == ['step-00000002.png', 'step-00000004.png']
    assert Image.open(pictures[0]).size == (10 * 10 * 6, 3 * 10 * 6)              # 3 rows of 10, each 8 + 2 pixels, magnified 6 times

def test_gradient_accumulation_averages_the_micro_steps(tmp_path):
    class Plain(Net):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__()
            self.net[2] = nn.Identity()

    gradients = []
    t = trainer(tmp_path, Plain(), gradient_accumulation_steps = 2, max_grad_norm = 1e9)
    batches = t.batches()
    t.before_training(batches)

    for micro_step in range(2):
        labels, alpha, pos, uncond = t.draw(t.push(batches), micro_step)
        loss, _ = t.loss_fn(t.generate(t.model, *t.inputs(labels, alpha, micro_step)), pos, uncond, alpha)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(t.unwrapped.parameters()))]))

    again = trainer(tmp_path, Plain(), gradient_accumulation_steps = 2, max_grad_norm = 1e9)
    batches = again.batches()
    again.before_training(batches)
    norm = again.train_step(batches)[2]['grad_norm']
    assert relative(norm, ((gradients[0] + gradients[1]) / 2).norm()) < 1e-5

def test_unconditional_training_ignores_labels_and_guidance(tmp_path):
    t = trainer(tmp_path, Net(num_classes = None))
    t.train()
    assert t.num_uncond == 0 and t.step == 20
    assert json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])['alpha/mean'] == 1
    assert t.sample(num_samples = 4, seed = 0).shape == (4, 2)

class Augmented(torch.utils.data.Dataset):
    """Labels of an odd type, and augmentations from three libraries' random states."""

    def __len__(self):
        return 240

    def __getitem__(self, i):
        import random
        noise = torch.randn(2) + random.random() + np.random.rand()
        return (X[i] + 0.01 * noise).double(), np.uint8(Y[i])

def test_resume_is_exact_with_augmentations_and_workers(tmp_path):
    torch.rand(3)
    straight = trainer(tmp_path / 'a', data = Augmented(), num_train_steps = 12)
    straight.train()

    trainer(tmp_path / 'b', data = Augmented(), num_train_steps = 6, save_every = 6, num_workers = 2).train()
    resumed = trainer(tmp_path / 'b', data = Augmented(), num_train_steps = 12, num_workers = 2, resume_from_checkpoint = 'latest')
    resumed.train()
    assert torch.equal(weights(straight), weights(resumed))

def test_no_clipping(tmp_path):
    t = trainer(tmp_path, max_grad_norm = None, num_train_steps = 2)
    t.train()
    assert weights(t).isfinite().all()

def test_two_trainers_at_once_do_not_disturb_each_other(tmp_path):
    alone = trainer(tmp_path / 'a', num_train_steps = 3, gradient_accumulation_steps = 2)
    alone.train()
    first = trainer(tmp_path / 'b', num_train_steps = 3, gradient_accumulation_steps = 2)
    trainer(tmp_path / 'c')
    first.train()
    assert torch.equal(weights(alone), weights(first))

def test_two_processes_train_one_model(tmp_path):
    """Each fills a queue of its own, the groups are shared, the loss's statistics are those of all groups."""
    script = tmp_path / 'train.py'
    script.write_text(f"""
import json, os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_trainer import trainer, weights, TensorDataset, X, Y
from drifting_pytorch import drift_loss

t = trainer({str(tmp_path / 'run')!r}, data = TensorDataset(X[:120], Y[:120]), num_train_steps = 6, save_every = 3, num_pos = 12)
t.train()
rank = t.accelerator.process_index

gen, pos = (torch.randn(2, n, 3, generator = torch.Generator().manual_seed(n)) for n in (4, 5))
loss, stats = drift_loss(gen[rank:rank + 1], pos[rank:rank + 1])
resumed = trainer({str(tmp_path / 'run')!r}, data = TensorDataset(X[:120], Y[:120]), num_train_steps = 6, num_pos = 12, resume_from_checkpoint = {str(tmp_path / 'run' / 'checkpoints' / 'step-00000003')!r})
resumed.train()

result = dict(world = t.accelerator.num_processes, weights = weights(t).tolist(), resumed = weights(resumed).tolist(), queue = t.queues['positives'].samples.flatten().tolist(), loss = loss.tolist(), scale = stats.scale.item())
json.dump(result, open({str(tmp_path)!r} + f'/{{rank}}.json', 'w'))
""")
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', '29617', str(script)]
    result = subprocess.run(command, capture_output = True, text = True, timeout = 200, env = {**os.environ, 'OMP_NUM_THREADS': '1'})
    assert result.returncode == 0, result.stderr[-3000:]

    a, b = (json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2))
    assert a['world'] == 2 and a['weights'] == b['weights'] and a['queue'] != b['queue']
    assert a['resumed'] == a['weights'] == b['resumed']

    gen, pos = (torch.randn(2, n, 3, generator = torch.Generator().manual_seed(n)) for n in (4, 5))
    loss, stats = drift_loss(gen, pos)
    assert relative([a['loss'][0], b['loss'][0]], loss) < 1e-5 and relative(a['scale'], stats.scale) < 1e-5

def test_half_precision(tmp_path):
    t = trainer(tmp_path, mixed_precision = 'bf16', num_train_steps = 3)
    t.train()
    assert weights(t).isfinite().all() and weights(t).dtype == torch.float32

# the encoder's trainer

def pictures(num = 96):
    """Images of two kinds: vertical and horizontal stripes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % 2
    waves = torch.sin(torch.arange(16) * 0.8 + 6 * torch.rand(num, 1, generator = generator))
    images = torch.where((labels == 0)[:, None, None], waves[:, :, None], waves[:, None, :])
    return TensorDataset(images[:, None], labels)

def mae_trainer(folder, **kwargs):
    torch.manual_seed(0)
    model = LatentMAE(dim = 8, channels = 1, layers = (1, 1, 1, 1), num_classes = 2)
    settings = dict(num_train_steps = 60, batch_size = 16, learning_rate = 3e-3, lr_warmup_steps = 5, ema_decay = 0.9, log_every = 10, sample_every = 0, save_every = 0, results_folder = folder, cpu = True, progress_bar = False)
    return MAETrainer(model, pictures(), **{**settings, **kwargs})

def test_pretraining_learns_to_reconstruct_then_to_classify(tmp_path):
    t = mae_trainer(tmp_path, num_train_steps = 80, finetune_steps = 40, cls_weight = 0.5, cls_warmup_steps = 10, sample_every = 80)
    t.train()
    log = rows(tmp_path)
    assert log[-1]['reconstruction'] < 0.5 * log[0]['reconstruction']
    assert [row['cls_weight'] for row in log] == pytest.approx([0.] * 4 + [0.5] * 4, abs = 0.06)
    assert sum(row['accuracy'] for row in log[-2:]) / 2 > 0.85
    assert Image.open(tmp_path / 'samples' / 'step-00000080.png').size == (10 * 18 * 3, 3 * 18 * 3)

    features = t.ema.ema_model.features(pictures().tensors[0][:4])
    assert features['layer4_mean'].shape == (4, 1, 64)

def test_lambda_ramps_linearly(tmp_path):
    t = mae_trainer(tmp_path, num_train_steps = 10, finetune_steps = 4, cls_weight = 0.1, cls_warmup_steps = 2)
    ramp = []
    for t.step in range(10):
        ramp.append(t.cls_weight_at(t.step))
    assert ramp == pytest.approx([0.] * 6 + [0.05, 0.1, 0.1, 0.1])

def test_another_number_of_steps_moves_the_fine_tuning(tmp_path):
    mae_trainer(tmp_path, num_train_steps = 4, finetune_steps = 2, save_every = 4).train()
    with pytest.warns(UserWarning, match = 'other settings than it had: finetune_start 2 -> 6'):
        mae_trainer(tmp_path, num_train_steps = 8, finetune_steps = 2, save_every = 4, resume_from_checkpoint = 'latest')

def test_pretraining_resumes_exactly(tmp_path):
    straight = mae_trainer(tmp_path / 'a', num_train_steps = 8)
    straight.train()
    mae_trainer(tmp_path / 'b', num_train_steps = 4, save_every = 4).train()
    resumed = mae_trainer(tmp_path / 'b', num_train_steps = 8, resume_from_checkpoint = 'latest')
    assert resumed.step == 4
    resumed.train()
    assert torch.equal(weights(straight), weights(resumed)) and rows(tmp_path / 'a')[-1] == rows(tmp_path / 'b')[-1]

def test_fine_tuning_needs_a_classifier(tmp_path):
    with pytest.raises(ValueError, match = 'finetune_steps needs a model with a classifier'):
        MAETrainer(LatentMAE(dim = 8, channels = 1, layers = (1, 1, 1, 1), num_classes = None), pictures(), batch_size = 16, finetune_steps = 2, results_folder = tmp_path, cpu = True)

class Wrong(Net):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)[:, :1]

X, Y = dataset().tensors

@pytest.mark.parametrize('kwargs, says', [
    (dict(data = TensorDataset(X[:10], Y[:10])), 'the dataset has 10 samples, fewer than the 16 read per step'),
    (dict(data = TensorDataset(X.long(), Y)), 'the dataset must yield (floating point tensor, label), its first sample is torch.int64'),
    (dict(data = [(0., 0)] * 20), 'its first sample is float'),
    (dict(data = TensorDataset(X, Y + 1)), 'labels must be finite and in 0 .. 2'),
    (dict(data = TensorDataset(X, Y.clamp(max = 1))), 'one pass over the data left 1 classes with fewer than num_pos = 8 samples (class: samples): 2: 0.'),
    (dict(data = TensorDataset(X.index_fill(0, torch.tensor(3), float('nan')), Y)), 'real samples must be finite'),
    (dict(num_pos = 20), 'does not fit into class_queue_size = 16'),
    (dict(num_uncond = 50), 'does not fit into uncond_queue_size = 40'),
    (dict(data = TensorDataset(X)), 'the dataset must yield (floating point tensor, label), its first sample is tuple'),
    (dict(num_uncond = 0), 'guidance needs 1 to 240 (the dataset) unconditional samples, got num_uncond = 0'),
    (dict(no_cfg_frac = 2.), 'no_cfg_frac must be between 0 and 1'),
    (dict(num_groups = 0), 'num_groups must be above 0'),
    (dict(num_gen = 1), 'num_gen must be above 1'),
    (dict(data = iter([])), 'the dataset must be map-style, with a length, got list_iterator'),
    (dict(data = [(torch.zeros(2 + (i == 7)), 0) for i in range(20)], model = Net(num_classes = None)), 'sample 7 of the dataset has shape (3,), the first one has (2,)'),
    (dict(loss_fn = lambda gen, *_: gen.mean()), 'loss_fn must return (loss, Breakdown), it returns Tensor'),
    (dict(alpha_range = (0.5, 2.)), 'alpha_range must be'),
    (dict(model = Wrong()), 'the generator returns samples of shape (1,), those of the dataset have (2,)'),
])
def test_trainer_errors_come_before_the_first_step(tmp_path, kwargs, says):
    with pytest.raises(ValueError) as error:
        trainer(tmp_path, **kwargs).train()
    assert says in str(error.value) and '\n' not in str(error.value)
