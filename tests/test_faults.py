"""What goes wrong in long runs: each fault has its behaviour."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, TensorDataset

from drifting_pytorch import DriftingGenerator, FeatureDriftLoss, LatentMAE, drifting
from helpers import (
    DATA,
    ROOT,
    Net,
    PlainNet,
    Y,
    checkpoint_names,
    launch,
    raises_one_line,
    rows,
    trainer,
    weights,
)

sys.path.append(str(ROOT / 'examples' / 'measure'))

from benchmark import peak_mib

# killed while a checkpoint is written

def short(folder, model = None, **kwargs):
    settings = dict(data = DATA, num_train_steps = 6, num_groups = 3, log_every = 1)
    return trainer(folder, model, **{**settings, **kwargs})

OPERATIONS = [
    (drifting, 'save_file'), (drifting, 'sha256'), (os, 'fsync'),
    (Path, 'write_text'), (Path, 'rename'), (Path, 'mkdir'), (shutil, 'rmtree')
]

def is_unfinished(name):
    return isinstance(name, Path) and name.is_file() and name.parent.name.startswith('unfinished')

def die_in_save(folder, at):
    """Train with a checkpoint after every step, and die at a file operation, half of the file written.

    at: its number, from the third save on.
    """
    t = short(folder, save_every = 1, keep_checkpoints = 2)
    count = 0

    def watched(fn):
        def call(*args, **kwargs):
            nonlocal count
            count += t.step >= 3
            if count == at:
                for name in filter(is_unfinished, args):
                    os.truncate(name, name.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return fn(*args, **kwargs)
        return call

    for owner, name in OPERATIONS:
        setattr(owner, name, watched(getattr(owner, name)))

    t.train()

def resumed(folder):
    """The step that the run went on from, its final weights, and what it said about unusable checkpoints."""
    with warnings.catch_warnings(record = True) as caught:
        warnings.simplefilter('always')
        t = short(folder, resume_from_checkpoint = 'latest')
    messages = [str(warning.message) for warning in caught]
    complaints = [message for message in messages if 'cannot be used' in message]

    start = t.step
    t.train()
    return start, weights(t).numpy(), complaints

@pytest.fixture(scope = 'module')
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp('straight')
    t = short(folder)
    t.train()
    return weights(t).numpy(), rows(folder)

@pytest.mark.parametrize('at', range(1, 41, 2))
def test_killed_while_saving(tmp_path, straight, at):
    assert launch(die_in_save, 1, tmp_path, at) == [-signal.SIGKILL]
    (start, final, complaints), = launch(resumed, 1, tmp_path)
    assert start >= 2                       # nothing is lost but the steps since the last checkpoint
    assert complaints == []
    assert (final == straight[0]).all()
    assert rows(tmp_path) == straight[1]
    assert not list((tmp_path / 'checkpoints').glob('unfinished*'))

# damaged checkpoints

def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

class Malicious:
    def __reduce__(self):
        return os._exit, (42,)

def replace_by_pickle(path):
    path.write_bytes(pickle.dumps(Malicious()))

def vouch_for(path):
    """As if the file had been written so."""
    manifest = json.loads((path.parent / 'manifest.json').read_text())
    manifest['sha256'][path.name] = drifting.sha256(path)
    (path.parent / 'manifest.json').write_text(json.dumps(manifest))

def forge(folder):
    """A pickle in place of the weights, with a manifest that vouches for it."""
    replace_by_pickle(folder / 'model.safetensors')
    vouch_for(folder / 'model.safetensors')

def edit_manifest(folder, **entries):
    path = folder / 'manifest.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

def point_to_a_pipe(folder):
    """Whoever opens it waits for ever."""
    (folder / 'model.safetensors').unlink()
    os.mkfifo(folder / 'model.safetensors')

def manifest_is_a_pipe(folder):
    (folder / 'manifest.json').unlink()
    os.mkfifo(folder / 'manifest.json')

@pytest.mark.parametrize('harm, says', [
    (lambda f: os.truncate(f / 'model.safetensors', 100), 'model.safetensors is not what its manifest says'),
    (lambda f: flip(f / 'optimizer.safetensors'), 'optimizer.safetensors is not what its manifest says'),
    (lambda f: replace_by_pickle(f / 'model.safetensors'), 'model.safetensors is not what its manifest says'),
    (lambda f: (f / 'queue-0.safetensors').unlink(), 'queue-0.safetensors is not what its manifest says'),
    (lambda f: (f / 'manifest.json').unlink(), 'it has no manifest'),
    (lambda f: (f / 'manifest.json').write_text('{"sha256": '), 'it is damaged (JSONDecodeError'),
    (lambda f: (f / 'manifest.json').write_text('{"sha256": {}}'), "it is damaged (KeyError: 'step'"),
    (lambda f: edit_manifest(f, sha256 = {}), "it is damaged (KeyError: 'ema.safetensors'"),
    (lambda f: (f / 'manifest.json').write_text('[' * 10 ** 6), 'it is damaged (RecursionError'),
    (lambda f: edit_manifest(f, step = '4'), "step is '4' in its manifest"),
    (lambda f: os.truncate(f / 'manifest.json', 2 ** 40), 'it has no manifest'),
    (lambda f: edit_manifest(f, config = None), 'config is None in its manifest'),
    (lambda f: edit_manifest(f, samples_read = None), 'samples_read is None in its manifest'),
    (point_to_a_pipe, 'model.safetensors is not what its manifest says'),
    (manifest_is_a_pipe, 'it has no manifest'),
])
def test_damaged_checkpoints(tmp_path, straight, harm, says):
    short(tmp_path, num_train_steps = 4, save_every = 2).train()
    newest = tmp_path / 'checkpoints' / 'step-00000004'
    harm(newest)

    with raises_one_line(says):
        short(tmp_path, resume_from_checkpoint = newest)

    start, final, (complaint,) = resumed(tmp_path)              # the newest that is sound, and it says so
    assert start == 2
    assert says in complaint
    assert (final == straight[0]).all()

def test_forged_checkpoint_runs_no_code(tmp_path):
    short(tmp_path, num_train_steps = 2, save_every = 2).train()
    forge(tmp_path / 'checkpoints' / 'step-00000002')
    with pytest.raises(SafetensorError, match = 'deserializing header'):
        short(tmp_path, resume_from_checkpoint = 'latest')

def shorten(states):
    states['net.0.weight.exp_avg'] = states['net.0.weight.exp_avg'][:1]

def add_one(states):
    states['other.weight.step'] = torch.tensor(1.)

@pytest.mark.parametrize('harm, found', [
    (shorten, "missing ['net.0.weight.exp_avg (32, 19)'], unknown ['net.0.weight.exp_avg (1, 19)']"),
    (lambda states: states.pop('net.0.bias.step'), "missing ['net.0.bias.step ()']"),
    (
        lambda states: [states.pop(f'net.3.bias.{kind}') for kind in ('step', 'exp_avg', 'exp_avg_sq')],
        "missing ['net.3.bias.exp_avg (2,)', 'net.3.bias.exp_avg_sq (2,)', 'net.3.bias.step ()']"
    ),
    (add_one, "unknown ['other.weight.step ()']"),
])
def test_states_of_the_optimizer_that_do_not_fit(tmp_path, harm, found):
    """They would be a segmentation fault of the fused optimizer, or train into nan."""
    short(tmp_path, num_train_steps = 2, save_every = 2).train()
    folder = tmp_path / 'checkpoints' / 'step-00000002'
    states = load_file(folder / 'optimizer.safetensors')
    harm(states)
    save_file({name: t.contiguous() for name, t in states.items()}, folder / 'optimizer.safetensors')
    vouch_for(folder / 'optimizer.safetensors')

    with raises_one_line(found):
        short(tmp_path, resume_from_checkpoint = 'latest')

@pytest.mark.parametrize('rest', [b'{"step": 5, "lo', b'{"step": 1, "\xff": 0}\n'])
def test_metrics_cut_short_by_a_crash(tmp_path, straight, rest):
    short(tmp_path, num_train_steps = 4, save_every = 2).train()
    with open(tmp_path / 'metrics.jsonl', 'ab') as file:
        file.write(rest)
    resumed(tmp_path)
    assert rows(tmp_path) == straight[1]

def train_short(folder):
    short(folder, num_groups = 4, num_train_steps = 2, save_every = 2).train()

def try_to_resume(folder):
    try:
        short(folder, num_groups = 4, resume_from_checkpoint = 'latest')
    except ValueError as error:
        return str(error)

@pytest.mark.parametrize('before, now', [(1, 2), (2, 1)])
def test_another_number_of_processes(tmp_path, before, now):
    """Not as if the checkpoint were damaged, which would start the run again."""
    launch(train_short, before, tmp_path)
    says = f'the checkpoint is of {before} processes, these are {now}'
    assert launch(try_to_resume, now, tmp_path) == [says] * now

# the disk

def with_full_disk(folder):
    """No file may grow above 1,500 bytes: writing fails as on a full disk."""
    t = short(folder, save_every = 2)
    save = t.save

    def save_without_space():
        if t.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
        save()

    t.save = save_without_space

    try:
        t.train()
    except OSError as error:
        return str(error), checkpoint_names(folder)

def test_full_disk(tmp_path, straight):
    (message, folders), = launch(with_full_disk, 1, tmp_path)
    assert 'checkpoint 4 could not be written' in message
    assert folders == ['step-00000002']

    start, final, complaints = resumed(tmp_path)
    assert start == 2
    assert not complaints
    assert (final == straight[0]).all()

def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match = 'run is in use, or not writable: '):
        short(tmp_path / 'file' / 'run')

    if os.geteuid() != 0:       # root may write everywhere
        (tmp_path / 'closed').mkdir(mode = 0o500)
        with pytest.raises(OSError, match = 'cannot be written to: '):
            short(tmp_path / 'closed')

def try_again(folder, **kwargs):
    """What a second run in the folder is told."""
    try:
        short(folder, **kwargs)
    except OSError as error:
        return str(error)

def test_two_runs_in_one_folder(tmp_path):
    """The second is refused before it removes anything; test_killed_while_saving: a dead process holds nothing."""
    t, told = short(tmp_path, save_every = 2), []
    save = t.save

    def save_and_start_again():
        save()
        for kwargs in (dict(overwrite = True), dict(resume_from_checkpoint = 'latest')):
            told.extend(launch(partial(try_again, tmp_path, **kwargs), 1))

    t.save = save_and_start_again
    t.train()
    assert len(told) == 6
    assert all('is in use, or' in message for message in told)
    assert checkpoint_names(tmp_path)[-1] == 'step-00000006'
    short(tmp_path, num_train_steps = 8, resume_from_checkpoint = 'latest').train()

# numbers that are none

class Breaking(Net):
    """Its output is broken at one step, through its gradients alone if `backwards`."""

    def __init__(self, at = 4, backwards = False):
        super().__init__()
        self.at, self.backwards, self.calls = at, backwards, 0

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if not (torch.is_grad_enabled() and self.training):
            return out

        self.calls += 1
        if self.calls != self.at:
            return out
        if self.backwards:
            return out + (0 * out).abs() ** 0.5
        return out + float('nan')

def broken(folder, backwards = False, **kwargs):
    torch.manual_seed(0)
    model = Breaking(backwards = backwards)
    loss_fn = FeatureDriftLoss(lambda x: {'sum': x.sum(dim = -1)[:, None, None]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drifting, 'can_read', lambda t: False)    # as on a GPU, where values are not looked at
        t = short(folder, model, loss_fn = loss_fn, **kwargs)
        t.train()

@pytest.mark.parametrize('backwards, found', [
    (False, 'feature/sum/drift_rms/0.05 is nan'),
    (True, 'what it logs is finite: look at the backward pass'),
])
def test_non_finite_numbers_stop_the_run(tmp_path, backwards, found):
    with pytest.raises(FloatingPointError) as error:
        broken(tmp_path, backwards, save_every = 1)
    message = str(error.value)
    good = tmp_path / 'checkpoints' / 'step-00000003'
    assert message.startswith('step 4: loss ')
    assert found in message
    assert message.endswith(f'the last checkpoint is {good}')

@pytest.mark.parametrize('save_every, found_at, good', [(3, 6, '.*step-00000003'), (0, 8, 'none')])
def test_broken_steps_are_found_without_waiting(tmp_path, save_every, found_at, good):
    """Nothing is read in the step, but before the next checkpoint or the end. Nothing broken is saved."""
    with pytest.raises(FloatingPointError, match = f'step {found_at}: .*the last checkpoint is {good}'):
        broken(tmp_path, num_train_steps = 8, save_every = save_every, log_every = 0)

def test_a_signal_late_in_a_step_saves_too(tmp_path):
    t = short(tmp_path, num_train_steps = 20, save_every = 0, log_every = 1)
    log = t.log

    def log_and_interrupt(*args):
        log(*args)
        if t.step == 7:
            signal.raise_signal(signal.SIGINT)

    t.log = log_and_interrupt
    before = signal.signal(signal.SIGINT, signal.default_int_handler)       # in the background it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            t.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoint_names(tmp_path) == ['step-00000008']

# data

class Unreadable(Dataset):
    """Files, one of which is not an image."""

    def __init__(self, folder):
        self.paths = [folder / f'{i}.png' for i in range(60)]
        for path in self.paths:
            Image.fromarray(np.zeros((4, 4), dtype = np.uint8)).save(path)
        self.paths[30].write_text('not an image')

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = torch.from_numpy(np.array(Image.open(self.paths[i])))
        return image.float().flatten()[:2] / 255, i % 3

@pytest.mark.parametrize('num_workers', [0, 1])
def test_image_that_does_not_open(tmp_path, num_workers):
    t = short(tmp_path / 'run', data = Unreadable(tmp_path), num_workers = num_workers, num_train_steps = 20)
    message = r'sample 30 of the dataset cannot be read: cannot identify image file .*30\.png'
    with pytest.raises(RuntimeError, match = message) as error:
        t.train()
    assert '\n' not in str(error.value)

# signals

def send(t, number, at, process_index = 0):
    """A process sends itself a signal in the step `at`."""
    step = t.train_step

    def train_step(batches):
        if t.step == at and t.accelerator.process_index == process_index:
            os.kill(os.getpid(), number)
        return step(batches)

    t.train_step = train_step

def interrupted(folder, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)       # where tests run in the background it is ignored
    t = short(folder)
    send(t, number, at = 2)

    try:
        t.train()
    except KeyboardInterrupt:
        return 'KeyboardInterrupt'

@pytest.mark.parametrize('number, result', [
    (signal.SIGINT, 'KeyboardInterrupt'),
    (signal.SIGTERM, -signal.SIGTERM),
])
def test_signals_save_before_they_act(tmp_path, straight, number, result):
    assert launch(interrupted, 1, tmp_path, number) == [result]
    assert checkpoint_names(tmp_path) == ['step-00000003']

    start, final, complaints = resumed(tmp_path)
    assert start == 3
    assert not complaints
    assert (final == straight[0]).all()
    assert rows(tmp_path) == straight[1]

def deaf(folder):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    t = short(folder)
    step = t.train_step

    def train_step(batches):
        os.kill(os.getpid(), signal.SIGINT)
        return step(batches)

    t.train_step = train_step
    t.train()
    return t.step

def test_an_ignored_signal_stays_ignored(tmp_path):
    """As in the background of a script."""
    assert launch(deaf, 1, tmp_path) == [6]

def interrupted_together(folder):
    """The signal reaches the second process alone; both stop at the same step, neither as if it had ended."""
    signal.signal(signal.SIGINT, signal.default_int_handler)       # where tests run in the background it is ignored
    t = short(folder, num_train_steps = 40, num_groups = 4)
    send(t, signal.SIGINT, at = 13, process_index = 1)

    try:
        t.train()
    except KeyboardInterrupt:
        return t.step, 'interrupted'
    return t.step, 'ended'

def test_a_signal_to_one_process_stops_all(tmp_path):
    assert launch(interrupted_together, 2, tmp_path) == [(20, 'interrupted')] * 2
    assert checkpoint_names(tmp_path) == ['step-00000020']

WITH_WORKERS = """
import signal, sys
from helpers import Net, trainer

class Breaking(Net):
    def forward(self, *args, **kwargs):
        if t.step == 3:
            print('third step', flush = True)
            if sys.argv[2] == 'raises':
                raise RuntimeError('broken')
        return super().forward(*args, **kwargs)

signal.signal(signal.SIGINT, signal.default_int_handler)
t = trainer(sys.argv[1], Breaking(), num_workers = 2, num_train_steps = 100_000)
t.train()
"""

@pytest.mark.parametrize('kill, number, code', [
    (None, None, 1),
    (os.kill, signal.SIGINT, -signal.SIGINT),
    (os.killpg, signal.SIGINT, -signal.SIGINT),
    (os.kill, signal.SIGTERM, -signal.SIGTERM),
    (os.killpg, signal.SIGTERM, -signal.SIGTERM),
])
def test_a_process_with_workers_ends(tmp_path, kill, number, code):
    """After an exception; after a signal to it alone, and to its workers too, as of a terminal or a scheduler."""
    command = [sys.executable, '-c', WITH_WORKERS, tmp_path, 'trains' if kill else 'raises']
    paths = os.pathsep.join((str(ROOT), str(ROOT / 'tests')))
    options = dict(stdout = subprocess.PIPE, stderr = subprocess.PIPE, start_new_session = True)
    process = subprocess.Popen(command, env = {**os.environ, 'PYTHONPATH': paths}, **options)

    try:
        assert process.stdout.readline() == b'third step\n'
        if kill is not None:
            kill(process.pid, number)
        assert process.wait(timeout = 40) == code, process.stderr.read().decode()[-2000:]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    if kill is not None:
        assert len(checkpoint_names(tmp_path)) == 1

# collapse

def test_collapse_is_told(tmp_path):
    class Constant(PlainNet):
        def forward(self, noise, *args, **kwargs):
            return super().forward(noise * 1e-4, *args, **kwargs)

    message = 'samples of a class spread less than a tenth of real ones, they collapse'
    with pytest.warns(UserWarning, match = message):
        short(tmp_path, Constant()).train()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        short(tmp_path / 'sound', ema_decay = 0.5).train()

# memory

def peak_of_step(folder, num_groups, chunk):
    torch.manual_seed(0)
    model = DriftingGenerator(
        image_size = 16, channels = 1, patch_size = 2, dim = 64, depth = 4, heads = 4, num_classes = 3,
        num_register_tokens = 2, num_style_tokens = 2
    )
    loss_fn = FeatureDriftLoss(LatentMAE(dim = 16, channels = 1, layers = (1, 2, 1, 1), num_classes = None))
    data = TensorDataset(torch.rand(60, 1, 16, 16) * 2 - 1, Y[:60])
    t = trainer(folder, model, data, loss_fn, num_groups = num_groups, num_gen = 8, group_chunk_size = chunk)
    batches = t.batches()
    t.before_training(batches)
    return peak_mib(partial(t.train_step, batches), t.device)

def test_chunks_bound_the_memory(tmp_path):
    few = peak_of_step(tmp_path / 'a', num_groups = 4, chunk = 4)
    many = peak_of_step(tmp_path / 'b', num_groups = 16, chunk = 4)
    whole = peak_of_step(tmp_path / 'c', num_groups = 16, chunk = None)
    assert many < 1.3 * few, (few, many, whole)
    assert whole > 2 * many, (few, many, whole)
