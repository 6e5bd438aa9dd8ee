"""What macOS and Windows do otherwise, as far as Linux can show it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drifting_pytorch import drifting
from drifting_pytorch.metrics import Evaluation
from helpers import checkpoint_names, json_lines, trainer

def test_lines_of_windows_are_resumed(tmp_path, monkeypatch):
    """Where a file in text mode ends its lines otherwise, the log of before is not lost."""
    def opened(path, mode = 'r', newline = None):
        return open(path, mode, newline = '\r\n' if newline is None and 'b' not in mode else newline)

    monkeypatch.setattr(drifting, 'open', opened, raising = False)
    trainer(tmp_path, num_train_steps = 4, save_every = 4, log_every = 1).train()
    trainer(tmp_path, num_train_steps = 6, log_every = 1, resume_from_checkpoint = 'latest').train()
    assert [row['step'] for row in json_lines(tmp_path / 'metrics.jsonl')] == [1, 2, 3, 4, 5, 6]

MAPS = Path('/proc/self/maps')

@pytest.mark.skipif(not MAPS.exists(), reason = 'no list of mapped files')
def test_a_resumed_run_does_not_hold_its_checkpoint(tmp_path):
    """Windows refuses to remove a file that is mapped."""
    trainer(tmp_path, num_train_steps = 4, save_every = 4).train()
    again = trainer(tmp_path, resume_from_checkpoint = 'latest')
    assert again.step == 4
    assert str(tmp_path) not in MAPS.read_text()

class OnMPS(torch.Tensor):
    """It has no float64 there."""

    def double(self):
        raise TypeError('Cannot convert a MPS Tensor to float64 dtype')

    def cpu(self):
        return self.as_subclass(torch.Tensor)

def test_evaluation_has_doubles_on_the_cpu_alone():
    images = torch.rand(8, 1, 4, 4)
    evaluation = Evaluation(images, lambda x: x.flatten(1).as_subclass(OnMPS))
    assert abs(evaluation.compare(images)['frechet']) < 1e-6

def test_dropout_is_seeded_on_any_device(tmp_path, monkeypatch):
    t, seeds = trainer(tmp_path), []
    monkeypatch.setattr(torch.mps, 'manual_seed', seeds.append)
    t.device = torch.device('mps')
    t.seed_model()
    t.seed_model('chunk')
    t.seed_model()
    assert seeds[0] == seeds[2] != seeds[1]

def test_random_numbers_of_any_device_go_on_after_a_training(tmp_path, monkeypatch):
    t, seeds = trainer(tmp_path, num_train_steps = 1), []
    monkeypatch.setattr(torch, 'manual_seed', seeds.append)         # of all devices
    t.train()
    t.train()
    assert len(set(seeds)) == 2

SCRIPT = '''
import torch
from torch.utils.data import TensorDataset
from drifting_pytorch import ConvGenerator, LatentMAE, MAETrainer, Trainer

torch.multiprocessing.set_start_method('spawn', force = True)
data = TensorDataset(torch.rand(64, 1, 8, 8) * 2 - 1, torch.arange(64) % 3)
settings = dict(num_train_steps = 2, num_workers = 1, progress_bar = False, overwrite = True)

def train():
    mae = LatentMAE(dim = 8, channels = 1, layers = (1, 1, 1, 1), num_classes = None)
    MAETrainer(mae, data, batch_size = 8, results_folder = 'mae', **{**settings, 'num_workers': 0}).train()
    model = ConvGenerator(image_size = 8, channels = 1, num_classes = 3, dim = 16)
    groups = dict(num_groups = 2, num_gen = 4, num_pos = 4, push_size = 8, num_uncond = 4)
    Trainer(model, None, data, results_folder = 'generator', **groups, **settings).train()
    print('trained')

GUARDtrain()
'''

@pytest.mark.parametrize('guard', ['', "if __name__ == '__main__':\n    "])
def test_a_worker_that_runs_the_script_again_removes_nothing(tmp_path, guard):
    """Where processes are not forked, workers import the script that made them."""
    (tmp_path / 'script.py').write_text(SCRIPT.replace('GUARD', guard))
    script = [sys.executable, 'script.py']
    result = subprocess.run(script, cwd = tmp_path, capture_output = True, text = True, timeout = 300)
    if guard:
        assert result.returncode == 0 and 'trained' in result.stdout, result.stderr[-2000:]
    else:
        assert result.returncode != 0
        assert "num_workers needs a script under if __name__ == '__main__'" in result.stderr
    assert checkpoint_names(tmp_path / 'mae') == ['step-00000002']
