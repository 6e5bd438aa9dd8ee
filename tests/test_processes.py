"""Many processes: what they share, what grows with their number, and what becomes of a run in which one is lost.

Up to 1024 are simulated. In torch's fake process group one of them runs; in threads that exchange their sums all do.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator, PartialState
from torch import cat, distributed
from torch.utils.data import TensorDataset

from helpers import (
    DATA,
    ROOT,
    PlainNet,
    averaged_weights,
    end_processes,
    flat_gradients,
    launch,
    picture_generator,
    relative,
    rows,
    run,
    trainer,
    weights,
)

sys.path[:0] = [str(ROOT / 'examples'), str(ROOT / 'examples' / 'measure')]

import benchmark
import plan

# one of many, in a fake process group

NUM = 8192
PICTURES = TensorDataset(torch.linspace(-1, 1, NUM)[:, None, None, None].expand(-1, 1, 8, 8), torch.arange(NUM) % 3)

def one_process(folder, world, rank):
    """Its calls of ten steps, bytes that it holds and that a step adds."""
    with plan.one_of(world, rank):
        t = trainer(
            folder / f'{world}-{rank}', picture_generator(), PICTURES, num_groups = 2 * world, push_size = 8,
            num_pos = 4, num_train_steps = 10, log_every = 10, save_every = 10
        )
        calls = plan.calls_of_run(t)
        peak = benchmark.peak_mib(partial(t.train_step, t.batches()), t.device)
        return calls, plan.held_by(t), peak

def test_what_grows_with_the_number_of_processes(tmp_path):
    """Nothing of a step does. What is gathered at checkpoints, and while queues fill, does."""
    kinds = [(8, 0), (64, 1), (1024, 1023)]
    (first, held, peak), *others = (one_process(tmp_path, *kind) for kind in kinds)
    step = first.of('step', 8)
    assert [kind for kind, _ in step] == ['allreduce_'] * len(step) and len(step) > 1

    for (world, _), (calls, own_held, own_peak) in zip(kinds[1:], others, strict = True):
        assert calls.of('step', 8) == step
        assert own_held == held
        assert abs(own_peak / peak - 1) < 0.02

        for part in ('between', 'checkpoint'):
            found, expected = calls.of(part), first.of(part)
            assert [kind for kind, _ in found] == [kind for kind, _ in expected]
            assert sum(size for _, size in found) < 1000 * world

        classes = 3 + 1                                     # and the unconditional queue
        assert calls.of('start')[0] == ['allgather_', 8 * classes * (world + 1)]

def test_more_processes_than_groups_are_refused(tmp_path):
    with plan.one_of(8, 7), pytest.raises(ValueError, match = 'num_groups 7 cannot be shared by 8 processes'):
        trainer(tmp_path, data = DATA, num_groups = 7)

# all of many: in turn, and in lockstep

PLACES = torch.arange(NUM)
NUMBERED = TensorDataset(torch.stack((2 * PLACES / NUM - 1, PLACES % 3 - 1.), dim = -1), PLACES % 3)

def rows_in(samples):
    """A sample tells its row."""
    return ((samples[..., 0] + 1) * NUM / 2).flatten().long().tolist()

# processes, groups, real samples that each process reads per step

SHARES = [(7, 16, 4), (32, 48, 4), pytest.param(1024, 1500, 2, marks = pytest.mark.slow)]

def numbered_trainer(folder, groups, push_size):
    torch.manual_seed(0)
    return trainer(
        folder, PlainNet(), NUMBERED, num_groups = groups, push_size = push_size, num_pos = 1, num_uncond = 2,
        lr_warmup_steps = 0
    )

@pytest.mark.parametrize('world, groups, push_size', SHARES)
def test_what_all_processes_read_and_draw_is_what_one_does(tmp_path, world, groups, push_size):
    """Nothing twice, and nothing is left out."""
    one = numbered_trainer(tmp_path / 'one', groups, push_size * world)
    batches = one.batches()
    read_by_one = [next(batches)[0] for _ in range(2)]
    one.push(one.batches())
    _, alpha_of_one, *_ = one.draw(torch.zeros(groups).long(), 0)
    noise_of_one, *_ = one.inputs(torch.zeros(groups).long(), alpha_of_one, 0)

    with plan.one_of(world, 0):
        t = numbered_trainer(tmp_path / 'many', groups, push_size)
        t.alphas, t.noise, read = [], [], ([], [])

        for t.rank in range(world):
            t.samples_read = 0
            own = [*islice(t.batches(), 2)]

            for queue in t.queues.values():
                queue.pushed.zero_()

            newest = [t.push(iter([batch])) for batch in own][-1]
            labels, alpha, pos, uncond = t.draw(newest, 0)
            t.alphas.append(alpha)
            t.noise.append(t.inputs(labels, alpha, 0)[0])

            for all_rows, (samples, _) in zip(read, own, strict = True):
                all_rows.append(samples)

            num_times = math.ceil(len(labels) / push_size)
            assert (labels.bincount(minlength = 3) <= num_times * newest.bincount(minlength = 3)).all()
            assert {*rows_in(pos), *rows_in(uncond)} <= {row for samples, _ in own for row in rows_in(samples)}
            assert [row % 3 for row in rows_in(pos)] == labels.tolist()

    for many, whole in zip(read, read_by_one, strict = True):
        assert torch.equal(cat(many), whole)

    assert len({*rows_in(cat(read_by_one))}) == 2 * world * push_size
    assert torch.equal(cat(t.alphas), alpha_of_one)
    assert torch.equal(cat(t.noise), noise_of_one)

def in_lockstep(work, trainers):
    """work(trainer) of all, in threads that take turns, and meet where they sum."""
    own, parts, total, errors, turn = threading.local(), [None] * len(trainers), [], [], threading.Lock()

    def add():
        total[:] = [torch.stack(parts).sum(dim = 0)]

    barrier = threading.Barrier(len(trainers), action = add, timeout = 300)

    def all_reduce(t, *_):
        parts[own.rank] = t.clone()
        turn.release()
        try:
            barrier.wait()
        finally:
            turn.acquire()
        t.copy_(total[0])

    def process(rank):
        own.rank = rank
        with turn:
            try:
                work(trainers[rank])
            except Exception as error:
                errors.append(error)
                barrier.abort()

    threads = [threading.Thread(target = process, args = (rank,)) for rank in range(len(trainers))]

    with plan.one_of(len(trainers), 0), patch.object(distributed, 'all_reduce', all_reduce):
        Accelerator(cpu = True)         # accelerate has one state

        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert not errors, errors[0]

@pytest.mark.parametrize('world, groups, push_size', SHARES)
def test_steps_of_all_processes_are_those_of_one(tmp_path, world, groups, push_size):
    """Their sums are real here: S, the norm of the drift and the gradient are those of all groups."""
    trainers = []

    for rank in range(world):
        with plan.one_of(world, rank):
            t = numbered_trainer(tmp_path / 'many', groups, push_size)
            t.model.register_comm_hook(world, plan.averaged)
            t.own_batches, t.own_draw, t.drawn = t.batches(), t.draw, []
            trainers.append(t)

    def step(t):
        def draw(*args):
            t.drawn = t.own_draw(*args)
            return t.drawn

        t.draw = draw
        t.loss_of_step, *_ = t.train_step(t.own_batches)

    one = numbered_trainer(tmp_path / 'one', groups, push_size)
    one.push = lambda batches: None
    one.draw = lambda *args: tuple(map(cat, zip(*(t.drawn for t in trainers), strict = True)))

    for number in range(2):
        in_lockstep(step, trainers)
        Accelerator(cpu = True)         # now of one process
        loss, *_ = one.train_step(None)
        all_losses = sum(t.loss_of_step * len(t.drawn[0]) for t in trainers) / groups
        assert abs(all_losses / loss - 1) < 1e-5
        assert relative(flat_gradients(trainers[0].unwrapped), flat_gradients(one.unwrapped)) < 1e-5, number
        assert relative(weights(trainers[0]), weights(one)) < 1e-5
        assert all(torch.equal(weights(t), weights(trainers[0])) for t in trainers)

# a straggler, and a process that is lost

def train(folder, before_step = lambda t: None, **kwargs):
    """Weights, averages, this process's queue; and the seconds of the steps."""
    t = trainer(folder, data = DATA, num_train_steps = 12, num_groups = 5, num_pos = 12, save_every = 5, **kwargs)
    step, seconds = t.train_step, []

    def train_step(batches):
        start = time.perf_counter()
        before_step(t)
        result = step(batches)
        seconds.append(time.perf_counter() - start)
        return result

    t.train_step = train_step
    t.train()
    return (weights(t).numpy(), averaged_weights(t).numpy(), t.queues['positives'].samples.numpy()), seconds

def same(results, expected):
    return all((a == b).all() for pair in zip(results, expected, strict = True) for a, b in zip(*pair, strict = True))

def same_to_rounding(results, expected):
    """torch puts gradients into other buckets after the first step of a process: three or more are summed otherwise."""
    pairs = [pair for processes in zip(results, expected, strict = True) for pair in zip(*processes, strict = True)]
    return all(relative(a, b) < 1e-6 for a, b in pairs)

WORLD, LAST = 3, 2

def train_with_straggler(folder):
    def before_step(t):
        if t.rank == LAST and t.step == 6:
            time.sleep(1.5)

    return train(folder, before_step)

def train_with_loss(folder):
    """The last process is killed before its step 8; of the others what they say, and after how many seconds."""
    killed_at = folder / 'killed'

    def before_step(t):
        if t.rank == LAST and t.step == 7:
            killed_at.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        train(folder, before_step)
    except Exception as error:
        return f'{type(error).__name__}: {error}', time.time() - float(killed_at.read_text())

def resume(folder):
    return train(folder, resume_from_checkpoint = 'latest')

def test_stragglers_and_lost_processes(tmp_path):
    """All wait for one that is slow. If one is killed, the others end, and go on from the last checkpoint."""
    straight, _ = zip(*launch(train, WORLD, tmp_path / 'a'), strict = True)
    late, seconds = zip(*launch(train_with_straggler, WORLD, tmp_path / 'b'), strict = True)
    assert same(late, straight)
    assert all(own[6] > 1.4 for own in seconds)

    *others, lost = launch(train_with_loss, WORLD, tmp_path / 'c')
    print('\n', others)
    assert lost == -signal.SIGKILL
    for said, seconds in others:
        assert said.startswith('RuntimeError') and 'onnection' in said
        assert seconds < 10

    resumed, _ = zip(*launch(resume, WORLD, tmp_path / 'c'), strict = True)
    assert same_to_rounding(resumed, straight)
    assert rows(tmp_path / 'a') == rows(tmp_path / 'b')

def train_with_hang(folder):
    """A process that neither dies nor goes on: the others wait for as long as they were told."""
    PartialState(cpu = True, timeout = timedelta(seconds = 4))          # before the Trainer
    given_up = [folder / f'given-up-{rank}' for rank in range(2)]

    def before_step(t):
        while t.rank == 2 and t.step == 7 and not all(path.exists() for path in given_up):
            time.sleep(0.1)

    start = time.time()

    try:
        train(folder, before_step)
    except Exception as error:
        rank = int(os.environ['RANK'])
        if rank < 2:
            given_up[rank].write_text('')
        return f'{type(error).__name__}: {error}', time.time() - start

def test_a_process_that_hangs_is_given_up(tmp_path):
    """One says so, and by ending tells the others."""
    *others, _ = launch(train_with_hang, 3, tmp_path)
    print('\n', others)
    assert any('imed out' in said for said, _ in others)
    assert all(said.startswith('RuntimeError') and seconds > 4 for said, seconds in others)

# started anew by torchrun

def die_once(folder, at):
    """The second process is killed there, the first time that it comes by."""
    flag = folder / 'died'

    def before_step(t):
        if t.rank == 1 and t.step == at and not flag.exists():
            flag.write_text('')
            os.kill(os.getpid(), signal.SIGKILL)

    return before_step

@pytest.mark.slow
@pytest.mark.parametrize('at', [2, 7])
def test_torchrun_starts_anew(tmp_path, at):
    """Killed before and after the first checkpoint: this module as a script, see the end of it.

    torch's default, one store for all attempts, lets the second one look for the addresses of the first.
    """
    straight = launch(train, 2, tmp_path / 'straight')
    torchrun = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2)
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}
    run(*torchrun, '--max-restarts', 1, __file__, tmp_path, at, timeout = 200, env = environment)
    assert (tmp_path / 'run' / 'died').exists()

    for rank, (expected, _) in enumerate(straight):
        found = json.loads((tmp_path / f'{rank}.json').read_text())
        assert found == [array.tolist() for array in expected]

    assert rows(tmp_path / 'run') == rows(tmp_path / 'straight')

if __name__ == '__main__':      # started by torchrun
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    own_result, _ = train(
        place / 'run', die_once(place / 'run', int(sys.argv[2])), resume_from_checkpoint = 'latest'
    )
    text = json.dumps([array.tolist() for array in own_result])
    (place / f'{os.environ["RANK"]}.json').write_text(text)
    end_processes()
