"""examples/measure/plan.py: what it computes on the meta device against steps that were taken on the CPU."""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.utils import flop_counter

from drifting_pytorch import FeatureDriftLoss, LatentMAE, drifting
from drifting_pytorch.drifting import GeneratorSettings
from helpers import ROOT

sys.path[:0] = [str(ROOT / 'examples'), str(ROOT / 'examples' / 'measure')]

import benchmark
import plan

CPU = argparse.Namespace(device = torch.device('cpu'))
WIDE = dict(image_size = 16, channels = 4, patch_size = 2, dim = 256, depth = 2, heads = 4)

# 100 to 370 MiB: a generator is most of the first, the second has wide features, the third works in chunks

SIZES = dict(
    deep = dict(
        generator = 'tiny', encoder = dict(dim = 16, layers = (1, 2, 2, 1)),
        settings = dict(num_groups = 4, num_gen = 16, num_pos = 16, num_uncond = 8)
    ),
    wide = dict(
        generator = WIDE, encoder = dict(dim = 64, layers = (1, 1, 1, 1)), checkpointing = True,
        settings = dict(num_groups = 4, num_gen = 16, num_pos = 16, num_uncond = 8)
    ),
    chunks = dict(
        generator = 'tiny', encoder = dict(dim = 32, layers = (1, 1, 1, 1)),
        settings = dict(num_groups = 2, num_gen = 24, num_pos = 16, num_uncond = 8, group_chunk_size = 1)
    )
)

class NoModules:
    """torch's counter follows modules, and fails where a block is checkpointed: totals do without."""
    parents = {'Global'}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

def attention_on_a_cpu():
    """The counter knows attention on a GPU alone."""
    def formula(kind, *args, **kwargs):
        return flop_counter.flop_registry[getattr(torch.ops.aten, f'_scaled_dot_product_flash_attention{kind}')](
            *args, **kwargs
        )

    mapping = {}

    for kind in ('', '_backward'):
        on_a_cpu = getattr(torch.ops.aten, f'_scaled_dot_product_flash_attention_for_cpu{kind}')
        mapping[on_a_cpu] = partial(formula, kind)
        mapping[on_a_cpu]._get_raw = True

    return mapping

def measured(trainer, batches):
    """Operations of a step, and the most bytes that torch holds in it."""
    with patch.object(flop_counter, 'ModuleTracker', NoModules):
        with flop_counter.FlopCounterMode(display = False, custom_mapping = attention_on_a_cpu()) as counter:
            trainer.train_step(batches)

    trainer.optimizer.zero_grad()
    return counter.get_total_flops(), benchmark.peak_mib(partial(trainer.train_step, batches), CPU.device) * 2 ** 20

def simulated(size, **settings):
    with torch.device('meta'):
        model = benchmark.make_generator(size['generator'], num_classes = 10).to('meta')
        encoder = LatentMAE(**size['encoder'], num_classes = None)

    model.checkpointing = encoder.checkpointing = 'checkpointing' in size
    settings = GeneratorSettings(**{**size['settings'], **settings})
    loss_fn = FeatureDriftLoss(encoder)

    with patch.dict(drifting.PART_NUMBERS, meta = drifting.PART_NUMBERS['cpu']):
        return model, loss_fn, settings, plan.simulate(model, loss_fn, settings, half = False)

def test_a_peak_is_that_of_the_call():
    """What was there before is not counted, nor that it goes, even where torch recorded how it was made."""
    with torch.profiler.profile(profile_memory = True):
        recorded = [torch.empty(3000) for _ in range(50)]

    del recorded
    before = [torch.empty(3000) for _ in range(50)]             # some in the places of those

    calls = []

    def call():
        calls.append(None)

        if len(calls) == 2:                                     # the first one is not measured
            before.clear()

        parts = [torch.empty(2 ** 18) for _ in range(2)]
        parts.pop()
        parts.append(torch.empty(2 ** 17))

    assert benchmark.peak_mib(call, CPU.device) == 2

def test_features_that_are_solved_together_need_no_more_memory(monkeypatch):
    loss_fn = FeatureDriftLoss(LatentMAE(dim = 16, layers = (2, 2, 2, 2), num_classes = None))
    gen, pos, uncond = (torch.randn(2, n, 4, 16, 16) for n in (16, 16, 4))
    gen.requires_grad_()
    together, num = FeatureDriftLoss.problems, []

    def step():
        loss, _ = loss_fn(gen, pos, uncond, torch.tensor([1., 2.]))
        loss.backward()

    def one_by_one(self, *args, **kwargs):
        for bundle in together(self, *args, **kwargs):
            num.append(len(bundle))
            for name in list(bundle):
                yield {name: bundle.pop(name)}

    peak = benchmark.peak_mib(step, CPU.device)
    monkeypatch.setattr(FeatureDriftLoss, 'problems', one_by_one)
    alone = benchmark.peak_mib(step, CPU.device)
    print(f'\n{num} features together: {peak:.1f} MiB, one by one {alone:.1f} MiB')
    assert len(num) < sum(num) / 3
    assert peak < 1.02 * alone

def bytes_of(tensors):
    return sum(t.nbytes for t in tensors)

@pytest.mark.parametrize('name', [
    pytest.param(name, marks = () if name == 'deep' else pytest.mark.slow) for name in SIZES
])
def test_plan_is_what_a_step_on_the_cpu_needs(name, tmp_path):
    size = SIZES[name]
    trainer, batches = benchmark.make_trainer(CPU, tmp_path, size, size['settings']['num_groups'])
    trainer.unwrapped.checkpointing = trainer.loss_fn.encoders[0].checkpointing = 'checkpointing' in size
    flops, peak = measured(trainer, batches)
    model, loss_fn, settings, result = simulated(size)
    print(f'\n{name}: measured {peak / 2 ** 20:.1f} MiB, planned {result.peak / 2 ** 20:.1f} MiB')
    assert sum(record['flops'] for record in result.records) == flops
    assert abs(result.peak / peak - 1) < 0.05
    num_features = len(trainer.loss_fn.features(torch.zeros(1, *model.noise_shape)))
    assert 2 <= len(result.sums) < 2 / 3 * num_features     # of 2 * num_features, many are summed in one call

    planned = {what: on_gpu for what, (on_gpu, _) in plan.held(model, loss_fn, settings, 1).items()}
    states = trainer.optimizer.state.values()
    moments = [state[name] for state in states for name in ('exp_avg', 'exp_avg_sq')]
    assert planned['weights'] == bytes_of(plan.tensors_of(trainer.unwrapped))
    assert planned['averages'] == bytes_of(plan.tensors_of(trainer.ema.ema_model))
    assert planned['optimizer'] == bytes_of(moments)
    assert planned['encoders'] == bytes_of(plan.tensors_of(trainer.loss_fn))
    assert planned['queues of real samples'] == bytes_of(queue.samples for queue in trainer.queues.values())

def test_half_precision_and_checkpointing_need_less():
    size = SIZES['deep']
    model, loss_fn, settings, whole = simulated(size)
    *_, again = simulated(dict(size, checkpointing = True))
    half = plan.simulate(model, loss_fn, settings)
    assert again.peak < whole.peak and half.peak < whole.peak

    def flops(result):
        return sum(record['flops'] for record in result.records)

    assert flops(half) == flops(whole) < flops(again)

@pytest.fixture
def small_ablation():
    """In place of the preset's networks and groups."""
    for cached in (plan.simulated, plan.make_run):
        cached.cache_clear()

    settings = dict(num_groups = 18, num_gen = 8, num_pos = 8, num_uncond = 4)
    encoder = dict(dim = 8, layers = (1, 1, 1, 1))

    with (
        patch.dict(drifting.PRESETS, {'B/2': benchmark.TINY}), patch.dict(plan.ENCODERS, ablation = encoder),
        patch.dict(drifting.TRAINER_PRESETS, ablation = settings)
    ):
        yield

    for cached in (plan.simulated, plan.make_run):
        cached.cache_clear()

@pytest.mark.slow
def test_few_groups_tell_of_many(small_ablation):
    """Memory is on a straight line, operations in proportion to the groups."""
    for sizes in ((18, None, 'both'), (10, 5, 'none')):
        num_groups, chunk, checkpointing = sizes
        model, loss_fn, settings = plan.make_run('ablation', checkpointing)
        exact = plan.simulate(model, loss_fn, replace(settings, num_groups = num_groups, group_chunk_size = chunk))
        assert abs(plan.peak_of('ablation', *sizes) / exact.peak - 1) < 0.05
        assert sum(plan.flops_of('ablation', *sizes).values()) == sum(record['flops'] for record in exact.records)

def test_buckets_are_those_of_torch():
    with torch.device('meta'):
        model = benchmark.make_generator('B/2')

    parameters = list(reversed(list(model.parameters())))
    found, _ = torch.distributed._compute_bucket_assignment_by_size(parameters, [2 ** 20, 25 * 2 ** 20])
    assert plan.num_buckets(model) == len(found)

def test_the_command(small_ablation, tmp_path, capsys):
    def run(*options):
        plan.main(['--preset', 'ablation', '--output', str(tmp_path / 'plan.json'), *options])
        return json.loads((tmp_path / 'plan.json').read_text())

    result = run('--gpus', '2')
    (whole,) = result['runs']
    assert (whole['groups per GPU'], whole['`--group-chunk-size`'], whole['`--checkpointing`']) == (9, '', '')
    assert whole['calls per step'] == sum(row['calls'] for row in result['tables']['Collective calls of a step']) // 1
    assert 'Computed, not measured' in capsys.readouterr().out

    with pytest.raises(ValueError, match = 'cannot share the 18 groups'):
        run('--gpus', '19')

@pytest.mark.parametrize('in_parts', [False, True])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_step_of_an_encoder_needs_what_is_planned(checkpointing, in_parts, monkeypatch):
    """On a CPU in float32, to 2 %."""
    monkeypatch.setitem(plan.MAES, 'small', dict(dim = 32, layers = (1, 1, 2, 1)))
    planned = plan.peak_of_encoder('small', 8, checkpointing, in_parts, half = False)

    mae = LatentMAE(dim = 32, layers = (1, 1, 2, 1), num_classes = plan.NUM_CLASSES, checkpointing = checkpointing)
    side = 32 // mae.mask_pixels

    def step():
        samples, mask = torch.randn(8, 4, 32, 32), torch.ones(8, side, side)
        for _ in range(2 if in_parts else 1):
            loss, _ = mae(samples, torch.zeros(8, dtype = torch.long), mask = mask)
            loss.backward()
            del loss
        mae.zero_grad()

    assert planned == pytest.approx(benchmark.peak_mib(step, CPU.device) * 2 ** 20, rel = 0.02)

def test_how_many_samples_of_an_encoder_fit(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, 'MAES', {'small': dict(dim = 32, layers = (1, 1, 2, 1))})

    def found(*options):
        plan.main(['--encoders', '--output', str(tmp_path / 'plan.json'), *options])
        row, = json.loads((tmp_path / 'plan.json').read_text())['runs']
        return row['GB between steps'], row['samples per GPU'], row['with `--checkpointing`']

    (held, num, more), (of_one, num_of_one, _) = found('--memory', '1'), found('--memory', '1', '--gpus', '1')
    few, many = (plan.peak_of_encoder('small', size, False, True) for size in (num, 2 * num))
    assert of_one == pytest.approx(held * 4 / 5) and 1 < num <= min(more, num_of_one)
    assert plan.peak_of_encoder('small', num, True, True) < few <= (0.9 - held) * 1e9 < many
    assert found('--memory', '0.055')[1:] == ('none', 'none')

def test_512_pixels_need_as_many_tokens_and_features_as_256():
    assert 'L/2-512' in plan.ENCODERS
    large, small = (plan.make_run(preset, 'none') for preset in ('L/2-512', 'L/2'))
    (model, loss_fn, _), (small_model, small_loss_fn, _) = large, small
    assert model.noise_shape == (4, 64, 64) and small_model.noise_shape == (4, 32, 32)
    encoder, small_encoder = loss_fn.encoders[0], small_loss_fn.encoders[0]
    assert model.noise_shape[-1] // encoder.patch_size == small_model.noise_shape[-1] // small_encoder.patch_size

def test_every_preset_is_planned():
    assert set(plan.ENCODERS) == {'ablation', *drifting.PRESETS}

def test_what_many_processes_share_in_numbers():
    """Of every class a process reads num_pos at least; among many it passes over more rows."""
    assert 10 * 4 <= plan.rows_to_fill(10, 4) < 4 * 10 * 4
    assert plan.ms_to_find_rows(8, 7, 4, 1) < plan.ms_to_find_rows(4096, 7, 64, 1)

@pytest.mark.slow
def test_the_simulation(tmp_path, capsys):
    plan.main(['--simulate', '4', '16', '--output', str(tmp_path / 'plan.json')])
    result = json.loads((tmp_path / 'plan.json').read_text())
    assert [(row['processes'], row['rank']) for row in result['runs']] == [
        (4, 0), (4, 1), (4, 3), (16, 0), (16, 1), (16, 15)
    ]
    assert len({(row['calls per step'], row['MB in them']) for row in result['runs']}) == 1
    few, many = result['tables']['What grows']
    assert many['GB of queues in a checkpoint'] == pytest.approx(4 * few['GB of queues in a checkpoint'])
    assert 'Counted in a fake process group' in capsys.readouterr().out
