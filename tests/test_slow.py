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
from conftest import REFERENCE, launch

from drifting_pytorch import DriftingGenerator

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
