"""Several processes, several chunks: the gradient is that of one step on one process."""

import json
import os
import shutil
import signal
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from drifting_pytorch import (
    DriftingGenerator,
    FeatureDriftLoss,
    LatentMAE,
    MAETrainer,
    SinkhornField,
    drift_loss,
    drifting,
)
from helpers import (
    DATA,
    Net,
    PlainNet,
    averaged_weights,
    end_processes,
    flat_gradients,
    flat_parameters,
    launch,
    picture_generator,
    relative,
    rows,
    run,
    trainer,
    weights,
)

GROUPS = 5      # neither by two nor by four

class Encoder(nn.Module):
    """Two features of different shapes, and normalised locations like those of the real encoders."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 24)
        with torch.no_grad():
            for i, p in enumerate(self.net.parameters()):
                p.copy_(torch.randn(p.shape, generator = torch.Generator().manual_seed(i)))

    def features(self, x):
        h = self.net(x).tanh().reshape(len(x), 4, 6)
        return dict(locations = h, mean = h.mean(dim = 1, keepdim = True))

def batch():
    rng = torch.Generator().manual_seed(0)
    gen, pos, uncond = (torch.randn(GROUPS, n, 6, generator = rng) for n in (7, 9, 4))
    return gen, pos, uncond, torch.rand(GROUPS, generator = rng) * 2 + 1

def share(t):
    """This process's groups."""
    rank = int(os.environ.get('RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    return t.tensor_split(world)[rank]

# the loss

def numbers(stats):
    per_temperature = (*stats.drift_rms.values(), *stats.neighbors.values())
    return [stats.scale.item(), *(value.item() for value in per_temperature)]

def loss_of_share(chunk):
    """The loss on this process's groups: loss, gradient, statistics."""
    Accelerator(cpu = True)
    gen, pos, uncond, alpha = map(share, batch())
    gen.requires_grad_()
    loss_fn = FeatureDriftLoss(Encoder(), affinity_floor = 0., group_chunk_size = chunk)
    loss, breakdown = loss_fn(gen, pos, uncond, alpha)
    loss.backward()
    stats = {name: numbers(stats) for name, stats in breakdown.stats.items()}
    return loss.item() * len(gen), (gen.grad * len(gen)).numpy(), stats

@pytest.mark.parametrize('world, chunk', [(2, None), (4, None), (2, 1), (4, 2)])
def test_statistics_loss_and_gradient_of_processes_are_those_of_one(world, chunk):
    loss, grad, stats = loss_of_share(None)
    losses, grads, all_stats = zip(*launch(loss_of_share, world, chunk), strict = True)
    assert abs(sum(losses) / loss - 1) < 1e-5
    assert relative(torch.cat([torch.from_numpy(part) for part in grads]), grad) < 1e-5

    for part in all_stats:
        assert part.keys() == stats.keys() == {'global', 'locations', 'mean'}
        for name in stats:
            assert relative(part[name], stats[name]) < 1e-5

def loss_of_broken_share(chunk):
    """What a process says of a nan in the last one, and whether they can still talk to each other."""
    Accelerator(cpu = True)
    gen, pos, uncond, alpha = map(share, batch())
    rank = int(os.environ['RANK'])
    pos[0, 0, 0] = float('nan') if rank == 1 else 0.

    try:
        FeatureDriftLoss(Encoder(), group_chunk_size = chunk)(gen, pos, uncond, alpha)
    except ValueError as error:
        return str(error), gather_object([rank])

@pytest.mark.parametrize('chunk', [None, 1])
def test_processes_stop_together(chunk):
    (others, _), (own, heard) = launch(loss_of_broken_share, 2, chunk, timeout = 60)
    assert 'the field is not finite' in others
    assert own == "pos of feature 'global' has non-finite values (nan or inf)"
    assert heard == [0, 1]

def test_statistics_of_all_chunks_are_not_those_of_each():
    step = batch()
    alone = FeatureDriftLoss(affinity_floor = 0.)
    shared = FeatureDriftLoss(affinity_floor = 0., group_chunk_size = 2)
    assert relative(shared(*step)[0], alone(*step)[0]) < 1e-6

    parts = [alone(*(t[i:i + 2] for t in step))[0] for i in (0, 2, 4)]
    assert relative((2 * parts[0] + 2 * parts[1] + parts[2]) / 5, alone(*step)[0]) > 1e-4

# a step

def gradient_of_step(folder, chunk, accumulation = 1):
    """The gradient of one training step on a fixed real batch, whichever way it is laid out."""
    torch.manual_seed(0)
    t = trainer(
        folder, PlainNet(), num_groups = GROUPS, push_size = 20, num_pos = 4,
        group_chunk_size = chunk, gradient_accumulation_steps = accumulation
    )
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (GROUPS,), generator = rng)
    alpha = torch.rand(GROUPS, generator = rng) * 2 + 1
    pos, uncond = (torch.randn(GROUPS, n, 2, generator = rng) for n in (9, 4))

    def draw(newest, micro_step):
        return tuple(map(share, (labels, alpha, pos, uncond)))

    t.draw = draw
    t.model.train()
    batches = t.batches()
    for micro_step in range(accumulation):
        t.backward(batches, micro_step, sync = micro_step == accumulation - 1)
    return flat_gradients(t.unwrapped).numpy()

@pytest.mark.parametrize('world, chunk', [(1, 1), (1, 2), (2, None), (4, None), (2, 2)])
def test_step_has_the_gradient_of_one_process_and_one_chunk(tmp_path, world, chunk):
    whole = gradient_of_step(tmp_path / 'one', None)

    if world == 1:
        assert relative(gradient_of_step(tmp_path / 'chunks', chunk), whole) < 1e-5
    else:
        parts = launch(gradient_of_step, world, tmp_path / 'many', chunk)
        assert all(relative(part, whole) < 1e-5 for part in parts)

def test_accumulation_works_on_top_of_chunks(tmp_path):
    chunks = gradient_of_step(tmp_path / 'a', 2, accumulation = 3)
    whole = gradient_of_step(tmp_path / 'b', None, accumulation = 3)
    assert relative(chunks, whole) < 1e-5

def test_chunks_replay_the_same_dropout(tmp_path):
    """Without a graph, and again with one: the gradient belongs to the samples that the loss saw."""
    t = trainer(tmp_path, num_groups = 4, group_chunk_size = 1)
    t.model.train()
    inputs = t.inputs(torch.tensor([0, 1, 2, 0]), torch.ones(4), 0)

    chunks = drifting.chunked(inputs, 1)

    def generated():
        return torch.cat([t.generate(*chunk, i) for i, chunk in enumerate(chunks)])

    first = generated()
    assert torch.equal(first, generated())
    assert torch.equal(first, t.without_graph(chunks))
    assert not torch.equal(first, t.generate(*inputs, 9))

@pytest.mark.parametrize('size', [None, 2])
def test_a_second_batch_has_dropout_of_its_own(tmp_path, size):
    loss_fn = FeatureDriftLoss(field = SinkhornField(), temperatures = (0.1,))
    t = trainer(tmp_path, loss_fn = loss_fn, num_groups = 4, group_chunk_size = size)
    masks = []
    t.unwrapped.net[2].register_forward_hook(lambda module, inputs, out: masks.append((out == 0) & (inputs[0] != 0)))
    batches = t.batches()
    t.before_training(batches)
    t.train_step(batches)
    num = 1 if size is None else 2
    of_neg, of_gen = masks[:num], masks[num:2 * num]
    assert all(mask.any() for mask in masks)
    assert not any(torch.equal(a, b) for a in of_neg for b in of_gen)

# a run on two processes, forked and as the command line starts them

def loss_between_processes(rank = None):
    """Two problems, or one of them; the loss of each, and S."""
    gen, pos = (torch.randn(2, n, 3, generator = torch.Generator().manual_seed(n)) for n in (4, 5))
    own = slice(None) if rank is None else slice(rank, rank + 1)
    loss, stats = drift_loss(gen[own], pos[own])
    return loss.tolist(), stats.scale.item()

def train_and_resume(folder, **kwargs):
    settings = dict(data = DATA, num_train_steps = 6, num_pos = 12, **kwargs)
    t = trainer(folder, save_every = 3, **settings)
    t.train()
    loss, scale = loss_between_processes(t.accelerator.process_index)
    resumed = trainer(folder, resume_from_checkpoint = folder / 'checkpoints' / 'step-00000003', **settings)
    resumed.train()

    return dict(
        world = t.accelerator.num_processes,
        weights = weights(t).tolist(),
        resumed = weights(resumed).tolist(),
        queue = t.queues['positives'].samples.flatten().tolist(),
        loss = loss,
        scale = scale,
    )

def by_launch(folder):
    return launch(train_and_resume, 2, folder / 'run')

def by_torchrun(folder):
    """This module as a script, see the end of it. Without GPUs, and nobody has to say so."""
    torchrun = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2)
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    run(*torchrun, __file__, folder, timeout = 200, env = environment)
    return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(2)]

def end(folder):
    t = trainer(folder, data = DATA, num_train_steps = 1, num_pos = 12)
    t.train()
    wrapped = weakref.ref(t.model)
    t.end_training()
    return wrapped() is None, t.sample(torch.arange(3), seed = 0).shape

def test_the_group_of_processes_ends_after_ddp(tmp_path):
    """Or DDP, its last owner, waits for a thread of gloo that waits for python, and the process may never end."""
    assert launch(end, 2, tmp_path) == [(True, (3, 2))] * 2

@pytest.mark.parametrize('start', [by_launch, by_torchrun])
def test_two_processes_train_one_model(tmp_path, start):
    """Each fills a queue of its own, the groups are shared, the loss's statistics are those of all groups."""
    a, b = start(tmp_path)
    assert a['world'] == b['world'] == 2
    assert a['weights'] == b['weights']
    assert a['queue'] != b['queue']
    assert a['resumed'] == a['weights'] == b['resumed']

    loss, scale = loss_between_processes()
    assert relative(a['loss'] + b['loss'], loss) < 1e-5
    assert relative(a['scale'], scale) < 1e-5
    assert a['scale'] == b['scale']

# a run that is killed

def train(folder, stop_at = None, **kwargs):
    """Train; with stop_at the process dies there, as by kill -9.

    Returns the weights, the averaged ones, and this process's queue.
    """
    t = trainer(folder, data = DATA, num_train_steps = 20, num_groups = GROUPS, num_pos = 12, **kwargs)
    step = t.train_step

    def train_step(batches):
        if t.step == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(batches)

    t.train_step = train_step
    t.train()
    return weights(t).numpy(), averaged_weights(t).numpy(), t.queues['positives'].samples.numpy()

def train_killed(folder):
    return train(folder, stop_at = 13, save_every = 5)

def train_resumed(folder):
    return train(folder, save_every = 5, resume_from_checkpoint = 'latest')

@pytest.mark.parametrize('world', [1, 2])
def test_killed_and_resumed_is_as_if_nothing_had_been(tmp_path, world):
    straight = launch(train, world, tmp_path / 'a')
    killed = launch(train_killed, world, tmp_path / 'b')
    assert all(code != 0 for code in killed)
    assert -signal.SIGKILL in killed
    resumed = launch(train_resumed, world, tmp_path / 'b')

    for before, after in zip(straight, resumed, strict = True):
        assert all((a == b).all() for a, b in zip(before, after, strict = True))

    assert rows(tmp_path / 'a') == rows(tmp_path / 'b')

    # one model, a queue for each

    (model, average, queue), *others = straight

    for other_model, other_average, other_queue in others:
        assert (other_model == model).all()
        assert (other_average == average).all()
        assert (other_queue != queue).any()

# buffers

class Counting(PlainNet):
    """Statistics, and a count of the batches, of what a process sees."""

    def __init__(self):
        super().__init__()
        self.net[1] = nn.BatchNorm1d(32)

def buffers_of(model):
    return torch.cat([buffer.flatten().double() for buffer in model.buffers()])

def train_counting(folder, **kwargs):
    t = trainer(folder, Counting(), DATA, num_train_steps = 6, num_groups = GROUPS, num_pos = 12, **kwargs)
    t.train()
    return buffers_of(t.unwrapped), buffers_of(t.ema.ema_model), t.sample([0, 1, 2], seed = 0)

def test_buffers_of_one_process_are_averaged_counted_and_resumed(tmp_path):
    straight = train_counting(tmp_path, save_every = 3)
    assert straight[0][-1] == straight[1][-1] == 6                 # of num_batches_tracked, which is no average
    assert not torch.equal(straight[0], straight[1])

    resumed = train_counting(tmp_path, resume_from_checkpoint = tmp_path / 'checkpoints' / 'step-00000003')
    assert all(map(torch.equal, straight, resumed))

class Constants(PlainNet):
    def __init__(self):
        super().__init__()
        self.register_buffer('scale', torch.ones(1), persistent = False)
        self.register_buffer('order', torch.arange(3))

def try_to_train(folder):
    trainer(folder / 'constants', Constants(), DATA, num_train_steps = 1, num_groups = GROUPS, num_pos = 12).train()
    try:
        trainer(folder / 'counting', Counting(), DATA, num_groups = GROUPS, num_pos = 12)
    except ValueError as error:
        return str(error)

def test_statistics_of_several_processes_are_refused(tmp_path):
    says = "the buffers ['net.1.running_mean', 'net.1.running_var'] would differ between processes: "
    assert all(message.startswith(says) for message in launch(try_to_train, 2, tmp_path))

# parameters

class Unused(PlainNet):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(2))

def train_unused(folder):
    try:
        trainer(folder, Unused(), DATA, num_groups = GROUPS, num_pos = 12).train()
    except ValueError as error:
        return str(error)

def test_an_unused_parameter_is_named(tmp_path):
    says = "with several processes ['token'] need a gradient and have none: freeze them"
    assert launch(train_unused, 2, tmp_path) == [says] * 2

# sharded models

PICTURES = TensorDataset(
    torch.rand(120, 1, 8, 8, generator = torch.Generator().manual_seed(0)) * 2 - 1,
    torch.arange(120) % 3
)

def picture_trainer(folder, **kwargs):
    settings = dict(num_train_steps = 6, num_groups = GROUPS, save_every = 3, sample_every = 2)
    return trainer(folder, picture_generator(depth = 2), PICTURES, **settings, **kwargs)

def plain_run(folder):
    t = picture_trainer(folder)
    t.train()
    return weights(t).numpy(), averaged_weights(t).numpy()

def sharding_accelerator(**kwargs):
    """With FSDP2. accelerate turns it on for accelerators alone, so it is told here that this cpu is one."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = Accelerator(**kwargs)
    plugin = FullyShardedDataParallelPlugin(fsdp_version = 2, auto_wrap_policy = 'no_wrap')
    plugin.cpu_ram_efficient_loading = True                 # accelerate launch's default
    if accelerator.mixed_precision != 'no':                 # as AcceleratorState does
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state['distributed_type'] = DistributedType.FSDP
    return accelerator

def whole_parameters(model):
    return torch.cat([p.full_tensor().flatten() for p in model.parameters()]).detach().numpy()

def sharded_run(folder, **kwargs):
    drifting.Accelerator = sharding_accelerator         # in a process of its own
    t = picture_trainer(folder, **kwargs)
    assert all(type(p).__name__ == 'DTensor' for p in t.unwrapped.parameters())
    t.train()
    t.save_pretrained(folder / 'model')
    return whole_parameters(t.unwrapped), whole_parameters(t.ema.ema_model)

def resumed_sharded_run(folder):
    return sharded_run(folder, resume_from_checkpoint = 'latest')

def test_sharded_training_equals_replicated(tmp_path):
    whole, _ = launch(plain_run, 2, tmp_path / 'a')
    for sharded in launch(sharded_run, 2, tmp_path / 'b'):
        assert all(relative(a, b) < 1e-5 for a, b in zip(sharded, whole, strict = True))

    assert (tmp_path / 'b' / 'samples' / 'step-00000004.png').is_file()
    exported = DriftingGenerator.from_pretrained(tmp_path / 'b' / 'model')
    assert (flat_parameters(exported).numpy() == sharded[1]).all()

    # resumed, and in other hands: the checkpoint is that of the whole model

    checkpoint = tmp_path / 'b' / 'checkpoints' / 'step-00000006'
    shutil.rmtree(checkpoint)
    resumed, _ = launch(resumed_sharded_run, 2, tmp_path / 'b')
    assert all((a == b).all() for a, b in zip(resumed, sharded, strict = True))
    picture_generator(depth = 2).load_state_dict(load_file(checkpoint / 'ema.safetensors'))

def encoder_trainer(folder, **kwargs):
    torch.manual_seed(0)
    model = LatentMAE(dim = 8, channels = 1, layers = (1, 1, 1, 1), num_classes = 3)
    settings = dict(num_train_steps = 4, finetune_steps = 2, lr_warmup_steps = 0, batch_size = 8, sample_every = 2)
    return MAETrainer(
        model, PICTURES, results_folder = folder, cpu = True, progress_bar = False, **settings, **kwargs
    )

def run_with_precision(folder, make, precision, is_sharded):
    if is_sharded:
        drifting.Accelerator = sharding_accelerator
    t = make(folder, mixed_precision = precision)
    t.train()
    t.save()                                                # pictures may leave the average whole
    parts = t.unwrapped, t.ema.ema_model
    return [whole_parameters(part) if is_sharded else flat_parameters(part).numpy() for part in parts]

@pytest.mark.parametrize('make', [picture_trainer, encoder_trainer])
def test_sharded_training_in_half_precision(tmp_path, make):
    """Products are rounded, as accelerate does it for replicated models, and parameters are not."""
    whole, _ = launch(run_with_precision, 2, tmp_path / 'a', make, 'bf16', False)
    sharded, _ = launch(run_with_precision, 2, tmp_path / 'b', make, 'bf16', True)
    exact, _ = launch(run_with_precision, 2, tmp_path / 'c', make, 'no', False)
    assert all(relative(a, b) < 1e-6 for a, b in zip(sharded, whole, strict = True))
    assert all(relative(a, b) > 1e-5 for a, b in zip(exact, whole, strict = True)), 'nothing was rounded'

class CannotBeSentError(Exception):
    """Not as it is: it needs two arguments, and a lambda cannot be pickled."""

    def __init__(self, text, of_what):
        super().__init__(text)
        self.of_what = of_what

def no_picture(samples):
    if os.environ['RANK'] == '0':
        raise CannotBeSentError('there is no picture', lambda: samples)
    return torch.zeros(len(samples), 1, 8, 8)

def train_without_pictures(folder):
    with pytest.raises(Exception) as error:
        trainer(folder, to_image = no_picture, sample_every = 1).train()
    return type(error.value).__name__, str(error.value)

def test_an_error_of_one_process_is_told_in_all(tmp_path):
    own, others = launch(train_without_pictures, 2, tmp_path, timeout = 60)
    assert own == ('CannotBeSentError', 'there is no picture')
    assert others == ('Exception', 'in another process: CannotBeSentError: there is no picture')

def train_on_few(folder, num_classes, num_each, num_pos):
    labels = torch.arange(num_classes * num_each) % num_classes
    few = TensorDataset(torch.randn(len(labels), 2), labels)
    t = trainer(folder, Net(num_classes), few, num_pos = num_pos, num_train_steps = 1)
    try:
        t.train()
    except ValueError as error:
        return str(error)
    return t.queues['positives'].filled.min().item()

@pytest.mark.parametrize('world', [1, 2])
@pytest.mark.parametrize('num_classes, num_each, num_pos', [(3, 16, 16), (60, 2, 2)])
def test_queues_fill_in_any_number_of_processes(tmp_path, world, num_classes, num_each, num_pos):
    """A process reads every second batch: of an epoch it may miss some of a class."""
    assert launch(train_on_few, world, tmp_path, num_classes, num_each, num_pos) == [num_pos] * world

@pytest.mark.parametrize('world', [1, 2])
def test_classes_that_are_too_small_are_named(tmp_path, world):
    for said in launch(train_on_few, world, tmp_path, 4, 12, 13):
        assert '4 classes with fewer than num_pos = 13 samples (class: samples): {0: 12, 1: 12, 2: 12, 3: 12}' in said

if __name__ == '__main__':      # started by torchrun
    place = Path(sys.argv[1])
    result = train_and_resume(place / 'run', cpu = False)
    (place / f'{os.environ["RANK"]}.json').write_text(json.dumps(result))
    end_processes()
