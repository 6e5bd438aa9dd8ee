"""The README's code runs as it stands, and the examples run from end to end in a few steps."""

import argparse
import csv
import json
import os
import re
import runpy
import sys
import time
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from drifting_pytorch import BackboneFeatures, ConvGenerator, ImageFolder, LatentMAE, Trainer
from helpers import ROOT, run, run_example

EXAMPLES = ROOT / 'examples'

@pytest.fixture
def examples(monkeypatch):
    """The scripts can be imported."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES / 'measure'))

def run_here(monkeypatch, script, *args):
    """A script in this process: it starts in no time, where it ends at once."""
    monkeypatch.setattr(sys, 'argv', [*map(str, (script, *args))])
    runpy.run_path(str(EXAMPLES / script), run_name = '__main__')

def launched(script, *args, processes = 2):
    """What a script prints that torchrun starts."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', processes]
    path = os.pathsep.join((str(ROOT), os.environ.get('PYTHONPATH', '')))
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}
    return run(*command, EXAMPLES / script, *args, env = env, timeout = 300)

@pytest.mark.parametrize('script, option', [('train_policy.py', '--seeds'), ('train_images.py', '--threads')])
def test_numbers_that_count_start_at_1(monkeypatch, capsys, examples, script, option):
    with pytest.raises(SystemExit, match = '2'):
        run_here(monkeypatch, script, option, '0')
    assert f'argument {option}: must be a whole number from 1 on, got 0' in capsys.readouterr().err

@pytest.mark.parametrize('name, least', [('README.md', 6), ('examples/README.md', 3), ('tests/README.md', 0)])
def test_readme_code_runs(tmp_path, monkeypatch, name, least):
    text = (ROOT / name).read_text().replace('num_train_steps = 400,', 'num_train_steps = 20,')
    blocks = re.findall(r'```python\n(.*?)```', text, flags = re.DOTALL)
    assert len(blocks) >= least

    monkeypatch.chdir(tmp_path)
    (tmp_path / 'tests').symlink_to(ROOT / 'tests')

    for i in range(16):
        path = tmp_path / 'path' / 'to' / 'images' / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents = True, exist_ok = True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype = np.uint8)
        Image.fromarray(pixels).save(path)

    namespace = {}

    for block in blocks:
        exec(compile(block, name, 'exec'), namespace)

def test_minimal(tmp_path):
    run(sys.executable, EXAMPLES / 'minimal.py', 4, cwd = tmp_path)
    picture = Image.open(tmp_path / 'results' / 'minimal' / 'samples.png')
    assert picture.height * 16 == picture.width * 10        # 10 rows of 16
    assert len((EXAMPLES / 'minimal.py').read_text().splitlines()) <= 40

SHORT = ('--steps', 8, '--sample-every', 4, '--save-every', 4, '--threads', 1)

def test_digits(tmp_path):
    run_example('train_digits.py', '--results-folder', tmp_path, *SHORT)

    arrays = np.load(tmp_path / 'samples.npz')
    assert arrays['images'].shape == (1000, 1, 8, 8) and arrays['images'].min() >= 0 and arrays['images'].max() <= 1
    assert np.bincount(arrays['labels']).tolist() == [100] * 10

    picture = Image.open(tmp_path / 'samples.png')
    assert picture.height * 2 == picture.width             # 10 rows of 20
    assert Image.open(tmp_path / 'curves.png').width > 500

    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['real']['accuracy'] > 0.98              # a classifier worth asking
    assert 0 <= metrics['samples']['accuracy'] <= 1 and metrics['samples']['frechet_ratio'] > 1

def test_digits_of_two_processes_are_judged_once(tmp_path):
    text = launched('train_digits.py', '--results-folder', tmp_path, *SHORT)
    assert text.count('recognised as their class') == text.count('samples.png') == 1
    manifest = json.loads((tmp_path / 'checkpoints' / 'step-00000008' / 'manifest.json').read_text())
    assert manifest['num_processes'] == 2 and manifest['torch'] == torch.__version__
    assert json.loads((tmp_path / 'metrics.json').read_text())['samples']['frechet_ratio'] > 1

def test_digit_metrics_know_copies_and_collapse(examples):
    from sklearn.datasets import load_digits

    import train_digits

    pixels, labels = load_digits(return_X_y = True)
    pixels = pixels / 16
    means = np.stack([pixels[labels == i].mean(axis = 0) for i in range(10)])

    copies = train_digits.evaluate(pixels[:1000], labels[:1000], pixels, labels)
    collapsed = train_digits.evaluate(means[labels[:1000]], labels[:1000], pixels, labels)

    assert copies['samples']['nearest_real']['mean'] == 0 and copies['samples']['frechet_ratio'] < 1.5
    assert collapsed['samples']['spread_within_class'] < 1e-6 and collapsed['samples']['frechet_ratio'] > 10
    assert 0.5 < copies['real']['nearest_real']['mean'] < 2

def test_mnist(tmp_path):
    steps = ('--steps', 4, '--raw-steps', 2, '--mae-steps', 6, '--sample-every', 0, '--save-every', 0)
    text = run_example('train_mnist.py', '--results-folder', tmp_path, '--encoder', 'mae+cls', *steps, '--threads', 1)

    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['judge_accuracy'] > 0.96                                             # a classifier worth asking
    assert metrics['real']['recall'] > 0.8 and metrics['real']['frechet_distance'] < 20
    assert list(metrics['samples']) == ['1.0', '1.5', '2.0', '3.0'] and 'real training images' in text

    for measures in metrics['samples'].values():            # after four steps
        assert 0 <= measures['accuracy'] <= 1 and measures['frechet_distance'] > 100

    samples, alphas = (Image.open(tmp_path / name) for name in ('samples.png', 'alpha_grid.png'))
    assert samples.height * 2 == samples.width              # 10 rows of 20
    assert alphas.height * 5 == alphas.width                # 4 rows of 20
    assert (tmp_path / 'reconstructions.png').exists() and (tmp_path / 'curves.png').exists()

def test_compare(tmp_path, examples, monkeypatch):
    args = ('measure/compare_mnist.py', '--results-folder', tmp_path, '--budget', 0.1, '--points', 1)
    text = run_example(*args, '--num-samples', 50)
    table = dict(re.findall(r'^([\w-]+) +\d+ +([\d,]+) ', text, flags = re.MULTILINE))
    assert list(table) == ['drifting', 'drifting-pixels', 'meanflow', 'wgan', 'flow']
    assert all(int(size.replace(',', '')) <= 450_000 for size in table.values())

    for method, evaluations in (dict.fromkeys(table, 1) | dict(flow = 50)).items():
        record, = json.loads((tmp_path / f'{method}-0.json').read_text())
        assert record['evaluations'] == evaluations and 0 <= record['recall'] <= 1 and record['novelty'] > 0.5
        assert Image.open(tmp_path / f'{method}-0.png').height > 400

    assert Image.open(tmp_path / 'compare.png').width > 800

    # another run in its folder is refused, before it asks the judge, which takes long to train

    import common
    monkeypatch.setattr(common, 'train_classifier', lambda *_: lambda images: (images, torch.zeros(len(images))))

    for other, message in (
        (('--num-samples', 100, '--method', 'drifting'), 'was evaluated by 50 samples: pass --num-samples 50'),
        (('--num-samples', 50, '--method', 'flow', '--set', 'uniform_times=True'), 'pass the same, or another'),
    ):
        with pytest.raises(SystemExit, match = message):
            run_here(monkeypatch, *args, *other)

@pytest.mark.slow
def test_compare_on_photographs(tmp_path, examples, monkeypatch, capsys):
    """On a few crops, and neither the judge nor the encoder of drifting is trained."""
    import compare_mnist
    import encoders
    import photographs

    of_any_number = photographs.crops
    monkeypatch.setattr(photographs, 'crops', lambda part, num, *args: of_any_number(part, min(num, 150), *args))
    monkeypatch.setattr(encoders.Classifier, 'train_on', lambda *_, **__: None)
    args = ('measure/compare_mnist.py', '--data', 'photographs', '--results-folder', tmp_path, '--budget', 0.1)
    args = (*args, '--points', 1, '--num-samples', 8, '--evaluations', 1)
    small = 'num_gen=4', 'num_pos=8', 'encoder_steps=2'
    run_here(monkeypatch, *args, '--method', 'drifting', '--set', *small)
    run_here(monkeypatch, *args, '--method', 'flow')
    rows = re.findall(r'^([\w-]+) +(\d+) +([\d,]+) ', capsys.readouterr().out, flags = re.MULTILINE)
    table = {name: (int(evaluations), int(size.replace(',', ''))) for name, evaluations, size in rows}
    evaluations = {name: num for name, (num, _) in table.items()}
    assert evaluations == {'drifting': 1, 'flow': 50, 'flow-1': 1}
    assert all(size <= 450_000 for _, size in table.values())

    for name in table:
        assert Image.open(tmp_path / f'{name}-0.png').size == (20 * 68, 2 * 68)

    assert Image.open(tmp_path / 'samples.png').size == (9 * 68, 3 * 2 * 68 + 2 * 6)
    record, = json.loads((tmp_path / 'flow-0.json').read_text())
    assert record['final'] != record['flow-1'] and len(record['accuracy_per_class']) == 2

    with pytest.raises(SystemExit, match = 'was trained on photographs: pass another'):
        compare_mnist.check_same('flow-0.pt', record, 0.1, 8, 'mnist', {})

@pytest.mark.parametrize('method', [
    'drifting', 'flow', *(pytest.param(name, marks = pytest.mark.slow) for name in ('meanflow', 'wgan'))
])
def test_compare_goes_on_as_if_it_had_not_stopped(tmp_path, examples, method):
    import compare_mnist

    torch.manual_seed(0)
    images, labels = torch.rand(100, 1, 28, 28) * 2 - 1, torch.arange(100) % 10
    kwargs = dict(batch_size = 8)
    if method == 'drifting':
        kwargs = dict(folder = tmp_path / 'run', num_gen = 4, num_pos = 8, encoder_steps = 2)
    trained = compare_mnist.METHODS[method](images, labels, **kwargs)
    start = [p.clone() for p in trained.averaged.parameters()]

    trained.step()
    torch.save((trained, torch.get_rng_state()), tmp_path / 'state.pt')
    trained.step()

    resumed, random_state = torch.load(tmp_path / 'state.pt', weights_only = False)
    torch.set_rng_state(random_state)
    resumed.step()

    straight, gone_on = ([*each.averaged.parameters()] for each in (trained, resumed))
    assert all(torch.equal(a, b) for a, b in zip(straight, gone_on, strict = True))
    assert any(not torch.equal(a, b) for a, b in zip(straight, start, strict = True))

@pytest.mark.slow
def test_restore(tmp_path):
    text = run_example('train_restore.py', '--quick', '--results-folder', tmp_path)
    record = json.loads((tmp_path / 'metrics.json').read_text())
    assert 200_000 < record['parameters'] < 400_000 and record['judge_accuracy'] > 0.96
    assert (tmp_path / 'restore.md').read_text() in text and text.count('\n| ') == 2 * (2 + 6)

    for task in ('coarse', 'half'):
        regression, *others, nearest = (seeds[0] for seeds in record[task]['results'].values())
        assert regression['spread'] == 0 and regression['error_of_mean'] == regression['error_of_best']
        assert len(others) == 4 and all(0.1 < each['spread'] < 2 for each in others)
        assert 0 < nearest['inconsistency'] < 0.5 and nearest['recognised'] > 0.6
        assert all(runs[0]['steps'] > 0 for runs in record[task]['training'].values())

    picture = Image.open(tmp_path / 'restore.png')
    assert picture.width > picture.height > 400

def test_restore_measures(examples):
    """The truth as the answer has no error; a second answer makes a spread, not a larger error of the best."""
    from types import SimpleNamespace

    import train_restore

    images, labels = torch.rand(3, 1, 28, 28, generator = torch.Generator().manual_seed(0)), torch.tensor([1, 1, 2])
    judge = SimpleNamespace(classify = lambda x: (None, torch.tensor([0., 9., 0.]).expand(len(x), 3)))

    for task in ('coarse', 'half'):
        condition = train_restore.condition_of(images, task)
        assert condition.shape == (3, 2, 28, 28) and condition[:, 1].mean() == (0.5 if task == 'half' else 0)

        other = images.clone()
        train_restore.unknown(other, task).add_(1)          # of all pixels, so known changes too, where it is coarse
        answers = torch.stack((images, other), dim = 1)
        measures = train_restore.evaluate(answers, images, labels, task, judge)

        expected = dict(
            error_of_mean = 0.5, error_of_best = 0., recognised = 2 / 3, another_digit = 1 / 3, spread = 1.,
            inconsistency = 0.5 if task == 'coarse' else 0.
        )
        assert measures == pytest.approx(expected, abs = 1e-5)

def test_toy(tmp_path):
    text = run_example('train_toy.py', '--results-folder', tmp_path, '--steps', 8, '--threads', 1)
    assert text.count('\n| ') >= 7 and Image.open(tmp_path / 'evolution.png').width > 500

    args = ('--steps', 4, '--ablation', '--seeds', 0, 1, '--threads', 1)
    text = run_example('train_toy.py', '--results-folder', tmp_path, *args)
    assert 'bimodal 1.5 V+ - 1.0 V-' in text and text.count('\n| ') >= 13 and text.count(' ± ') == 12

def test_ablations(tmp_path, examples, monkeypatch, capsys):
    import ablations

    trained, train = [], ablations.train
    monkeypatch.setattr(ablations, 'train', lambda *args: trained.append(args) or train(*args))
    monkeypatch.setattr(ablations, 'Data', lru_cache(ablations.Data))

    args = ('--table', 'guidance', '--quick', '--steps', 2, '--seeds', 0, 1, '--results-folder', tmp_path)
    monkeypatch.setattr(sys, 'argv', ['ablations.py', *map(str, args)])

    ablations.main()
    tables = (tmp_path / 'ablations.md').read_text()
    runs = list((tmp_path / 'runs').glob('*.json'))

    assert len(runs) == len(trained) == 2                   # of two seeds, a generator for all five scales
    assert len(list(csv.DictReader(open(tmp_path / 'results.csv')))) == 2 * 5
    assert tables in capsys.readouterr().out
    assert tables.count('\n| ') == 2 + 5 and tables.count('±') == 5 * 5
    assert Image.open(tmp_path / 'ablations.png').width > 200

    # what is finished is not repeated; what is missing is, and what was done with other settings

    gone, other = sorted(runs)
    gone.unlink()
    other.write_text(other.read_text().replace('"steps": 2', '"steps": 3'))

    for _ in range(2):
        ablations.main()
        assert (tmp_path / 'ablations.md').read_text() == tables

    assert gone.exists() and '"steps": 2' in other.read_text() and len(trained) == 4

@pytest.mark.slow
def test_every_ablation_trains(tmp_path, examples, monkeypatch):
    import ablations

    quick = dict(ablations.MODES['quick'], raw_steps = 0, mae_steps = dict(short = 3, long = 6))
    monkeypatch.setattr(ablations, 'MODES', dict(ablations.MODES, quick = quick))
    monkeypatch.setattr(sys, 'argv', ['ablations.py', '--quick', '--steps', '1', '--results-folder', str(tmp_path)])
    ablations.main()

    rows = list(csv.DictReader(open(tmp_path / 'results.csv')))
    expected = [(name, row) for name, (_, table) in ablations.TABLES.items() for row in table]
    assert [(row['table'], row['row']) for row in rows] == expected
    assert all(np.isfinite(float(row['frechet_distance'])) for row in rows)

def test_ablation_verdicts(examples):
    from ablations import verdict

    low, high, wide = [10., 11., 12.], [20., 21., 22.], [5., 12., 40.]
    assert verdict(high, low, '>', 'frechet_distance') == 'seen'
    assert verdict(low, high, '>', 'frechet_distance') == 'not seen'
    assert verdict(low, high, '<', 'frechet_distance') == 'seen'
    assert verdict(high, low, None, 'frechet_distance') == 'higher'
    assert verdict(wide, low, '>', 'frechet_distance') == 'not resolvable'
    assert verdict(low[:1], high[:1], '>', 'recall') == 'one seed'

RECOVERED = [
    ('far', 'paper'), ('collapsed', 'paper'),
    ('between', 'gaussian'), ('between', 'gradient'), ('between', 'sharp'), ('far', 'sinkhorn')
]

@pytest.mark.parametrize('start, field', RECOVERED)
def test_toy_recovers_both_modes(examples, start, field):
    import train_toy

    kwargs = dict(steps = 400, batch = 128, learning_rate = 3e-3, temperatures = (0.02, 0.05, 0.2, 0.5), seed = 0)
    result = train_toy.train('bimodal', start, field = train_toy.FIELDS[field], **kwargs)[3]
    assert result['modes_covered'] == 2 and result['ratio'] < 6

def test_benchmark(tmp_path):
    output = tmp_path / 'benchmark.json'
    text = run_example('measure/benchmark.py', 'all', '--quick', '--step', '--device', 'cpu', '--output', output)

    results = json.loads(output.read_text())
    assert all(results[what] for what in ('loss', 'small', 'features', 'maps', 'step', 'trainer', 'sampling', 'growth'))
    assert text.count('\n| ') > 25
    assert {row['contender'] for row in results['loss']} == {'transcription', 'drift_loss', 'floor'}
    assert all(row['/ products'] > 1 for row in results['sampling'])
    assert 0 < results['step']['whole'][0]['utilisation'] < 1

    whole = results['step']['whole'][0]
    assert whole['processor seconds'] > 0 and whole['wall seconds'] > 0
    assert 0 < whole['of these, by the steps'] < whole['peak MiB of a new process']
    assert [row['part'] for row in results['step']['parts']][2:4] == ['encoder of generated', 'encoder of real']

    assert [row['/ plain loop'] > 0 for row in results['small']] == [True, True]
    assert [row['/ var_mean'] > 0 for row in results['maps']] == [True, True, True]
    assert [row['/ bare'] > 0 for row in results['trainer']] == [True, True]
    growth = {row['what varies']: row for row in results['growth']}
    assert list(growth) == ['groups', 'samples', 'groups of a whole step']
    assert growth['groups']['exponent of the peak'] < 1.1 and 'Not linear in time: ' in text

def test_benchmark_compares_equals(examples):
    import benchmark

    inputs = benchmark.problems(argparse.Namespace(device = torch.device('cpu')), 3, 12, 6, 5, 4)
    losses = [fn(*inputs) for fn in (benchmark.ours, benchmark.transcription, benchmark.plain_loop)]
    check_equal(losses, inputs[0])

    gen, pos, uncond, uncond_weight = benchmark.problems(argparse.Namespace(device = torch.device('cpu')), 3, 12, u = 0)
    contenders = benchmark.ours_without_weights, benchmark.bare_loss, benchmark.plain_loop, benchmark.plain_drift_loss
    check_equal([fn(gen, pos, uncond, uncond_weight) for fn in contenders], gen)

def check_equal(losses, gen):
    """Losses and gradients."""
    ours, *others = ((loss, torch.autograd.grad(loss.sum(), gen)[0]) for loss in losses)

    for loss, gradient in others:
        assert torch.allclose(loss, ours[0], rtol = 1e-4)
        assert torch.allclose(gradient, ours[1], rtol = 1e-3, atol = 1e-5)

def test_benchmark_of_maps_compares_equals(examples):
    import benchmark

    encoder = LatentMAE(dim = 8, layers = (1, 1, 2, 1), num_classes = None).double()
    x = torch.randn(2, 4, 32, 32, dtype = torch.float64)
    today, before = encoder.features(x), benchmark.with_var_mean(lambda: encoder.features(x))()
    assert today.keys() == before.keys()
    assert all(torch.allclose(today[name], before[name], rtol = 0, atol = 1e-10) for name in today)

def test_gpu_report(tmp_path, examples, monkeypatch, capsys):
    """All of it on a cpu, even smaller than --quick. What fails is told, and the next part follows."""
    import benchmark
    import gpu

    sizes = dict(image_size = 16, channels = 4, patch_size = 4, dim = 32, depth = 1, heads = 4)
    step = dict(
        generator = 'tiny', encoder = dict(dim = 8, layers = (1, 1, 1, 1)),
        settings = dict(num_groups = 2, num_gen = 4, num_pos = 8, num_uncond = 4)
    )
    monkeypatch.setattr(benchmark, 'TINY', sizes)
    monkeypatch.setitem(benchmark.STEPS, 'tiny', step)
    digits = torch.rand(1_600, 1, 32, 32) * 2 - 1, torch.arange(1_600) % 10
    monkeypatch.setattr(gpu, 'load_mnist', lambda: digits)           # the real ones take seconds to read

    def too_large(args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 PiB.\nAnd so on')

    monkeypatch.setitem(gpu.PARTS, 'rates', lambda args, rates = gpu.report_rates: rates(args) or too_large(args))
    output = tmp_path / 'folder' / 'gpu.md'
    gpu.main(['--quick', '--device', 'cpu', '--threads', '1', '--output', str(output)])
    text = output.read_text()

    assert text in capsys.readouterr().out
    assert re.findall(r'^## (.+)$', text, flags = re.MULTILINE) == ['rates', 'loss', 'step', 'mnist', 'sampling']
    assert re.findall(r'^Failed: .*$', text, flags = re.MULTILINE) == [
        'Failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 1 PiB.'
    ]
    shares = re.findall(r'^\| (\w[\w ]+?) +\| [\d.,]+ +\| (0\.\S+) +\|$', text, re.MULTILINE)
    parts = 'real samples', 'generator', 'encoder of generated', 'encoder of real', 'loss'
    assert [part for part, _ in shares][:5] == list(parts) and len(shares) == 8
    assert all(0 < float(share) < 1 for _, share in shares)
    assert 'A Frechet distance of 3 was ' in text and text.count('| eager ') == 2

    gpu.main(['--quick', '--device', 'cpu', '--minutes', '0', '--output', str(output)])
    assert output.read_text().count('Left out: the time is over') == 5

def test_gpu_report_samples_in_every_way(examples, monkeypatch):
    """Graphs, which a cpu does not have, come with a GPU."""
    import gpu

    monkeypatch.setattr(torch, 'compile', lambda model, **kwargs: model)
    model = gpu.make_generator('tiny').eval()

    args = argparse.Namespace(device = torch.device('cpu'), compile = True)
    makers = gpu.sampling_contenders(model, 3, args, torch.bfloat16)
    assert list(makers) == ['eager', 'compiled']
    outs = [make()() for make in makers.values()]
    assert all(out.shape == (3, *model.noise_shape) and not out.requires_grad for out in outs)

def folder_of_images(folder, classes = ('',), num = 40, grey = False):
    """Of small pictures of two sizes, and how many channels they should have."""
    for i in range(num):
        pixels = np.random.default_rng(i).integers(0, 256, (10 + i % 2, 12, 3), dtype = np.uint8)
        path = folder / classes[i % len(classes)] / f'{i}.png'
        path.parent.mkdir(parents = True, exist_ok = True)
        Image.fromarray(pixels[..., :1].repeat(3, -1) if grey else pixels).save(path)

    return folder

def train_images(monkeypatch, folder, results, *args):
    settings = ('--steps', 4, '--image-size', 8, '--threads', 1)
    run_here(monkeypatch, 'train_images.py', folder, '--results-folder', results, *settings, *args)
    return json.loads((results / 'metrics.json').read_text())

@pytest.mark.parametrize('classes, grey', [(('a', 'b'), False), (('',), False), (('',), True)])
def test_images(tmp_path, monkeypatch, examples, capsys, classes, grey):
    results = tmp_path / 'results'
    metrics = train_images(monkeypatch, folder_of_images(tmp_path / 'cats', classes, grey = grey), results)
    printed = capsys.readouterr().out
    assert '40 images, ' in printed and 'held out: 16' in printed and '12x10 to 12x11' in printed
    rare = ', as many as the smallest class has: leave out rare classes' if len(classes) > 1 else ''
    assert f'\nreal images per class in a step: {24 // len(classes)}{rare}\n' in printed
    assert ('grey' in printed) == grey and ('2 classes (a 12, b 12)' in printed) == (len(classes) > 1)
    assert metrics['samples']['frechet'] > 0 and metrics['real']['frechet'] > 0
    assert ('recognised' in metrics['samples']) == (len(classes) > 1)

    model = ConvGenerator.from_pretrained(results / 'model')
    assert model.num_classes == (2 if len(classes) > 1 else None)
    card = (results / 'model' / 'README.md').read_text()
    assert '# cats' in card and str(tmp_path) not in card and f'{metrics["samples"]["frechet"]:.3f}' in card
    code, = re.findall(r'```python\n(.*?)```', card, flags = re.DOTALL)
    monkeypatch.chdir(results / 'model')
    exec(code, namespace := {})
    assert namespace['samples'].shape == (4, 1 if grey else 3, 8, 8)

    assert Image.open(results / 'training.gif').n_frames == 4
    assert all((results / name).exists() for name in ('samples.png', 'neighbors.png', 'curves.png', 'plan.json'))

    with pytest.raises(SystemExit, match = 'holds an earlier run: pass --resume'):
        train_images(monkeypatch, tmp_path / 'cats', results)

def images_of(folder, monkeypatch, *args):
    """The script, its options, and what it reads: pictures to train on, to choose, and to judge."""
    import train_images as script

    settings = ('--image-size', 8, '--threads', 1, *args)
    monkeypatch.setattr(sys, 'argv', [*map(str, ('train_images.py', folder, *settings))])
    args = script.options()
    return script, args, *script.load_data(args)[:3]

def test_images_where_a_run_cannot_be(tmp_path, monkeypatch, examples):
    folder = folder_of_images(tmp_path / 'cats')

    with pytest.raises(SystemExit, match = 'lies in the folder of images: pass another --results-folder'):
        train_images(monkeypatch, folder, folder / 'results')
    with pytest.raises(SystemExit, match = 'holds no run to go on with: leave out --resume'):
        train_images(monkeypatch, folder, tmp_path / 'typo', '--resume')
    assert not (folder / 'results').exists() and not (tmp_path / 'typo').exists()

def test_images_mirrored_copies_are_found(examples):
    from train_images import Pictures, nearest

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (20, 1, 8, 8), generator = generator, dtype = torch.uint8)
    plain, flipped = (Pictures(pixels, torch.zeros(20), flip) for flip in (False, True))
    mirrored = plain.batch(slice(0, 10)).flip(-1)
    assert nearest(mirrored, plain, 1)[0].min() > 1

    distances, places = nearest(mirrored, flipped, 3)
    assert distances[:, 0].max() < 1e-2 and places[:, 0].tolist() == list(range(10)) and places.shape == (10, 3)

def test_images_real_ones_are_of_the_classes_and_the_number_of_samples(tmp_path, monkeypatch, examples):
    """Ten classes of six: some of the classes judge, and all of them are trained on."""
    from drifting_pytorch.metrics import Evaluation

    compared, compare = [], Evaluation.compare
    monkeypatch.setattr(Evaluation, 'compare', lambda self, x: compared.append((self, len(x))) or compare(self, x))
    folder = folder_of_images(tmp_path / 'cats', 'abcdefghij', 60)
    _, _, pictures, _, judging = images_of(folder, monkeypatch)
    expected = torch.isin(pictures.labels, judging.labels).sum()
    train_images(monkeypatch, folder, tmp_path / 'results')
    (samples, num), (real, num_real) = compared[-2:]
    assert real is samples and num == num_real == expected < len(pictures)

def test_images_that_choose_do_not_judge(tmp_path, monkeypatch, examples):
    folder, apart = folder_of_images(tmp_path / 'cats', 'ab', 60), folder_of_images(tmp_path / 'apart', 'ab', 40)

    for args, sizes in (((), (44, 8, 8)), (('--held-out', apart), (60, 20, 20))):
        _, _, *parts = images_of(folder, monkeypatch, *args)
        found = [{image.numpy().tobytes() for image in pictures.pixels} for pictures in parts]
        assert tuple(map(len, found)) == sizes
        assert not found[1] & found[2] and (args or not found[0] & (found[1] | found[2]))
        assert all(pictures.labels.bincount().diff() == 0 for pictures in parts)        # as many of both classes

def test_images_held_out_are_grey_where_those_to_train_on_are(tmp_path, monkeypatch, examples):
    folder, apart = folder_of_images(tmp_path / 'grey', grey = True), folder_of_images(tmp_path / 'colour')
    _, _, trained, choosing, judging = images_of(folder, monkeypatch, '--held-out', apart)
    expected = torch.stack([image for image, _ in ImageFolder(apart, 8, channels = 1)])
    held_out = torch.stack((choosing.pixels, judging.pixels), dim = 1).flatten(0, 1)         # they take turns
    assert trained.pixels.shape == held_out.shape == (40, 1, 8, 8)
    assert torch.equal(held_out, ((expected + 1) * 127.5).round().byte())

def test_images_the_best_average_of_the_best_step_is_the_model(tmp_path, monkeypatch, examples):
    from drifting_pytorch.metrics import Evaluation

    numbers = [9., 8., 7., 4., 5., 2.] + [3.] * 14          # of two averages, every second step

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, '__call__', lambda self, sample: dict(frechet = numbers.pop(0)))
        metrics = train_images(patch, folder_of_images(tmp_path / 'cats'), tmp_path / 'results', '--steps', 20)

    assert not numbers and metrics['chosen'] == dict(value = 2., step = 6, ema_decay = 0.)
    best = tmp_path / 'results' / 'checkpoints' / 'best-00000006'
    averages, model = load_file(best / 'averages.safetensors'), load_file(tmp_path / 'results/model/model.safetensors')
    assert all(torch.equal(t, averages[f'{name}.0']) for name, t in model.items())
    card = (tmp_path / 'results' / 'model' / 'README.md').read_text()
    assert 'of step 6, averaged with a decay of 0.' in card and 'distance, 2.000, to 8 of the images held out' in card

def test_images_go_on_as_if_they_had_not_been_interrupted(tmp_path, monkeypatch, examples):
    folder, straight, resumed = folder_of_images(tmp_path / 'cats', 'ab'), tmp_path / 'straight', tmp_path / 'resumed'
    expected = train_images(monkeypatch, folder, straight)
    train_step = Trainer.train_step

    def interrupted(trainer, batches):
        if trainer.step == 2:
            raise KeyboardInterrupt
        return train_step(trainer, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, 'train_step', interrupted)
        train_images(patch, folder, resumed)

    steps = json.loads((resumed / 'plan.json').read_text())['steps']
    assert steps['generator'] == 4 and not (resumed / 'model').exists()
    assert (resumed / 'checkpoints' / 'step-00000002').exists()
    metrics = train_images(monkeypatch, folder, resumed, '--resume', '--steps', 9)         # the number stays
    assert metrics['samples'] == expected['samples'] and metrics['steps'] == steps

    for name in ('model/model.safetensors', 'judge.safetensors', 'samples.png', 'neighbors.png', 'training.gif'):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes(), name

def test_images_go_on_from_another_directory(tmp_path, monkeypatch, examples):
    """On the folders that are given now, and without --held-out on that of the first start."""
    import train_images as script

    class Stopped(Exception):
        pass

    def stop(run, *_):
        raise Stopped(run)

    monkeypatch.setattr(script.Run, 'classifier', stop)                 # all is read by then, and the plan is written

    def started(results, folder, *args):
        args = (folder, '--results-folder', tmp_path / results, '--image-size', 8, '--steps', 2, '--threads', 1, *args)
        monkeypatch.setattr(sys, 'argv', [*map(str, ('train_images.py', *args))])

        with pytest.raises(Stopped) as stopped:
            script.main()

        run, = stopped.value.args
        return {pixels.numpy().tobytes() for pixels in run.pictures.pixels} | {run.choosing.pixels.numpy().tobytes()}

    folder, apart = folder_of_images(tmp_path / 'a' / 'cats'), folder_of_images(tmp_path / 'a' / 'apart', num = 38)
    monkeypatch.chdir(tmp_path / 'a')
    alone, both = started('alone', 'cats'), started('both', 'cats', '--held-out', 'apart')
    assert alone != both

    monkeypatch.chdir(tmp_path)
    assert started('alone', 'a/cats', '--resume') == alone
    assert started('both', 'a/cats', '--resume') == both
    with pytest.raises(ValueError, match = 'alone was started without --held-out'):
        started('alone', 'a/cats', '--resume', '--held-out', 'a/apart')

    folder.rename(tmp_path / 'cats')
    apart.rename(tmp_path / 'apart')
    assert started('both', 'cats', '--resume', '--held-out', 'apart') == both

    with pytest.raises(ValueError, match = 'apart is not a folder of images'):
        started('both', 'cats', '--resume')

    first, message = tmp_path / 'cats' / '0.png', 'the run was started with other images: now'
    with Image.open(first) as picture:
        picture.transpose(Image.Transpose.ROTATE_180).save(first)                   # as many, of the same sizes
    with pytest.raises(ValueError, match = f'{message} 40 images'):
        started('both', 'cats', '--resume', '--held-out', 'apart')

    first.unlink()
    with pytest.raises(ValueError, match = f'{message} 39 images'):
        started('both', 'cats', '--resume', '--held-out', 'apart')

def test_images_with_other_networks(tmp_path, monkeypatch, examples):
    folder = folder_of_images(tmp_path / 'cats')
    train_images(monkeypatch, folder, tmp_path / 'results', '--encoder', 'mae', '--image-size', 16, '--steps', 2)
    assert list((tmp_path / 'results' / 'encoders').iterdir())

    train_images(monkeypatch, folder, tmp_path / 'sharp', '--details', '--encoder', 'none', '--steps', 2)
    model = ConvGenerator.from_pretrained(tmp_path / 'sharp' / 'model')
    assert len(model.output_convs) == 3
    assert 'feature/detail1_std_4/loss' in (tmp_path / 'sharp' / 'metrics.jsonl').read_text()

    import train_images as script

    args = argparse.Namespace(size = 'small', image_size = 32, generator = 'transformer', seed = 0)
    pictures = script.Pictures(torch.zeros(4, 1, 32, 32, dtype = torch.uint8), torch.tensor([0, 1, 0, 1]))
    generator = script.Run(args, pictures, ['a', 'b']).generator()
    assert generator.patch_size == 4 and generator.sample([0, 1]).shape == (2, 1, 32, 32)

    monkeypatch.setitem(sys.modules, 'transformers', None)

    for encoder in ('convnext', 'dinov2'):
        with pytest.raises(SystemExit, match = r'drifting-pytorch\[convnext\]'):
            train_images(monkeypatch, folder, tmp_path / encoder, '--encoder', encoder)

def test_patch_tokens_of_a_transformer(examples):
    from transformers import Dinov2Config, Dinov2Model

    from encoders import PatchTokens

    sizes = dict(hidden_size = 8, num_hidden_layers = 1, num_attention_heads = 2, patch_size = 14, image_size = 28)
    tokens = PatchTokens(Dinov2Model(Dinov2Config(**sizes)))
    features = BackboneFeatures(tokens, num_prefix_tokens = 1, image_size = 28).features(torch.rand(2, 3, 32, 32))
    assert features['layer1'].shape == (2, 4, 8) and features['layer1_mean'].shape == (2, 1, 8)

def test_images_fill_the_time(tmp_path, monkeypatch, examples):
    settings = ('--image-size', 8, '--threads', 1, '--minutes', 0.02)
    folder = folder_of_images(tmp_path / 'cats', 'ab')
    run_here(monkeypatch, 'train_images.py', folder, '--results-folder', tmp_path / 'results', *settings)
    plan = json.loads((tmp_path / 'results' / 'plan.json').read_text())
    rows = (tmp_path / 'results' / 'metrics.jsonl').read_text().splitlines()
    assert json.loads(rows[-1])['step'] == plan['steps']['generator'] >= 10 and min(plan['steps'].values()) >= 10

def test_details_tell_where_they_are(examples):
    from encoders import details

    x = torch.zeros(2, 3, 32, 32)
    x[1, :, ::2, 16:] = 1                                           # stripes in the right half of the second picture
    features = details(x)
    sets = ('_mean_4', '_std_4', '_std')
    assert list(features) == [f'detail{i}{name}' for i in range(2) for name in sets]

    for i in range(2):
        flat, striped = features[f'detail{i}_std'].norm(dim = -1).squeeze(1)
        assert striped > 10 * flat

    columns = features['detail0_std_4'][1].norm(dim = -1).view(8, 8)
    assert columns[:, 4:].min() > 10 * columns[:, :3].max()

def test_images_time_of_evaluations_is_planned(tmp_path, monkeypatch, examples):
    folder = folder_of_images(tmp_path / 'cats')
    options = ('--minutes', 0.2, '--groups', 1, '--encoder', 'none')
    script, args, pictures, choosing, _ = images_of(folder, monkeypatch, *options)

    def steps(seconds):
        monkeypatch.setattr(Trainer, 'evaluate_averages', lambda self: time.sleep(seconds))
        return script.Run(args, pictures, [], choosing).plan()['generator']

    assert steps(0) > steps(1.2) == 10                      # ten times: no time is left for more

def test_broken_images_are_named(tmp_path, monkeypatch, examples, capsys):
    folder = folder_of_images(tmp_path / 'cats')
    (folder / '7.png').write_bytes(b'no picture')

    with pytest.raises(SystemExit, match = r'cats/7.png cannot be read as an image .* --skip-broken'):
        train_images(monkeypatch, folder, tmp_path / 'results')

    assert not (tmp_path / 'results').exists()
    metrics = train_images(monkeypatch, folder, tmp_path / 'results', '--skip-broken', '--encoder', 'none')
    assert '39 images' in metrics['data'] and '7.png' in capsys.readouterr().out

    with pytest.raises(SystemExit, match = 'has 12 images that can be read, at least 32'):
        train_images(monkeypatch, folder_of_images(tmp_path / 'few', num = 12), tmp_path / 'other')

SCRIPTS = [
    'train_digits.py', 'train_toy.py', 'train_mnist.py', 'train_images.py', 'train_restore.py',
    'measure/benchmark.py', 'measure/ablations.py', 'measure/compare_mnist.py', 'measure/gpu.py', 'export.py'
]

@pytest.mark.parametrize('script', SCRIPTS)
def test_help_explains_every_option(script, examples, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_here(monkeypatch, script, '--help')

    options = re.split(r'\n  (?=-)', capsys.readouterr().out.split('options:')[1])[1:]
    assert len(options) > 4 and all(len(option.split()) > 3 for option in options)
