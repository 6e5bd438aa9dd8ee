"""Pictures restored from what is left of them: the condition is a picture, and one input has many answers.

python examples/train_restore.py                                # 3 seeds, 2 tasks, 3 methods: a quarter of an hour
python examples/train_restore.py --task half --seeds 1          # one of the tasks, one seed
python examples/train_restore.py --budget 150                   # longer trainings

coarse     28x28 digits from 7x7 pixels, each the mean of 4x4
half       whole digits from their upper half

drifting   one evaluation, trained by Trainer on rows of (picture, condition): each row is a group of its own, and its
           picture the only positive. Another digit that would fit too is learned over the steps, from similar inputs
regression one evaluation, one answer: the mean of what is possible
flow       flow matching, the velocity at every time, sampled with 1, 10 and 50 evaluations

All have the same network, the same cpu time on one thread and the same 4,000 images of MNIST; the answers to the first
of the 1,000 images that were held out are judged. Writes into --results-folder: restore.md, metrics.json, restore.png.
"""

import json
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure
from torch import cat, nn, tensor
from torch.utils.data import TensorDataset

from common import Judge, crop, load_mnist, make_parser, num_parameters, positive, split
from drifting_pytorch import FeatureDriftLoss, Trainer
from drifting_pytorch.drifting import sinusoidal

# the tasks, of images [n 1 28 28]

def known(images, task):
    """What is left of them: 7x7 pixels, or the upper half."""
    return F.avg_pool2d(images, 4) if task == 'coarse' else images[:, :, :14]

def condition_of(images, task):
    """What a network sees [n 2 28 28]: what is known, at its place, and a mask, 1 where nothing is."""
    mask = torch.zeros_like(images)

    if task == 'coarse':
        return cat((F.interpolate(known(images, task), size = 28), mask), dim = 1)

    mask[:, :, 14:] = 1
    return cat((images * (1 - mask), mask), dim = 1)

# the network of all methods

class Block(nn.Module):
    """Two convolutions, scaled and shifted by the time in between."""

    def __init__(self, dim, dim_time):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, dim)
        self.conv1 = nn.Conv2d(dim, dim, 3, 1, 1)
        self.norm2 = nn.GroupNorm(8, dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1)
        self.to_scale_shift = nn.Linear(dim_time, dim * 2)

    def forward(self, x, time):
        scale, shift = rearrange(self.to_scale_shift(time), 'b (two d) -> two b d 1 1', two = 2)
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return x + self.conv2(F.silu(h * (1 + scale) + shift))

class Mixer(nn.Module):
    """Looks at all of a map of 7x7."""

    def __init__(self, dim, dim_mix):
        super().__init__()

        self.layers = nn.Sequential(
            nn.GroupNorm(8, dim), nn.SiLU(), nn.Conv2d(dim, 8, 1), nn.Flatten(),
            nn.Linear(8 * 49, dim_mix), nn.SiLU(), nn.Linear(dim_mix, 8 * 49),
            nn.Unflatten(1, (8, 7, 7)), nn.Conv2d(8, dim, 1)
        )

    def forward(self, x):
        return x + self.layers(x)

class Restorer(nn.Module):
    """(x [b 1 28 28], condition [b 2 28 28]) -> [b 1 28 28]; Trainer calls it as it calls any generator.

    x is noise (drifting), zero (regression) or something between an image and noise, at a time (flow matching).
    All is computed on maps of 7x7, of patches of 4x4 pixels, which is fast on a cpu.
    """

    noise_shape = (1, 28, 28)

    def __init__(self, dim = 32, dim_mix = 192, dim_time = 128):
        super().__init__()
        self.to_time = nn.Sequential(nn.Linear(64, dim_time), nn.SiLU())
        self.stem = nn.Conv2d(3 * 16, dim, 3, 1, 1)
        self.first = Mixer(dim, dim_mix)
        self.block = Block(dim, dim_time)
        self.last = Mixer(dim, dim_mix)
        self.head = nn.Sequential(nn.GroupNorm(8, dim), nn.SiLU(), nn.Conv2d(dim, 16, 3, 1, 1))

    def forward(self, x, condition, alpha = None, styles = None, time = None):
        time = torch.zeros(len(x)) if time is None else time
        time = self.to_time(sinusoidal(time * 10, 64))

        h = self.stem(F.pixel_unshuffle(cat((x, condition), dim = 1), 4))
        h = self.block(self.first(h), time)
        return F.pixel_shuffle(self.head(self.last(h)), 4)

# the methods: each trains for budget cpu seconds, and returns a function (condition, num) -> answers [n num 1 28 28]

def schedule(args):
    """As Trainer takes it."""
    return dict(learning_rate = args.learning_rate, lr_warmup_steps = 20, lr_decay_start = 200, ema_decay = 0.99)

def patches(images, size = 7):
    """Features of FeatureDriftLoss: every patch is compared with that at the same place."""
    return dict(patches = rearrange(images, 'b 1 (h p1) (w p2) -> b (h w) (p1 p2)', p1 = size, p2 = size))

def train_drifting(images, task, args, seed, folder):
    torch.manual_seed(seed)
    start = time.process_time()

    trainer = Trainer(
        Restorer(),
        FeatureDriftLoss(patches, temperatures = args.temperatures, affinity_floor = 0.),
        TensorDataset(images, condition_of(images, task)),
        num_groups = args.batch // args.num_gen,                # rows of the data
        num_gen = args.num_gen,
        num_pos = 1,                                            # of each row the picture
        alpha_range = (1., 1.),                                 # no guidance
        log_every = 0,
        sample_every = 0,
        save_every = 0,
        seed = seed,
        cpu = True,
        results_folder = folder / f'drifting-{task}-{seed}',
        overwrite = True,
        **schedule(args)
    )

    batches = trainer.batches()

    while time.process_time() - start < args.budget:
        trainer.train_step(batches)

    def restore(condition, num):
        return trainer.sample(condition, num_samples_each = num, seed = 0, batch_size = 256)

    return restore, trainer.step

def train_restorer(loss_of, images, task, args, seed):
    """The averaged network, with the optimiser and the schedule of Trainer, and the number of steps."""
    torch.manual_seed(seed)
    start = time.process_time()
    settings = schedule(args)

    model = Restorer()
    averaged = deepcopy(model)
    conditions = condition_of(images, task)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr = settings['learning_rate'], betas = (0.9, 0.95), weight_decay = 0.01, fused = True
    )

    def rate(step):
        warmup = min(1, step / settings['lr_warmup_steps'])
        return warmup * min(1, settings['lr_decay_start'] / (step + 1)) ** 0.5

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    steps = 0

    while time.process_time() - start < args.budget:
        batch = torch.randint(len(images), (args.batch,))
        loss = loss_of(model, images[batch], conditions[batch])

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.)
        optimizer.step()
        scheduler.step()
        steps += 1

        for average, p in zip(averaged.parameters(), model.parameters(), strict = True):
            average.data.lerp_(p.data, 1 - settings['ema_decay'])

    return averaged, steps

def regression_loss(model, images, condition):
    return F.mse_loss(model(torch.zeros_like(images), condition), images)

def flow_loss(model, images, condition):
    """The velocity from images (time 0) to noise (time 1)."""
    noise, t = torch.randn_like(images), torch.rand(len(images))
    z = torch.lerp(images, noise, rearrange(t, 'b -> b 1 1 1'))
    return F.mse_loss(model(z, condition, time = t), noise - images)

def train_regression(images, task, args, seed, folder):
    model, steps = train_restorer(regression_loss, images, task, args, seed)

    def restore(condition, num):
        answer = model(torch.zeros_like(condition[:, :1]), condition)
        return answer[:, None].expand(-1, num, -1, -1, -1)

    return restore, steps

def train_flow(images, task, args, seed, folder):
    model, steps = train_restorer(flow_loss, images, task, args, seed)

    def restore(condition, num, evaluations):
        answers = []

        for part in condition.repeat_interleave(num, dim = 0).split(256):
            z = torch.randn(len(part), 1, 28, 28)

            for t in torch.linspace(1, 0, evaluations + 1)[:-1]:            # Euler steps
                z = z - model(z, part, time = t.expand(len(part))) / evaluations

            answers.append(z)

        return rearrange(cat(answers), '(b k) ... -> b k ...', k = num)

    return restore, steps

METHODS = dict(regression = train_regression, flow = train_flow, drifting = train_drifting)

# how each is sampled: (method, network evaluations per answer)

VARIANTS = {
    'regression': ('regression', 1),
    'flow matching, 1 step': ('flow', 1),
    'flow matching, 10 steps': ('flow', 10),
    'flow matching, 50 steps': ('flow', 50),
    'drifting': ('drifting', 1)
}

# evaluation

def rms(images):
    """[... 1 h w] -> [...]"""
    return images.square().mean(dim = (-3, -2, -1)).sqrt()

def unknown(images, task):
    """Where errors and distances are measured: everywhere, or in the lower half."""
    return images if task == 'coarse' else images[..., 14:, :]

def evaluate(answers, images, labels, task, judge):
    """Measures of answers [n k 1 28 28] to the inputs that images [n 1 28 28] leave."""
    k = answers.shape[1]
    flat = rearrange(answers, 'b k ... -> (b k) ...')
    labels = labels.repeat_interleave(k)
    probabilities = judge.classify(flat)[1].softmax(dim = -1)
    confidence, predicted = probabilities.max(dim = -1)
    is_other = (predicted != labels) & (confidence > 0.9)

    given = known(images, task).repeat_interleave(k, dim = 0)
    hidden, truth = unknown(answers, task), unknown(images, task)
    distances = rms(hidden[:, :, None] - hidden[:, None])                       # b k k

    return dict(
        error_of_mean = rms(hidden.mean(dim = 1) - truth).mean().item(),
        error_of_best = rms(hidden - truth[:, None]).amin(dim = 1).mean().item(),
        recognised = (predicted == labels).double().mean().item(),
        another_digit = is_other.double().mean().item(),
        spread = distances.sum().item() / (len(answers) * k * max(1, k - 1)),
        inconsistency = rms(known(flat, task) - given).mean().item()
    )

def nearest_digits(images, task, judge, num):
    """The num training images [n num 1 28 28] whose inputs are nearest: what a memory would answer."""
    inputs, memory = known(images, task).flatten(1), known(judge.images, task).flatten(1)
    return judge.images[torch.cdist(inputs, memory).topk(num, largest = False).indices]

def restored(restore, condition, args, evaluations):
    """Answers in [-1, 1], always from the same noise, and their cpu ms in all."""
    torch.manual_seed(0)
    options = dict(evaluations = evaluations) if evaluations else {}
    start = time.process_time()

    with torch.no_grad():
        answers = restore(condition, args.answers, **options).clamp(-1, 1)

    return answers, (time.process_time() - start) * 1000

# what is written

MEASURES = dict(
    error_of_mean = 'error of the mean answer',
    error_of_best = 'error of the best answer',
    recognised = 'recognised',
    another_digit = 'another digit',
    spread = 'spread',
    inconsistency = 'inconsistency'
)

def table(results):
    """results: {name: the measures of every seed}. Mean and deviation."""
    titles = ['', 'evaluations', 'cpu ms per answer', *MEASURES.values()]
    lines = [f'| {" | ".join(titles)} |', '| --- ' * len(titles) + '|']

    for name, seeds in results.items():
        cells = [name, '-', '-']

        if name in VARIANTS:
            milliseconds = tensor([each['milliseconds'] for each in seeds]).mean()
            cells[1:] = [str(VARIANTS[name][1]), f'{milliseconds:.2f}']

        for key in MEASURES:
            values = tensor([each[key] for each in seeds])
            deviation = f' ± {values.std():.3f}' if len(seeds) > 1 else ''
            cells.append(f'{values.mean():.3f}{deviation}')

        lines.append(f'| {" | ".join(cells)} |')

    return '\n'.join(lines)

PICTURED = {
    'input': 1, 'truth': 1, 'regression': 1, 'flow matching, 1 step': 2, 'flow matching, 10 steps': 3,
    'flow matching, 50 steps': 4, 'drifting': 6
}

def plot(columns, path):
    """columns: {task: {title: pictures [rows n 1 28 28]}}."""
    figure = Figure(figsize = (8.4, 2.9 * len(columns)))
    axes = figure.subplots(len(columns), 1, squeeze = False)[:, 0]

    for axis, groups in zip(axes, columns.values(), strict = True):
        left = 0

        for title, pictures in groups.items():
            num_rows, num = pictures.shape[:2]
            tiles = rearrange(F.pad(pictures, (1, 1, 1, 1), value = 1.), 'r n 1 h w -> (r h) (n w)')
            axis.imshow(tiles, cmap = 'gray', vmin = -1, vmax = 1, extent = (left, left + num, num_rows, 0))
            axis.text(left + num / 2, -0.1, title.replace('matching, ', 'matching\n'), ha = 'center', fontsize = 7)
            left += num + 0.3

        axis.set(xlim = (0, left - 0.3), ylim = (num_rows, 0))
        axis.axis('off')

    figure.tight_layout()
    figure.savefig(path, dpi = 90)

def run(task, args, judge, labels, folder):
    """{name: measures of every seed}, {method: cpu seconds and steps of every seed}, columns of plot."""
    images, labels = judge.held_out[:args.inputs], labels[:args.inputs]
    condition = condition_of(images, task)
    nearest = nearest_digits(images, task, judge, args.answers)

    results = {name: [] for name in VARIANTS}
    results['nearest training digits'] = [evaluate(nearest, images, labels, task, judge)]
    training = {method: [] for method in METHODS}
    columns = {'input': condition[:, None, :1], 'truth': images[:, None]}

    for seed in range(args.seeds):
        restorers = {}

        for method, train in METHODS.items():
            start = time.process_time()
            restorers[method], steps = train(judge.images, task, args, seed, folder)
            training[method].append(dict(cpu_seconds = time.process_time() - start, steps = steps))
            print(f'{task}, seed {seed}: {method}, {steps} steps', flush = True)

        for name, (method, evaluations) in VARIANTS.items():
            steps = evaluations if method == 'flow' else None
            answers, milliseconds = restored(restorers[method], condition, args, steps)
            measures = evaluate(answers, images, labels, task, judge)
            num = len(answers) if method == 'regression' else answers.shape[:2].numel()     # it has one to each input
            results[name].append(dict(measures, milliseconds = milliseconds / num))
            columns.setdefault(name, answers)                               # of the first seed

    columns = {title: columns[title][:args.rows, :num] for title, num in PICTURED.items()}
    return results, training, columns

def options():
    parser = make_parser(__doc__)
    parser.add_argument('--results-folder', default = 'results/restore', help = 'where everything is written')
    parser.add_argument(
        '--task', nargs = '+', choices = ('coarse', 'half'), default = ['coarse', 'half'],
        help = 'what is left of the pictures: 7x7 pixels, or the upper half'
    )
    parser.add_argument('--seeds', type = positive, default = 3, help = 'trainings of each method')
    parser.add_argument('--budget', type = float, default = 40., help = 'cpu seconds of every training')
    parser.add_argument('--batch', type = positive, default = 64, help = 'rows that pass the network per step')
    parser.add_argument('--num-gen', type = positive, default = 4, help = 'answers per input and step, drifting only')
    parser.add_argument(
        '--temperatures', type = float, nargs = '+', default = [0.05, 0.2, 0.5],
        help = 'of the drifting field, relative to the mean distance of answers'
    )
    parser.add_argument('--learning-rate', type = float, default = 4e-3, help = 'of all methods')
    parser.add_argument('--inputs', type = positive, default = 250, help = 'held-out images that are restored')
    parser.add_argument('--answers', type = positive, default = 8, help = 'of each method to each input')
    parser.add_argument('--rows', type = positive, default = 6, help = 'of inputs in the picture')
    parser.add_argument(
        '--quick', action = 'store_true',
        help = 'one seed, a second of training, few inputs: only to see that everything runs'
    )
    args = parser.parse_args()

    if args.quick:
        args.seeds, args.budget, args.inputs = 1, 1., 20

    return args

def main():
    args = options()
    torch.set_num_threads(1)
    folder = Path(args.results_folder)
    folder.mkdir(parents = True, exist_ok = True)

    (images, labels), (held_out, held_out_labels) = split(*load_mnist(), num_held_out = 1_000)
    judge = Judge((crop(images), labels), (crop(held_out), held_out_labels))
    record = dict(settings = vars(args), parameters = num_parameters(Restorer()), judge_accuracy = judge.accuracy)
    texts, columns = [], {}

    for task in args.task:
        results, training, columns[task] = run(task, args, judge, held_out_labels, folder)
        record[task] = dict(results = results, training = training)
        texts.append(f'### {task}\n\n{table(results)}\n')

    text = '\n'.join(texts)
    (folder / 'restore.md').write_text(text, encoding = 'utf-8')
    (folder / 'metrics.json').write_text(json.dumps(record, indent = 1))
    plot(columns, folder / 'restore.png')

    print(f'''
{text}
{record["parameters"]:,} parameters; {args.inputs} inputs, {args.answers} answers to each, {args.seeds} seeds
the judge recognises {judge.accuracy:.3f} of the held-out digits
error, spread: root mean square of pixels in [-1, 1] where the picture is not known
another digit: share of the answers that are recognised as another digit with a confidence above 0.9
inconsistency: error of what was known
picture: {folder / "restore.png"}''')

if __name__ == '__main__':
    main()
