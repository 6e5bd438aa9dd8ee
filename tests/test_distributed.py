"""Several processes, several chunks: the gradient is that of one step on one process."""

import os
import shutil
import signal

import pytest
import torch
from conftest import launch, relative
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from drifting_pytorch import DriftingGenerator, FeatureDriftLoss, drifting
from test_trainer import Net, X, Y, rows, trainer, weights

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
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    return t.tensor_split(world)[rank]

def loss_of_share(chunk):
    """The loss on this process's groups: loss, gradient, statistics."""
    from accelerate import Accelerator
    Accelerator(cpu = True)
    gen, pos, uncond, alpha = map(share, batch())
    gen.requires_grad_()
    loss, breakdown = FeatureDriftLoss(Encoder(), affinity_floor = 0., group_chunk_size = chunk)(gen, pos, uncond, alpha)
    loss.backward()
    stats = {name: [s.scale.item(), *(v.item() for v in s.drift_rms.values()), *(v.item() for v in s.neighbors.values())] for name, s in breakdown.stats.items()}
    return loss.item() * len(gen), (gen.grad * len(gen)).numpy(), stats

@pytest.mark.parametrize('world, chunk', [(2, None), (4, None), (2, 1), (4, 2)])
def test_statistics_loss_and_gradient_of_processes_are_those_of_one(world, chunk):
    loss, grad, stats = loss_of_share(None)
    parts = launch(loss_of_share, world, chunk)
    assert abs(sum(part[0] for part in parts) / loss - 1) < 1e-5
    assert relative(torch.cat([torch.from_numpy(part[1]) for part in parts]), grad) < 1e-5

    for _, _, part in parts:
        assert part.keys() == stats.keys() == {'global', 'locations', 'mean'}
        for name in stats:
            assert relative(part[name], stats[name]) < 1e-5

class Plain(Net):
    def __init__(self):
        super().__init__()
        self.net[2] = nn.Identity()

def gradient_of_step(folder, chunk, accumulation = 1):
    """The gradient of one training step on a fixed real batch, whichever way it is laid out."""
    torch.manual_seed(0)
    t = trainer(folder, Plain(), loss_fn = FeatureDriftLoss(affinity_floor = 0.), num_groups = GROUPS, push_size = 20, num_pos = 4, group_chunk_size = chunk, gradient_accumulation_steps = accumulation)
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (GROUPS,), generator = rng)
    real = [labels, torch.rand(GROUPS, generator = rng) * 2 + 1, torch.randn(GROUPS, 9, 2, generator = rng), torch.randn(GROUPS, 4, 2, generator = rng)]
    t.draw = lambda newest, micro_step: tuple(share(x) for x in real)
    t.model.train()
    batches = t.batches()
    for micro_step in range(accumulation):
        t.backward(batches, micro_step, sync = micro_step == accumulation - 1)
    return torch.cat([p.grad.flatten() for p in t.unwrapped.parameters()]).numpy()

@pytest.mark.parametrize('world, chunk', [(1, 1), (1, 2), (2, None), (4, None), (2, 2)])
def test_step_has_the_gradient_of_one_process_and_one_chunk(tmp_path, world, chunk):
    whole = gradient_of_step(tmp_path / 'one', None)

    if world == 1:
        assert relative(gradient_of_step(tmp_path / 'chunks', chunk), whole) < 1e-5
    else:
        parts = launch(gradient_of_step, world, tmp_path / 'many', chunk)
        assert all(relative(part, whole) < 1e-5 for part in parts)

def test_accumulation_works_on_top_of_chunks(tmp_path):
    assert relative(gradient_of_step(tmp_path / 'a', 2, accumulation = 3), gradient_of_step(tmp_path / 'b', None, accumulation = 3)) < 1e-5

def test_chunks_replay_the_same_dropout(tmp_path):
    """Without a graph, and again with one: the gradient belongs to the samples that the loss saw."""
    t = trainer(tmp_path, num_groups = 4, group_chunk_size = 1)
    t.model.train()
    inputs = t.inputs(torch.tensor([0, 1, 2, 0]), torch.ones(4), 0)
    first, again = (torch.cat([t.generate(t.model, *part) for part in t.replays(inputs)]) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(first, t.samples_of(inputs))
    t.seed_model(9)
    assert not torch.equal(first, torch.cat([t.generate(t.model, *part) for part in [inputs]]))

def test_own_statistics_of_a_chunk_are_another_loss():
    gen, pos, uncond, alpha = batch()
    shared, own, alone = (FeatureDriftLoss(affinity_floor = 0., **kwargs) for kwargs in (dict(group_chunk_size = 2), dict(group_chunk_size = 2, chunk_statistics = 'own'), {}))
    whole = alone(gen, pos, uncond, alpha)[0]
    parts = [alone(gen[i:i + 2], pos[i:i + 2], uncond[i:i + 2], alpha[i:i + 2])[0] for i in (0, 2, 4)]
    assert relative(shared(gen, pos, uncond, alpha)[0], whole) < 1e-6
    assert relative(own(gen, pos, uncond, alpha)[0], (2 * parts[0] + 2 * parts[1] + parts[2]) / 5) < 1e-6 and relative(parts[0], parts[1]) > 1e-4

# a run on several processes

DATA = TensorDataset(X[:120], Y[:120])

def run(folder, stop_at = None, **kwargs):
    """Train; with stop_at the process dies there, as by kill -9. Returns the weights, the averaged ones, and this process's queue."""
    t = trainer(folder, data = DATA, num_train_steps = 20, num_groups = GROUPS, num_pos = 12, **kwargs)

    if stop_at is not None:
        step = t.train_step

        def dying(batches):
            if t.step == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(batches)

        t.train_step = dying

    t.train()
    ema = torch.cat([p.flatten() for p in t.ema.ema_model.parameters()])
    return weights(t).numpy(), ema.numpy(), t.queues['positives'].samples.numpy()

@pytest.mark.parametrize('world', [1, 2])
def test_killed_and_resumed_is_as_if_nothing_had_been(tmp_path, world):
    straight = launch(run, world, tmp_path / 'a')
    killed = launch(run_killed, world, tmp_path / 'b')
    assert all(code != 0 for code in killed) and -signal.SIGKILL in killed
    resumed = launch(run_resumed, world, tmp_path / 'b')

    for before, after in zip(straight, resumed):
        assert all((a == b).all() for a, b in zip(before, after))

    assert rows(tmp_path / 'a') == rows(tmp_path / 'b')

    # one model, a queue for each

    for result in straight[1:]:
        assert (result[0] == straight[0][0]).all() and (result[1] == straight[0][1]).all() and (result[2] != straight[0][2]).any()

def run_killed(folder):
    return run(folder, stop_at = 13, save_every = 5)

def run_resumed(folder):
    return run(folder, save_every = 5, resume_from_checkpoint = 'latest')

# sharded models

def sharded_run(folder, precision = 'no', **kwargs):
    """The same with FSDP2. accelerate turns it on for accelerators alone, so it is told here that this one is, and shards on the cpu."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    def sharding(**arguments):
        accelerator = Accelerator(**arguments)
        plugin = FullyShardedDataParallelPlugin(fsdp_version = 2, auto_wrap_policy = 'no_wrap', cpu_ram_efficient_loading = False)
        if precision != 'no':
            plugin.set_mixed_precision(precision)
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState._shared_state['distributed_type'] = DistributedType.FSDP
        return accelerator

    Accelerator, drifting.Accelerator = drifting.Accelerator, sharding
    t = trainer(folder, generator(), PICTURES, num_train_steps = 6, num_groups = GROUPS, save_every = 3, sample_every = 3, mixed_precision = precision, **kwargs)
    assert all(type(p).__name__ == 'DTensor' for p in t.unwrapped.parameters())
    t.train()
    t.save_pretrained(folder / 'model')
    return [torch.cat([p.full_tensor().flatten() for p in model.parameters()]).detach().numpy() for model in (t.unwrapped, t.ema.ema_model)]

def plain_run(folder):
    t = trainer(folder, generator(), PICTURES, num_train_steps = 6, num_groups = GROUPS, save_every = 3, sample_every = 3)
    t.train()
    return [torch.cat([p.flatten() for p in model.parameters()]).detach().numpy() for model in (t.unwrapped, t.ema.ema_model)]

PICTURES = TensorDataset(torch.rand(120, 1, 8, 8, generator = torch.Generator().manual_seed(0)) * 2 - 1, torch.arange(120) % 3)

def generator():
    torch.manual_seed(0)
    return DriftingGenerator(image_size = 8, channels = 1, patch_size = 4, dim = 16, depth = 2, heads = 2, num_classes = 3, num_register_tokens = 1, num_style_tokens = 2)

def test_sharded_training_equals_replicated(tmp_path):
    whole, _ = launch(plain_run, 2, tmp_path / 'a')
    for sharded in launch(sharded_run, 2, tmp_path / 'b', 'no'):
        assert all(relative(a, b) < 1e-5 for a, b in zip(sharded, whole))

    assert (tmp_path / 'b' / 'samples' / 'step-00000003.png').is_file()
    exported = DriftingGenerator.from_pretrained(tmp_path / 'b' / 'model')
    assert (torch.cat([p.flatten() for p in exported.parameters()]).detach().numpy() == sharded[1]).all()

    # resumed, and in other hands: the checkpoint is that of the whole model

    shutil.rmtree(tmp_path / 'b' / 'checkpoints' / 'step-00000006')
    resumed, _ = launch(resumed_sharded_run, 2, tmp_path / 'b')
    assert all((a == b).all() for a, b in zip(resumed, sharded))
    generator().load_state_dict(load_file(tmp_path / 'b' / 'checkpoints' / 'step-00000006' / 'ema.safetensors'))

def resumed_sharded_run(folder):
    return sharded_run(folder, resume_from_checkpoint = 'latest')
