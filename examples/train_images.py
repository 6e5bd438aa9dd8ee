"""From a folder of images to a generator, with the numbers and pictures that say how good it is.

python examples/train_images.py FOLDER                            # of images, or of a folder per class: ten minutes
python examples/train_images.py FOLDER --minutes 60 --flip        # longer, and mirrored images too
python examples/train_images.py FOLDER --resume                   # go on, exactly, where an earlier run stopped
python examples/train_images.py FOLDER --encoder dinov2 --size base     # on a GPU

Reads the folder, says what it found and chose, keeps a part of the images apart, trains a judge (which only measures),
an encoder and a generator. Half of the images kept apart choose: about ten times in the training, several averages of
the weights are measured against them, and the best one is the model. The other half, which had no part in this choice,
judges the model at the end. All steps are chosen at the start, so that the training takes about --minutes, evaluations
included. Writes into --results-folder: samples.png (a row per class), neighbors.png (samples, and the training images
nearest to them), training.gif, curves.png, metrics.json, plan.json (what was chosen), model/ (the generator, for
from_pretrained, and a model card) and what the trainer writes.
"""

import json
import os
import random
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import cat, stack
from torch.utils.data import Dataset
from tqdm import tqdm

from common import (
    EncoderFeatures,
    load_best,
    make_parser,
    num_parameters,
    plot_curves,
    positive,
    pretrain_encoder,
    sha256,
    write_whole,
)
from drifting_pytorch import ConvGenerator, DriftingGenerator, FeatureDriftLoss, ImageFolder, Trainer
from drifting_pytorch.drifting import check, image_grid, seed_for, seeded
from drifting_pytorch.metrics import Evaluation, inception_features
from encoders import PRETRAINED, Classifier, details

SIZES = dict(
    small = dict(
        image_size = 32, tokens = 8,
        conv = dict(dim = 64),
        transformer = dict(dim = 192, depth = 4, heads = 6)
    ),
    base = dict(
        image_size = 64, tokens = 16,
        conv = dict(dim = 128),
        transformer = dict(dim = 384, depth = 12, heads = 6)
    )
)

GENERATORS = dict(conv = 'better and quicker on small data, up to 64x64', transformer = 'for larger images')

ENCODERS = dict(
    none = 'the field sees pixels alone',
    classifier = 'trained here, on the classes, if there are any, and on quarter turns',
    mae = 'a masked autoencoder, trained here',
    convnext = 'ConvNeXt-V2 of the paper, downloaded',
    dinov2 = 'DINOv2, downloaded'
)

MOST_STEPS = dict(judge = 1_000, encoder = 2_000)               # small networks have learned what they can by then
SHARES = dict(judge = 0.08, encoder = 0.12, generator = 0.75)   # of the time; the rest is for numbers and pictures

LEAST = 32          # images in the folder
HELD_OUT = 16       # of them, or more: half of these choose the model, half judge it
FEW = 16            # real images of a class in a step: fewer are pointed out

EVALUATIONS = 10                                # in the training
CHOOSING = dict(num_samples = 250, seed = 1)    # of other noise than that of the samples that are judged
WINDOWS = (10, 30, 100)                         # averages of the weights: over the last tenth of the steps, and so on

# data

class Pictures(Dataset):
    """Images in memory, uint8 [n ch h w], and labels [n]. flip: mirror half of them at random."""

    def __init__(self, pixels, labels, flip = False):
        self.pixels = pixels
        self.labels = labels
        self.flip = flip

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        image = self.batch(index)
        return image.flip(-1) if self.flip and random.random() < 0.5 else image, int(self.labels[index])

    def batch(self, index):
        return self.pixels[index].float() / 127.5 - 1

def read(root, args, channels = None):
    """(pixels, labels, classes, sizes on the disk) of a folder. channels: None for 1 if all images are grey, else 3."""
    folder = ImageFolder(root, args.image_size, channels = channels or 3)

    def load(i):
        try:
            image, label = folder[i]
        except ValueError as error:
            return error

        with Image.open(folder.root / folder.files[i][0]) as file:
            return ((image + 1) * 127.5).round().byte(), label, file.size

    with ThreadPoolExecutor(args.threads) as pool:
        found = list(tqdm(pool.map(load, range(len(folder))), desc = f'reading {root}', total = len(folder)))

    broken = [item for item in found if isinstance(item, ValueError)]
    advice = 'mend it or take it away, or pass --skip-broken to leave out such images'
    check(args.skip_broken or not broken, f'{"; ".join(map(str, broken[:3]))} ({len(broken)} in all): {advice}')

    for error in broken:
        print(f'left out: {error}')

    found = [item for item in found if isinstance(item, tuple)]
    check(len(found) >= LEAST, f'{root} has {len(found)} images that can be read, at least {LEAST} are needed')
    images, labels, sizes = zip(*found, strict = True)
    pixels = stack(images)

    if channels is None:
        channels = 1 if (pixels == pixels[:, :1]).all() else 3

    return pixels[:, :channels], torch.tensor(labels), folder.classes, sizes

def split(labels):
    """Which are held out, bool [n]: about a tenth, always the same, and of every class its share."""
    n = len(labels)
    num = max(HELD_OUT, min(2_000, n // 10))
    shuffled = torch.randperm(n, generator = seeded('held out'))
    by_class = shuffled[labels[shuffled].argsort(stable = True)]
    is_held_out = torch.zeros(n, dtype = torch.bool)
    is_held_out[by_class[(torch.arange(num) * n + n // 2) // num]] = True
    return is_held_out

def load_data(args):
    """Pictures to train on, two halves of those held out, the names of the classes, and a line about them."""
    pixels, labels, classes, sizes = read(args.folder, args, 3 if args.encoder in PRETRAINED else None)

    if args.held_out:
        trained = Pictures(pixels, labels, args.flip)
        unseen_pixels, unseen_labels, found, _ = read(args.held_out, args, pixels.shape[1])
        unseen = Pictures(unseen_pixels, unseen_labels)
        check(found == classes, f'{args.held_out} has the classes {found}, expected {classes}')
    else:
        is_unseen = split(labels)
        trained = Pictures(pixels[~is_unseen], labels[~is_unseen], args.flip)
        unseen = Pictures(pixels[is_unseen], labels[is_unseen])

    counts = torch.bincount(trained.labels, minlength = len(classes)).tolist()
    few = [name for name, count in zip(classes, counts, strict = False) if count < 2]
    check(not few, f'classes with fewer than two images to train on: {", ".join(few)}')

    named = ', '.join(f'{name} {count:,}' for name, count in zip(classes[:8], counts, strict = False))
    of_classes = f'{len(classes)} classes ({named})' if classes else 'no classes'
    colour = 'grey' if pixels.shape[1] == 1 else 'in colour'
    smallest, largest = (f'{width}x{height}' for width, height in (min(sizes, key = min), max(sizes, key = min)))
    about = f'{len(pixels):,} images, {colour}, {smallest} to {largest}, held out: {len(unseen):,}, {of_classes}'

    by_class = unseen.labels.argsort(stable = True)
    halves = [Pictures(unseen.pixels[half], unseen.labels[half]) for half in (by_class[::2], by_class[1::2])]
    return trained, *halves, classes, about

# what is trained, each the same for the same seed and number of steps

class Run:
    """pictures: to train on. choosing: those held out by which the best weights are chosen."""

    def __init__(self, args, pictures, classes, choosing = None):
        self.args = args
        self.pictures = pictures
        self.choosing = choosing
        self.on_gpu = torch.cuda.is_available()
        channels = pictures.pixels.shape[1]
        self.images = dict(image_size = args.image_size, channels = channels, num_classes = len(classes) or None)

    def classifier(self, name, num_steps, folder, progress_bar = True):
        """Trained, or read from an earlier start of the same run."""
        torch.manual_seed(seed_for(self.args.seed, name))
        classifier = Classifier(**self.images, with_locations = not self.args.details)
        classifier.to('cuda' if self.on_gpu else 'cpu')
        path = folder / f'{name}.safetensors'

        if path.exists():
            classifier.load_state_dict(load_file(path))
            return classifier

        classifier.train_on(self.pictures, num_steps, f'{name}, seed {self.args.seed}', progress_bar)
        write_whole(path, save(classifier.state_dict()))
        return classifier

    def encoder(self, num_steps, folder, progress_bar = True):
        """The encoder or None, and the folder of what its trainer logged or None."""
        kind = self.args.encoder

        if kind == 'none':
            return None, None

        if kind in PRETRAINED:
            return PRETRAINED[kind](), None

        if kind == 'classifier':
            return self.classifier('encoder', num_steps, folder, progress_bar), None

        sizes = dict(dim = 16, patch_size = self.args.image_size // 16, layers = (1, 1, 1, 1))
        mae, encoder_folder = pretrain_encoder(
            kind, self.pictures, folder, dict(sizes, channels = self.images['channels']),
            num_steps = num_steps, seed = self.args.seed, preset = 'gpu' if self.on_gpu else 'cpu',
            batch_size = min(64, len(self.pictures)), learning_rate = 2e-3, lr_warmup_steps = 50, ema_decay = 0.99,
            progress_bar = progress_bar
        )
        return EncoderFeatures(mae, ['layer2', 'layer3', 'layer4']), encoder_folder

    def generator(self):
        torch.manual_seed(self.args.seed)
        size = SIZES[self.args.size]

        if self.args.generator == 'conv':
            detail = dict(output_conv_dim = 16, noise_channels = 1) if self.args.details else {}
            return ConvGenerator(**self.images, **size['conv'], **detail)

        patch_size = self.args.image_size // size['tokens']
        pixels = dict(output_conv_dim = 32, outer_slope = 0.1)                      # no seams, hardly outside [-1, 1]
        return DriftingGenerator(**self.images, patch_size = patch_size, **pixels, **size['transformer'])

    @property
    def num_pos(self):
        """Real images of a class in a step, as many of every class."""
        return min(128, self.pictures.labels.bincount().min().item())

    def evaluation(self, judge, pictures, **options):
        """Of samples, against these pictures."""
        features = inception_features() if self.args.features == 'inception' else judge.forward
        labels = pictures.labels if self.images['num_classes'] else None
        return Evaluation(pictures, features, labels = labels, **options)

    def trainer(self, evaluation, encoder, num_steps, folder, **settings):
        """With the recipe for small data."""
        is_conv = self.args.generator == 'conv'
        encoders = [each for each in (encoder, details if self.args.details else None) if each is not None]
        decays = [max(0., round(1 - window / num_steps, 7)) for window in WINDOWS]

        return Trainer(
            self.generator(),
            FeatureDriftLoss(encoders, affinity_floor = 0.),        # the release's floor holds small data back
            self.pictures,
            num_train_steps = num_steps,
            num_groups = self.args.groups,
            num_gen = self.args.num_gen,
            num_pos = self.num_pos,
            class_queue_size = 400,
            push_size = min(64, len(self.pictures)),
            alpha_range = (1., 1.),
            learning_rate = 4e-3 if is_conv else 1e-3,
            lr_warmup_steps = 0 if is_conv else 50,
            lr_decay_start = 200,
            ema_decay = list(dict.fromkeys(decays)),                # of a few steps some are the same
            evaluate = lambda sample: evaluation(lambda **asked: sample(**asked).clamp(-1, 1)),
            seed = self.args.seed,
            results_folder = folder,
            **settings
        )

    def plan(self):
        """Numbers of steps, {'judge': , 'encoder': , 'generator': }. To fill the time, a few are tried and timed."""
        if self.args.steps:
            return {name: min(self.args.steps, MOST_STEPS.get(name, self.args.steps)) for name in SHARES}

        def seconds_per_step(train):
            times = []

            for num_steps in (1, 5, 25):                            # the first one warms up
                with TemporaryDirectory() as folder:
                    start = time.perf_counter()
                    result = train(num_steps, Path(folder), progress_bar = False)
                    times.append(time.perf_counter() - start)

            return max((times[2] - times[1]) / 20, 1e-3), result

        def train_generator(*args, **kwargs):
            quiet = dict(log_every = 0, sample_every = 0, save_every = 0)
            trainer = self.trainer(evaluation, encoder, *args, **quiet, **kwargs)
            trainer.train()
            return trainer

        print('timing a few steps')
        seconds = self.args.minutes * 60
        times, steps = {}, {}
        times['judge'], judge = seconds_per_step(partial(self.classifier, 'judge'))
        evaluation = self.evaluation(judge, self.choosing, **CHOOSING)
        times['encoder'], (encoder, _) = seconds_per_step(self.encoder)
        times['generator'], trainer = seconds_per_step(train_generator)

        start = time.perf_counter()
        trainer.evaluate_averages()
        of_evaluations = EVALUATIONS * (time.perf_counter() - start)

        for name, most in MOST_STEPS.items():
            steps[name] = max(10, min(most, int(seconds * SHARES[name] / times[name])))

        trained = ['judge'] if self.args.encoder in ('none', *PRETRAINED) else list(MOST_STEPS)
        left = seconds * sum(SHARES.values()) - of_evaluations - sum(steps[name] * times[name] for name in trained)
        return dict(steps, generator = max(10, int(left / times['generator'])))

# pictures and the model card

def nearest(images, others, k):
    """Distances [n k] of pixels, and places [n k], of the nearest others to images [n ch h w]."""
    if others.flip:                                         # copies may be mirrored
        n, plain = len(images), Pictures(others.pixels, others.labels)
        distances, places = nearest(cat((images, images.flip(-1))), plain, k)
        distances, order = cat((distances[:n], distances[n:]), dim = 1).topk(k, largest = False)
        return distances, cat((places[:n], places[n:]), dim = 1).gather(1, order)

    found = []

    for start in tqdm(range(0, len(others), 1_000), desc = 'neighbours', leave = False):
        some = others.batch(slice(start, start + 1_000))
        distance, index = torch.cdist(images.flatten(1), some.flatten(1)).topk(min(k, len(some)), largest = False)
        found.append((distance, index + start))

    distances, places = (cat(parts, dim = 1) for parts in zip(*found, strict = True))
    distances, order = distances.topk(k, largest = False)
    return distances, places.gather(1, order)

CARD = """---
library_name: drifting-pytorch
tags: [image-generation, drifting-models]
---

# {name}

A one-step generator of images, trained by drifting-pytorch on {num:,} images of the folder `{name}`.
Found there: {about}.
The weights are those of step {step:,}, averaged with a decay of {ema_decay:g}. Of all that were tried, they had the
least Frechet distance, {value:.3f}, to {choosing:,} of the images held out.

```python
from drifting_pytorch import {kind}

model = {kind}.from_pretrained('.')       # this folder
samples = model.sample({asked}, seed = 0)        # in [-1, 1]
```

| measure | samples | real images |
| --- | --- | --- |
{table}

Frechet distance (smaller is better), precision and recall against the other {judged:,} images held out, in features of
{judge}. For comparison, those of as many real training images. nearest: the distance of pixels to the nearest training
image, in that of images held out; copies have 0. recognised: the share of samples, or of images held out, in which the
judge sees the class that they should have.

Classes:

{labels}

Settings:

```json
{settings}
```
"""

def finish(run, trainer, judge, unseen, about, classes, steps):
    """Numbers, pictures, and the model with its card. Returns a table."""
    args, folder, pictures = run.args, Path(run.args.results_folder), run.pictures
    some = torch.randperm(len(pictures), generator = seeded('real'))
    some = some[torch.isin(pictures.labels[some], unseen.labels)][:1_000]       # of classes that are judged
    evaluation = run.evaluation(judge, unseen, num_samples = len(some))         # as many of both
    samples = trainer.sample(**evaluation.asked, **evaluation.options).cpu().clamp(-1, 1)
    metrics = dict(samples = evaluation.compare(samples), real = evaluation.compare(pictures.batch(some)))

    # are they copies, and are they what was asked for

    held_out = unseen.batch(slice(None))
    distance, places = nearest(samples, pictures, 5)
    metrics['samples']['nearest'] = (distance[:, 0].mean() / nearest(held_out, pictures, 1)[0].mean()).item()
    metrics['real']['nearest'] = 0.

    if classes:
        metrics['samples']['recognised'] = judge.accuracy(samples, evaluation.asked['labels'])
        metrics['real']['recognised'] = judge.accuracy(held_out, unseen.labels)

    # pictures: a row per class, or of anything; ten samples, and what is nearest to them

    rows = min(20, len(classes)) or 8
    asked = dict(labels = torch.arange(rows)) if classes else dict(num_samples = rows)
    grid = trainer.sample(**asked, num_samples_each = 16, seed = args.seed)
    image_grid((grid + 1) / 2).save(folder / 'samples.png')

    shown = torch.arange(10) * len(samples) // 10
    grid = stack([cat((samples[i, None], pictures.batch(places[i]))) for i in shown])
    image_grid((grid + 1) / 2).save(folder / 'neighbors.png')

    frames = [Image.open(path).convert('RGB').quantize(128) for path in sorted((folder / 'samples').glob('step-*.png'))]
    durations = [150] * (len(frames) - 1) + [2_000]
    frames[0].save(folder / 'training.gif', save_all = True, append_images = frames[1:], duration = durations, loop = 0)

    # the model

    model, name = trainer.unwrapped, Path(args.folder).resolve().name
    settings = dict(vars(args), folder = name, held_out = args.held_out and Path(args.held_out).name)
    settings = {key: value for key, value in settings.items() if key not in ('results_folder', 'resume', 'threads')}
    table = [f'| {key} | {value:.3f} | {metrics["real"][key]:.3f} |' for key, value in metrics['samples'].items()]
    result = dict(metrics, chosen = trainer.best, data = about, steps = steps, parameters = num_parameters(model))
    result['settings'] = settings
    (folder / 'metrics.json').write_text(json.dumps(result, indent = 1))

    trainer.save_pretrained(folder / 'model')
    card = CARD.format(
        name = name, num = len(pictures), kind = type(model).__name__, about = about, table = '\n'.join(table),
        **trainer.best, choosing = len(run.choosing), judged = len(unseen),
        asked = '[0, 0, 0, 0]' if classes else 'num_samples = 4',
        labels = '\n'.join(f'- {i}: {name}' for i, name in enumerate(classes)) or 'none',
        judge = 'Inception' if args.features == 'inception' else 'a small classifier',
        settings = json.dumps(dict(settings, steps = steps), indent = 1)
    )
    (folder / 'model' / 'README.md').write_text(card, encoding = 'utf-8', errors = 'replace')
    return table

def options():
    parser = make_parser(__doc__)
    parser.add_argument('folder', help = 'of images, or of a folder of images per class')
    parser.add_argument('--results-folder', default = 'results/images', help = 'where everything is written')
    parser.add_argument('--minutes', type = float, default = 10., help = 'about so long all trainings take together')
    parser.add_argument('--steps', type = positive, default = None, help = 'of the generator, instead of --minutes')
    parser.add_argument(
        '--resume', action = 'store_true',
        help = 'go on with the run in the results folder, with its settings; FOLDER (and --held-out) may have moved'
    )
    parser.add_argument('--size', choices = tuple(SIZES), default = 'small', help = 'of images and networks')
    parser.add_argument('--image-size', type = int, default = None, help = 'None: 32 if small, 64 if base')
    parser.add_argument(
        '--generator', choices = ('auto', *GENERATORS), default = 'auto',
        help = 'auto: conv up to 64x64, else transformer'
    )
    parser.add_argument(
        '--encoder', choices = ('auto', *ENCODERS), default = 'auto',
        help = 'whose features the field compares. auto: classifier; the last two are downloaded'
    )
    parser.add_argument('--groups', type = positive, default = None, help = 'classes per step. None: all, up to 4')
    parser.add_argument('--num-gen', type = positive, default = 32, help = 'samples per group')
    parser.add_argument('--details', action = 'store_true', help = 'sharper samples of photographs, in twice the time')
    parser.add_argument('--flip', action = 'store_true', help = 'mirror half of the images: not for letters')
    parser.add_argument('--skip-broken', action = 'store_true', help = 'leave out images that cannot be read')
    parser.add_argument('--held-out', default = None, help = 'a folder to evaluate with; None: a tenth of the images')
    parser.add_argument(
        '--features', choices = ('judge', 'inception'), default = 'judge',
        help = 'of the evaluation. judge: a small classifier of its own; inception: downloaded, needs the extra [eval]'
    )
    parser.add_argument('--seed', type = int, default = 0, help = 'of the run; what is held out does not depend on it')
    parser.add_argument('--threads', type = positive, default = os.cpu_count(), help = 'cpu threads')
    args = parser.parse_args()
    check(args.minutes > 0, '--minutes must be above 0')
    args.held_out = args.held_out and os.path.abspath(args.held_out)            # to be found on --resume
    args.image_size = args.image_size or SIZES[args.size]['image_size']

    if args.generator == 'auto':
        args.generator = 'conv' if args.image_size <= 64 else 'transformer'

    if args.encoder == 'auto':
        args.encoder = 'classifier'

    wanted = 16 if args.generator == 'transformer' or args.encoder == 'mae' else 4 if args.image_size <= 32 else 8
    check(args.image_size % wanted == 0, f'--image-size must be a multiple of {wanted}, got {args.image_size}')
    return args

def main():
    args = options()
    folder = Path(args.results_folder)
    path, plan = folder / 'plan.json', None

    check(os.environ.get('WORLD_SIZE', '1') == '1', 'start one process: the time that steps take is measured in it')
    check(args.threads > 0, f'--threads must be 1 or more, got {args.threads}')
    inside = folder.resolve().is_relative_to(Path(args.folder).resolve())
    check(not inside, f'{folder} lies in the folder of images: pass another --results-folder')
    check(path.exists() or not args.resume, f'{folder} holds no run to go on with: leave out --resume')

    if path.exists():
        check(args.resume, f'{folder} holds an earlier run: pass --resume, or another --results-folder')
        plan = json.loads(path.read_text())
        given = {name: getattr(args, name) for name in ('folder', 'threads', 'results_folder')}

        if args.held_out:
            check(plan['settings']['held_out'], f'{folder} was started without --held-out')
            given['held_out'] = args.held_out

        args = Namespace(**{**plan['settings'], **given})

    torch.set_num_threads(args.threads)
    pictures, choosing, unseen, classes, about = load_data(args)
    digest = sha256(t.numpy().tobytes() for part in (pictures, choosing, unseen) for t in (part.pixels, part.labels))
    is_same = plan is None or (plan['data'], plan.get('sha256', digest)) == (about, digest)
    check(is_same, f'the run was started with other images: now {about}')
    args.groups = args.groups or min(4, max(1, len(classes)))
    run = Run(args, pictures, classes, choosing)

    rare = ', as many as the smallest class has: leave out rare classes' if run.num_pos < FEW else ''
    print(f'data: {about}')
    print(f'real images per class in a step: {run.num_pos}{rare}')
    print(f'size: {args.image_size}x{args.image_size} (--size, --image-size)')
    size = f'{num_parameters(run.generator()):,} parameters'
    print(f'generator: {args.generator}, {size}, {GENERATORS[args.generator]} (--generator)')
    print(f'encoder: {args.encoder}, {ENCODERS[args.encoder]} (--encoder)')

    if plan is None:
        plan = dict(settings = vars(args), data = about, sha256 = digest, steps = run.plan())
        folder.mkdir(parents = True, exist_ok = True)
        path.write_text(json.dumps(plan, indent = 1))

    steps = plan['steps']
    within = f'about {args.minutes:g} minutes (--minutes)' if args.steps is None else '--steps'
    print(f'steps: {", ".join(f"{name} {num:,}" for name, num in steps.items())}, for {within}')

    judge = run.classifier('judge', steps['judge'], folder)
    encoder, encoder_folder = run.encoder(steps['encoder'], folder)

    def every(share):
        return max(1, steps['generator'] // share)

    evaluation = run.evaluation(judge, choosing, **CHOOSING)
    trainer = run.trainer(
        evaluation, encoder, steps['generator'], folder, resume_from_checkpoint = 'latest', keep_checkpoints = 2,
        log_every = every(200), sample_every = every(30), save_every = every(10),
        evaluate_every = every(EVALUATIONS), keep_best = 'frechet'
    )
    trainer.train()
    load_best(trainer)
    table = finish(run, trainer, judge, unseen, about, classes, steps)
    plot_curves(folder / 'curves.png', folder, encoder_folder)
    print('\n'.join(('', '| measure | samples | real images |', '| --- | --- | --- |', *table)))
    print(f'\n{folder / "samples.png"}, {folder / "model" / "README.md"}')

if __name__ == '__main__':
    try:
        main()
    except (ValueError, ImportError) as error:
        raise SystemExit(f'{error}') from error
