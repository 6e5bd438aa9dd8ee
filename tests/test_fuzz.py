"""Wrong calls of all that is public, some thousands: each is refused clearly, or works; none crashes or hangs.

A valid tiny call of every function and method is taken, and one or two of its arguments are changed. The number of a
call is its seed; `python tests/test_fuzz.py 1234` makes it again and shows what comes of it.
"""

import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import ConvNextV2Config, ConvNextV2Model

from drifting_pytorch import (
    BackboneFeatures,
    ConvGenerator,
    ConvNeXtFeatures,
    DriftField,
    DriftingGenerator,
    FeatureDriftLoss,
    GradientField,
    ImageFolder,
    LatentMAE,
    MAETrainer,
    SampleQueue,
    SharpField,
    SinkhornField,
    Trainer,
    drift_loss,
    drifting,
)
from helpers import REFERENCE, run

NUM_CALLS = 3_000
LEAST_CLEAR = 0.9           # of refused calls whose arguments are of the right kind
SECONDS = 20                # a call that takes longer hangs
GIB = 8                     # that a process may take
BATCH = 50                  # calls of one process

# valid arguments

def floats(*shape):
    return torch.randn(shape, generator = torch.Generator().manual_seed(0))

def labels(num = 2):
    return torch.arange(num) % 3

class Pairs(list):
    """A dataset of (sample, label)."""

def images(num = 12):
    return Pairs(zip(floats(num, 1, 8, 8).tanh(), labels(num).tolist(), strict = True))

KINDS = dict(num_classes = 3, dim_condition = 2, condition_channels = 1)

def conditions(num = 2):
    return dict(labels = labels(num), vector = floats(num, 2), image = floats(num, 1, 4, 4))

def pictures(num = 12):
    """Samples with every kind of condition."""
    given = conditions(num)
    rows = [{name: t[i] for name, t in given.items()} for i in range(num)]
    return Pairs(zip(floats(num, 1, 8, 8).tanh(), rows, strict = True))

def encode(x):
    return {'half': x.flatten(1)[:, None, ::2]}

class Maps(nn.Module):
    """A backbone of maps [b d h w], or of tokens [b n d] with one in front."""

    def __init__(self, tokens = False):
        super().__init__()
        self.conv, self.tokens = nn.Conv2d(3, 4, 4, 4), tokens

    def forward(self, x):
        maps = self.conv(x)
        return nn.functional.pad(maps.flatten(2).mT, (0, 0, 1, 0)) if self.tokens else [maps, maps.relu()]

def convnext():
    return ConvNextV2Model(ConvNextV2Config(hidden_sizes = (4, 4, 4, 8), depths = (1, 1, 1, 1))).eval()

SIZES = dict(image_size = 8, channels = 1, patch_size = 4, dim = 16, depth = 1, heads = 2, num_classes = 3)
TOKENS = dict(num_register_tokens = 2, num_style_tokens = 2, style_codebook_size = 4)
ENCODER = dict(dim = 4, channels = 1, patch_size = 1, layers = (1, 1, 1, 2), num_classes = 3)

def generator(**kwargs):
    return DriftingGenerator(**{**SIZES, **TOKENS, **kwargs})

def encoder():
    return LatentMAE(**ENCODER)

POINTS = dict(x = floats(4, 2), y_pos = floats(5, 2), y_neg = floats(3, 2), temperature = 0.5)
WEIGHTED = dict(uncond = floats(2, 2, 4), uncond_weight = torch.ones(2, 2))
FEATURES = dict(gen = floats(2, 3, 4), pos = floats(2, 5, 4) + 1, **WEIGHTED, temperatures = (0.1, 0.5))
SAMPLES = dict(gen = floats(2, 3, 1, 8, 8), pos = floats(2, 4, 1, 8, 8) + 1, uncond = floats(2, 2, 1, 8, 8))
GUIDED = dict(SAMPLES, alpha = torch.tensor([1., 2.]))
NOISE = dict(noise = floats(2, 1, 8, 8), labels = labels(), alpha = torch.ones(2), styles = labels(4).view(2, 2))
MASKED = dict(x = floats(2, 1, 16, 16), mask = torch.ones(2, 8, 8))
PIXELS = dict(mean = (0.5, 0.5, 0.5), std = (0.2, 0.2, 0.2))

LOOP = dict(
    num_train_steps = 2, seed = 0, learning_rate = 1e-3, lr_warmup_steps = 1, lr_decay_start = 2, betas = (0.9, 0.95),
    weight_decay = 0.01, max_grad_norm = 2., ema_decay = 0.9, gradient_accumulation_steps = 1, mixed_precision = 'no',
    num_workers = 0, log_every = 1, sample_every = 2, save_every = 2, keep_checkpoints = 1, cpu = True,
    progress_bar = False, results_folder = 'results'
)
GROUPS = dict(
    num_groups = 3, num_gen = 3, num_pos = 2, num_uncond = 2, group_chunk_size = 2, alpha_range = (1., 2.),
    alpha_power = 3., no_cfg_frac = 0.5, push_size = 6, class_queue_size = 4, uncond_queue_size = 8,
    queue_device = 'cpu', queue_dtype = torch.float32
)
MAE = dict(batch_size = 4, finetune_steps = 1, cls_weight = 0.1, cls_warmup_steps = 1)

# functions: what accepts its arguments has to work with what is valid

def then(make, use):
    return lambda *args, **kwargs: use(make(*args, **kwargs))

def with_gradient(loss_fn):
    """The result of a loss, and its gradient."""
    def call(**arguments):
        gen = arguments.get('gen')
        if torch.is_tensor(gen) and gen.is_floating_point():
            gen = arguments['gen'] = gen.clone().requires_grad_()
        result = loss_fn(**arguments)
        loss = result[0] if isinstance(result, tuple) else result
        if loss.requires_grad:
            loss.sum().backward()
        return result, getattr(gen, 'grad', None)
    return call

def with_field(field):
    return field(**POINTS)

def with_loss(loss_fn):
    return with_gradient(loss_fn)(**GUIDED)

def with_generator(model):
    return model.sample([0, 2], alpha = 1.5, seed = 0)

def with_encoder(model):
    loss, breakdown = model(floats(2, 1, 16, 16), labels(), cls_weight = 0.1)
    loss.backward()
    return loss, breakdown, [p.grad for p in model.parameters()]

def with_features(model):
    return FeatureDriftLoss(model, raw = False)(floats(1, 2, 3, 16, 16), floats(1, 3, 3, 16, 16))

def with_queue(queue):
    queue.push(floats(12, 5), labels(12))
    return queue.draw(torch.tensor([0, 2]), 2)

def trained(trainer):
    trainer.train()
    return list(trainer.ema.ema_model.parameters())

def trainer(**kwargs):
    arguments = dict(model = generator(), loss_fn = None, dataset = images(), **LOOP, **GROUPS)
    return Trainer(**{**arguments, **kwargs})

def mae_trainer(**kwargs):
    return MAETrainer(**{**dict(model = encoder(), dataset = images(), **LOOP, **MAE), **kwargs})

def push(**arguments):
    queue = SampleQueue(3, size = 4)
    queue.push(**arguments)
    return queue.samples

def draw(**arguments):
    queue = SampleQueue(3, size = 4)
    queue.push(floats(12, 5), labels(12))
    return queue.draw(**arguments)

# name: section of the file, function, valid arguments. Paths are of folders that write_folders writes
TARGETS = {
    'DriftField(...)': (
        2, then(DriftField, with_field), dict(kernel = 'laplace', normalize = 'both', attraction = 1.5, repulsion = 1.)
    ),
    'DriftField.forward': (2, DriftField(), POINTS),
    'DriftingGenerator(...)': (
        4, then(DriftingGenerator, with_generator),
        dict(
            SIZES, **TOKENS, ff_mult = 4., share_style_codebook = False, outer_slope = 0.1, bf16_rotary = False,
            checkpointing = False
        )
    ),
    'DriftingGenerator.from_preset': (
        4, then(DriftingGenerator.from_preset, with_generator), dict(SIZES, **TOKENS, name = 'B/2')
    ),
    'DriftingGenerator.forward': (4, generator(), NOISE),
    'DriftingGenerator.sample': (
        4, generator().sample, dict(labels = labels(), alpha = 2., seed = 0, batch_size = 1)
    ),
    'DriftingGenerator.sample, no classes': (
        4, generator(num_classes = None).sample, dict(num_samples = 2, alpha = torch.ones(2), seed = 0, batch_size = 1)
    ),
    'DriftingGenerator.forward, conditions': (
        4, generator(**KINDS), dict(noise = floats(2, 1, 8, 8), labels = conditions(), alpha = torch.ones(2))
    ),
    'DriftingGenerator.sample, conditions': (
        5, generator(**KINDS).sample, dict(labels = conditions(), alpha = 2., seed = 0, num_samples_each = 2)
    ),
    'ConvGenerator(...)': (
        5, then(ConvGenerator, with_generator),
        dict(image_size = 8, channels = 1, num_classes = 3, dim = 16, dim_noise = 4, noise_channels = 1)
    ),
    'ConvGenerator.forward': (
        5, ConvGenerator(image_size = 8, channels = 1, dim = 16, dim_noise = 4, noise_channels = 1, **KINDS),
        dict(noise = floats(2, 24), labels = conditions(), alpha = torch.ones(2))
    ),
    'drift_loss': (
        6, with_gradient(drift_loss),
        dict(FEATURES, affinity_floor = 1e-6, field = DriftField(), diagnostics = True)
    ),
    'drift_loss, own negatives': (
        6, with_gradient(drift_loss), dict(FEATURES, field = SinkhornField(), neg = floats(2, 3, 4) + 2)
    ),
    'FeatureDriftLoss(...)': (
        6, then(FeatureDriftLoss, with_loss),
        dict(
            affinity_floor = 1e-6, encoder = [encode], decoder = torch.tanh, raw = True, group_chunk_size = 2,
            temperatures = [0.1]
        )
    ),
    'FeatureDriftLoss.forward': (
        6, with_gradient(FeatureDriftLoss(encode)), dict(GUIDED, neg = floats(2, 3, 1, 8, 8), diagnostics = True)
    ),
    'FeatureDriftLoss.forward, chunks': (6, with_gradient(FeatureDriftLoss(encoder(), group_chunk_size = 1)), GUIDED),
    'GradientField(...)': (
        7, then(GradientField, with_field), dict(kernel = 'gaussian', attraction = 1., repulsion = 1.)
    ),
    'GradientField.forward': (7, GradientField(), POINTS),
    'SharpField(...)': (7, then(SharpField, with_field), dict(attraction = 1., repulsion = 1.)),
    'SharpField.forward': (7, SharpField(), POINTS),
    'SinkhornField(...)': (7, then(SinkhornField, with_field), dict(iters = 3, attraction = 1., repulsion = 1.)),
    'SinkhornField.forward': (7, SinkhornField(), POINTS),
    'LatentMAE(...)': (
        8, then(LatentMAE, with_encoder),
        dict(ENCODER, mask_patch_size = 2, mask_ratio = 0.5, feature_sets = ('2x2', 'norm_x'), checkpointing = False)
    ),
    'LatentMAE.forward': (8, encoder(), dict(MASKED, labels = labels(), cls_weight = 0.1)),
    'LatentMAE.features': (8, encoder().features, dict(x = floats(2, 1, 16, 16))),
    'LatentMAE.reconstruct': (8, encoder().reconstruct, MASKED),
    'LatentMAE.draw_mask': (8, encoder().draw_mask, dict(x = floats(2, 1, 16, 16), generator = torch.Generator())),
    'BackboneFeatures(...)': (
        8, then(BackboneFeatures, with_features),
        dict(PIXELS, backbone = Maps(True), num_prefix_tokens = 1, feature_sets = ('locations', '2x2'), image_size = 16)
    ),
    'BackboneFeatures.features': (
        8, BackboneFeatures(Maps(), image_size = 16).features, dict(x = floats(2, 3, 16, 16))
    ),
    'ConvNeXtFeatures(...)': (
        8, then(ConvNeXtFeatures, with_features), dict(PIXELS, model = convnext(), image_size = 32)
    ),
    'ConvNeXtFeatures.features': (
        8, ConvNeXtFeatures(convnext(), image_size = 32).features, dict(x = floats(2, 3, 16, 16))
    ),
    'ImageFolder(...)': (
        9, then(ImageFolder, list), dict(root = Path('pictures'), image_size = 8, channels = 3, flip = False)
    ),
    'SampleQueue(...)': (
        9, then(SampleQueue, with_queue), dict(num_classes = 3, size = 4, device = 'cpu', dtype = torch.float32)
    ),
    'SampleQueue.push': (9, push, dict(samples = floats(3, 5), labels = labels(3))),
    'SampleQueue.draw': (9, draw, dict(labels = labels(), num = 2, generator = torch.Generator())),
    'Trainer(...)': (10, then(trainer, trained), dict(LOOP, **GROUPS)),
    'Trainer(...), objects': (
        10, then(trainer, trained),
        dict(model = generator(), loss_fn = FeatureDriftLoss(), dataset = images(), to_image = torch.sigmoid)
    ),
    'Trainer(...), data': (10, then(trainer, trained), dict(dataset = images())),
    'Trainer(...), conditions': (
        10, then(partial(trainer, model = generator(**KINDS), num_pos = 1), trained), dict(dataset = pictures())
    ),
    'Trainer(...), resumed': (
        10, then(trainer, trained), dict(num_train_steps = 3, resume_from_checkpoint = Path('step-00000002'))
    ),
    'Trainer.from_preset': (
        10, then(Trainer.from_preset, trained),
        dict(LOOP, **GROUPS, name = 'L/2', model = generator(), loss_fn = None, dataset = images())
    ),
    'Trainer.sample': (
        10, lambda **arguments: trainer(num_train_steps = 1).sample(**arguments),
        dict(labels = labels(), alpha = 2., seed = 0, batch_size = 1)
    ),
    'MAETrainer(...)': (10, then(mae_trainer, trained), dict(LOOP, **MAE)),
    'MAETrainer(...), objects': (
        10, then(mae_trainer, trained), dict(model = encoder(), dataset = images(), to_image = torch.sigmoid)
    ),
    'MAETrainer(...), data': (10, then(partial(mae_trainer, batch_size = 12), trained), dict(dataset = images())),
    'DriftingGenerator.from_pretrained': (
        11, then(DriftingGenerator.from_pretrained, with_generator), dict(name = Path('generator'))
    ),
    'DriftingGenerator.from_pretrained, published': (
        11, then(DriftingGenerator.from_pretrained, with_generator), dict(name = Path('published'))
    ),
    'LatentMAE.from_pretrained': (11, then(LatentMAE.from_pretrained, with_encoder), dict(name = Path('encoder'))),
}

def write_folders(root):
    generator().save_pretrained(root / 'generator')
    encoder().save_pretrained(root / 'encoder')
    shutil.copytree(REFERENCE / 'artifact_generator', root / 'published')
    for i in range(6):
        path = root / 'pictures' / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents = True, exist_ok = True)
        Image.fromarray(np.full((10 + i, 12, 3), 40 * i, np.uint8)).save(path)

    trainer(results_folder = root / 'run').train()
    (root / 'run' / 'checkpoints' / 'step-00000002').rename(root / 'step-00000002')

# mutations

def with_one(t, value):
    """One number of a tensor changed."""
    t = t.clone()
    t.view(-1)[t.numel() // 2:][:1] = value
    return t

def with_item(values, item):
    """One item of a sequence changed."""
    return (*values[:-1], item)

def mapped(change):
    """A module that returns something else, changed tensor by tensor."""
    class Changed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.num_classes = inner, getattr(inner, 'num_classes', None)
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, *args, **kwargs):
            return tree_map(lambda t: change(t) if torch.is_tensor(t) else t, self.inner(*args, **kwargs))
    return lambda value, rng: Changed(value)

def with_pair(change):
    """A dataset with one changed pair."""
    return lambda data, rng: Pairs([*data[:1], change(*data[1]), *data[2:]])

def with_pairs(change):
    return lambda data, rng: Pairs(itertools.starmap(change, data))

def damaged(change):
    """A folder one of whose files is not what it was."""
    def mutate(folder, rng):
        change(rng.choice(sorted(path for path in folder.rglob('*') if path.is_file())), rng)
        return folder
    return mutate

def edited(change):
    """A folder one of whose json files, if there is any, has another value somewhere."""
    def mutate(folder, rng):
        files = sorted(folder.glob('*.json'))
        path = rng.choice(files) if files else folder / 'new.json'
        top = json.loads(path.read_text()) if files else {'key': 1}
        nodes = [top, *(node for node in top.values() if isinstance(node, dict) and node)]
        node = rng.choice(nodes)
        change(node, rng.choice(sorted(node)), rng)
        path.write_text(json.dumps(top))
        return folder
    return mutate

def replaced_by_folder(path, rng):
    path.unlink()
    path.mkdir()

def beside(path, rng):
    shutil.copy(path, path.parent.parent / path.name)

def along(change):
    """A tensor changed along one of its dimensions."""
    return lambda t, rng: change(t, rng.randrange(t.ndim)) if t.ndim > 0 else t

def of_dtype(dtype):
    return lambda t, rng: t.to(dtype)

ODD_VALUES = (None, 'nonsense', -1, 0, 2.5, 1e30, [], [1, 2], {}, True)

# of the same kind: {kind of the argument: {what is done: the function of it}}
MUTATIONS = {
    'tensor': {
        'one longer': along(lambda t, dim: torch.cat((t, t.narrow(dim, 0, 1)), dim)),
        'one shorter': along(lambda t, dim: t.narrow(dim, 1, t.shape[dim] - 1)),
        'of size 1': along(lambda t, dim: t.narrow(dim, 0, 1)),
        'empty': along(lambda t, dim: t.narrow(dim, 0, 0)),
        'one dimension more': along(lambda t, dim: t.unsqueeze(dim)),
        'one dimension less': along(lambda t, dim: t.select(dim, 0)),
        'flat': lambda t, rng: t.flatten(),
        'one number of it': lambda t, rng: t.flatten()[0],
        'transposed': along(lambda t, dim: t.transpose(dim, dim - 1)),
        'float64': of_dtype(torch.float64),
        'float16': of_dtype(torch.float16),
        'bfloat16': of_dtype(torch.bfloat16),
        'int64': of_dtype(torch.int64),
        'uint8': of_dtype(torch.uint8),
        'bool': of_dtype(torch.bool),
        'complex': of_dtype(torch.complex64),
        'float32': of_dtype(torch.float32),
        'a nan': lambda t, rng: with_one(t.float(), math.nan),
        'an inf': lambda t, rng: with_one(t.float(), math.inf),
        'a -inf': lambda t, rng: with_one(t.float(), -math.inf),
        'a huge number': lambda t, rng: with_one(t.float(), 1e30),
        'huge': lambda t, rng: t * 1e30,
        'tiny': lambda t, rng: t * 1e-30,
        'far away': lambda t, rng: t + 1000,
        'negative': lambda t, rng: -t - 1,
        'zeros': lambda t, rng: torch.zeros_like(t),
    },
    'number': {
        'nan': lambda value, rng: math.nan,
        'inf': lambda value, rng: math.inf,
        '-inf': lambda value, rng: -math.inf,
        '1e30': lambda value, rng: 1e30,
        '-1e30': lambda value, rng: -1e30,
        '1e-30': lambda value, rng: 1e-30,
        '0': lambda value, rng: 0,
        '-1': lambda value, rng: -1,
        'negative': lambda value, rng: -value - 1,
        '2.5': lambda value, rng: 2.5,
        '7': lambda value, rng: 7,
        'one more': lambda value, rng: value + 1,
        'of numpy': lambda value, rng: np.array(value)[()],
        'a bool': lambda value, rng: rng.random() < 0.5,
        'a tensor of it': lambda value, rng: torch.tensor(value),
    },
    'flag': {
        'None': lambda value, rng: None,
        'a word': lambda value, rng: 'no',
        'turned': lambda value, rng: not value,
    },
    'text': {
        'nothing': lambda value, rng: '',
        'nonsense': lambda value, rng: 'nonsense',
        'a path': lambda value, rng: 'a/b/c',
        'upper case': lambda value, rng: value.upper(),
        'blank': lambda value, rng: value + ' ',
    },
    'sequence': {
        'empty': lambda value, rng: (),
        'one less': lambda value, rng: value[1:],
        'one more': lambda value, rng: (*value, value[-1]),
        'turned': lambda value, rng: value[::-1],
        'a list': lambda value, rng: list(value),
        'an array': lambda value, rng: np.array(value),
        'nested': lambda value, rng: (value,),
        'with nan': lambda value, rng: with_item(value, math.nan),
        'with inf': lambda value, rng: with_item(value, math.inf),
        'with 0': lambda value, rng: with_item(value, 0),
        'with -1': lambda value, rng: with_item(value, -1),
        'with 1e30': lambda value, rng: with_item(value, 1e30),
        'with None': lambda value, rng: with_item(value, None),
        'with a word': lambda value, rng: with_item(value, 'nonsense'),
    },
    'function': {
        'returns None': mapped(lambda t: None),
        'returns numbers': mapped(lambda t: 1.),
        'returns nan': mapped(lambda t: t * math.nan),
        'returns integers': mapped(lambda t: t.long()),
        'returns arrays': mapped(lambda t: t.detach().numpy()),
        'returns fewer': mapped(lambda t: t[1:]),
        'returns less': mapped(lambda t: t[:, :-1]),
        'returns more dimensions': mapped(lambda t: t[None]),
        'returns another dtype': mapped(lambda t: t.double()),
        'returns huge numbers': mapped(lambda t: t * 1e30),
        'returns constants': mapped(lambda t: t * 0),
    },
    'dataset': {
        'empty': lambda data, rng: Pairs(),
        'one pair': lambda data, rng: data[:1],
        'iterator': lambda data, rng: iter(data),
        'dict': lambda data, rng: dict(enumerate(data)),
        'samples alone': with_pairs(lambda x, label: x),
        'triples': with_pairs(lambda x, label: (x, label, label)),
        'arrays': with_pairs(lambda x, label: (x.numpy(), label)),
        'integers': with_pairs(lambda x, label: (x.byte(), label)),
        'float64': with_pairs(lambda x, label: (x.double(), label)),
        'other shape': with_pairs(lambda x, label: (x[:, 1:], label)),
        'flat': with_pairs(lambda x, label: (x[0], label)),
        'huge': with_pairs(lambda x, label: (x * 1e30, label)),
        'zeros': with_pairs(lambda x, label: (x * 0, label)),
        'labels of tensors': with_pairs(lambda x, label: (x, tree_map(torch.as_tensor, label))),
        'float labels': with_pairs(lambda x, label: (x, tree_map(lambda t: t + 0.5, label))),
        'no labels': with_pairs(lambda x, label: (x, None)),
        'words as labels': with_pairs(lambda x, label: (x, str(label))),
        'lists as labels': with_pairs(lambda x, label: (x, [1])),
        'one class': with_pairs(lambda x, label: (x, 0)),
        'labels from 1': with_pairs(lambda x, label: (x, tree_map(lambda t: t + 1, label))),
        'a nan': with_pair(lambda x, label: (with_one(x, math.nan), label)),
        'an inf': with_pair(lambda x, label: (with_one(x, math.inf), label)),
        'a huge number': with_pair(lambda x, label: (with_one(x, 1e30), label)),
        'a small one': with_pair(lambda x, label: (x[:, :4], label)),
        'one array': with_pair(lambda x, label: (x.numpy(), label)),
        'one not a pair': with_pair(lambda x, label: x),
        'one None': with_pair(lambda x, label: None),
        'one int sample': with_pair(lambda x, label: (x.long(), label)),
        'label of 3': with_pair(lambda x, label: (x, 3)),
        'label of -1': with_pair(lambda x, label: (x, -1)),
        'label of None': with_pair(lambda x, label: (x, None)),
        'label of nan': with_pair(lambda x, label: (x, math.nan)),
        'label of 10^30': with_pair(lambda x, label: (x, 10 ** 30)),
        'a word as label': with_pair(lambda x, label: (x, 'cat')),
    },
    'folder': {
        'none': lambda folder, rng: Path('absent'),
        'a file': lambda folder, rng: rng.choice(sorted(path for path in folder.rglob('*') if path.is_file())),
        'above it': lambda folder, rng: folder.parent,
        'as text': lambda folder, rng: str(folder),
        'a file less': damaged(lambda path, rng: path.unlink()),
        'a file cut': damaged(lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size))),
        'an empty file': damaged(lambda path, rng: path.write_bytes(b'')),
        'garbage': damaged(lambda path, rng: path.write_bytes(rng.randbytes(200))),
        'other first bytes': damaged(lambda path, rng: path.write_bytes(rng.randbytes(9) + path.read_bytes()[9:])),
        'something behind': damaged(lambda path, rng: path.write_bytes(path.read_bytes() + b'more')),
        'a folder as file': damaged(replaced_by_folder),
        'a file beside': damaged(beside),
        'a list': damaged(lambda path, rng: path.write_text('[1, 2]')),
        'a json key less': edited(lambda node, key, rng: node.pop(key)),
        'a json key more': edited(lambda node, key, rng: node.update(nonsense = 1)),
        'a json value': edited(lambda node, key, rng: node.update({key: rng.choice(ODD_VALUES)})),
    },
}

# of another kind than it should be
OTHERS = {
    'None': lambda value: None,
    'a word': lambda value: 'nonsense',
    'a number': lambda value: 3,
    'a list of it': lambda value: [value],
    'a dict': lambda value: dict(a = value),
    'an object': lambda value: object(),
    'numbers': lambda value: [1., 2.],
    'its class': type,
    'a tensor': lambda value: torch.ones(2, 3),
    'an array': lambda value: np.array(value) if torch.is_tensor(value) else np.ones((2, 3)),
    'a function': lambda value: len,
    'its list': lambda value: value.tolist() if torch.is_tensor(value) else [],
    'bytes': lambda value: str(value).encode(),
    'a complex number': lambda value: 1j,
    'a set': lambda value: {1, 2},
}

def kind_of(value):
    kinds = dict(
        flag = bool, number = (int, float), text = str, folder = Path, tensor = torch.Tensor, dataset = Pairs,
        sequence = (tuple, list), field = DriftField
    )
    found = (kind for kind, types in kinds.items() if isinstance(value, types))
    return next(found, 'function' if callable(value) else 'other')

def mutated(arguments, rng):
    """The arguments with one or two changes, what these are, and whether every kind is still as it should be."""
    valid, arguments = arguments, deepcopy(arguments)
    done, same_kinds = [], True

    for key in rng.sample(sorted(valid), min(len(valid), rng.choice((1, 1, 1, 2)))):
        value, chance = deepcopy(valid[key]), rng.random()
        kind = kind_of(value)
        changes = MUTATIONS.get(kind)
        other = rng.choice([name for name in valid if name != key] or [key])

        if changes and chance < 0.75:
            name = rng.choice(list(changes))
            arguments[key] = changes[name](value, rng)
            same_kinds = same_kinds and kind != 'function'
        elif chance < 0.94:
            name = rng.choice(list(OTHERS))
            arguments[key] = OTHERS[name](value)
            same_kinds = False
        elif chance < 0.98:
            name = f'swapped with {other}'
            same_kinds = same_kinds and kind == kind_of(valid[other])
            arguments |= {key: deepcopy(valid[other]), other: value}
        else:
            name = 'misspelled'
            arguments[f'{key}_'] = arguments.pop(key)

        done.append(f'{key}: {name}')

    return arguments, ', '.join(done), same_kinds

# one call

def copy_folders(arguments, root):
    for value in arguments.values():
        if isinstance(value, Path):
            shutil.copytree(root / value, value)

def prepared(seed, root):
    """Function, arguments, and a description of the call, in a folder of its own."""
    rng, name = random.Random(seed), list(TARGETS)[seed % len(TARGETS)]
    section, function, arguments = TARGETS[name]
    copy_folders(arguments, root)
    arguments, what, same_kinds = mutated(arguments, rng)
    return function, arguments, dict(seed = seed, section = section, name = name, what = what, same_kinds = same_kinds)

def is_finite(result):
    found = [t for t in tree_leaves(result) if torch.is_tensor(t) and (t.is_floating_point() or t.is_complex())]
    return all(bool(t.isfinite().all()) for t in found)

def is_clear(error):
    """An error in one or two lines that the library raises itself, or Python for arguments that it does not know."""
    message, frame = str(error), traceback.extract_tb(error.__traceback__)[-1]
    is_ours = Path(frame.filename).parent == Path(drifting.__file__).parent and frame.line.startswith('raise ')
    unknown = re.match(r'(\w+)[\w.]*\(\) (got an unexpected keyword|missing \d+ required)', message)
    is_ours = is_ours or unknown and getattr(drifting, unknown[1]).__module__ == drifting.__name__
    kinds = ValueError, TypeError, OSError, FloatingPointError      # the last one is what a broken training raises
    return bool(is_ours and isinstance(error, kinds) and message and message.count('\n') < 2)

def outcome(function, arguments):
    """What comes of a call: 'finite' or 'not finite', or 'clear' or 'unclear' and the error."""
    torch.manual_seed(0)
    try:
        return dict(outcome = 'finite' if is_finite(function(**arguments)) else 'not finite')
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text, *more = f'{type(error).__name__}: {error}'.splitlines()
        where = f'{Path(frame.filename).name}:{frame.lineno} {frame.line}'
        kind = 'clear' if is_clear(error) else 'unclear'
        return dict(outcome = kind, error = text + ' ...' * bool(more), where = where)
    finally:
        AcceleratorState._reset_state(reset_partial_state = True)

# processes

def child(pipe, seeds, root):
    """Sends the description of each call, then what comes of it."""
    resource.setrlimit(resource.RLIMIT_AS, (GIB * 2 ** 30,) * 2)
    warnings.simplefilter('ignore')
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)

    for seed in seeds:
        with tempfile.TemporaryDirectory(dir = root) as folder:
            os.chdir(folder)
            function, arguments, description = prepared(seed, root)
            pipe.send(description)
            pipe.send(outcome(function, arguments))

    os._exit(0)

def calls(seeds, root):
    """What comes of every call. A process that dies or hangs is followed by another one."""
    context = multiprocessing.get_context('fork')

    while seeds:
        pipe, theirs = context.Pipe(duplex = False)
        process = context.Process(target = child, args = (theirs, seeds[:BATCH], root))
        process.start()
        theirs.close()
        ended, num = None, 0

        while not ended and num < len(seeds[:BATCH]):
            try:
                description = pipe.recv()
                result = pipe.recv() if pipe.poll(SECONDS) else dict(outcome = 'hang')
            except EOFError:
                result = dict(outcome = 'crash')
            ended = result['outcome'] in ('hang', 'crash')
            num += 1
            yield description | result

        process.kill()
        process.join()
        seeds = seeds[num:]

def main(first, last = None):
    """The calls from first to last as lines of json; with one number that call, and its error as it comes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_folders(root)
        if last is not None:
            for call in calls(range(first, last), root):
                print(json.dumps(call), flush = True)
        else:
            os.chdir(root / 'pictures')
            function, arguments, description = prepared(first, root)
            print(description, arguments, sep = '\n')
            print(function(**arguments))

# all calls

@pytest.fixture(scope = 'module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('folders')
    write_folders(root)
    return root

@pytest.mark.parametrize('name', TARGETS)
def test_unchanged_calls_work(name, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, function, arguments = TARGETS[name]
    copy_folders(arguments, folders)
    assert is_finite(function(**deepcopy(arguments)))

OUTCOMES = 'clear', 'unclear', 'finite', 'not finite', 'crash', 'hang'

def table(found):
    """How many calls of every function came to what."""
    lines = [f'{"":48}' + ''.join(f'{name:>11}' for name in OUTCOMES)]
    for name in (*TARGETS, 'all'):
        counts = Counter(call['outcome'] for call in found if name in (call['name'], 'all'))
        lines.append(f'{name:48}' + ''.join(f'{counts[outcome]:11}' for outcome in OUTCOMES))
    return '\n'.join(lines)

def line(call):
    kinds = '' if call['same_kinds'] else ' (of another kind)'
    return '{seed} | {section}. {name} | {what}{kinds} | {outcome} | {error} | {where}'.format(
        **{'error': '', 'where': '', **call}, kinds = kinds
    )

@pytest.mark.slow
def test_wrong_calls_are_refused_clearly_or_work():
    env = {**os.environ, 'DRIFTING_TYPECHECK': '0', 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
    found = [json.loads(text) for text in run(sys.executable, __file__, 0, NUM_CALLS, env = env).splitlines()]
    bad = [call for call in found if call['outcome'] not in ('clear', 'finite')]
    bad.sort(key = lambda call: (not call['same_kinds'], call['section'], call['name']))
    print('', table(found), *map(line, bad), sep = '\n')

    counts = Counter(call['outcome'] for call in found)
    assert len(found) == NUM_CALLS and counts['clear'] + counts['unclear'] > NUM_CALLS / 3
    assert counts['crash'] == counts['hang'] == counts['not finite'] == 0

    refused = [call for call in found if call['same_kinds'] and call['outcome'] in ('clear', 'unclear')]
    share = sum(call['outcome'] == 'clear' for call in refused) / len(refused)
    assert share >= LEAST_CLEAR, f'{share:.1%} of refused calls are clear'

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
