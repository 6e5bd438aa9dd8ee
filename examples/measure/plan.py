"""What a training run of ImageNet needs, computed without a GPU: memory, operations, collective calls, days.

python examples/measure/plan.py --preset L/2 --gpus 64      one run, a table for each part
python examples/measure/plan.py --all                       all presets on 1, 8 and 64 GPUs, a line each
python examples/measure/plan.py --encoders --gpus 8         how many samples of train_mae.py fit
python examples/measure/plan.py --simulate 8 64 1024        small steps of some of so many processes, on this machine

The Trainer's own step runs on the meta device: shapes without numbers. Every tensor that is allocated there is counted
until it is freed, and every product. What torch, the driver and the libraries need besides is --margin. The speed of
the GPU and of the network are not known here: they are options. Processes are replicated, not sharded.

--simulate takes real steps of a tiny model in torch's fake process group: one process runs, the others are taken to do
what it does. Calls, bytes and memory are counted.

Writes --output, a json file, and prints the same as tables.
"""

import json
import math
import os
import sys
import tempfile
import time
import tracemalloc
import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, distributed
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import BatchSampler, Dataset
from torch.utils.flop_counter import flop_registry

from benchmark import peak_mib, show
from drifting_pytorch import ConvNeXtFeatures, DriftingGenerator, FeatureDriftLoss, LatentMAE, Trainer, drifting
from drifting_pytorch.drifting import PRESETS, TRAINER_PRESETS, GeneratorSettings, check

sys.path.insert(0, str(Path(__file__).parents[1]))      # examples/

from common import make_parser, num_parameters, positive

NUM_CLASSES = 1000

# the encoders of the commands in examples/README.md

LATENT_640 = dict(dim = 640)
PIXEL_640 = dict(dim = 640, channels = 3, patch_size = 8)

ENCODERS = {
    'ablation': dict(dim = 256), 'B/2': LATENT_640, 'L/2': LATENT_640,
    'L/2-512': dict(LATENT_640, patch_size = 2),        # maps as large as those of L/2
    'B/16': PIXEL_640, 'L/16': PIXEL_640
}

def tensors_of(*modules):
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]

def nbytes(*modules):
    return sum(t.nbytes for t in tensors_of(*modules))

# counting

SHAPES = {}             # of the results of operations that were seen

def described(value):
    if isinstance(value, (list, tuple)):
        return [described(each) for each in value]
    if isinstance(value, dict):
        return {name: described(each) for name, each in value.items()}
    return (tuple(value.shape), value.stride(), value.dtype) if torch.is_tensor(value) else value

class Meter(TorchDispatchMode):
    """Bytes that tensors hold, and operations of products, between two marks."""

    def __init__(self):
        super().__init__()
        self.held = {}              # {storage: bytes}
        self.live = self.peak = self.highest = self.before = self.flops = 0
        self.records = []

    def __torch_dispatch__(self, func, types, args = (), kwargs = None):
        out = self.result(func, args, kwargs or {})
        formula = flop_registry.get(func.overloadpacket)

        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val = out)

        for t in tree_leaves(out):
            if torch.is_tensor(t):
                self.hold(t.untyped_storage())

        return out

    def result(self, func, args, kwargs):
        """func of these. Its shape is worked out once: torch takes long."""
        writes_alone = torch.Tag.pointwise in func.tags and func._schema.name.endswith('_')

        if writes_alone and args[0].is_meta:
            return args[0]

        is_view = any(returned.alias_info for returned in func._schema.returns)
        key = None if is_view else repr((func, *map(described, args), described(kwargs)))

        if key in SHAPES:
            shape, stride, dtype = SHAPES[key]
            return torch.empty_strided(shape, stride, dtype = dtype, device = 'meta')

        out = func(*args, **kwargs)

        if key and torch.is_tensor(out) and out.is_meta:
            SHAPES[key] = out.shape, out.stride(), out.dtype

        return out

    def hold(self, storage):
        key = storage._cdata

        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.release, key).atexit = False

    def release(self, key):
        self.live -= self.held.pop(key)

    def mark(self, part, feature = None):
        """What came since the last mark was this part."""
        self.highest = max(self.highest, self.peak)
        self.records.append(dict(
            part = part, feature = feature, flops = self.flops,
            peak = self.peak, working = self.peak - self.before, kept = self.live - self.before
        ))
        self.peak = self.before = self.live
        self.flops = 0

HALF = 'linear', 'conv2d', 'matmul', '__matmul__', 'bmm', 'baddbmm'
FULL = 'group_norm', 'layer_norm', 'softmax'

class LikeGPU(TorchFunctionMode):
    """What torch does on a GPU and not on the meta device: autocast to bfloat16, fused attention."""

    def __init__(self, half):
        super().__init__()
        self.half, self.enabled = half, False
        self.weights = {}           # in half precision, as autocast keeps them

    def __torch_function__(self, func, types, args = (), kwargs = None):
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')

        if self.enabled and name in (*HALF, 'scaled_dot_product_attention'):
            args, kwargs = tree_map_only(Tensor, self.to_half, (args, kwargs))
        elif self.enabled and name in FULL:
            args, kwargs = tree_map_only(Tensor, drifting.full_precision, (args, kwargs))

        if name == 'scaled_dot_product_attention':      # keeps no weights of pairs
            check(kwargs.get('attn_mask') is None, 'attention with a mask is not planned for')
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        if name == 'logsumexp':                         # with the copy inside it, of which torch tells nothing
            (t, *rest), keep = args, dict(kwargs, keepdim = True)
            return (t - t.amax(*rest, **keep)).exp_().sum(*rest, **kwargs).log()

        return func(*args, **kwargs)

    def to_half(self, t):
        if t.dtype != torch.float32:
            return t
        if not (t.is_leaf and t.requires_grad):
            return t.bfloat16()
        if id(t) not in self.weights:
            self.weights[id(t)] = t.bfloat16()
        return self.weights[id(t)]

    @contextmanager
    def precision(self, enabled):
        before, self.enabled = self.enabled, enabled and self.half
        yield
        self.enabled = before
        if not before:
            self.weights.clear()

    def autocast(self):
        """torch.autocast, a class that others have imported, becomes this one."""
        def init(context, device_type, dtype = None, enabled = True, **kwargs):
            context.inner = self.precision(enabled)

        methods = dict(
            __init__ = init,
            __enter__ = lambda context: context.inner.__enter__(),
            __exit__ = lambda context, *error: context.inner.__exit__(*error)
        )
        return patch.multiple(torch.autocast, **methods)

    @contextmanager
    def again(self, enabled):
        """Inside a backward pass, where torch has switched the mode off."""
        with self, self.precision(enabled):
            yield

    def checkpoint(self, block, *args, use_reentrant):
        enabled = self.enabled
        return torch.utils.checkpoint.checkpoint(
            block, *args, use_reentrant = use_reentrant, preserve_rng_state = False,
            context_fn = lambda: (nullcontext(), self.again(enabled))
        )

# a step on the meta device

class MetaTrainer(Trainer):
    """The Trainer's step of one process, without its data, its weights' update and its files."""

    def __init__(self, model, loss_fn, settings, meter):
        self.settings, self.meter, self.unwrapped = settings, meter, model
        self.world, self.rank, self.logs_this_step, self.has_conditions = 1, 0, False, False
        self.num_classes, self.sample_shape = model.num_classes, model.noise_shape
        self.loss_fn = watched(loss_fn, meter).with_options(group_chunk_size = settings.group_chunk_size)
        self.accelerator = SimpleNamespace(autocast = lambda: torch.autocast('meta'), backward = Tensor.backward)

    def model(self, *inputs):
        with self.accelerator.autocast():
            return self.unwrapped(*inputs).float()

    def synced(self, sync):
        return nullcontext()

    def seed_model(self, *key):
        pass

    def push(self, batches):
        pass

    def draw(self, newest, micro_step):
        c, s = self.settings.num_groups, self.settings
        sets = [torch.empty(c, num, *self.sample_shape) for num in (s.num_pos, s.num_uncond)]
        return torch.zeros(c, dtype = torch.long), torch.ones(c), *sets

    def inputs(self, labels, alpha, micro_step, kind = 'gen'):
        c, g = self.settings.num_groups, self.settings.num_gen
        styles = torch.zeros(c, g, self.unwrapped.num_style_tokens, dtype = torch.long)
        return torch.empty(c, g, *self.sample_shape), labels, alpha, styles

    def generate(self, *inputs):
        self.meter.mark('samples, and generator backward')
        gen = super().generate(*inputs)
        self.meter.mark('generator')
        return gen

    def loss(self, gen, *others):
        if gen.grad_fn is not None:
            gen.register_hook(lambda grad: self.meter.mark('encoder backward'))
        return super().loss(gen, *others)

def watched(loss_fn, meter):
    """The loss, with marks behind the encoder and behind every feature."""
    other = copy(loss_fn)

    def features(x):
        meter.mark('encoder backward')
        found = loss_fn.features(x)
        meter.mark('encoder of generated' if torch.is_grad_enabled() else 'encoder of real')
        return found

    def problems(*args, **kwargs):
        inner = copy(loss_fn)
        inner.features = features
        names = []

        def noted(part):
            names.append([(name, sizes_of(problems)) for name, problems in part.items()])
            return part

        parts = map(noted, inner.problems(*args, **kwargs))

        while True:                 # no name of the problems here, or two parts are held
            try:
                yield next(parts)
            except StopIteration:
                return
            meter.mark('loss', names[-1])

    other.problems = problems
    return other

def sizes_of(problems):
    return dict(
        problems = problems.b, gen = problems.g, others = problems.y - problems.m, dim = problems.d,
        parts = len(problems.parts)
    )

@contextmanager
def on_meta(half, *modules, patches):
    """A Meter, of what is not modules, and a LikeGPU, both at work."""
    meter, like_gpu = Meter(), LikeGPU(half)
    meter.held = {t.untyped_storage()._cdata: 0 for t in tensors_of(*modules)}              # not of the step
    patches = [like_gpu.autocast(), patch.object(drifting, 'checkpoint', like_gpu.checkpoint), *patches]

    with ExitStack() as stack:
        for context in (*patches, torch.device('meta'), like_gpu, meter):
            stack.enter_context(context)

        yield meter, like_gpu

def simulate(model, loss_fn, settings, half = True):
    """A step of one process with settings.num_groups groups: records of its parts, its peak, its sums over processes.

    Everything is on the meta device. Bytes are what the step allocates, gradients of the weights included.
    """
    sums = []

    def counted(t):
        sums.append(t.nbytes)

    patches = [
        patch.object(torch.distributed, 'is_initialized', lambda: True),
        patch.object(torch.distributed, 'all_reduce', counted)
    ]

    with on_meta(half, model, loss_fn, patches = patches) as (meter, _):
        trainer = MetaTrainer(model, loss_fn, settings, meter)
        result = trainer.backward(None, 0, True)
        meter.mark('samples, and generator backward')

    del result
    model.zero_grad()
    return SimpleNamespace(records = meter.records, peak = meter.highest, sums = sums)

# a run: what a preset trains, with which encoders

@lru_cache
def make_run(preset, checkpointing):
    """Generator, loss and settings of train_generator.py. checkpointing: of 'none', of the 'encoder', or of 'both'."""
    generator = 'B/2' if preset == 'ablation' else preset

    with torch.device('meta'):
        model = DriftingGenerator.from_preset(generator, num_classes = NUM_CLASSES).to('meta')
        encoders = [LatentMAE(**ENCODERS[preset])]

        if PRESETS[generator]['channels'] == 3:
            from transformers import ConvNextV2Config, ConvNextV2Model

            base = ConvNextV2Config(hidden_sizes = [128, 256, 512, 1024], depths = [3, 3, 27, 3])
            encoders.append(ConvNeXtFeatures(ConvNextV2Model(base)).to('meta'))

    model.checkpointing, encoders[0].checkpointing = checkpointing == 'both', checkpointing != 'none'
    return model, FeatureDriftLoss(encoders), GeneratorSettings(**TRAINER_PRESETS[preset])

@lru_cache
def simulated(preset, num_groups, chunk, checkpointing):
    model, loss_fn, settings = make_run(preset, checkpointing)
    return simulate(model, loss_fn, replace(settings, num_groups = num_groups, group_chunk_size = chunk))

def peak_of(preset, num_groups, chunk, checkpointing):
    """Bytes of a step: simulated up to 16 groups, and on straight lines through simulations for more and for chunks."""
    def peak(*sizes):
        return simulated(preset, *sizes, checkpointing).peak

    if chunk is not None:
        model, _, settings = make_run(preset, checkpointing)
        num_samples = 3 * settings.num_gen + settings.num_pos + settings.num_uncond         # noise and gradient too
        per_group = 4 * math.prod(model.noise_shape) * num_samples
        per_group_of_chunk = (peak(16, 8) - peak(8, 4)) / 4 - 2 * per_group
        return peak(8, 4) + (num_groups - 8) * per_group + (chunk - 4) * per_group_of_chunk

    if num_groups <= 16:
        return peak(num_groups, None)

    return peak(16, None) + (num_groups - 16) * (peak(32, None) - peak(16, None)) / 16

def flops_of(preset, num_groups, chunk, checkpointing):
    """{part: operations} of a step, in proportion to its groups."""
    simulated_groups, parts = (2 if chunk is None else 8), {}

    for record in simulated(preset, simulated_groups, chunk and 4, checkpointing).records:
        parts[record['part']] = parts.get(record['part'], 0) + record['flops'] * num_groups / simulated_groups

    return parts

def held_to_train(model, gpus):
    """{what: (bytes on the GPU, bytes on the host)} of a process between two steps, of any training."""
    trained = sum(p.nbytes for p in model.parameters())

    return {
        'weights': (nbytes(model), 0),
        'averages': (nbytes(model), 0),
        'optimizer': (2 * trained, 0),
        'buckets for the sum of the gradients': (trained if gpus > 1 else 0, 0)
    }

def held(model, loss_fn, settings, gpus):
    """The same of a generator's training, with all that it has besides."""
    num_queued = model.num_classes * settings.class_queue_size + settings.uncond_queue_size
    queues = num_queued * math.prod(model.noise_shape) * (settings.queue_dtype or torch.float32).itemsize

    return {
        **held_to_train(model, gpus),
        'encoders': (nbytes(*loss_fn.frozen), 0),
        'queues of real samples': (0, queues) if str(settings.queue_device) == 'cpu' else (queues, 0)
    }

def num_buckets(model):
    """In which DistributedDataParallel sums gradients, from the last parameter on: of 1 MiB, then of 25 MiB."""
    num, size = 0, 0

    for p in reversed(list(model.parameters())):
        size += p.nbytes
        if size >= (25 if num else 1) * 2 ** 20:
            num, size = num + 1, 0

    return num + (size > 0)

def collectives(model, result, chunk, gpus, args):
    """A row for each kind of call, on average of a step. Nothing is hidden behind computation."""
    num_sums = len(result.sums) if chunk is None else 2         # chunks are summed before processes are
    num_features = sum(len(record['feature'] or ()) for record in result.records)
    logged = 4 * (8 + 11 * num_features)                # loss, scale, and three numbers for each temperature
    kinds = {
        'sums of the loss': (num_sums, sum(result.sums)),
        'gradients': (num_buckets(model), sum(p.nbytes for p in model.parameters())),
        'every tenth step: numbers to log, signals, whether it is finite': (4 / 10, logged / 10)
    }
    rows = []

    for kind, (calls, size) in kinds.items() if gpus > 1 else ():
        ms = calls * args.latency / 1e3 + 2 * (gpus - 1) / gpus * size / args.bandwidth / 1e6
        rows.append({'collective calls': kind, 'calls': calls, 'MB': size / 1e6, 'ms': ms})

    return rows

def fitting(preset, num_groups, free):
    """(chunk, checkpointing) with the fewest operations that fit into so many bytes, or what needs least."""
    for chunks in ([None], range(num_groups - 1, 0, -1)):
        for checkpointing in ('none', 'both'):
            for chunk in chunks:
                if peak_of(preset, num_groups, chunk, checkpointing) <= free:
                    return chunk, checkpointing

    return 1 if num_groups > 1 else None, 'both'

def needs(preset, gpus, args):
    """What a run needs, in one row; and the rows of its tables."""
    model, loss_fn, settings = make_run(preset, 'none')
    check(
        1 <= gpus <= settings.num_groups,
        f'{gpus} GPUs cannot share the {settings.num_groups} groups of {preset}: each needs one at least'
    )
    num_groups = math.ceil(settings.num_groups / gpus)
    always = held(model, loss_fn, settings, gpus)
    on_gpu, on_host = map(sum, zip(*always.values(), strict = True))
    free = args.memory * 1e9 * (1 - args.margin) - on_gpu
    chunk, checkpointing = fitting(preset, num_groups, free)

    sizes = num_groups, chunk, checkpointing

    peak, flops = peak_of(preset, *sizes), flops_of(preset, *sizes)
    calls = collectives(model, simulated(preset, 2, None, 'none'), chunk, gpus, args)
    ms_of_calls = sum(call['ms'] for call in calls)
    seconds = sum(flops.values()) / (args.tflops * 1e12 * args.utilisation) + ms_of_calls / 1e3
    row = {
        'preset': preset, 'GPUs': gpus, 'groups per GPU': num_groups,
        '`--group-chunk-size`': chunk or '',
        '`--checkpointing`': 'yes' if checkpointing == 'both' else '',
        'GB per GPU': f'{(on_gpu + peak) / 1e9:.1f}{"" if peak <= free else ", too many"}',
        'GB per process on the host': on_host / 1e9,
        'TFLOP per GPU and step': sum(flops.values()) / 1e12,
        'calls per step': round(sum(call['calls'] for call in calls)),
        'ms in calls': ms_of_calls,
        'days': seconds * settings.num_train_steps / 86_400
    }

    if args.all:
        return row, {}

    total = sum(flops.values())
    tables = {
        'Memory that a process holds between two steps': [
            {'held': what, 'GB on the GPU': gpu / 1e9, 'GB on the host': host / 1e9}
            for what, (gpu, host) in always.items()
        ],
        'What is kept for the backward pass, per group, and how many groups fit without chunks':
            [activations(preset, name, free) for name in ('none', 'encoder', 'both')],
        'The loss of two groups, the features that need most': loss_by_feature(preset),
        'Operations of a step on one GPU':
            [{'part': part, 'TFLOP': each / 1e12, 'share': each / total} for part, each in flops.items()],
        'Collective calls of a step': calls
    }
    return row, tables

def activations(preset, checkpointing, free):
    result = simulated(preset, 2, None, checkpointing)
    kept = {record['part']: record['kept'] / 2e9 for record in result.records}
    few, many = result.peak, peak_of(preset, 16, None, checkpointing)
    per_group = (many - few) / 14                       # between two and 16 groups, and beyond

    return {
        'computed again': checkpointing,
        'GB of the generator': kept['generator'],
        'GB of the encoder': kept['encoder of generated'],
        'GB of features of real samples': kept['encoder of real'],
        'GB at the peak, per group': per_group / 1e9,
        'most groups': max(0, int((free - few) // per_group) + 2),
        'TFLOP': sum(record['flops'] for record in result.records) / 2e12
    }

def loss_by_feature(preset):
    rows = []

    for record in simulated(preset, 2, None, 'none').records:
        if record['feature']:
            (name, sizes), *others = record['feature']              # those that are solved together
            name = f'{name} and {len(others)} more' if others else name
            sizes = dict.fromkeys(sizes, '') if others else sizes
            rows.append({'feature': name, **sizes, 'GB while it works': record['working'] / 1e9})

    return sorted(rows, key = lambda row: -row['GB while it works'])

# the training of the encoders

MAES = {'--dim 256': dict(dim = 256), '--dim 640': LATENT_640, '--space pixel --dim 640': PIXEL_640}

def make_encoder(name, checkpointing):
    with torch.device('meta'):
        return LatentMAE(**MAES[name], num_classes = NUM_CLASSES, checkpointing = checkpointing)

@lru_cache
def peak_of_encoder(name, batch_size, checkpointing, in_parts = False, half = True):
    """Bytes of a step of train_mae.py with so many samples, gradients of the weights included.

    in_parts: more than one, which add up their gradients.
    """
    mae = make_encoder(name, checkpointing)
    side = 32 if mae.channels == 4 else 256
    patches = [patch.object(drifting, 'check_range'), patch.object(drifting, 'checked_labels', lambda t, *_: t)]

    with on_meta(half, mae, patches = patches) as (meter, like_gpu):
        samples, labels = torch.empty(batch_size, mae.channels, side, side), torch.zeros(batch_size, dtype = torch.long)
        mask = torch.empty(batch_size, side // mae.mask_pixels, side // mae.mask_pixels)

        for _ in range(2 if in_parts else 1):
            with like_gpu.precision(True):
                loss, _ = mae(samples, labels, mask = mask)

            loss.backward()
            del loss

        meter.mark('step')

    mae.zero_grad()
    return meter.highest

def needs_of_encoder(name, args):
    """A row: what a process holds, and the largest powers of two of samples with which a step of 8,192 in all fits."""
    mae = make_encoder(name, False)
    always = sum(on_gpu for on_gpu, _ in held_to_train(mae, args.gpus).values())
    free = args.memory * 1e9 * (1 - args.margin) - always
    row = {'train_mae.py': f'`{name}`', 'parameters': num_parameters(mae), 'GB between steps': always / 1e9}

    for checkpointing in (False, True):
        sizes = [2 ** i for i in range(14) if 2 ** i * args.gpus <= 8192]
        fits = [num for num in sizes if peak_of_encoder(name, num, checkpointing, num * args.gpus < 8192) <= free]
        row['with `--checkpointing`' if checkpointing else 'samples per GPU'] = max(fits, default = 'none')

    return row

# many processes: one of them runs here, in torch's fake process group

IMAGENET = 1_281_167            # images

SMALL = dict(
    generator = dict(image_size = 16, channels = 4, patch_size = 2, dim = 64, depth = 2, heads = 4),
    encoder = dict(dim = 8, layers = (1, 1, 1, 1)), settings = dict(num_gen = 8, num_pos = 8, num_uncond = 4)
)

@contextmanager
def one_of(world, rank):
    """As one of so many processes, on a CPU. What is summed or gathered is as if all of them held the same."""
    all_reduce, names = distributed.all_reduce, ('WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'RANK', 'LOCAL_RANK')

    def multiplied(t, *args, **kwargs):
        all_reduce(t, *args, **kwargs)
        return t.mul_(world)

    AcceleratorState._reset_state(reset_partial_state = True)
    environment = dict(zip(names, map(str, (world, world, rank, rank)), strict = True))
    distributed.init_process_group('fake', store = FakeStore(), rank = rank, world_size = world)

    try:
        with patch.dict(os.environ, environment), patch.object(distributed, 'all_reduce', multiplied):
            yield
    finally:
        distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state = True)

def averaged(world, bucket):
    """What DistributedDataParallel does with a bucket of gradients, in a way that the fake group can answer."""
    distributed.all_reduce(bucket.buffer().div_(world))
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future

class Calls(TorchDispatchMode):
    """Collective calls: part of the run, step, kind, and bytes that go in and come out."""

    def __init__(self, trainer):
        super().__init__()
        self.trainer, self.part, self.found = trainer, 'between', []

    def __torch_dispatch__(self, func, types, args = (), kwargs = None):
        if func.namespace == 'c10d':
            size = sum(t.nbytes for t in tree_leaves(args) if torch.is_tensor(t))
            self.found.append((self.part, self.trainer.step, func.overloadpacket.__name__, size))
        return func(*args, **(kwargs or {}))

    def name(self, method, part):
        """Calls of this method of the trainer are of that part."""
        inner = getattr(self.trainer, method)

        def named(*args):
            before, self.part = self.part, part
            result = inner(*args)
            self.part = before
            return result

        setattr(self.trainer, method, named)

    def of(self, part, step = None):
        """[[kind, bytes]] of a part, in one step or in all."""
        return [call for name, at, *call in self.found if name == part and step in (None, at)]

class Rows(Dataset):
    """As many as the images of ImageNet, and ten classes."""

    def __init__(self, shape):
        self.shape = shape

    def __len__(self):
        return IMAGENET

    def __getitem__(self, index):
        return torch.full(self.shape, index / IMAGENET), index % 10

def small_trainer(world, folder):
    """Of ten steps, with two groups for each process."""
    model = DriftingGenerator(**SMALL['generator'], num_classes = 10)
    loss_fn = FeatureDriftLoss(LatentMAE(**SMALL['encoder'], num_classes = None))
    return Trainer(
        model, loss_fn, Rows(model.noise_shape), **SMALL['settings'], num_groups = 2 * world,
        num_train_steps = 10, log_every = 10, save_every = 10, sample_every = 0, lr_warmup_steps = 0,
        results_folder = folder, cpu = True, progress_bar = False
    )

def calls_of_run(trainer):
    """Its calls from the start to a checkpoint."""
    calls = Calls(trainer)
    trainer.model.register_comm_hook(trainer.world, averaged)

    for method, part in dict(before_training = 'start', train_step = 'step', save = 'checkpoint').items():
        calls.name(method, part)

    with calls:
        trainer.train()

    return calls

def held_by(trainer):
    """Bytes of tensors between two steps: weights, averages, gradients, moments, encoder, queues."""
    states = trainer.optimizer.state.values()
    tensors = [t for state in states for t in state.values()] + [queue.samples for queue in trainer.queues.values()]
    tensors += [p.grad for p in trainer.unwrapped.parameters()]
    return nbytes(trainer.unwrapped, trainer.ema.ema_model, trainer.loss_fn) + sum(t.nbytes for t in tensors)

def ms_to_find_rows(world, rank, num, repeats = 10):
    """Of a step, in the order that all processes share: each passes over the rows of the others."""
    places = enumerate(drifting.endless_shuffle(IMAGENET, seed = 0))
    batches = islice(BatchSampler(places, num, drop_last = False), rank, None, world)
    next(batches)
    start = time.process_time()

    for _ in range(repeats):
        next(batches)

    return (time.process_time() - start) / repeats * 1e3

def rows_to_fill(num_classes = NUM_CLASSES, num_pos = GeneratorSettings.num_pos):
    """That a process reads until it has num_pos of every class, where labels are uniform."""
    labels = torch.randint(num_classes, (4 * num_classes * num_pos,), generator = torch.Generator().manual_seed(0))
    counts, order = labels.bincount(minlength = num_classes), labels.argsort(stable = True)
    return order[counts.cumsum(dim = 0) - counts + num_pos - 1].max().item() + 1

def simulate_process(world, rank):
    """Two rows of what one of so many processes needs: that stays the same, and that grows."""
    with one_of(world, rank), tempfile.TemporaryDirectory() as folder:
        tracemalloc.start()
        trainer = small_trainer(world, folder)
        calls = calls_of_run(trainer)
        _, objects = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        batches = trainer.batches()
        peak = peak_mib(partial(trainer.train_step, batches), trainer.device)
        batches.close()

    def of(*part):
        found = calls.of(*part)
        return len(found), sum(size for _, size in found)

    num, size = of('step', 8)
    queues = sum(held(*make_run('L/2', 'none'), world)['queues of real samples'])
    always = {
        'processes': world, 'rank': rank, 'calls per step': num, 'MB in them': size / 1e6,
        'MB of tensors between steps': held_by(trainer) / 1e6, 'MB that a step adds': peak * 2 ** 20 / 1e6,
        'MB of Python objects': objects / 1e6
    }
    grows = {
        'processes': world,
        'KB at every tenth step': of('between', 10)[1] / 1e3, 'KB at a checkpoint': of('checkpoint')[1] / 1e3,
        'KB per read while queues fill': calls.of('start')[0][1] / 1e3,
        'ms to find the rows of a step': ms_to_find_rows(world, rank, trainer.samples_per_process),
        'epochs read before the first step': rows_to_fill() * world / IMAGENET,
        'GB of queues in a checkpoint': queues * world / 1e9
    }
    return always, grows

def simulate_processes(worlds):
    """Rows of the first two processes and of the last one, and a table of what grows, of the last one."""
    simulate_process(2, 0)          # what is made once is not counted
    found = {world: [simulate_process(world, rank) for rank in (0, 1, world - 1)] for world in worlds}
    rows = [always for processes in found.values() for always, _ in processes]
    return rows, {'What grows': [processes[-1][1] for processes in found.values()]}

# the command

def options(argv):
    parser = make_parser(__doc__)
    parser.add_argument('--preset', choices = tuple(ENCODERS), default = 'ablation', help = 'column of Table 8')
    parser.add_argument('--gpus', type = positive, default = 8, help = 'processes, one on each GPU')
    parser.add_argument('--all', action = 'store_true', help = 'every preset on 1, 8 and 64 GPUs')
    parser.add_argument('--encoders', action = 'store_true', help = 'instead: how many samples of train_mae.py fit')
    parser.add_argument(
        '--simulate', type = positive, nargs = '+', metavar = 'PROCESSES',
        help = 'instead: what some of so many processes need in ten steps of a tiny model'
    )
    parser.add_argument('--memory', type = float, default = 80., help = 'GB of a GPU')
    parser.add_argument(
        '--margin', type = float, default = 0.1,
        help = 'share of it that stays free, for CUDA, the libraries and gaps between tensors'
    )
    parser.add_argument('--tflops', type = float, default = 312., help = 'of the GPU in bfloat16, by its data sheet')
    parser.add_argument('--utilisation', type = float, default = 0.4, help = 'the share of --tflops that is reached')
    parser.add_argument('--bandwidth', type = float, default = 25., help = 'GB/s between two GPUs')
    parser.add_argument('--latency', type = float, default = 50., help = 'microseconds of a collective call')
    parser.add_argument('--output', type = Path, default = Path('results/plan.json'), help = 'where the numbers go')
    return parser.parse_args(argv)

def main(argv = None):
    args = options(argv)

    if args.simulate:
        rows, tables = simulate_processes(args.simulate)
    elif args.encoders:
        rows, tables = [needs_of_encoder(name, args) for name in MAES], {}
    else:
        every = [(preset, gpus) for preset in ENCODERS for gpus in (1, 8, 64)]
        runs = every if args.all else [(args.preset, args.gpus)]
        rows, (tables, *_) = zip(*(needs(*run, args) for run in runs), strict = True)

    for title, table in tables.items():
        if table:
            show(title, table[:8])

    show('Counted in a fake process group' if args.simulate else 'Computed, not measured', rows)
    results = dict(options = vars(args), runs = rows, tables = tables)
    args.output.parent.mkdir(parents = True, exist_ok = True)
    args.output.write_text(json.dumps(results, indent = 1, default = str))

if __name__ == '__main__':
    main()
