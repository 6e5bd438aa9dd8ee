"""Toys in the plane (paper, section 5.1): a small generator drifts onto a distribution that one can see.

python examples/train_toy.py                six runs: their evolution, the field, a table
python examples/train_toy.py --ablation     two of the targets with a broken anti-symmetry (Table 1)
python examples/train_toy.py --fields       the paper's field and those of later work, on four runs

One seed alone says little of a difference: --seeds 0 1 2 3 4 gives means and deviations.
"""

import json
import statistics
from itertools import pairwise
from pathlib import Path

import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import nn
from tqdm.auto import tqdm

from common import make_parser, positive
from drifting_pytorch import DriftField, GradientField, SharpField, SinkhornField, drift_loss

# targets: n points [n 2] of unit scale, and their modes if they have any

def gaussians(centers, std):
    def sample(n, generator):
        which = torch.randint(len(centers), (n,), generator = generator)
        return centers[which] + std * torch.randn(n, 2, generator = generator)

    return sample, centers, std

def checkerboard(n, generator):
    cell = torch.randint(8, (n,), generator = generator)
    row = cell // 2
    column = 2 * (cell % 2) + row % 2
    return torch.stack((column, row), dim = -1) - 2 + torch.rand(n, 2, generator = generator)

def swiss_roll(n, generator):
    angle = 1.5 * torch.pi * (1 + 2 * torch.rand(n, generator = generator))
    roll = torch.stack((angle * angle.cos(), angle * angle.sin()), dim = -1) / 7.5
    return roll + 0.05 * torch.randn(n, 2, generator = generator)

CELLS = torch.tensor([(2 * i + row % 2 - 1.5, row - 1.5) for row in range(4) for i in range(2)])
CIRCLE = torch.arange(8) * torch.pi / 4

TARGETS = dict(
    bimodal = gaussians(torch.tensor([[-2., 0.], [2., 0.]]), 0.4),
    eight_gaussians = gaussians(2 * torch.stack((CIRCLE.cos(), CIRCLE.sin()), dim = -1), 0.1),
    checkerboard = (checkerboard, CELLS, None),
    swiss_roll = (swiss_roll, None, None),
)

# the three initialisations of the paper: where the generator starts (center, spread)

STARTS = dict(between = ((0., 0.), 0.3), far = ((0., 6.), 0.3), collapsed = ((-2., 0.), 0.05))

# what is run: (target, start)

THREE_STARTS = [('bimodal', start) for start in STARTS]
RUNS = [*THREE_STARTS, ('eight_gaussians', 'between'), ('checkerboard', 'between'), ('swiss_roll', 'between')]

FIELDS = dict(
    paper = DriftField(),
    gaussian = DriftField(kernel = 'gaussian'),
    over_y = DriftField(normalize = 'y'),
    gradient = GradientField(),
    sharp = SharpField(),
    sinkhorn = SinkhornField()
)

FACTORS = [(1., 1.), (1.5, 1.), (1., 1.5), (2., 1.), (1., 2.), (1., 0.)]

class Generator(nn.Module):
    """A small MLP on top of a fixed start: noise [n 8] -> points [n 2]."""

    def __init__(self, center, spread, dim = 128):
        super().__init__()
        self.register_buffer('center', torch.tensor(center))
        self.spread = spread

        self.net = nn.Sequential(
            nn.Linear(8, dim), nn.SiLU(),
            nn.Linear(dim, dim), nn.SiLU(),
            nn.Linear(dim, dim), nn.SiLU(),
            nn.Linear(dim, 2)
        )

        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, noise):
        return self.center + self.spread * noise[:, :2] + self.net(noise)

# metrics

def sliced_wasserstein(a, b, num_directions = 128):
    """Mean over directions of the 1-Wasserstein distance of the projections of a [n 2] and b [n 2]."""
    angle = torch.arange(num_directions) * torch.pi / num_directions
    directions = torch.stack((angle.cos(), angle.sin()))
    a, b = ((points @ directions).sort(dim = 0).values for points in (a, b))
    return (a - b).abs().mean().item()

def mode_coverage(points, modes, std):
    """(modes that hold at least half of their share, number of modes, share of the points that lie on a mode)."""
    if std is None:                                                     # cells of the checkerboard, of side 1
        offset = (points[:, None] - modes[None]).abs().amax(dim = -1)
        radius = 0.5
    else:
        offset = torch.cdist(points, modes)
        radius = 3 * std

    on_mode = offset < radius
    covered = (on_mode.float().mean(dim = 0) >= 0.5 / len(modes)).sum().item()
    return covered, len(modes), on_mode.any(dim = -1).float().mean().item()

def evaluate(model, target, num = 4_000, seed = 1234):
    sample, modes, std = target
    generator = torch.Generator().manual_seed(seed)

    with torch.no_grad():
        points = model(torch.randn(num, 8, generator = generator))

    real = [sample(num, generator) for _ in range(6)]

    distance = sum(sliced_wasserstein(points, r) for r in real) / 6
    floor = sum(sliced_wasserstein(a, b) for a, b in pairwise(real)) / 5
    result = dict(distance = distance, real_distance = floor, ratio = distance / floor)

    if modes is not None:
        result['modes_covered'], result['modes'], result['on_mode'] = mode_coverage(points, modes, std)

    return result

# training

def train(
    target_name, start_name, *, steps, batch, learning_rate, temperatures, seed, field = FIELDS['paper'], snapshots = 5
):
    """Returns the model, [(step, points)] on the way, [(step, {temperature: drift rms})] and the metrics."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)

    sample = TARGETS[target_name][0]
    model = Generator(*STARTS[start_name])
    optimizer = torch.optim.AdamW(model.parameters(), lr = learning_rate, betas = (0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min = learning_rate / 20)

    if field.needs_neg:                             # transport: its regularisation, one as in 2605.11755
        temperatures = (0.05,)

    fixed = torch.randn(1_000, 8, generator = generator)
    when = {round(steps * (i / (snapshots - 1)) ** 2) for i in range(snapshots)}     # early steps move the most
    evolution, drifts = [], []

    for step in tqdm(range(steps + 1), desc = f'{target_name} from {start_name}', leave = False):
        if step in when:
            with torch.no_grad():
                evolution.append((step, model(fixed)))

        if step == steps:
            break

        points = model(torch.randn(batch, 8, generator = generator))
        neg = None

        if field.needs_neg:
            neg = model(torch.randn(batch, 8, generator = generator)).detach()[None]

        # the whole method: one group, raw points. The release's affinity floor would freeze low-dimensional data

        loss, stats = drift_loss(
            points[None], sample(batch, generator)[None], neg = neg,
            temperatures = temperatures, field = field, affinity_floor = 0.
        )

        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()

        if step % 20 == 0:
            drifts.append((step, {t: rms.item() for t, rms in stats.drift_rms.items()}))

    return model, evolution, drifts, evaluate(model, TARGETS[target_name])

# pictures

def plot_points(axis, real, points, title):
    middle = real.mean(dim = 0)
    half = 1.3 * (real.amax(dim = 0) - real.amin(dim = 0)).max().item() / 2
    (left, right), (bottom, top) = [(c - half, c + half) for c in middle.tolist()]
    top = max(top, points.amax(dim = 0)[1].item() + 0.3)

    axis.scatter(*real.T, s = 2, c = 'lightgray', linewidths = 0)
    axis.scatter(*points.T, s = 2, c = 'tab:orange', linewidths = 0)
    axis.set_title(title, fontsize = 7)
    axis.set(xticks = [], yticks = [], aspect = 'equal', xlim = (left, right), ylim = (bottom, top))

def plot_field(axis, real, points, temperature = 0.5):
    """The field of Algorithm 2 on a grid, for the first samples: where it sends them."""
    half = 1.2 * real.abs().max().item()
    side = torch.linspace(-half, half, 20)
    grid = rearrange(list(torch.meshgrid(side, side, indexing = 'xy')), 'd h w -> (h w) d')
    v = DriftField(normalize = 'y')(grid, real[:500], points[:500], temperature = temperature)

    plot_points(axis, real, points, 'the field at step 0')
    axis.quiver(*grid.T, *v.T, color = 'tab:blue', width = 0.005)

def plot_runs(runs, path):
    columns = len(runs[0][2]) + 2
    figure = Figure(figsize = (2.3 * columns, 2.3 * len(runs)))
    axes = figure.subplots(len(runs), columns, squeeze = False)
    generator = torch.Generator().manual_seed(0)

    for row, (name, target, evolution, drifts, result) in zip(axes, runs, strict = True):
        real = TARGETS[target][0](1_000, generator)
        *over_time, at_start, drift_axis = row

        for axis, (step, points) in zip(over_time, evolution, strict = True):
            plot_points(axis, real, points, f'{name}, step {step}')

        plot_field(at_start, real, evolution[0][1])

        steps = [step for step, _ in drifts]

        for temperature in drifts[0][1]:
            drift = [rms[temperature] for _, rms in drifts]
            drift_axis.plot(steps, drift, label = f'temperature {temperature}', linewidth = 1)

        drift_axis.set_yscale('log')
        drift_axis.set_ylim(bottom = 1e-3)
        drift_axis.set_title(f'drift rms; distance {result["ratio"]:.1f} x real', fontsize = 8)
        drift_axis.tick_params(labelsize = 6, which = 'both')
        drift_axis.legend(fontsize = 6)

    figure.tight_layout()
    figure.savefig(path, dpi = 90)

def table(results):
    """A line per run: the fewest modes of any seed, and means over seeds, with the deviation of the ratio."""
    lines = [
        '| run | modes covered | on a mode | distance to data | between real samples | ratio |',
        '| --- | --- | --- | --- | --- | --- |'
    ]

    for name, seeds in results.items():
        mean = {key: statistics.mean(r[key] for r in seeds) for key in seeds[0]}
        covered = on_mode = '-'
        ratio = f'{mean["ratio"]:.1f}'

        if 'modes' in mean:
            covered = f'{min(r["modes_covered"] for r in seeds)} / {seeds[0]["modes"]}'
            on_mode = f'{mean["on_mode"]:.2f}'

        if len(seeds) > 1:
            ratio += f' ± {statistics.stdev(r["ratio"] for r in seeds):.1f}'

        distances = f'{mean["distance"]:.4f} | {mean["real_distance"]:.4f}'
        lines.append(f'| {name} | {covered} | {on_mode} | {distances} | {ratio} |')

    return '\n'.join(lines)

def options():
    parser = make_parser(__doc__)
    parser.add_argument(
        '--results-folder', default = 'results/toy',
        help = 'where the picture, the table and metrics.json go'
    )
    parser.add_argument(
        '--ablation', action = 'store_true',
        help = 'break the anti-symmetry instead, on two targets: attraction and repulsion factors of Table 1'
    )
    parser.add_argument('--fields', action = 'store_true', help = 'compare the fields instead: ' + ', '.join(FIELDS))
    parser.add_argument('--steps', type = positive, default = 1_500, help = 'optimiser steps of each run')
    parser.add_argument('--batch', type = positive, default = 256, help = 'generated and real points per step')
    parser.add_argument(
        '--learning-rate', type = float, default = 3e-3,
        help = 'of AdamW, decayed to a twentieth by a cosine'
    )
    parser.add_argument(
        '--temperatures', type = float, nargs = '+', default = [0.02, 0.05, 0.2, 0.5],
        help = 'of the kernel, relative to the mean distance; the largest one carries points from mode to mode'
    )
    parser.add_argument(
        '--seeds', type = int, nargs = '+', default = [0],
        help = 'of weights, noise and data; the picture shows the first'
    )
    parser.add_argument('--threads', type = positive, default = 2, help = 'cpu threads')
    return parser.parse_args()

def jobs_of(args):
    """The name of the table, {name of a run: what is trained}."""
    if args.ablation:
        return 'ablation', {
            f'{target} {a} V+ - {b} V-': dict(
                target_name = target, start_name = 'between', field = DriftField(attraction = a, repulsion = b)
            )
            for target in ('bimodal', 'checkerboard')
            for a, b in FACTORS
        }

    if args.fields:
        return 'fields', {
            f'{target} from {start}, {name}': dict(target_name = target, start_name = start, field = field)
            for target, start in (*THREE_STARTS, ('swiss_roll', 'between'))
            for name, field in FIELDS.items()
        }

    return 'evolution', {
        f'{target} from {start}': dict(target_name = target, start_name = start)
        for target, start in RUNS
    }

def main():
    args = options()
    torch.set_num_threads(args.threads)
    folder = Path(args.results_folder)
    folder.mkdir(parents = True, exist_ok = True)

    name, jobs = jobs_of(args)
    runs, results = [], {}

    kwargs = dict(
        steps = args.steps, batch = args.batch, learning_rate = args.learning_rate,
        temperatures = tuple(args.temperatures)
    )

    for job_name, job in jobs.items():
        trained = [train(**job, **kwargs, seed = seed) for seed in args.seeds]
        results[job_name] = [result for *_, result in trained]

        _, *pictured = trained[0]
        runs.append((job_name, job['target_name'], *pictured))

    plot_runs(runs, folder / f'{name}.png')

    text = table(results)
    record = dict(settings = vars(args), results = results)
    (folder / f'{name}.md').write_text(text + '\n', encoding = 'utf-8')
    (folder / f'{name}.json').write_text(json.dumps(record, indent = 1))
    print(f'{text}\n\npicture: {folder / f"{name}.png"}')

if __name__ == '__main__':
    main()
