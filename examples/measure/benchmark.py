"""Speed and memory of the loss, of a training step and of sampling, next to the arithmetic that they cannot do without.

python examples/measure/benchmark.py loss --threads 1           problems W1 to W3 against a transcription of the release
python examples/measure/benchmark.py small --clock cpu          five small problems against a plain loop
python examples/measure/benchmark.py features                   the loss over every feature of a MAE
python examples/measure/benchmark.py maps --clock cpu           features of an encoder's maps, against var_mean
python examples/measure/benchmark.py step --clock cpu           seconds and memory of a training step, and of its parts
python examples/measure/benchmark.py trainer --clock cpu        Trainer's steps against those of a bare loop
python examples/measure/benchmark.py sampling --models B/2 L/2  images per second
python examples/measure/benchmark.py growth --clock cpu         the loss over groups, samples, locations, dimension; and
                                                                over processes, with torchrun

Contenders take turns, medians are reported. Each call is preceded by one that is not timed, so that it finds the memory
as it left it. Writes --output, a json file, and prints the same as tables.
"""

import argparse
import gc
import json
import math
import os
import platform
import sys
import tempfile
import time
from contextlib import nullcontext
from copy import copy, deepcopy
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from einops import rearrange
from torch import cat, nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from drifting_pytorch import (
    ConvGenerator,
    DriftField,
    DriftingGenerator,
    FeatureDriftLoss,
    LatentMAE,
    Trainer,
    drift_loss,
    drifting,
    plain_drift_loss,
)

sys.path.insert(0, str(Path(__file__).parents[1]))      # examples/

from common import make_parser, positive

TEMPERATURES = (0.02, 0.05, 0.2)

# what it is measured against

def transcription(gen, pos, uncond, uncond_weight):
    """The release's loss [b], line by line and without a thought for speed. It equals drift_loss."""
    (b, g, d), p, u = gen.shape, pos.shape[1], uncond.shape[1]

    with torch.no_grad():
        y = cat((gen, uncond, pos), dim = 1)
        weight = cat((gen.new_ones(b, g), uncond_weight, gen.new_ones(b, p)), dim = 1)

        x_sq, y_sq = (torch.einsum('bnd,bnd->bn', t, t) for t in (gen, y))
        products = torch.einsum('bnd,bmd->bnm', gen, y)
        dist = (x_sq[:, :, None] + y_sq[:, None] - 2 * products).clamp(min = 1e-8).sqrt()

        scale = (dist * weight[:, None]).mean() / weight.mean()
        feature_scale = (scale / d ** 0.5).clamp(min = 1e-3)
        x, y = gen / feature_scale, y / feature_scale
        dist = dist / scale.clamp(min = 1e-3) + 100 * F.pad(torch.eye(g, device = gen.device), (0, u + p))

        V = torch.zeros_like(x)

        for temperature in TEMPERATURES:
            logits = -dist / temperature
            A = (logits.softmax(dim = -1) * logits.softmax(dim = -2)).clamp(min = 1e-6).sqrt() * weight[:, None]
            A_neg, A_pos = A[:, :, :g + u], A[:, :, g + u:]
            sum_neg, sum_pos = (t.sum(dim = -1, keepdim = True) for t in (A_neg, A_pos))
            W = cat((-A_neg * sum_pos, A_pos * sum_neg), dim = -1)
            V_t = torch.einsum('bny,byd->bnd', W, y) - W.sum(dim = -1, keepdim = True) * x
            V = V + V_t / (V_t ** 2).mean().clamp(min = 1e-8).sqrt()

        goal = x + V

    return ((gen / feature_scale - goal) ** 2).mean(dim = (1, 2))

def plain_loop(gen, pos, uncond, uncond_weight):
    """The same loss [b] as short as one would write it: no clamps that never act, weights only where they are given."""
    (b, g, d), p = gen.shape, pos.shape[1]

    with torch.no_grad():
        y = cat((pos, uncond, gen), dim = 1)
        weight = cat((gen.new_ones(b, p), uncond_weight, gen.new_ones(b, g)), dim = 1)[:, None]
        is_guided = uncond_weight.shape[1] > 0
        dist = torch.cdist(gen, y)
        scale = (dist * weight).mean() / weight.mean() if is_guided else dist.mean()
        dist = dist / scale
        dist[:, :, -g:] += 100 * torch.eye(g, device = gen.device)
        unit = scale / d ** 0.5
        V = 0.

        for temperature in TEMPERATURES:
            logits = dist / -temperature
            A = (logits.softmax(dim = -1) * logits.softmax(dim = -2)).clamp(min = 1e-6).sqrt()
            A = A * weight if is_guided else A
            A_pos, A_neg = A[:, :, :p], A[:, :, p:]
            sum_pos, sum_neg = (t.sum(dim = -1, keepdim = True) for t in (A_pos, A_neg))
            V_t = cat((A_pos * sum_neg, -A_neg * sum_pos), dim = -1) @ y / unit
            V = V + V_t / V_t.square().mean().clamp(min = 1e-8).sqrt()

        target = gen / unit + V

    return (gen / unit - target).square().mean(dim = (1, 2))

def bare_loss(gen, pos, uncond, _):
    """The operations of drift_loss and nothing around them: no checks, weights, parts, statistics, other processes."""
    (b, g, d), p = gen.shape, pos.shape[1]

    with torch.no_grad():
        x = gen.detach()
        y = cat((pos, uncond, x), dim = 1).sub_(x.mean(dim = 1, keepdim = True))
        dist = drifting.squared_distances(y[:, -g:], y).clamp_(min = 1e-8).sqrt_()
        scale = dist.mean()
        dist /= scale.clamp(min = 1e-3)
        dist[:, :, -g:].diagonal(dim1 = -2, dim2 = -1).add_(100.)
        temperature = gen.new_tensor(TEMPERATURES).view(-1, 1, 1)
        W = drifting.DRIFT_FIELD.coefficients(dist[:, None], p, g, temperature, None, 1e-6)
        V = (W.flatten(1, 2) @ y).view(b, len(TEMPERATURES), g * d)

        # 1 / (lambda unit), for fields at root mean square 1
        unit = (scale / d ** 0.5).clamp(min = 1e-3)
        lengths = torch.linalg.vector_norm(V, dim = (0, 2)) / (b * g * d) ** 0.5
        factors = 1 / lengths.clamp(min = 1e-4 * unit)
        V = (factors.expand(b, 1, -1).contiguous() @ V).view(b, g, d)
        loss = V.square().mean(dim = (1, 2))
        grad = V.mul_(-2 / (b * g * d * unit))

    return drifting.KnownGradient.apply(gen, loss, grad)

def var_mean_features(name, x, sets):
    """map_features with the pixels of a patch in the last dimension, and torch.var_mean over them."""
    h, w = x.shape[-2:]
    features = {name: rearrange(x, 'b d h w -> b (h w) d')} if 'locations' in sets else {}

    for feature_set, suffix, p1, p2 in (('mean_std', '', h, w), ('2x2', '_2', 2, 2), ('4x4', '_4', 4, 4)):
        if feature_set in sets and h % p1 == 0 and w % p2 == 0:
            patches = rearrange(x, 'b d (h p1) (w p2) -> b (h w) d (p1 p2)', p1 = p1, p2 = p2)
            var, features[f'{name}_mean{suffix}'] = torch.var_mean(patches, dim = -1, correction = 0)
            features[f'{name}_std{suffix}'] = (var + 1e-6).sqrt()

    return features

def with_var_mean(fn):
    """fn, where map_features is var_mean_features, of maps that lie in memory channel by channel."""
    fold = LatentMAE.fold

    def channels_first(encoder, x):
        return fold(encoder, x).contiguous()

    def run():
        with patch.object(drifting, 'map_features', var_mean_features), patch.object(LatentMAE, 'fold', channels_first):
            return fn()

    return run

def loss_flops(b, g, y, d):
    """Of the two products without which there is no field: points against points, coefficients against points."""
    return 2 * b * g * y * d * (1 + len(TEMPERATURES))

def products(gen, y, split):
    """These two, so many problems at a time, into memory that exists."""
    (g, d), m = gen.shape[1:], y.shape[1]
    rows = len(TEMPERATURES) * g
    W, dist, V = (gen.new_ones(split, *shape) for shape in ((rows, m), (g, m), (rows, d)))

    def run():
        for x_part, y_part in zip(gen.split(split), y.split(split), strict = True):
            n = len(x_part)
            torch.bmm(x_part, y_part.mT, out = dist[:n])
            torch.bmm(W[:n], y_part, out = V[:n])

    return run

def floor(gen, pos, uncond, args):
    """The products at the split that suits the device best, and one read of the features."""
    gen = gen.detach()
    y = cat((pos, gen, uncond), dim = 1)

    def fastest(run):
        return min(seconds(run, args)[0] for _ in range(2))

    splits = sorted({1, min(8, len(gen)), min(64, len(gen)), len(gen)})
    run = min((products(gen, y, split) for split in splits), key = fastest)
    return lambda: (run(), y.sum())

# how it is measured

def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)

def now(args):
    """In seconds, when the device is done with what it was asked for."""
    synchronize(args.device)
    return time.process_time() if args.clock == 'cpu' else time.perf_counter()

def seconds(fn, args):
    """Of one call after another that is not counted: on the clock (of the device), and of this process's processor."""
    fn()
    synchronize(args.device)

    if args.device.type == 'cuda':
        start, end = (torch.cuda.Event(enable_timing = True) for _ in range(2))
        cpu = time.process_time()
        start.record()
        fn()
        end.record()
        synchronize(args.device)
        return start.elapsed_time(end) / 1e3, time.process_time() - cpu

    start = now(args)
    cpu = time.process_time()
    fn()
    return now(args) - start, time.process_time() - cpu

def interleaved(contenders, args):
    """{name: (median seconds, median processor seconds)} of the contenders {name: function}, which take turns."""
    times = {name: [] for name in contenders}

    for _ in range(args.rounds):
        for name, fn in contenders.items():
            times[name].append(seconds(fn, args))

    return {name: tuple(map(median, zip(*each, strict = True))) for name, each in times.items()}

def repeated(fn, number):
    """A function that calls fn so many times."""
    def run():
        for _ in range(number):
            fn()

    return run

def peak_mib(fn, device):
    """The most that torch held during a call, beyond what it held before."""
    fn()
    gc.collect()                # or what others left is freed during the call

    if device.type == 'cuda':
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2 ** 20

    with torch.profiler.profile(activities = [torch.profiler.ProfilerActivity.CPU], profile_memory = True) as profiler:
        fn()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'trace.json'
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())['traceEvents']

    events = [event for event in events if event.get('name') == '[memory]']
    held, total, peak = {}, 0, 0

    for event in sorted(events, key = lambda event: event['ts']):
        address, num_bytes = event['args']['Addr'], event['args']['Bytes']

        if num_bytes > 0:
            held[address] = num_bytes
            total += num_bytes
        else:
            total -= held.pop(address, 0)       # what was there before the call is not counted when it goes

        peak = max(peak, total)

    return peak / 2 ** 20

def mib(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors) / 2 ** 20

def matmul_rate(args, dtype):
    """flop/s of a large square product: what the device can do at all."""
    size = 8192 if args.device.type == 'cuda' else 1024
    a, b = (torch.randn(size, size, device = args.device, dtype = dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = partial(torch.mm, a, b, out = out)
    return 2 * size ** 3 / min(seconds(product, args)[0] for _ in range(5))

def flops_of(fn):
    with FlopCounterMode(display = False) as counter:
        fn()

    return counter.get_total_flops()

def is_main():
    return int(os.environ.get('RANK', 0)) == 0

def cell(value):
    """A number as text. None: does not apply."""
    if value is None:
        return '-'

    if isinstance(value, float):
        return f'{value:.3g}' if abs(value) < 100 else f'{value:,.0f}'

    return str(value)

def show(title, rows):
    """A table in markdown."""
    if not is_main():
        return

    columns = [[name, *(cell(row[name]) for row in rows)] for name in rows[0]]
    widths = [max(map(len, column)) for column in columns]
    padded = [[text.ljust(width) for text in column] for column, width in zip(columns, widths, strict = True)]
    lines = [f'| {" | ".join(texts)} |' for texts in zip(*padded, strict = True)]
    rule = f'|{"|".join("-" * (width + 2) for width in widths)}|'
    print(f'\n{title}\n', lines[0], rule, *lines[1:], sep = '\n', flush = True)

def plural(number, what):
    return f'{number} {what}{"s" * (number > 1)}'

# the loss

def problems(args, b, d, g = 64, p = 64, u = 16):
    generator = torch.Generator().manual_seed(0)
    gen, pos, uncond = (torch.randn(b, n, d, generator = generator).to(args.device) for n in (g, p, u))
    uncond_weight = torch.rand(b, u, generator = generator).to(args.device) + 0.5
    return gen.requires_grad_(), pos, uncond, uncond_weight

def ours(gen, pos, uncond, uncond_weight, **kwargs):
    return drift_loss(gen, pos, uncond, uncond_weight = uncond_weight, diagnostics = False, **kwargs)[0]

def compiled_field():
    """What compile = True compiles of the loss itself, on a GPU."""
    field = DriftField()
    field.coefficients = torch.compile(field.coefficients)
    return field

def gradient(loss_fn, features):
    """Forward, and backward with respect to the generated features of every set of problems."""
    gens = [inputs[0] for inputs in features]

    def run():
        return torch.autograd.grad(sum(loss_fn(*inputs).mean() for inputs in features), gens)

    return run

def compare(args, features):
    """Rows of contenders over a list of sets of problems (gen, pos, uncond, uncond_weight)."""
    floors = [floor(gen, pos, uncond, args) for gen, pos, uncond, _ in features]
    flops = 0

    for gen, pos, uncond, _ in features:
        b, g, d = gen.shape
        flops += loss_flops(b, g, g + pos.shape[1] + uncond.shape[1], d)

    losses = {'transcription': transcription, 'drift_loss': ours}

    if args.compile:
        losses['transcription, compiled'] = torch.compile(transcription)
        losses['drift_loss, compiled'] = partial(ours, field = compiled_field())

    contenders = {name: gradient(fn, features) for name, fn in losses.items()}
    times = interleaved({**contenders, 'floor': lambda: [run() for run in floors]}, args)
    gradients = mib(*(inputs[0] for inputs in features))
    rows = []

    for name, (wall, cpu) in times.items():
        row = {
            'contender': name,
            'ms': wall * 1e3,
            '/ transcription': wall / times['transcription'][0],
            '/ floor': wall / times['floor'][0]
        }

        if args.device.type == 'cpu' and args.clock == 'wall':
            row['cpu ms'] = cpu * 1e3
            row['cpu / transcription'] = cpu / times['transcription'][1]
            row['cpu / floor'] = cpu / times['floor'][1]

        row['GFLOP/s'] = flops / wall / 1e9
        row['MiB beyond inputs and gradient'] = None

        if name in contenders:
            row['MiB beyond inputs and gradient'] = peak_mib(contenders[name], args.device) - gradients

        rows.append(row)

    return rows

KINDS = {
    'products': ('bmm', 'baddbmm', 'addmm', 'mm'),
    'exponentials': ('exp',),
    'sums and extremes': ('sum', 'amax', 'vector_norm', 'vecdot', 'mean', 'aminmax', 'dot', 'min')
}

def shares(fn, device):
    """{kind of operation: share of the time that operations take} of a call."""
    fn()
    cuda = device.type == 'cuda'
    activities = [torch.profiler.ProfilerActivity.CPU]

    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    with torch.profiler.profile(activities = activities) as profiler:
        fn()
        synchronize(device)

    times = dict.fromkeys((*KINDS, 'the rest'), 0.)

    for event in profiler.key_averages():
        name = event.key.removeprefix('aten::').rstrip('_').removeprefix('linalg_')
        kind = next((kind for kind, names in KINDS.items() if name in names), 'the rest')
        times[kind] += event.self_device_time_total if cuda else event.self_cpu_time_total

    return {kind: value / sum(times.values()) for kind, value in times.items()}

def benchmark_loss(args):
    sizes = dict(W1 = (8, 256), W2 = (512, 256), W3 = (512, 640))

    if args.quick:
        sizes = dict(W1 = (8, 256), W2 = (32, 64))

    rows, where = [], []

    for name, (b, d) in sizes.items():
        problem = f'{name}, {b} of {d} dimensions'
        features = [problems(args, b, d)]
        rows += [{'problem': problem, **row} for row in compare(args, features)]
        where.append({'problem': problem, **shares(gradient(ours, features), args.device)})

    show('The loss, forward and backward: so many problems of 64 generated, 64 positives, 16 unconditional', rows)
    show('Where drift_loss spends its time, by kind of operation', where)
    return rows

SMALL = (           # problems, generated, positive and unconditional samples, dimensions
    (10, 32, 64, 0, 64),
    (32, 8, 1, 0, 32),
    (1, 64, 64, 0, 6),
    (4, 32, 128, 0, 784),
    (8, 64, 64, 16, 256)
)

def ours_without_weights(gen, pos, uncond, _):
    return drift_loss(gen, pos, uncond if uncond.numel() > 0 else None, diagnostics = False)[0]

def benchmark_small(args):
    """Where operations cost more than arithmetic. Each time is of many calls, the loss checks its input."""
    rows = []

    for b, g, p, u, d in SMALL[:2] if args.quick else SMALL:
        gen, pos, uncond, uncond_weight = problems(args, b, d, g, p, u)
        inputs = gen, pos + 1, uncond, torch.ones_like(uncond_weight)
        losses = {'plain loop': plain_loop, 'plain_drift_loss': plain_drift_loss, 'drift_loss': ours_without_weights}
        losses['its operations alone'] = bare_loss

        if args.compile:
            losses['plain loop, compiled'] = torch.compile(plain_loop, dynamic = False)

        contenders = {name: gradient(fn, [inputs]) for name, fn in losses.items()}
        calls = math.ceil(0.02 / seconds(contenders['drift_loss'], args)[0])
        runs = {name: repeated(fn, calls) for name, fn in contenders.items()}
        ms = {name: wall / calls * 1e3 for name, (wall, _) in interleaved(runs, args).items()}

        rows.append({
            'problems x generated, real, dimensions': f'{b} x {g}, {p}{f" + {u}" * (u > 0)}, {d}',
            **{f'{name}, ms': t for name, t in ms.items()},
            **{f'/ {name}': ms['drift_loss'] / t for name, t in ms.items() if name != 'drift_loss'}
        })

    show('Small problems, forward and backward; the last columns are drift_loss as a share of the others', rows)
    return rows

def benchmark_features(args):
    """Over all features of a MAE: shapes [f d] from an encoder without weights, and random features."""
    dim, size, layers = args.mae_dim, 32, (3, 4, 6, 3)
    groups = args.groups or 1

    if args.quick:
        dim, size, layers = 8, 8, (1, 1, 1, 1)
        groups = 1

    with torch.device('meta'):
        features = LatentMAE(dim = dim, layers = layers).features(torch.zeros(1, 4, size, size))
        shapes = [t.shape[1:] for t in features.values()]

    rows = compare(args, [problems(args, groups * f, d) for f, d in shapes])
    numbers = sum(f * d for f, d in shapes)
    what = f'the {len(shapes)} features of a MAE of width {dim}, {numbers:,} numbers per sample'
    show(f'The loss over {what}, {plural(groups, "group")}', rows)
    return rows

def problems_of(args, world, groups, samples, locations, dim):
    return problems(args, groups // world * locations, dim, samples, samples, samples // 4)

def exponent(values, measured):
    """Of the power of the values that fits best what was measured."""
    return float(np.polyfit(np.log(values), np.log(measured), 1)[0])

def growth_of_loss(args, world):
    """{what varies: (values, ms, peak MiB)} of the loss alone. All points are interleaved."""
    base = dict(groups = 4, samples = 64, locations = 16, dimensions = 128)
    grown = dict(
        groups = (1, 2, 4, 8, 16),
        samples = (16, 32, 64, 128),
        locations = (4, 16, 64),
        dimensions = (64, 128, 256, 512)
    )

    if args.quick:
        base, grown = dict(base, samples = 16), dict(groups = (1, 2), samples = (8, 16))

    grown['groups'] = tuple(num for num in grown['groups'] if num % world == 0)
    runs = {}

    for axis, values in grown.items():
        for value in values:
            groups, samples, locations, dim = sizes = tuple({**base, axis: value}.values())
            runs[sizes] = gradient(ours, [problems_of(args, world, groups, samples, locations, dim)])

    times = interleaved(runs, args)
    peaks = {sizes: peak_mib(run, args.device) for sizes, run in runs.items()}
    growth = {}

    for axis, values in grown.items():
        sizes = [tuple({**base, axis: value}.values()) for value in values]
        growth[axis] = values, [times[each][0] * 1e3 for each in sizes], [peaks[each] for each in sizes]

    return growth

def growth_of_step(args):
    """The same of the whole training step over its groups."""
    preset = STEPS['tiny']
    values = (1, 2) if args.quick else (1, 2, 4, 8)
    runs = {}

    with tempfile.TemporaryDirectory() as folder:
        for groups in values:
            trainer, batches = make_trainer(args, Path(folder) / str(groups), preset, groups)
            runs[groups] = partial(trainer.train_step, batches)

        times = interleaved(runs, args)
        peaks = [peak_mib(run, args.device) for run in runs.values()]

    return {'groups of a whole step': (values, [wall * 1e3 for wall, _ in times.values()], peaks)}

def benchmark_growth(args):
    """Time and memory over the size of the problems. Processes, if there are several, share the groups."""
    world = int(os.environ.get('WORLD_SIZE', 1))
    Accelerator(cpu = args.device.type == 'cpu')            # knows the other processes
    growth = growth_of_loss(args, world)

    if args.step:
        growth |= growth_of_step(args)

    rows = [
        {
            'what varies': axis,
            'values': ', '.join(map(str, values)),
            'ms': ', '.join(map(cell, ms)),
            'exponent of time': exponent(values, ms),
            'peak MiB beyond inputs': ', '.join(map(cell, peaks)),
            'exponent of the peak': exponent(values, peaks)
        }
        for axis, (values, ms, peaks) in growth.items()
    ]

    base = '4 groups of 64 samples, 16 locations, 128 dimensions'
    show(f'The loss as it grows from {base}, forward and backward, number of processes: {world}', rows)
    exponents = {row['what varies']: row['exponent of time'] for row in rows}
    uneven = [f'{axis} ({value:.2f})' for axis, value in exponents.items() if abs(value - 1) > 0.15]

    if is_main():
        print(f'\nNot linear in time: {", ".join(uneven) or "nothing"}. Exponents of 0.85 to 1.15 count as linear.')

    return rows

# a training step

TINY = dict(image_size = 16, channels = 4, patch_size = 2, dim = 128, depth = 4, heads = 4)

STEPS = dict(
    tiny = dict(
        generator = 'tiny',
        encoder = dict(dim = 16, layers = (1, 2, 2, 1)),
        settings = dict(num_groups = 2, num_gen = 16, num_pos = 16, num_uncond = 8)
    ),
    cpu = dict(
        generator = dict(image_size = 32, channels = 4, patch_size = 4, dim = 192, depth = 6, heads = 6),
        encoder = dict(dim = 64, layers = (1, 1, 2, 1)),
        settings = dict(num_groups = 8, num_gen = 16, num_pos = 16, num_uncond = 8)
    ),
    ablation = dict(
        generator = 'B/2',
        encoder = dict(dim = 256),
        settings = dict(num_groups = 64)
    )
)

ON_A_GPU = (64, 48, 32, 24, 16, 12, 8, 4, 2, 1)         # groups that are tried there

def make_generator(name, num_classes = 1000):
    if name == 'tiny':
        name = TINY

    if isinstance(name, dict):
        return DriftingGenerator(**name, num_classes = num_classes)

    return DriftingGenerator.from_preset(name, num_classes = num_classes)

def make_trainer(args, folder, preset, num_groups, compile = False):
    """The Trainer of the ablation, or a small one, on random samples of ten classes."""
    model = make_generator(preset['generator'], num_classes = 10)
    encoder = LatentMAE(**preset['encoder'], num_classes = None)
    dataset = TensorDataset(torch.randn(1_280, *model.noise_shape), torch.arange(1_280) % 10)

    trainer = Trainer.from_preset(
        'ablation', model, FeatureDriftLoss(encoder), dataset,
        **{**preset['settings'], 'num_groups': num_groups},
        cpu = args.device.type == 'cpu',
        mixed_precision = 'bf16' if args.device.type == 'cuda' else 'no',
        compile = compile,
        log_every = 0, sample_every = 0, save_every = 0,
        results_folder = folder,
        overwrite = True
    )

    batches = trainer.batches()
    trainer.before_training(batches)
    return trainer, batches

class Stopwatch:
    """{part: seconds} of what was done between two calls, summed where a part comes again."""

    def __init__(self, args):
        self.args = args
        self.parts = {}
        self.last = now(args)

    def mark(self, part):
        before, self.last = self.last, now(self.args)
        self.parts[part] = self.parts.get(part, 0.) + self.last - before

def parts_of_step(trainer, batches, args):
    """{part: seconds} of a step that is made of the Trainer's own pieces, one after the other."""
    loss_fn, accelerator = copy(trainer.loss_fn), trainer.accelerator
    features = loss_fn.features
    watch = Stopwatch(args)

    def timed_features(x):
        out = features(x)
        watch.mark('encoder of generated' if torch.is_grad_enabled() else 'encoder of real')
        return out

    loss_fn.features = timed_features

    labels, alpha, pos, uncond = trainer.draw(trainer.push(batches), 0)
    inputs = trainer.inputs(labels, alpha, 0)
    watch.mark('real samples')

    with accelerator.autocast():
        gen = trainer.generate(*inputs)
        watch.mark('generator')
        gen.register_hook(lambda grad: watch.mark('backward of loss and encoder'))

        u = uncond.shape[1]
        weight = ((alpha - 1) * (gen.shape[1] - 1) / u)[:, None].expand(-1, u)
        samples = dict(gen = gen, pos = pos, uncond = uncond, uncond_weight = weight)
        loss, _ = loss_fn.loss_of(samples, dict(loss_fn.drift_loss_kwargs, diagnostics = False))
        watch.mark('loss')

    accelerator.backward(loss)
    watch.mark('backward of generator')

    accelerator.clip_grad_norm_(trainer.model.parameters(), 2.)
    trainer.optimizer.step()
    trainer.ema.update()
    trainer.optimizer.zero_grad()
    watch.mark('optimiser')
    return watch.parts

def resident_mib(what):
    """Of this process, by the system: VmRSS now, VmHWM at most."""
    lines = dict(line.split(':') for line in Path('/proc/self/status').read_text().splitlines())
    return int(lines[what].split()[0]) / 2 ** 10

def peak_of_process(args, preset, groups):
    """(at most, before the first step) MiB of a process that takes three steps: run it in a new one."""
    torch.set_num_threads(args.threads)

    with tempfile.TemporaryDirectory() as folder:
        trainer, batches = make_trainer(args, folder, preset, groups)
        before = resident_mib('VmRSS')

        for _ in range(3):
            trainer.train_step(batches)

    return resident_mib('VmHWM'), before

def measure_step(args, preset, groups):
    """Of a step: (wall seconds, processor seconds) as a whole, {part: seconds} of several, the peak of its memory."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, batches = make_trainer(args, folder, preset, groups, args.compile)
        step = partial(trainer.train_step, batches)

        wall = argparse.Namespace(**{**vars(args), 'clock': 'wall'})
        whole = interleaved({'step': step}, wall)['step']
        parts = [parts_of_step(trainer, batches, args) for _ in range(args.rounds)]
        return whole, parts, peak_mib(step, args.device)

def measure_largest_step(args, preset, sizes):
    """With as many groups as fit: their number, and what measure_step says of them."""
    for groups in sizes:
        if args.device.type == 'cuda':
            gc.collect()
            torch.cuda.empty_cache()                    # the memory of the one before

        try:
            return groups, *measure_step(args, preset, groups)
        except RuntimeError as error:                   # near the limit cuDNN and cuBLAS have errors of their own
            failure = str(error)                        # not its frames, which hold memory
            print(f'{groups} groups: {failure}', file = sys.stderr)

    raise SystemExit(f'not even one group fits: {failure}')

def benchmark_step(args):
    name = 'tiny' if args.quick else args.preset
    on_a_gpu = args.device.type == 'cuda'
    preset = STEPS[name]
    most = preset['settings']['num_groups']
    sizes = [most]

    if args.groups:
        sizes = [args.groups]
    elif on_a_gpu:
        sizes = [groups for groups in ON_A_GPU if groups <= most]

    with tempfile.TemporaryDirectory() as folder:       # of one group, they grow with the groups
        trainer, batches = make_trainer(args, folder, preset, 1)
        flops_per_group = flops_of(partial(trainer.train_step, batches))
        num_gen = trainer.settings.num_gen

    del trainer, batches
    groups, (wall, cpu), each, peak = measure_largest_step(args, preset, sizes)
    clock = cpu if args.clock == 'cpu' else wall

    parts = {part: median(times[part] for times in each) for part in each[0]}
    total = sum(parts.values())
    rows = [{'part': part, 'ms': t * 1e3, 'share': t / total} for part, t in {**parts, 'sum': total}.items()]

    what = f'{name}, {plural(groups, "group")} of {num_gen} generated samples'
    show(f'A training step, {what}, {len(parts)} parts one after the other', rows)

    rate = matmul_rate(args, torch.bfloat16 if on_a_gpu else torch.float32)
    flops = groups * flops_per_group
    memory = {}

    if not on_a_gpu and Path('/proc/self/status').exists():
        with get_context('spawn').Pool(1) as pool:
            process, before = pool.apply(peak_of_process, (args, preset, groups))

        memory = {'peak MiB of a new process': process, 'of these, by the steps': process - before}

    summary = [{
        'groups': groups,
        'wall seconds': wall,
        'processor seconds': cpu,
        'samples per second': groups * num_gen / clock,
        'peak MiB of torch': peak,
        **memory,
        'TFLOP': flops / 1e12,
        'utilisation': flops / clock / rate,
        'of TFLOP/s': rate / 1e12
    }]

    show("The Trainer's step as a whole; utilisation is against the measured rate of a large product", summary)
    return dict(parts = rows, whole = summary)

class VectorNet(nn.Sequential):
    """The README's generator of vectors, and what the bare loop asks of it."""

    noise_shape, num_classes = (6,), None

    def __init__(self):
        super().__init__(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 6))

    def forward(self, noise, labels = None, alpha = None, styles = None):
        return super().forward(noise)

TRAINED = {         # make a generator, the shape of a sample, number of classes, settings, steps of a timed call
    'vectors of 6 numbers': (
        VectorNet, (6,), 1,
        dict(num_groups = 1, num_gen = 64, num_pos = 64, alpha_range = (1., 1.)), 200
    ),
    'pictures of 28x28, by a ConvGenerator': (
        partial(ConvGenerator, image_size = 28, channels = 1, num_classes = 10, noise_channels = 1), (1, 28, 28), 10,
        dict(num_groups = 4, num_gen = 32, num_pos = 128, class_queue_size = 400, alpha_range = (1., 1.2)), 30
    )
}

def bare_loop(model, loss_fn, samples, settings):
    """A step of the same loss, optimizer and clipping, as one would write it: samples [classes n ...] lie in memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr = 2e-4, betas = (0.9, 0.95), weight_decay = 0.01, fused = True)
    groups, num_gen, num_pos = (settings[name] for name in ('num_groups', 'num_gen', 'num_pos'))
    low, high = settings['alpha_range']

    def step():
        labels = torch.randperm(len(samples))[:groups]
        pos = torch.stack([samples[i][torch.randperm(samples.shape[1])[:num_pos]] for i in labels.tolist()])
        noise, alpha, uncond = torch.randn(groups * num_gen, *model.noise_shape), None, None

        if high > 1:
            alpha = drifting.sample_alpha(groups, low = low, high = high)
            uncond = samples.flatten(0, 1)[torch.randint(samples.shape[:2].numel(), (groups, 16))]

        given = [t if t is None else t.repeat_interleave(num_gen) for t in (labels, alpha)]
        gen = model(noise, *given).unflatten(0, (groups, num_gen))
        loss, _ = loss_fn(gen, pos, uncond, alpha, diagnostics = False)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.)
        optimizer.step()

    return step

def trainer_loop(trainer, batches, steps):
    """So many steps, with all that Trainer does in them: average, checks, logs, signals, reading of samples."""
    def run():
        trainer.settings.num_train_steps = trainer.step + steps
        trainer.run(batches)

    return run

def benchmark_trainer(args):
    """What Trainer costs beyond a bare loop. The loss compares raw samples."""
    if args.device.type == 'cuda' or int(os.environ.get('WORLD_SIZE', 1)) > 1:
        print('\nTrainer is compared with a bare loop on the cpu, in one process', flush = True)
        return []

    rows = []

    for what, (make, shape, num_classes, settings, steps) in TRAINED.items():
        samples = torch.randn(num_classes, 400, *shape)
        labels = torch.arange(num_classes).repeat_interleave(400)
        loss_fn = FeatureDriftLoss(affinity_floor = 0.)
        steps = 2 if args.quick else steps

        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                make(), loss_fn, TensorDataset(samples.flatten(0, 1), labels), **settings, cpu = True,
                sample_every = 0, save_every = 0, progress_bar = False, results_folder = folder
            )
            batches = trainer.batches()
            trainer.before_training(batches)
            bare = repeated(bare_loop(make(), loss_fn, samples, settings), steps)
            times = interleaved({'bare': bare, 'Trainer': trainer_loop(trainer, batches, steps)}, args)

        bare, ours = (wall / steps * 1e3 for wall, _ in times.values())
        rows.append({
            'what': what,
            'bare loop, ms': bare,
            'Trainer, ms': ours,
            'more, ms': ours - bare,
            '/ bare': ours / bare
        })

    show('A step of Trainer, and one of a bare loop with the same loss, optimizer and clipping, and no average', rows)
    return rows

def benchmark_maps(args):
    """map_features, alone, in an encoder and in a step, against var_mean of maps that lie channel by channel."""
    preset = STEPS['tiny' if args.quick else 'cpu']
    groups, num_gen = args.groups or preset['settings']['num_groups'], preset['settings']['num_gen']
    model = make_generator(preset['generator'], num_classes = None)
    encoder = LatentMAE(**preset['encoder'], num_classes = None).to(args.device).requires_grad_(False)
    x = torch.randn(groups * num_gen, *model.noise_shape, device = args.device).requires_grad_()

    def there_and_back(features_of, inputs):
        gradients = [torch.randn_like(t) for t in features_of().values()]
        return lambda: torch.autograd.grad(list(features_of().values()), inputs, gradients)

    def of_maps():
        maps = {name: t.detach().requires_grad_() for name, t in encoder.maps(encoder.fold(x)).items()}

        def features_of_maps():
            features = {}

            for name, t in maps.items():
                features |= drifting.map_features(name, t, encoder.feature_sets)

            return features

        return there_and_back(features_of_maps, list(maps.values()))

    with tempfile.TemporaryDirectory() as folder:
        trainer, batches = make_trainer(args, folder, preset, groups)
        today = {
            'features of maps, forward and backward': of_maps,
            'encoder with features, forward and backward': lambda: there_and_back(partial(encoder.features, x), [x]),
            'training step': lambda: partial(trainer.train_step, batches)
        }
        contenders = {}

        for name, make in today.items():
            contenders[name, 0] = make()
            plain = with_var_mean(make)()                   # its maps are made so, too
            contenders[name, 1] = with_var_mean(plain)

        times = interleaved(contenders, args)

    rows = [
        {
            'of': name,
            'var_mean, ms': times[name, 1][0] * 1e3,
            'map_features, ms': times[name, 0][0] * 1e3,
            '/ var_mean': times[name, 0][0] / times[name, 1][0]
        }
        for name in today
    ]

    show(f'Features of the maps of an encoder, {len(x)} generated samples', rows)
    return rows

# sampling

def product_shapes(model, batch, dtype):
    """{(number, n, k, m): times} of the matrix products of a forward pass: of linear layers, and of attention."""
    shapes = {}

    def note(module, inputs, _):
        shape = (1, inputs[0].numel() // module.in_features, module.in_features, module.out_features)
        shapes[shape] = shapes.get(shape, 0) + 1

    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    sample(model, batch, dtype)()

    for hook in hooks:
        hook.remove()

    tokens, dim_head = model.rotary.shape[1:]
    heads = batch * model.blocks[0].attn.heads

    for shape in ((heads, tokens, dim_head, tokens), (heads, tokens, tokens, dim_head)):
        shapes[shape] = shapes.get(shape, 0) + len(model.blocks)

    return shapes

def matrix_products(model, batch, args, dtype):
    """Seconds of these products by themselves, each at its own shape into memory that exists."""
    total = 0.

    for (number, n, k, m), times in product_shapes(model, batch, dtype).items():
        shapes = (n, k), (k, m), (n, m)
        a, b, out = (torch.zeros(number, *shape, device = args.device, dtype = dtype) for shape in shapes)
        product = partial(torch.bmm, a, b, out = out)
        total += times * min(seconds(product, args)[0] for _ in range(3))

    return total

def sample(model, batch, dtype):
    labels = torch.zeros(batch, dtype = torch.long)
    device = next(model.parameters()).device

    def run():
        precision = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype = dtype)

        with precision:
            return model.sample(labels, seed = 0)

    return run

def benchmark_sampling(args):
    device = args.device
    dtype = torch.bfloat16 if device.type == 'cuda' else torch.float32
    rate = matmul_rate(args, dtype)
    models, batch_sizes = args.models, args.batch_sizes
    rows = []

    if args.quick:
        models, batch_sizes = ['tiny'], (1, 4)

    for name in models:
        with device:
            model = make_generator(name).eval()

        for batch in batch_sizes:
            flops = flops_of(sample(model, batch, dtype))
            contenders = {'eager': sample(model, batch, dtype)}

            if args.compile:
                compiled = deepcopy(model)
                compiled.compile()
                contenders['compiled'] = sample(compiled, batch, dtype)

            alone = matrix_products(model, batch, args, dtype)

            for contender, (wall, _) in interleaved(contenders, args).items():
                rows.append({
                    'generator': name,
                    'batch': batch,
                    'contender': contender,
                    'images / s': batch / wall,
                    'ms': wall * 1e3,
                    'GFLOP': flops / 1e9,
                    'products alone, ms': alone * 1e3,
                    '/ products': wall / alone,
                    'utilisation': flops / wall / rate
                })

    measured = f'{rate / 1e9:,.0f} GFLOP/s, the measured rate of a large product'
    show(f'Sampling, one network evaluation each; utilisation of {measured}', rows)
    return rows

BENCHMARKS = dict(
    loss = benchmark_loss,
    small = benchmark_small,
    features = benchmark_features,
    maps = benchmark_maps,
    step = benchmark_step,
    trainer = benchmark_trainer,
    sampling = benchmark_sampling,
    growth = benchmark_growth
)

def device_name(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)

    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    name = names[0] if names else platform.processor() or platform.machine()
    return f'{name}, {plural(torch.get_num_threads(), "thread")}'

def options():
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser = make_parser(__doc__)
    parser.add_argument('what', choices = [*BENCHMARKS, 'all'], help = 'what to measure')
    parser.add_argument('--device', type = torch.device, default = torch.device(device), help = 'cpu or cuda')
    parser.add_argument('--threads', type = positive, default = 1, help = 'cpu threads')
    parser.add_argument('--rounds', type = positive, default = 9, help = 'timed calls of each contender')
    parser.add_argument(
        '--clock', choices = ['wall', 'cpu'], default = 'wall',
        help = 'what times are read from: cpu is the processor time of this process, for a cpu shared with others'
    )
    parser.add_argument(
        '--compile', action = 'store_true',
        help = 'torch.compile too: as further contenders, in the step instead'
    )
    parser.add_argument(
        '--quick', action = 'store_true',
        help = 'tiny sizes and two rounds, to see that everything runs'
    )
    parser.add_argument(
        '--preset', choices = list(STEPS), default = 'cpu',
        help = 'of the step: cpu is a generator of width 192 with a MAE of width 64, ablation is for a GPU'
    )
    parser.add_argument('--step', action = 'store_true', help = 'growth: of a small training step too')
    parser.add_argument(
        '--groups', type = int, default = 0,
        help = "class groups of step, maps and features, 0: the preset's, on a GPU at most as many as fit; "
               "1 for the features"
    )
    parser.add_argument(
        '--mae-dim', type = positive, default = 256,
        help = 'width of the encoder whose features are compared'
    )
    parser.add_argument('--models', nargs = '+', default = ['B/2', 'L/2'], help = 'generators to sample from')
    parser.add_argument('--batch-sizes', type = positive, nargs = '+', default = [1, 8], help = 'of sampling')
    parser.add_argument('--output', default = 'results/benchmark.json', help = 'the json file to write')
    args = parser.parse_args()

    if args.device.type == 'cuda' and args.clock == 'cpu':
        parser.error('--clock cpu does not see what a GPU does')

    if args.quick:
        args.rounds = 2

    return args

def main():
    args = options()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    name = device_name(args.device)
    networks = '; networks in bfloat16' if args.device.type == 'cuda' else ''

    if is_main():
        print(f'{name}, torch {torch.__version__}, float32, {args.clock} time{networks}')

    results = {what: run(args) for what, run in BENCHMARKS.items() if args.what in (what, 'all')}

    if is_main():
        output = Path(args.output)
        settings = {key: str(value) for key, value in vars(args).items()}
        record = dict(device = name, torch = torch.__version__, settings = settings, **results)
        output.parent.mkdir(parents = True, exist_ok = True)
        output.write_text(json.dumps(record, indent = 1))
        print(f'\n{output}')

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

if __name__ == '__main__':
    main()
