"""The encoder's pretraining: reconstruction, then classification."""

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from drifting_pytorch import LatentMAE, MAETrainer
from drifting_pytorch.drifting import MAESettings
from helpers import raises_one_line, rows, weights

# stripes

def pictures(num = 96):
    """Images of two kinds: vertical and horizontal stripes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % 2
    waves = torch.sin(torch.arange(16) * 0.8 + 6 * torch.rand(num, 1, generator = generator))
    images = torch.where((labels == 0)[:, None, None], waves[:, :, None], waves[:, None, :])
    return TensorDataset(images[:, None], labels)

def small_mae(num_classes):
    return LatentMAE(dim = 8, channels = 1, layers = (1, 1, 1, 1), num_classes = num_classes)

def mae_trainer(folder, **kwargs):
    torch.manual_seed(0)
    model = small_mae(num_classes = 2)
    settings = dict(
        num_train_steps = 60, batch_size = 16, learning_rate = 3e-3, lr_warmup_steps = 5, ema_decay = 0.9,
        log_every = 10, sample_every = 0, save_every = 0, results_folder = folder, cpu = True, progress_bar = False
    )
    return MAETrainer(model, pictures(), **{**settings, **kwargs})

def test_pretraining_learns_to_reconstruct_then_to_classify(tmp_path):
    t = mae_trainer(
        tmp_path, num_train_steps = 80, finetune_steps = 40, cls_weight = 0.5, cls_warmup_steps = 10, sample_every = 80
    )
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
    assert ramp == pytest.approx([0.] * 7 + [0.05, 0.1, 0.1])

    # longer than the training: all of it
    settings = MAESettings(num_train_steps = 10, finetune_steps = 500)
    assert settings.finetune_start == 0

def test_defaults_are_the_release_s():
    settings = MAESettings()
    found = settings.batch_size, settings.learning_rate, settings.lr_warmup_steps, settings.betas, settings.ema_decay
    assert found == (8192, 4e-3, 4_000, (0.9, 0.95), 0.9995)
    assert (settings.weight_decay, settings.cls_weight, settings.cls_warmup_steps) == (0.01, 0.1, 1_000)

def test_another_number_of_steps_moves_the_fine_tuning(tmp_path):
    settings = dict(finetune_steps = 2, save_every = 4)
    mae_trainer(tmp_path, num_train_steps = 4, **settings).train()
    with pytest.raises(ValueError, match = r'cls_weight must be a number in 0 .. 1, got 2.0'):
        mae_trainer(tmp_path / 'other', cls_weight = 2.)
    with pytest.warns(UserWarning, match = 'other settings than it had: finetune_start 2 -> 6'):
        mae_trainer(tmp_path, num_train_steps = 8, resume_from_checkpoint = 'latest', **settings)

def test_pretraining_resumes_exactly(tmp_path):
    straight = mae_trainer(tmp_path / 'a', num_train_steps = 8)
    straight.train()
    mae_trainer(tmp_path / 'b', num_train_steps = 4, save_every = 4).train()
    resumed = mae_trainer(tmp_path / 'b', num_train_steps = 8, resume_from_checkpoint = 'latest')
    assert resumed.step == 4
    resumed.train()
    assert torch.equal(weights(straight), weights(resumed))
    assert rows(tmp_path / 'a')[-1] == rows(tmp_path / 'b')[-1]

def test_fine_tuning_needs_a_classifier(tmp_path):
    settings = dict(batch_size = 16, finetune_steps = 2, results_folder = tmp_path, cpu = True)
    with pytest.raises(ValueError, match = 'finetune_steps needs a classifier: set num_classes'):
        MAETrainer(small_mae(num_classes = None), pictures(), **settings)

def test_a_sample_that_does_not_open_is_named_before_the_first_step(tmp_path):
    """The pictures take it first, without the loader."""
    data = [*pictures()]
    data[3] = data[3][0], 'horizontal'
    settings = dict(batch_size = 16, results_folder = tmp_path, cpu = True, progress_bar = False)
    t = MAETrainer(small_mae(num_classes = 2), data, **settings)
    with raises_one_line("sample 3 of the dataset has the label 'horizontal', expected an integer"):
        t.train()
