"""The robotics example runs, its demonstrator is worth imitating, its measures tell sides and crashes apart."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from helpers import ROOT, run_example

# train_policy.py as a module

@pytest.fixture
def policy(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'examples'))
    import train_policy
    return train_policy

def test_quick(tmp_path):
    text = run_example('train_policy.py', '--quick', '--results-folder', tmp_path)
    assert (tmp_path / 'policy.md').read_text() in text and text.count('\n| ') == 7
    assert Image.open(tmp_path / 'policy.png').width > 500

    results = json.loads((tmp_path / 'metrics.json').read_text())['results']
    assert results['demonstrator'][0]['success'] == 1
    assert results['drifting'][0]['evaluations_per_action'] == 1 / 8
    assert results['flow matching, 100 steps'][0]['evaluations_per_action'] == 12.5

def test_demonstrations_take_both_sides_of_the_same_scene(policy, rng):
    result = policy.evaluate(lambda n: policy.demonstrator(n, rng), num_scenes = 20, repeats = 12)
    assert result['success'] > 0.98 and result['crashed'] < 0.02
    assert 0.4 < result['left'] < 0.6 and result['both_sides'] > 0.9

def test_straight_ahead_crashes(policy):
    def ahead(obs):
        return torch.nn.functional.normalize(obs[:, :2], dim = -1)[:, None]

    result = policy.evaluate(lambda n: ahead, num_scenes = 20, repeats = 2)
    assert result['crashed'] == 1 and result['success'] == 0 and result['left'] is None

def test_chunks_are_what_followed_the_observation(policy, rng):
    observations, chunks = policy.demonstrate(20, rng)
    assert observations.shape[1:] == (7,) and chunks.shape[1:] == (policy.CHUNK, 2)
    assert len(observations) == len(chunks) > 60

    start = observations[:, 5:].norm(dim = -1) == 0     # not moving yet: the sides differ, the way ahead is the same
    assert start.sum() == 20 and (chunks[start, :8, 0] > 0).all()
    assert chunks[start, :8, 1].mean(dim = 1).abs().min() > 0.1

def test_only_one_method(tmp_path):
    options = ('--quick', '--methods', 'drifting', '--coins', 0)
    run_example('train_policy.py', *options, '--results-folder', tmp_path)
    assert list(json.loads((tmp_path / 'metrics.json').read_text())['results']) == ['demonstrator', 'drifting']

@pytest.mark.parametrize('coins, outcomes', [(3, 8), (0, 1000)])
def test_coins_have_nothing_in_between(policy, rng, coins, outcomes):
    observations, chunks = policy.demonstrate(5, rng)
    model = policy.DriftingPolicy(observations, chunks, coins)
    assert model.noise_shape == (coins or 32,)

    with torch.no_grad():
        drawn = model(torch.randn(1000, *model.noise_shape, generator = rng), observations[:1].expand(1000, -1))

    assert len(drawn.mul(1e4).round().unique(dim = 0)) == outcomes
    assert policy.num_parameters(model) == policy.num_parameters(policy.Policy(observations, chunks))

def test_drifting_learns_both_sides_where_regression_crashes(policy, rng, tmp_path):
    observations, chunks = policy.demonstrate(200, rng)
    settings = SimpleNamespace(
        steps = 300, batch = 256, coins = 4, num_gen = 8, temperatures = (0.05, 0.2, 0.5), learning_rate = 3e-3,
        results_folder = tmp_path
    )

    def result_of(method):
        model, _ = policy.train(method, observations, chunks, settings, seed = 0)
        return policy.evaluate(lambda n: policy.policy_of(model, method), num_scenes = 20, repeats = 10)

    regression, drifting = result_of('regression'), result_of('drifting')
    assert regression['success'] < 0.2
    assert drifting['success'] > regression['success'] + 0.2 and drifting['both_sides'] > 0.3

def test_help_explains_every_option(policy, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['train_policy.py', '--help'])
    with pytest.raises(SystemExit):
        policy.main()

    options = capsys.readouterr().out.split('options:')[1].split('\n  -')[1:]
    assert len(options) > 4 and all(len(option.split()) > 3 for option in options)
