"""Frechet distance, precision and recall, and an Evaluation of a trainer's samples."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from drifting_pytorch import ConvGenerator, LatentMAE, Trainer
from drifting_pytorch.metrics import Evaluation, coverage, frechet_distance, inception_features

def gaussians(seed, n, d = 12):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)

@pytest.mark.parametrize('n, m, d', [(400, 300, 12), (50, 80, 1), (10, 300, 12)])      # the last has no full rank
def test_frechet_distance_is_that_of_the_matrix_root(n, m, d):
    from scipy.linalg import sqrtm

    a, b = gaussians(0, n, d), gaussians(1, m, d)
    cov_a, cov_b = (np.cov(t, rowvar = False).reshape(d, d) for t in (a, b))
    root = sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(axis = 0) - b.mean(axis = 0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel = 1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel = 1e-6)

def test_equal_and_disjoint_sets():
    a = gaussians(0, 200)
    assert abs(frechet_distance(a, a)) < 1e-9 * np.trace(np.cov(a, rowvar = False))
    assert frechet_distance(a, a + 3) == pytest.approx(9 * 12)
    assert coverage(a, a) == 1 and coverage(a, a + 1e3) == coverage(a + 1e3, a) == 0

def test_precision_and_recall_of_half_of_the_modes():
    real = np.concatenate((gaussians(0, 100), gaussians(0, 100) + 1e3))
    assert coverage(real[:100], real) == 1 and coverage(real, real[:100]) == 0.5

def means(x):
    return torch.cat((x.mean(dim = (2, 3)), x.std(dim = (2, 3))), dim = 1)

@pytest.mark.parametrize('features', [means, LatentMAE(dim = 8, channels = 1, layers = (1, 1, 1, 1), num_classes = 3)])
def test_evaluation_of_images(features):
    real = torch.rand(40, 1, 32, 32, generator = torch.Generator().manual_seed(0)) * 2 - 1
    evaluation = Evaluation(real, features, batch_size = 7)
    same, other = evaluation.compare(real), evaluation.compare(real / 4 + 0.75)
    assert abs(same['frechet']) < 1e-6 and same['precision'] == same['recall'] == 1
    assert other['frechet'] > 0.1
    pairs = Evaluation(TensorDataset(real, torch.zeros(40)), features)
    assert np.allclose(pairs.real, evaluation.real, atol = 1e-5)

def test_the_network_of_features_is_in_eval_mode():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout(), torch.nn.Flatten())
    real = torch.rand(40, 1, 8, 8)
    evaluation = Evaluation(real, net)
    assert abs(evaluation.compare(real)['frechet']) < 1e-6 and not net.training and net[1].num_batches_tracked == 0

@pytest.mark.parametrize('num_classes', [None, 3])
def test_evaluation_of_a_trainer(tmp_path, num_classes):
    images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 3
    model = ConvGenerator(image_size = 8, channels = 1, num_classes = num_classes, dim = 16)
    evaluation = Evaluation(images, means, labels = labels if num_classes else None, num_samples = 30)
    sizes = dict(num_groups = 2, num_gen = 4, num_pos = 4, push_size = 8)
    trainer = Trainer(
        model, None, TensorDataset(images, labels), results_folder = tmp_path, cpu = True,
        num_train_steps = 1, alpha_range = (1., 1.), **sizes,
        evaluate = evaluation, evaluate_every = 1, keep_best = 'frechet'
    )
    trainer.train()
    found = evaluation(trainer.sample)
    assert found.keys() == {'frechet', 'precision', 'recall'} and found == evaluation(trainer.sample)
    row = json.loads((tmp_path / 'metrics.jsonl').read_text())
    assert [row[f'eval/{name}'] for name in found] == pytest.approx(list(found.values()), rel = 1e-5)

    def sample(labels = None, num_samples = None, **kwargs):
        assert num_samples == 30 if num_classes is None else labels.tolist() == [0] * 11 + [1] * 10 + [2] * 9
        return images

    assert evaluation(sample)['recall'] == 1

def test_errors():
    real = torch.rand(8, 1, 4, 4)
    evaluation = Evaluation(real, means)

    for call, message in (
        (lambda: Evaluation(real[:3], means), r'\[4 or more, d\], .* got \(3, 2\) of 3'),
        (lambda: Evaluation(real, means, labels = torch.arange(16)), '16 labels of 8 real images'),
        (lambda: evaluation.compare(real[:2]), r'4 or more, .* got \(2, 2\) of 2'),
        (lambda: evaluation.compare(real * torch.nan), 'must be finite'),
        (lambda: evaluation.compare((real * 255).byte()), r'torch.uint8: expected numbers in \[-1, 1\]'),
        (lambda: Evaluation(real, lambda x: x), r'got \(8, 1, 4, 4\) of 8'),
        (lambda: Evaluation(real, means, num_samples = 2)(lambda **_: real[:2]), '4 or more'),
    ):
        with pytest.raises(ValueError, match = message):
            call()

def test_inception_is_that_of_torch_fidelity(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_fidelity', None)
    monkeypatch.setitem(sys.modules, 'torch_fidelity.feature_extractor_inceptionv3', None)

    with pytest.raises(ImportError, match = r'drifting-pytorch\[eval\]'):
        inception_features()

    class Fake(nn.Module):
        def __init__(self, name, features, weights):
            super().__init__()
            assert features == ['2048'] and weights == 'file'

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape == (5, 3, 8, 8) and x.min() == 0 and x.max() == 255
            return x.flatten(1).float(),

    fake = type(sys)('torch_fidelity.feature_extractor_inceptionv3')
    fake.FeatureExtractorInceptionV3 = Fake
    monkeypatch.setitem(sys.modules, 'torch_fidelity.feature_extractor_inceptionv3', fake)
    images = torch.linspace(-1, 1, 5 * 64).view(5, 1, 8, 8)
    assert Evaluation(images, inception_features('file')).compare(images)['precision'] == 1
