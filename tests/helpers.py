"""What the tests share: commands and processes, the reference's weights, small models, and a small training."""

import gc
import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from einops import rearrange
from torch import nn
from torch.utils.data import TensorDataset

from drifting_pytorch import DriftingGenerator, FeatureDriftLoss, LatentMAE, Trainer

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / 'tests' / 'reference'

# commands and processes

def run(*command, **kwargs):
    """What a command prints, or its error where it fails."""
    result = subprocess.run([*map(str, command)], capture_output = True, text = True, **kwargs)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout

def run_example(script, *args):
    return run(sys.executable, ROOT / 'examples' / script, *args, timeout = 300)

def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]

def launch(fn, world, *args, timeout = 120):
    """Run fn(*args) in `world` forked processes that accelerate takes for one run.

    Returns what each of them returns, or its exit code if it died.
    """
    importlib.import_module('torch.distributed.algorithms.ddp_comm_hooks')     # or each process does, with accelerate
    context = multiprocessing.get_context('fork')
    pipes, processes = [], []

    shared = dict(
        WORLD_SIZE = str(world),
        LOCAL_WORLD_SIZE = str(world),
        MASTER_ADDR = '127.0.0.1',
        MASTER_PORT = str(free_port()),
        OMP_NUM_THREADS = '1',          # accelerate would take more
    )

    def child(rank, pipe):
        os.environ.update(shared, RANK = str(rank), LOCAL_RANK = str(rank))
        AcceleratorState._reset_state(reset_partial_state = True)
        pipe.send(fn(*args))
        os._exit(0)                     # no exit handlers of the parent

    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target = child, args = (rank, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)

    results = []

    try:
        for pipe, process in zip(pipes, processes, strict = True):
            try:
                assert pipe.poll(timeout), f'no answer within {timeout} s'
                results.append(pipe.recv())
                process.join()
            except EOFError:
                process.join()
                assert process.exitcode != 1, 'it raised, see its own traceback'
                results.append(process.exitcode)
    finally:
        for process in processes:       # where one gives no answer, all wait for it
            process.kill()

    return results

def end_processes():
    """The end of a script that torchrun started, or gloo may abort it, or it never ends."""
    gc.collect()        # what may be left of its trainers goes before the group
    Accelerator(cpu = True).end_training()

# what is compared

def relative(a, b):
    """norm of the difference / norm"""
    a, b = (np.asarray(t.detach() if torch.is_tensor(t) else t, dtype = np.float64) for t in (a, b))
    assert a.shape == b.shape, f'{a.shape} against {b.shape}'
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)

def flat_parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])

def flat_gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])

@contextmanager
def raises_one_line(says):
    """A ValueError that says so, in one clear line."""
    with pytest.raises(ValueError) as error:
        yield
    message = str(error.value)
    assert says in message
    assert '\n' not in message

# the reference: weights that follow from their names, and outputs in a few numbers

def by_the_rule(path, shape):
    """The reference's rule for weights that are not stored."""
    seed = zlib.crc32(path.encode()) & 0xffffffff
    normal = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    kind = path.split('/')[-1]

    if kind in ('scale', 'weight', 'gamma'):
        return 1 + 0.1 * normal
    if kind in ('bias', 'beta'):
        return 0.05 * normal
    if kind == 'kernel':
        return (normal / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)
    return 0.1 * normal

def digest(t):
    """The first eight numbers, mean, deviation, and a projection on a fixed direction."""
    v = t.double().numpy().flatten()
    direction = np.random.RandomState(1234).standard_normal(v.size)
    projection = v @ direction / np.sqrt(v.size)
    first = np.pad(v[:8], (0, max(0, 8 - v.size)))
    return np.concatenate((first, (v.mean(), v.std(), projection)))

def nchw(array):
    return rearrange(torch.from_numpy(array), '... h w ch -> ... ch h w')

def packed(shape, dtype, data):
    """An array as the release's files have it. msgpack is an extra, which not every test needs."""
    import msgpack
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))

def packed_array(array):
    return packed(array.shape, array.dtype.name, array.tobytes())

def write_artifact(folder, config, params):
    """A folder like the published ones, params {path: array}."""
    import msgpack
    tree = {}

    for path, array in params.items():
        *branches, leaf = path.split('/')
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[leaf] = packed_array(array)

    folder.mkdir()
    (folder / 'metadata.json').write_text(json.dumps(dict(model_config = config)))
    (folder / 'ema_params.msgpack').write_bytes(msgpack.packb(tree))
    return folder

# small models

TINY_GENERATOR = dict(
    image_size = 8, channels = 2, patch_size = 2, dim = 32, depth = 2, heads = 4, num_classes = 5,
    num_register_tokens = 3, num_style_tokens = 4, style_codebook_size = 6
)

TINY_MAE = dict(dim = 8, channels = 2, layers = (2, 1, 3, 4), num_classes = 5)

def tiny_generator(**kwargs):
    torch.manual_seed(0)
    return DriftingGenerator(**{**TINY_GENERATOR, **kwargs})

def tiny_mae(**kwargs):
    torch.manual_seed(0)
    return LatentMAE(**{**TINY_MAE, **kwargs})

def awake(model):
    """Zero initialisation hides everything: fill every parameter, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator = generator)
    return model

def picture_generator(depth = 1, **kwargs):
    """For images [1 8 8] of three classes."""
    torch.manual_seed(0)
    return DriftingGenerator(
        image_size = 8, channels = 1, patch_size = 4, dim = 16, depth = depth, heads = 2, num_classes = 3,
        num_register_tokens = 1, num_style_tokens = 2, **kwargs
    )

# a small training: three clusters in the plane

CENTERS = torch.tensor([[-1., 0.], [1., 0.], [0., 1.]])

def dataset(num = 240):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % 3
    return TensorDataset(CENTERS[labels] + 0.1 * torch.randn(num, 2, generator = generator), labels)

X, Y = dataset().tensors
DATA = TensorDataset(X[:120], Y[:120])

class Net(nn.Module):
    """Any module with the call will do."""

    def __init__(self, num_classes = 3):
        super().__init__()
        self.num_classes = num_classes
        self.embed = nn.Embedding(num_classes or 1, 16)
        self.net = nn.Sequential(nn.Linear(2 + 16 + 1, 32), nn.SiLU(), nn.Dropout(0.1), nn.Linear(32, 2))

    def forward(self, noise, labels = None, alpha = None, styles = None):
        if labels is None:
            labels = torch.zeros(len(noise), dtype = torch.long)
        return self.net(torch.cat((noise, self.embed(labels), alpha[:, None]), dim = -1))

class PlainNet(Net):
    """Without dropout."""

    def __init__(self):
        super().__init__()
        self.net[2] = nn.Identity()

def trainer(folder, model = None, data = None, loss_fn = None, **kwargs):
    torch.manual_seed(0)
    settings = dict(
        num_train_steps = 20, num_groups = 6, num_gen = 8, num_pos = 8, num_uncond = 4,
        push_size = 16, class_queue_size = 16, uncond_queue_size = 40,
        learning_rate = 1e-2, lr_warmup_steps = 4,
        log_every = 5, sample_every = 0, save_every = 0, results_folder = folder, cpu = True, progress_bar = False
    )
    model = Net() if model is None else model
    loss_fn = loss_fn or FeatureDriftLoss(affinity_floor = 0.)
    return Trainer(model, loss_fn, data or dataset(), **{**settings, **kwargs})

def weights(t):
    return flat_parameters(t.unwrapped)

def averaged_weights(t):
    return flat_parameters(t.ema.ema_model)

def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

def rows(folder):
    """What was logged, without what is of the machine."""
    return [
        {name: value for name, value in row.items() if not name.startswith('machine/')}
        for row in json_lines(folder / 'metrics.jsonl')
    ]

def checkpoint_names(folder):
    return sorted(path.name for path in (folder / 'checkpoints').iterdir())
