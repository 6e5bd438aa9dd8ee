"""The paper's ablations, and those that a reproduction asked for, in small: which of its trends does one see on digits?

python examples/measure/ablations.py --quick                                     # every table on 8x8 digits, one seed
python examples/measure/ablations.py --table anti-symmetry --quick --seeds 0 1 2 # one table, with spreads
python examples/measure/ablations.py --table all --seeds 0 1 2                   # MNIST, hours

Writes into --results-folder: runs/ (a json and a few samples of every finished run, which is not repeated), results.csv
(a line per row and seed), ablations.md (every table with mean and standard deviation over seeds), summary.md (a line
per table) and ablations.png. The samples are judged by a classifier of real digits, against digits that were held out
from everything else.
"""

import csv
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from scipy.stats import t as student
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from drifting_pytorch import DriftField, DriftingGenerator, FeatureDriftLoss, LatentMAE, SinkhornField, Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))      # examples/

from common import (
    MNIST_ON_CPU,
    EncoderFeatures,
    Judge,
    class_rows,
    crop,
    load_digits,
    load_mnist,
    make_parser,
    positive,
    pretrain_encoder,
    split,
    write_whole,
)

# the settings of a run, where its row does not say otherwise: the paper's recipe on raw pixels, without guidance. Rows
# may also have alpha_min, the smallest guidance scale in training; start_gain, of the generator's last layer, which
# otherwise starts at 0 as in the release; and transport = True, a SinkhornField

BASE = dict(
    attraction = 1., repulsion = 1., kernel = 'laplace', normalize = 'both',
    temperatures = (0.02, 0.05, 0.2), affinity_floor = 0.,
    num_groups = 4, num_gen = 64, num_pos = 64, num_style_tokens = 4,
    alpha_max = 1., alphas = (1.,),                 # guidance scales: the largest in training, and those to sample with
    width = 0, mae_steps = 0, classifier = False,   # of the encoder. Width 0: none, steps 0: untrained
    maps = ('layer2', 'layer3'), feature_sets = ('maps',), raw = True
)

# a table is {row: (what differs, the paper's FID)}. Every row is compared with the first one. Where there is no FID:
# '>' if the source expects a row to be worse than the first, '<' if better, None if it is an open question

GROUP = dict(num_groups = 4, num_gen = 32, num_pos = 32)        # encoders are costly
NARROW, WIDE = 8, 16
ALPHAS = (1., 1.5, 2., 3., 4.)
FACTORS = ((1., 1., 8.46), (1.5, 1., 41.05), (1., 1.5, 46.28), (2., 1., 86.16), (1., 2., 112.84), (1., 0., 177.14))

def mae(width, length, **kwargs):
    return dict(GROUP, width = width, mae_steps = length, **kwargs)

def allocation(num_groups, num_pos, num_gen):
    return dict(num_groups = num_groups, num_pos = num_pos, num_gen = num_gen)

def features(*feature_sets):
    """Of maps ahead of a norm, which would fix mean and deviation."""
    return mae(WIDE, 'long', maps = ('layer1_blk2', 'layer2_blk2'), feature_sets = feature_sets)

def guided(alpha):
    return dict(alpha_max = max(ALPHAS), alphas = ALPHAS, alpha = alpha)

def always_guided(alpha):
    return dict(alpha_min = alpha, alpha_max = alpha, alphas = (alpha,), alpha = alpha)

TABLES = {
    'anti-symmetry': ('Table 1, a V+ - b V-', {
        f'a = {a:g}, b = {b:g}': (dict(attraction = a, repulsion = b), fid)
        for a, b, fid in FACTORS
    }),
    'allocation': ('Table 2, N_c / N_pos / N_neg, the same number of generated samples', {
        '4 / 64 / 64': (allocation(4, 64, 64), 8.46),           # the paper's N_c are 16 times as large
        '8 / 32 / 32': (allocation(8, 32, 32), 9.32),
        '16 / 16 / 16': (allocation(16, 16, 16), 10.16),
        '32 / 8 / 8': (allocation(32, 8, 8), 11.82)
    }),
    'positives': ('Table 2, N_pos', {
        '64': ({}, 8.46),
        '32': (dict(num_pos = 32), 8.97),
        '16': (dict(num_pos = 16), 10.39),
        '1': (dict(num_pos = 1), 20.43),        # never starts: S, the mean of 1 distance and 63 zeros, is out of reach
        '1, from noise': (dict(num_pos = 1, start_gain = 0.5), 20.43),
        '64, from noise': (dict(start_gain = 0.5), None)
    }),
    'encoder': ('Table 3, width and length of the MAE, and fine-tuning as a classifier', {
        'narrow, short': (mae(NARROW, 'short'), 8.46),
        'none': (GROUP, None),
        'untrained': (mae(NARROW, 0), '>'),
        'narrow, long': (mae(NARROW, 'long'), '<'),
        'wide, short': (mae(WIDE, 'short'), 6.30),
        'wide, long': (mae(WIDE, 'long'), 4.28),
        'wide, long, cls': (mae(WIDE, 'long', classifier = True), 3.36)
    }),
    'normalisation': ('Table 11', {
        'both': ({}, 8.46),
        'over y': (dict(normalize = 'y'), 8.92),
        'none': (dict(normalize = 'none'), 10.54)
    }),
    'temperatures': ('A.6', {
        'all three': ({}, 8.46),
        '0.02': (dict(temperatures = (0.02,)), 10.62),  # as with one positive, nothing is within its reach at the start
        '0.02, from noise': (dict(temperatures = (0.02,), start_gain = 0.5), 10.62),
        '0.05': (dict(temperatures = (0.05,)), 8.67),
        '0.2': (dict(temperatures = (0.2,)), 8.96)
    }),
    'features': ('A.5, locations, mean and deviation, those of 2x2 and of 4x4 patches, of the maps of an MAE', {
        'all': (features('locations', 'mean_std', '2x2', '4x4'), 8.46),
        'without 4x4': (features('locations', 'mean_std', '2x2'), 9.10),
        'without both': (features('locations', 'mean_std'), 9.58)
    }),
    'styles': ('A.2, random style embeddings', {
        'with': ({}, 8.46),
        'without': (dict(num_style_tokens = 0), 8.86)
    }),
    'guidance': ((
        'Figure 5, guidance scale alpha at sampling, one generator of all scales; '
        'the claim is that variety, the recall, falls'
    ), {
        f'{alpha:g}': (guided(alpha), '<') for alpha in ALPHAS
    }),
    'fixed guidance': ('the same, a generator for each scale', {
        '1': ({}, '<'),
        **{f'{alpha:g}': (always_guided(alpha), '<') for alpha in ALPHAS[1:]}
    }),
    'batch': ('reproduction on MNIST, N_pos = N_neg', {
        f'{n}': (dict(num_gen = n, num_pos = n), fid) for n, fid in ((64, 47.90), (32, 56.20), (128, 47.68))
    }),
    'kernel': ('reproduction on MNIST; transport: 2605.11755 on ImageNet, 7.08 instead of 8.46', {
        'Laplace': ({}, 53.87),
        'Gaussian': (dict(kernel = 'gaussian'), 39.52),
        'transport': (dict(transport = True, temperatures = (0.05,)), '<')
    }),
    'space': ('asked for by the reproduction', {
        'pixels': (GROUP, None),
        'pixels and features': (mae(WIDE, 'long'), None),
        'features': (mae(WIDE, 'long', raw = False), None)
    })
}

METRICS = {'guidance': 'recall', 'fixed guidance': 'recall'}    # what rows are compared by, if not the Frechet distance

# sizes of the two modes

MODES = dict(
    quick = dict(
        steps = 200, raw_steps = 60, mae_steps = dict(short = 75, long = 300), layers = (2, 2, 1, 1),
        generator = dict(
            image_size = 8, patch_size = 8, dim = 64, depth = 1, heads = 2,         # one token: ten seconds
            num_register_tokens = 1, style_codebook_size = 8
        ),
        trainer = dict(num_uncond = 16, push_size = 16, learning_rate = 1e-2, lr_warmup_steps = 20, ema_decay = 0.95),
        mae = dict(patch_size = 1),
        mae_trainer = dict(batch_size = 64, learning_rate = 2e-3, lr_warmup_steps = 20, ema_decay = 0.97)
    ),
    full = dict(
        MNIST_ON_CPU,
        generator = dict(MNIST_ON_CPU['generator'], image_size = 32),
        mae_steps = dict(short = 300, long = 1_200), layers = (2, 2, 1, 1)
    )
)

# data

def enlarge(x):
    return F.interpolate(x, size = 28, mode = 'bilinear')       # what the judge looks at

class Data:
    """Real digits, and what the samples of a run are worth next to them."""

    def __init__(self, quick):
        data, num_held_out, view = (load_digits(), 450, enlarge) if quick else (load_mnist(), 1_000, crop)
        (self.train, self.labels), held_out = split(*data, num_held_out = num_held_out)
        self.judge = Judge((self.train, self.labels), held_out, view)

    def metrics(self, images, labels):
        result = self.judge(images, labels)
        del result['accuracy_per_class']
        return dict(result, nearest_ratio = self.judge.novelty(images))         # 0: copies of training images

# a run

class LateFeatures(FeatureDriftLoss):
    """Raw pixels only for the first steps.

    Through the norms of the encoder a picture without contrast gets a huge gradient of no use.
    """

    def __init__(self, *args, raw_steps, **kwargs):
        super().__init__(*args, **kwargs)
        self.raw_steps = raw_steps

    def forward(self, *args, **kwargs):
        self.raw_steps -= 1
        return super().forward(*args, **kwargs)

    def features(self, x):
        if self.raw_steps >= 0:
            return {'global': rearrange(x, 'b ... -> b 1 (...)')}

        return super().features(x)

def encoder_of(run, mode, dataset, seed, folder):
    """The frozen encoder that a run asks for. Encoders are trained once, and shared by the runs."""
    sizes = dict(mode['mae'], dim = run['width'], layers = mode['layers'])

    if run['mae_steps'] == 0:
        torch.manual_seed(seed)
        model = LatentMAE(channels = 1, num_classes = None, **sizes)
    else:
        kind = 'mae+cls' if run['classifier'] else 'mae'
        own = folder / f'width-{run["width"]}'
        own.mkdir(parents = True, exist_ok = True)
        settings = dict(mode['mae_trainer'], progress_bar = False)
        model, _ = pretrain_encoder(kind, dataset, own, sizes, num_steps = run['mae_steps'], seed = seed, **settings)

    return EncoderFeatures(model, run['maps'], run['feature_sets'])

def train(run, mode, data, seed, folder):
    """Of a generator trained with the settings of a run.

    Returns samples [n ch h w] in [-1, 1] for each guidance scale, their labels, the seconds that the training took.
    """
    dataset = TensorDataset(data.train, data.labels)
    encoder, raw_steps = None, 0

    if run['width'] > 0:
        encoder = encoder_of(run, mode, dataset, seed, folder / 'encoders')
        raw_steps = mode['raw_steps']

    torch.manual_seed(seed)
    sizes = dict(mode['generator'], num_style_tokens = run['num_style_tokens'])
    model = DriftingGenerator(channels = 1, num_classes = 10, **sizes)

    if 'start_gain' in run:                         # instead of samples that are all zero
        torch.nn.init.xavier_uniform_(model.to_patch.weight, gain = run['start_gain'])

    field = DriftField(**{name: run[name] for name in ('attraction', 'repulsion', 'kernel', 'normalize')})

    if 'transport' in run:
        field = SinkhornField()

    counts = {name: run[name] for name in ('num_groups', 'num_gen', 'num_pos')}

    loss_fn = LateFeatures(
        encoder,
        raw = run['raw'],
        raw_steps = raw_steps,
        field = field,
        temperatures = run['temperatures'],
        affinity_floor = run['affinity_floor']
    )

    trainer = Trainer(
        model, loss_fn, dataset,
        num_train_steps = mode['steps'],
        alpha_range = (run.get('alpha_min', 1.), run['alpha_max']),
        alpha_power = 1.,                           # all of the range about as often
        seed = seed,
        cpu = True,
        log_every = 0, sample_every = 0, save_every = 0,
        progress_bar = False,
        results_folder = folder / 'last',
        overwrite = True,
        **{**mode['trainer'], **counts}
    )

    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start

    labels = torch.arange(10).repeat_interleave(100)
    samples = {alpha: trainer.sample(labels, alpha = alpha, seed = 0, batch_size = 250) for alpha in run['alphas']}
    return {alpha: x.clamp(-1, 1) for alpha, x in samples.items()}, labels, seconds

def name_of(run, seed):
    """What differs from BASE, as the name of a file."""
    differs = []

    for key, value in run.items():
        if value != BASE.get(key):
            text = '+'.join(map(str, value)) if isinstance(value, tuple) else value
            differs.append(f'{key}={text}')

    return f'{",".join(differs) or "base"},seed={seed}'

def finished(run, mode, seed, folder, data):
    """The metrics of a run by guidance scale, from its file if it is of these settings, or from a training now."""
    path = folder / 'runs' / f'{name_of(run, seed)}.json'
    settings = json.loads(json.dumps(dict(run = run, mode = mode, seed = seed)))

    if path.is_file():
        known = json.loads(path.read_text())

        if known['settings'] == settings:
            return known['metrics']

    samples, labels, seconds = train(run, mode, data, seed, folder)
    metrics = {str(alpha): data.metrics(x, labels) for alpha, x in samples.items()}

    path.parent.mkdir(parents = True, exist_ok = True)
    first = samples[run['alphas'][0]]
    class_rows((first + 1) / 2, 10).save(path.with_suffix('.png'))

    found = dict(settings = settings, metrics = metrics, seconds = seconds)
    write_whole(path, json.dumps(found, indent = 1).encode())
    return metrics

# results

def verdict(values, reference, claim, metric):
    """Whether the claim is seen. The claim, '>' or '<', is about the row's metric against that of the reference.

    Student's t-test of two groups of seeds, at 5 %, which wants two seeds at least. Distances are compared by their
    logarithm: what is far away varies more.
    """
    a, b = np.asarray(values), np.asarray(reference)

    if metric == 'frechet_distance':
        a, b = np.log(a), np.log(b)

    difference = a.mean() - b.mean()
    freedom = len(a) + len(b) - 2

    if freedom < 2:
        return 'one seed'

    error = math.sqrt((a.var(ddof = 1) + b.var(ddof = 1)) * (1 / len(a) + 1 / len(b)) / 2)

    if abs(difference) <= student.ppf(0.975, freedom) * error:
        return 'not resolvable'

    if claim is None:
        return 'higher' if difference > 0 else 'lower'

    return 'seen' if (difference > 0) == (claim == '>') else 'not seen'

def collect(names, seeds, mode, folder, data):
    """{table: {row: dict(paper, verdict, and a list over seeds of every metric)}}"""
    runs = []

    for name in names:
        for row, (differs, _) in TABLES[name][1].items():
            differs = dict(differs)
            alpha = differs.pop('alpha', 1.)
            run = {**BASE, **differs}
            run['mae_steps'] = mode['mae_steps'].get(run['mae_steps'], 0)
            runs += [(name, row, run, alpha, seed) for seed in seeds]

    # seed by seed: of an interrupted session the first seeds have all tables

    runs = sorted(runs, key = lambda run: seeds.index(run[-1]))
    results = {name: {row: {} for row in TABLES[name][1]} for name in names}

    for name, row, run, alpha, seed in tqdm(runs, desc = 'runs'):
        metrics = finished(run, mode, seed, folder, data)[str(alpha)]

        for metric, value in metrics.items():
            results[name][row].setdefault(metric, []).append(value)

    for name, rows in results.items():
        judge_rows(name, rows)

    return results

def judge_rows(name, rows):
    """Adds the source's number and the verdict to every row of a table."""
    metric = METRICS.get(name, 'frechet_distance')
    papers = {row: paper for row, (_, paper) in TABLES[name][1].items()}
    reference = next(iter(rows))

    for row, result in rows.items():
        claim = paper = papers[row]

        if isinstance(paper, float):
            claim = '>' if paper > papers[reference] else '<'

        result['paper'] = paper if isinstance(paper, float) else '-'

        if row == reference:
            result['verdict'] = ''
        elif any(result['precision']) or any(result['recall']):
            result['verdict'] = verdict(result[metric], rows[reference][metric], claim, metric)
        else:
            result['verdict'] = 'never started'

# {metric: (title, digits)}

COLUMNS = dict(
    frechet_distance = ('Frechet distance', 1),
    accuracy = ('recognised', 3),
    precision = ('precision', 3),
    recall = ('recall', 3),
    nearest_ratio = ('nearest / real', 2)
)

def spread(values, digits):
    text = f'{np.mean(values):.{digits}f}'

    if len(values) > 1:
        text += f' ± {np.std(values, ddof = 1):.{digits}f}'

    return text

def full_tables(results):
    titles = ' | '.join(title for title, _ in COLUMNS.values())
    lines = []

    for name, rows in results.items():
        lines += [f'**{name}** ({TABLES[name][0]})', '']
        lines += [f'| | FID of the source | {titles} | trend |', '| --- ' * (len(COLUMNS) + 3) + '|']

        for row, result in rows.items():
            cells = ' | '.join(spread(result[metric], digits) for metric, (_, digits) in COLUMNS.items())
            lines.append(f'| {row} | {result["paper"]} | {cells} | {result["verdict"]} |')

        lines.append('')

    return '\n'.join(lines)

MARKS = {
    'seen': '**{}**',
    'not seen': '*{}* (opposite)',
    'higher': '{} (higher)',
    'lower': '{} (lower)',
    'never started': 'never started'
}

def summary(results):
    """A line per table: the first row, then the others, marked by their verdict."""
    lines = [
        '| ablation | compared with | rows; in bold a trend of the source that is seen |',
        '| --- | --- | --- |'
    ]

    for name, rows in results.items():
        metric = METRICS.get(name, 'frechet_distance')
        title, digits = COLUMNS[metric]
        texts = []

        for row, result in rows.items():
            mark = MARKS.get(result['verdict'], '{}')
            texts.append(f'{row}: {mark.format(spread(result[metric], digits))}')

        lines.append(f'| {name}, {title} | {texts[0]} | {"; ".join(texts[1:])} |')

    return '\n'.join(lines)

COLORS = {'seen': 'tab:green', 'not seen': 'tab:red', 'higher': 'tab:blue', 'lower': 'tab:blue'}

def plot(results, path):
    """A panel per table, a line per row, a dot per seed, a bar at their mean.

    Green where a trend is seen, red where the opposite is. Frechet distances, unless the title says otherwise.
    """
    columns = min(5, len(results))
    height = math.ceil(len(results) / columns)
    figure = Figure(figsize = (2.9 * columns, 2 * height))
    axes = figure.subplots(height, columns, squeeze = False)

    for axis in axes.flat[len(results):]:
        axis.axis('off')

    for axis, (name, rows) in zip(axes.flat, results.items(), strict = False):
        plot_table(axis, name, rows)

    figure.tight_layout()
    figure.savefig(path, dpi = 75)

def plot_table(axis, name, rows):
    metric = METRICS.get(name, 'frechet_distance')
    reference = next(iter(rows.values()))

    for y, result in enumerate(rows.values()):
        if result['verdict'] == 'never started':        # its place is far outside
            continue

        values = result[metric]
        color = 'black' if y == 0 else COLORS.get(result['verdict'], 'gray')
        axis.plot(values, [y] * len(values), 'o', color = color, markersize = 3)
        axis.plot([np.mean(values)], [y], '|', color = color, markersize = 12)

    if metric == 'frechet_distance':
        axis.set_xscale('log')
        axis.xaxis.set_major_locator(LogLocator(subs = (1, 2, 5)))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(4))

    axis.axvline(np.mean(reference[metric]), color = 'lightgray', linewidth = 1, zorder = 0)
    axis.set_yticks(range(len(rows)), list(rows), fontsize = 7)
    axis.set_title(f'{name}: {metric}' if name in METRICS else name, fontsize = 8)
    axis.xaxis.set_major_formatter('{x:g}')
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis = 'x', labelsize = 7)
    axis.set_ylim(len(rows) - 0.5, -0.5)

def write(results, seeds, folder):
    with open(folder / 'results.csv', 'w', newline = '') as file:
        writer = csv.writer(file)
        writer.writerow(('table', 'row', 'paper', 'seed', *COLUMNS))

        for name, rows in results.items():
            for row, result in rows.items():
                for i, seed in enumerate(seeds):
                    values = [result[metric][i] for metric in COLUMNS]
                    writer.writerow((name, row, result['paper'], seed, *values))

    (folder / 'ablations.md').write_text(full_tables(results), encoding = 'utf-8')
    (folder / 'summary.md').write_text(summary(results) + '\n', encoding = 'utf-8')
    plot(results, folder / 'ablations.png')

def options():
    parser = make_parser(__doc__)
    parser.add_argument(
        '--table', choices = ('all', *TABLES), nargs = '+', default = ['all'],
        help = 'which ablations to run'
    )
    parser.add_argument(
        '--quick', action = 'store_true',
        help = '8x8 digits and ten seconds a run, instead of MNIST and minutes'
    )
    parser.add_argument(
        '--seeds', type = int, nargs = '+', default = [0],
        help = 'of weights, data order, noise and encoder; a trend wants three or more'
    )
    parser.add_argument(
        '--steps', type = positive, default = None,
        help = 'optimiser steps of each run, None for those of the mode'
    )
    parser.add_argument(
        '--results-folder', default = None,
        help = 'where everything is written, None for results/ablations-quick or -full'
    )
    parser.add_argument(
        '--threads', type = positive, default = 1,
        help = 'cpu threads; small networks gain nothing from more'
    )
    return parser.parse_args()

def main():
    args = options()
    torch.set_num_threads(args.threads)
    kind = 'quick' if args.quick else 'full'
    mode = dict(MODES[kind])

    if args.steps:
        mode['steps'] = args.steps

    folder = Path(args.results_folder or f'results/ablations-{kind}')
    folder.mkdir(parents = True, exist_ok = True)

    start = time.perf_counter()
    data = Data(args.quick)
    names = list(TABLES) if 'all' in args.table else args.table
    seeds = list(dict.fromkeys(args.seeds))
    results = collect(names, seeds, mode, folder, data)
    write(results, seeds, folder)

    real = data.metrics(data.train[:1_000], data.labels[:1_000])
    texts = [f'{COLUMNS[metric][0]} {value:.{COLUMNS[metric][1]}f}' for metric, value in real.items()]
    print(f'{full_tables(results)}\n{summary(results)}\n\n1,000 real training digits: {", ".join(texts)}')
    print(f'{time.perf_counter() - start:.0f} s, {folder / "ablations.png"}')

if __name__ == '__main__':
    main()
