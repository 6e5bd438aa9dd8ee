"""What takes long: pytest -m slow -s"""

import json
import os
import re
import resource
import time

import msgpack
import numpy as np
import pytest
import torch
from conftest import REFERENCE, launch, relative
from torch.utils.data import TensorDataset

from drifting_pytorch import DriftField, DriftingGenerator, FeatureDriftLoss, LatentMAE
from test_trainer import rows, trainer

pytestmark = pytest.mark.slow

# a published model of full size

SIZES = {48: 1024, 96: 2048, 144: 3072, 288: 6144, 128: 2752, 11: 1000, 8: 64, 3: 16}     # of the tiny artifact: of L/2

def write_full_size_artifact(folder):
    """L/2 in the release's layout, random numbers under the names of the tiny artifact."""
    source = REFERENCE / 'artifact_generator'
    metadata = json.loads((source / 'metadata.json').read_text())
    metadata['model_config'].update(num_classes = 1000, noise_classes = 64, noise_coords = 32, input_size = 32, n_cls_tokens = 16, hidden_size = 1024, cond_dim = 1024, depth = 24, num_heads = 16)
    (folder / 'metadata.json').write_text(json.dumps(metadata))
    rng = np.random.default_rng(0)

    def grown(tree, *path):
        if isinstance(tree, msgpack.ExtType):
            shape, dtype, _ = msgpack.unpackb(tree.data)
            shape = [SIZES.get(n, n) for n in shape]
            shape = [1, 256, 1024] if path[-1] == 'pos_embed' else [64] if path[-2] in ('q_norm', 'k_norm') else shape
            return msgpack.ExtType(1, msgpack.packb((shape, dtype, rng.standard_normal(shape, dtype = np.float32).tobytes())))

        full = {name: grown(branch, *path, name) for name, branch in tree.items() if not re.fullmatch(r'(blocks|noise_embeds)_[1-9]\d*', name)}
        for name, num in (('blocks', 24), ('noise_embeds', 32)):
            if f'{name}_0' in full:
                full |= {f'{name}_{i}': full[f'{name}_0'] for i in range(1, num)}
        return full

    (folder / 'ema_params.msgpack').write_bytes(msgpack.packb(grown(msgpack.unpackb((source / 'ema_params.msgpack').read_bytes()))))

def load(folder):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    model = DriftingGenerator.from_pretrained(folder)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, (after - before) / 2 ** 10, sum(p.numel() for p in model.parameters()), len(model.blocks)

def test_full_size_artifact_loads_without_a_second_copy(tmp_path):
    launch(write_full_size_artifact, 1, tmp_path)
    mib = (tmp_path / 'ema_params.msgpack').stat().st_size / 2 ** 20
    (seconds, memory, parameters, depth), = launch(load, 1, tmp_path)
    print(f'\nL/2, {parameters:,} parameters, a file of {mib:.0f} MiB: loaded in {seconds:.1f} s, peak memory {memory:.0f} MiB, {memory / mib:.2f} times the file')
    assert depth == 24 and memory < 1.25 * mib

# compiled

def test_compiled_step_is_the_same(tmp_path):
    """Generator, encoder and field through torch.compile, against plain python: loss, gradient, drift of the first step, sample of the network."""
    results = []

    for compile in (False, True):
        torch.manual_seed(0)
        model = DriftingGenerator(image_size = 16, channels = 1, patch_size = 4, dim = 32, depth = 1, heads = 4, num_classes = 3, num_register_tokens = 2, num_style_tokens = 2)
        torch.nn.init.normal_(model.to_patch.weight, std = 0.1)
        encoder = LatentMAE(dim = 16, channels = 1, layers = (1, 1, 1, 1), num_classes = None, feature_sets = ('locations',))       # means over whole maps are constants here: one channel per norm
        data = TensorDataset(torch.rand(60, 1, 16, 16, generator = torch.Generator().manual_seed(0)) * 2 - 1, torch.arange(60) % 3)
        field = DriftField()
        field.coefficients = torch.compile(field.coefficients) if compile else field.coefficients       # FeatureDriftLoss leaves it alone on a cpu
        t = trainer(tmp_path / str(compile), model, data, loss_fn = FeatureDriftLoss(encoder, field = field), compile = compile, num_train_steps = 1)
        t.train()
        row, = rows(tmp_path / str(compile))
        results.append([row[name] for name in ('loss', 'grad_norm', 'drift/0.02', 'drift/0.05', 'drift/0.2', 'spread')])

    assert relative(*results) < 1e-4, results
