"""Checkpoints, exact resume, and what is exported."""

import json
import random
import re
import warnings

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from drifting_pytorch import DriftField, DriftingGenerator, FeatureDriftLoss
from drifting_pytorch.drifting import Breakdown
from helpers import (
    Net,
    X,
    Y,
    checkpoint_names,
    dataset,
    json_lines,
    picture_generator,
    rows,
    trainer,
    weights,
)

# exact resume

def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

def test_resume_is_exact(tmp_path):
    straight = trainer(tmp_path / 'a')
    straight.train()

    trainer(tmp_path / 'b', num_train_steps = 12, save_every = 6).train()
    resumed = trainer(tmp_path / 'b', resume_from_checkpoint = 'latest')
    assert resumed.step == 12
    resumed.train()

    assert torch.equal(weights(straight), weights(resumed))
    assert same_state(straight.ema.ema_model, resumed.ema.ema_model)
    for name in straight.queues:
        assert same_state(straight.queues[name], resumed.queues[name]), name

    assert rows(tmp_path / 'a')[-1] == rows(tmp_path / 'b')[-1]

class Augmented(Dataset):
    """Labels of an odd type, and augmentations from three libraries' random states."""

    def __len__(self):
        return 240

    def __getitem__(self, i):
        noise = torch.randn(2) + random.random() + np.random.rand()
        return (X[i] + 0.01 * noise).double(), np.uint8(Y[i])

def test_resume_is_exact_with_augmentations_and_workers(tmp_path):
    torch.rand(3)
    straight = trainer(tmp_path / 'a', data = Augmented(), num_train_steps = 12)
    straight.train()

    trainer(tmp_path / 'b', data = Augmented(), num_train_steps = 6, save_every = 6, num_workers = 2).train()
    resumed = trainer(
        tmp_path / 'b', data = Augmented(), num_train_steps = 12, num_workers = 2, resume_from_checkpoint = 'latest'
    )
    resumed.train()
    assert torch.equal(weights(straight), weights(resumed))

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

def test_resume_with_the_model_that_was_trained(tmp_path):
    straight = trainer(tmp_path / 'a')
    straight.train()
    first = trainer(tmp_path / 'b', num_train_steps = 10, save_every = 10)
    first.train()
    resumed = trainer(tmp_path / 'b', first.unwrapped, resume_from_checkpoint = 'latest')
    resumed.train()
    assert torch.equal(weights(resumed), weights(straight))

class Skipping(Net):
    """Draws from python and numpy, and notes what."""

    def forward(self, *args, **kwargs):
        self.drawn = random.random(), np.random.rand()
        return super().forward(*args, **kwargs) * sum(self.drawn)

def test_random_numbers_of_a_model_are_those_of_its_place(tmp_path):
    def new():
        torch.manual_seed(0)
        return Skipping()

    straight = trainer(tmp_path / 'a', new(), num_train_steps = 4)
    straight.train()
    trainer(tmp_path / 'b', new(), num_train_steps = 2, save_every = 2, num_workers = 1).train()
    resumed = trainer(tmp_path / 'b', new(), num_train_steps = 4, resume_from_checkpoint = 'latest')
    resumed.train()
    assert torch.equal(weights(resumed), weights(straight))

def test_both_passes_of_a_chunk_draw_the_same(tmp_path):
    model, drawn = Skipping(), []
    model.register_forward_hook(lambda module, *_: drawn.append(module.drawn))
    trainer(tmp_path, model, num_train_steps = 1, group_chunk_size = 3).train()
    assert len(drawn) == 4 and drawn[:2] == drawn[2:] and drawn[0] != drawn[1]

# the folder of a run

def logged_steps(folder):
    return [row['step'] for row in json_lines(folder / 'metrics.jsonl')]

def test_a_relative_folder_is_that_of_the_start(tmp_path, monkeypatch):
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path)
    t = trainer('run', num_train_steps = 2, save_every = 2)
    monkeypatch.chdir('elsewhere')
    t.train()
    assert checkpoint_names(tmp_path / 'run') == ['step-00000002'] and not any((tmp_path / 'elsewhere').iterdir())

def test_another_precision_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    trainer(tmp_path, num_train_steps = 2, save_every = 2).train()
    AcceleratorState._reset_state(reset_partial_state = True)           # as in a process of its own
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'no')
    with pytest.warns(UserWarning, match = 'other settings than it had: mixed_precision bf16 -> no$'):
        trainer(tmp_path, resume_from_checkpoint = 'latest')

def test_checkpoints(tmp_path):
    trainer(tmp_path, num_train_steps = 10, save_every = 2, keep_checkpoints = 2, log_every = 4).train()
    checkpoints = tmp_path / 'checkpoints'
    assert checkpoint_names(tmp_path) == ['step-00000008', 'step-00000010']

    # the averaged weights are plain safetensors of the module

    Net().load_state_dict(load_file(checkpoints / 'step-00000010' / 'ema.safetensors'))

    with pytest.raises(ValueError, match = 'has another run than .*checkpoints'):
        trainer(tmp_path, resume_from_checkpoint = checkpoints)
    with pytest.raises(ValueError, match = 'the saved queue has'):
        trainer(tmp_path, class_queue_size = 17, resume_from_checkpoint = 'latest')
    assert trainer(tmp_path / 'empty', resume_from_checkpoint = 'latest').step == 0

    changes = r'other settings than it had: seed 0 -> 1, betas \[0.9, 0.95\] -> \[0.9, 0.99\]$'
    with pytest.warns(UserWarning, match = changes):
        trainer(tmp_path, seed = 1, betas = (0.9, 0.99), log_every = 7, resume_from_checkpoint = 'latest')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        trainer(tmp_path, num_train_steps = 12, log_every = 7, resume_from_checkpoint = 'latest')

    # a run that is resumed from further back logs again what came after

    assert logged_steps(tmp_path) == [4, 8, 10]
    earlier = checkpoints / 'step-00000008'
    trainer(tmp_path, num_train_steps = 10, log_every = 4, resume_from_checkpoint = earlier).train()
    assert logged_steps(tmp_path) == [4, 8, 10]

    # a new run does not mix with an earlier one

    with pytest.raises(ValueError, match = 'holds an earlier run'):
        trainer(tmp_path)
    trainer(tmp_path, num_train_steps = 5, save_every = 5, overwrite = True).train()
    assert logged_steps(tmp_path) == [5]
    assert checkpoint_names(tmp_path) == ['step-00000005']

def test_a_checkpoint_of_one_run_does_not_go_on_in_another(tmp_path):
    """In a folder of its own it does."""
    for name in 'ab':
        trainer(tmp_path / name, num_train_steps = 4, save_every = 2).train()

    checkpoint = tmp_path / 'b' / 'checkpoints' / 'step-00000002'
    for overwrite in (False, True):
        with pytest.raises(ValueError, match = 'has another run than .*step-00000002'):
            trainer(tmp_path / 'a', resume_from_checkpoint = checkpoint, overwrite = overwrite)

    assert checkpoint_names(tmp_path / 'a') == ['step-00000002', 'step-00000004']
    assert trainer(tmp_path / 'c', resume_from_checkpoint = checkpoint).step == 2

def frozen_net():
    model = Net()
    model.embed.requires_grad_(False)
    return model

def total(x):
    return {'sum': x.sum(dim = -1)[:, None, None]}

def plain_loss(gen, *_):
    return gen.square().mean(), Breakdown({}, {})

@pytest.mark.parametrize('kwargs, change', [
    (dict(data = dataset(180)), 'dataset_length 240 -> 180'),
    (dict(model = frozen_net()), "frozen [] -> ['embed.weight']"),
    (
        dict(loss_fn = FeatureDriftLoss(affinity_floor = 0.5)),
        "loss.drift_loss_kwargs {'affinity_floor': 0.0} -> {'affinity_floor': 0.5}"
    ),
    (
        dict(loss_fn = FeatureDriftLoss(affinity_floor = 0., field = DriftField(attraction = 2.))),
        "loss.drift_loss_kwargs {'affinity_floor': 0.0} -> {'affinity_floor': 0.0, 'field': 'DriftField'}, "
        'field.attraction 1.0 -> 2.0'
    ),
    (dict(loss_fn = FeatureDriftLoss(total, affinity_floor = 0.)), "loss.encoders [] -> ['total']"),
    (dict(loss_fn = plain_loss), 'loss.class FeatureDriftLoss -> plain_loss'),
])
def test_what_else_a_run_depends_on_is_warned_of(tmp_path, kwargs, change):
    trainer(tmp_path, num_train_steps = 4, save_every = 2).train()
    with pytest.warns(UserWarning, match = f'other settings than it had: .*{re.escape(change)}'):
        t = trainer(tmp_path, resume_from_checkpoint = 'latest', **kwargs)
    t.train()
    assert t.step == 20

def test_other_arguments_of_the_model_are_warned_of(tmp_path):
    """Those too that no weight tells of."""
    data = TensorDataset(torch.randn(240, 1, 8, 8), torch.arange(240) % 3)
    settings = dict(data = data, num_train_steps = 2, save_every = 2)
    trainer(tmp_path, model = picture_generator(), **settings).train()
    with pytest.warns(UserWarning, match = r'other settings than it had: model.outer_slope 1.0 -> 0.1$'):
        trainer(tmp_path, model = picture_generator(outer_slope = 0.1), **settings, resume_from_checkpoint = 'latest')

def test_guidance_cannot_be_switched_on(tmp_path):
    trainer(tmp_path, num_train_steps = 4, save_every = 2, alpha_range = (1., 1.)).train()
    with pytest.raises(ValueError, match = r'no queue of unconditional samples: set alpha_range = \(1, 1\)'):
        trainer(tmp_path, resume_from_checkpoint = 'latest')

def test_going_back_sets_later_checkpoints_aside(tmp_path):
    trainer(tmp_path, num_train_steps = 8, save_every = 2).train()
    assert checkpoint_names(tmp_path) == ['step-00000004', 'step-00000006', 'step-00000008']

    earlier = tmp_path / 'checkpoints' / 'step-00000004'
    trainer(tmp_path, num_train_steps = 5, save_every = 1, resume_from_checkpoint = earlier).train()
    left = ['left-step-00000006', 'left-step-00000008']
    assert checkpoint_names(tmp_path) == [*left, 'step-00000004', 'step-00000005']
    assert trainer(tmp_path, resume_from_checkpoint = 'latest').step == 5

def test_a_look_at_a_checkpoint_changes_nothing_on_disk(tmp_path):
    trainer(tmp_path, num_train_steps = 8, save_every = 2).train()
    earlier = tmp_path / 'checkpoints' / 'step-00000004'
    before = checkpoint_names(tmp_path), (tmp_path / 'metrics.jsonl').read_bytes()
    t = trainer(tmp_path, num_train_steps = 8, resume_from_checkpoint = earlier)
    assert t.step == 4 and t.sample([0]).isfinite().all()
    assert (checkpoint_names(tmp_path), (tmp_path / 'metrics.jsonl').read_bytes()) == before
    assert trainer(tmp_path, num_train_steps = 8, resume_from_checkpoint = 'latest').step == 8

def test_damaged_checkpoints_do_not_count(tmp_path):
    """Where none is sound the run starts again, and keeps what it saves."""
    trainer(tmp_path, num_train_steps = 8, save_every = 8).train()
    (tmp_path / 'checkpoints' / 'step-00000008' / 'ema.safetensors').write_bytes(b'')

    with pytest.warns(UserWarning, match = 'step-00000008 cannot be used'):
        settings = dict(num_train_steps = 4, save_every = 2, keep_checkpoints = 1)
        again = trainer(tmp_path, resume_from_checkpoint = 'latest', **settings)

    again.train()
    assert checkpoint_names(tmp_path) == ['left-step-00000008', 'step-00000004']

def test_refused_settings_remove_nothing(tmp_path):
    trainer(tmp_path, num_train_steps = 2, save_every = 2).train()
    with pytest.raises(ValueError, match = 'guidance needs 1 to 40 unconditional samples'):
        trainer(tmp_path, overwrite = True, num_uncond = 100)
    assert checkpoint_names(tmp_path) == ['step-00000002']

def test_overwriting_removes_what_a_run_wrote(tmp_path):
    trainer(tmp_path, num_train_steps = 2, save_every = 2).train()
    others = [tmp_path / 'samples', tmp_path / 'checkpoints' / 'step-00000002-best', tmp_path / 'notes']
    for folder in others:
        folder.mkdir()
        (folder / 'kept').touch()

    trainer(tmp_path, overwrite = True)
    assert all((folder / 'kept').exists() for folder in others)
    assert checkpoint_names(tmp_path) == ['step-00000002-best']

# exports

def test_checkpoints_of_a_generator_name_it(tmp_path):
    data = TensorDataset(torch.rand(96, 1, 8, 8) * 2 - 1, torch.arange(96) % 3)
    t = trainer(tmp_path, picture_generator(), data, num_train_steps = 2, save_every = 2)
    t.train()
    checkpoint = tmp_path / 'checkpoints' / 'step-00000002'
    config = json.loads((checkpoint / 'config.json').read_text())
    DriftingGenerator(**config).load_state_dict(load_file(checkpoint / 'ema.safetensors'))

    with pytest.raises(ValueError, match = 'is of a run: resume it, then save_pretrained'):
        DriftingGenerator.from_pretrained(checkpoint)               # its model.safetensors are not the average

    with pytest.raises(ValueError, match = 'save_pretrained is for the models of this package'):
        trainer(tmp_path / 'other').save_pretrained(tmp_path / 'other')

    t.save_pretrained(tmp_path / 'export')
    exported = DriftingGenerator.from_pretrained(tmp_path / 'export')
    assert torch.equal(exported.sample([0, 1], seed = 0), t.sample([0, 1], seed = 0))
