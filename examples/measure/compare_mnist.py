"""One-step drifting next to what one would pick instead, each with the same cpu time and at most 450,000 parameters.

python examples/measure/compare_mnist.py                               # all methods, 600 cpu seconds each: an hour
python examples/measure/compare_mnist.py --method drifting meanflow    # some of them
python examples/measure/compare_mnist.py --seeds 0 1 --budget 1800     # more seeds, more time
python examples/measure/compare_mnist.py --data photographs --method drifting meanflow flow --evaluations 1
python examples/measure/compare_mnist.py --method flow --set ema_decay=1. uniform_times=True        # other settings,
                                                                       # in a results folder of their own

drifting   one evaluation of a ConvGenerator, trained by Trainer with the drifting field of pixels and of the features
           of a classifier (2602.04770); drifting-pixels: of pixels alone, as the judge is a classifier too
meanflow   one evaluation of a U-Net, the average velocity on the whole way from noise to data (2505.13447)
wgan       one evaluation of a generator like drifting's, trained against a critic with gradient penalty (1704.00028)
flow       50 evaluations of meanflow's U-Net, the velocity at every time: flow matching, the reference that may take
           many steps (2210.02747)

All are class-conditional, sampled without guidance, on 4,000 MNIST images, or on 4,000 crops of two photographs. The
time is that of the process, on one thread, with all that is trained (encoder, critic) and without the evaluations.
MNIST's data, judge and measures are those of train_mnist.py. Writes into --results-folder: METHOD-SEED.json (every
evaluation), METHOD-SEED.png (samples, a row per class), METHOD-SEED.pt and METHOD-SEED/ (to go on, with a larger
budget), compare.png (the curves), samples.png (of every method, one above the other, and of real images).
"""

import ast
import json
import math
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image
from torch import cat, nn
from torch.utils.data import TensorDataset

from drifting_pytorch import ConvGenerator, DriftField, FeatureDriftLoss, Trainer
from drifting_pytorch.drifting import sinusoidal

sys.path.insert(0, str(Path(__file__).parents[1]))      # examples/

import encoders
from common import (
    Judge,
    class_rows,
    crop,
    first_of_each_class,
    load_mnist,
    make_parser,
    num_parameters,
    positive,
    split,
)
from photographs import crops, parts

# networks

def scaled_and_shifted(x, cond):
    """x [b d ...] by cond [b 2d]."""
    scale, shift = cond.reshape(len(x), 2, -1, *(1 for _ in x.shape[2:])).unbind(dim = 1)
    return x * (1 + scale) + shift

def sizes_of(images, labels):
    """What the networks have to know of images [n ch h w] and labels [n]."""
    return dict(channels = images.shape[1], num_classes = int(labels.max()) + 1)

def conv_generator(image_size = 28, channels = 1, num_classes = 10, **others):
    """That of drifting, with maps of noise. Photographs have more detail."""
    sizes = dict(image_size = image_size, channels = channels, num_classes = num_classes)
    detail = dict(noise_channels = 1, output_conv_dim = 16 if channels == 3 else 0)
    return ConvGenerator(**sizes, **(detail | others))

class TransposedGenerator(ConvGenerator):
    """That of WGAN-GP, for which transposed convolutions are better."""

    def __init__(self, image_size, channels, num_classes, dim = 64):
        super().__init__(image_size = image_size, channels = channels, num_classes = num_classes, dim = dim)
        self.layers[2] = nn.Sequential(nn.ConvTranspose2d(dim, dim // 2, 4, 2, 1), nn.GroupNorm(8, dim // 2))
        self.to_image = nn.ConvTranspose2d(dim // 2, channels, 4, 2, 1)

class ConditionedBlock(nn.Module):
    """Two convolutions, scaled and shifted by the condition in between."""

    def __init__(self, dim_in, dim, dim_cond):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, dim_in)
        self.conv1 = nn.Conv2d(dim_in, dim, 3, 1, 1)
        self.norm2 = nn.GroupNorm(8, dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1)
        self.to_scale_shift = nn.Linear(dim_cond, dim * 2)
        self.shortcut = nn.Conv2d(dim_in, dim, 1) if dim_in != dim else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, cond):
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return self.shortcut(x) + self.conv2(F.silu(scaled_and_shifted(h, self.to_scale_shift(cond))))

class UNet(nn.Module):
    """Velocities at z [b ch h w], averaged between the times r [b] and t [b], on maps of half and a quarter."""

    def __init__(self, channels = 1, num_classes = 10, dim = 32, dim_cond = 128, depth = 2):
        super().__init__()
        self.class_embed = nn.Embedding(num_classes, dim_cond)
        self.time_embed = nn.Sequential(nn.Linear(128, dim_cond), nn.SiLU(), nn.Linear(dim_cond, dim_cond))

        self.stem = nn.Conv2d(4 * channels, dim, 3, 1, 1)
        self.first = ConditionedBlock(dim, dim, dim_cond)
        self.down = nn.Conv2d(dim, dim * 2, 3, 2, 1)
        self.middle = nn.ModuleList([ConditionedBlock(dim * 2, dim * 2, dim_cond) for _ in range(depth)])
        self.up = nn.ConvTranspose2d(dim * 2, dim, 4, 2, 1)
        self.last = ConditionedBlock(dim * 2, dim, dim_cond)
        self.head = nn.Sequential(nn.GroupNorm(8, dim), nn.SiLU(), nn.Conv2d(dim, 4 * channels, 3, 1, 1))
        nn.init.zeros_(self.head[-1].weight)

    def forward(self, z, labels, r, t):
        times = cat((sinusoidal(t * 10, 64), sinusoidal((t - r) * 10, 64)), dim = -1)
        cond = F.silu(self.time_embed(times) + self.class_embed(labels))

        outer = self.first(self.stem(F.pixel_unshuffle(z, 2)), cond)
        x = self.down(outer)

        for block in self.middle:
            x = block(x, cond)

        x = self.last(cat((self.up(x), outer), dim = 1), cond)
        return F.pixel_shuffle(self.head(x), 2)

class Classifier(nn.Module):
    """The encoder of drifting, trained in seconds, with a convolution less than the judge.

    It has no norms, so a picture without contrast does no harm.
    """

    def __init__(self, channels = 1, num_classes = 10, dim = 32):
        super().__init__()

        self.to_map = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * channels, dim, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(dim, dim * 2, 3, 2, 1), nn.ReLU(),
            nn.Flatten()
        )

        self.to_vector = nn.Sequential(nn.Linear(dim * 32, 64), nn.ReLU())
        self.head = nn.Linear(64, num_classes)

    def features(self, x):
        """The 4x4 map as one vector, and the last layer, {name: [b 1 d]}: each sees the whole digit."""
        maps = self.to_map(x)
        found = dict(map = maps, vector = self.to_vector(maps))
        return {name: rearrange(t, 'b d -> b 1 d') for name, t in found.items()}

    def train_on(self, images, labels, num_steps, batch_size = 64):
        def falls_in_the_second_half(step):
            return min(1, 2 - 2 * step / num_steps)

        optimizer = torch.optim.AdamW(self.parameters(), lr = 2e-3, weight_decay = 0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, falls_in_the_second_half)

        for _ in range(num_steps):
            index = torch.randint(len(images), (batch_size,))
            shift = torch.randint(-2, 3, (2,)).tolist()
            shifted = images[index].roll(shift, dims = (2, 3))
            logits = self.head(self.to_vector(self.to_map(shifted)))
            F.cross_entropy(logits, labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

class Crops(TensorDataset):
    """As encoders.Classifier wants them."""

    def batch(self, index):
        return self.tensors[0][index]

    @property
    def labels(self):
        return self.tensors[1]

class TurnsClassifier(encoders.Classifier):
    """The encoder of drifting on photographs, where classes alone are too easy: it sees how they are turned, too."""

    def __init__(self, channels, num_classes):
        super().__init__(32, channels, num_classes, dim = 24, with_locations = False)

    def features(self, x):
        return super().features(x) | encoders.details(x)

    def train_on(self, images, labels, num_steps):
        super().train_on(Crops(images, labels), num_steps, f'encoder {torch.initial_seed()}', progress_bar = False)

class Critic(nn.Module):
    """A score [b] of images [b ch h w], of 28 or 32 pixels a side, as pictures of their classes."""

    def __init__(self, channels = 1, num_classes = 10, dim = 32):
        super().__init__()

        self.net = nn.Sequential(
            nn.Conv2d(channels, dim, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(dim, dim * 2, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(dim * 2, dim * 2, 3, 2, 1), nn.LeakyReLU(0.2),
            nn.Flatten()
        )

        self.to_score = nn.Linear(dim * 32, 1)
        self.class_embed = nn.Embedding(num_classes, dim * 32)

    def forward(self, x, labels):
        x = self.net(x)                                                                     # b d
        of_class = (x * self.class_embed(labels)).sum(dim = -1) / x.shape[-1] ** 0.5
        return self.to_score(x).squeeze(-1) + of_class

# methods: what is trained, a step, and samples

class Method:
    """With a loop of its own."""

    evaluations = 1

    def __init__(
        self, images, labels, model, *,
        learning_rate, ema_decay, decay_start = math.inf, betas = (0.9, 0.95)
    ):
        self.images = images
        self.labels = labels
        self.model = model
        self.parts = [model]                        # all that is trained
        self.averaged = deepcopy(model)

        self.learning_rate = learning_rate
        self.decay_start = decay_start
        self.ema_decay = ema_decay
        self.updates = 0

        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr = learning_rate, betas = betas, weight_decay = 0.01, fused = True
        )

    def batch(self, size):
        index = torch.randint(len(self.images), (size,))
        return self.images[index], self.labels[index]

    def descend(self, loss):
        self.updates += 1

        for group in self.optimizer.param_groups:
            group['lr'] = self.learning_rate * min(1, self.decay_start / self.updates) ** 0.5

        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 2.)
        self.optimizer.step()

        decay = min(self.ema_decay, self.updates / (self.updates + 9))              # the first steps are soon forgotten

        for average, p in zip(self.averaged.parameters(), self.model.parameters(), strict = True):
            average.data.lerp_(p.data, 1 - decay)

    def sample(self, labels):
        return generate(self.averaged, labels)

def generate(model, labels):
    return model(torch.randn(len(labels), *model.noise_shape), labels)

class Drifting:
    """Few class groups and a cheap generator, so many steps.

    The field has unit size however near the samples are, so the steps have to become small by themselves, at a rate
    that knows of no end; and the weights are averaged over about the last tenth of them. A little guidance in training
    gives better shapes at scale 1, which is sampled, and a little more repulsion than attraction more variety. Its
    Trainer goes on from its own checkpoint, in folder.
    """

    evaluations = 1

    def __init__(
        self, images, labels, folder,
        num_groups = 4, num_gen = 32, num_pos = 128, encoder_steps = 600, encoder = Classifier,
        alpha_range = (1., 1.2), learning_rate = 4e-3, decay_start = 200, ema_decay = 1., repulsion = 1.01, **generator
    ):
        self.dataset = TensorDataset(images, labels)
        self.sizes = sizes_of(images, labels)
        self.generator = generator                  # arguments
        self.ema_decay = ema_decay
        self.field = DriftField(repulsion = repulsion)
        self.encoder = None

        if encoder is not None:
            self.encoder = encoder(**self.sizes)
            self.encoder.train_on(images, labels, encoder_steps)

        self.settings = dict(
            num_groups = num_groups, num_gen = num_gen, num_pos = num_pos, class_queue_size = 400,
            alpha_range = alpha_range, learning_rate = learning_rate, lr_warmup_steps = 0, lr_decay_start = decay_start,
            log_every = 0, sample_every = 0, save_every = 0, keep_checkpoints = 1, progress_bar = False,
            seed = torch.initial_seed(), cpu = True, results_folder = folder
        )
        self.make_trainer(overwrite = True)

    def make_trainer(self, **kwargs):
        loss_fn = FeatureDriftLoss(self.encoder, affinity_floor = 0., field = self.field)
        model = conv_generator(self.dataset.tensors[0].shape[-1], **self.sizes, **self.generator)
        self.trainer = Trainer(model, loss_fn, self.dataset, **self.settings, **kwargs)

    def __getstate__(self):
        self.trainer.save()
        return {name: value for name, value in vars(self).items() if name != 'trainer'}

    def __setstate__(self, state):
        vars(self).update(state)
        self.make_trainer(resume_from_checkpoint = 'latest')

    @property
    def parts(self):
        return [part for part in (self.trainer.unwrapped, self.encoder) if part is not None]

    @property
    def averaged(self):
        return self.trainer.ema.ema_model.eval()

    @property
    def updates(self):
        return self.trainer.step

    def step(self):
        """Twenty steps at a time."""
        trainer = self.trainer
        steps = trainer.settings.num_train_steps = trainer.step + 20
        trainer.ema.beta = trainer.ema.min_value = min(self.ema_decay, 1 - 10 / steps)      # nobody knows the last step
        trainer.train()

    def sample(self, labels):
        return generate(self.averaged, labels)

class WGAN(Method):
    def __init__(self, images, labels, batch_size = 64, critic_steps = 4, penalty = 10., **kwargs):
        settings = {**dict(learning_rate = 5e-4, ema_decay = 0.995, betas = (0., 0.9)), **kwargs}
        sizes = sizes_of(images, labels)
        super().__init__(images, labels, TransposedGenerator(images.shape[-1], **sizes), **settings)
        self.batch_size = batch_size
        self.critic_steps = critic_steps
        self.penalty = penalty

        self.critic = Critic(**sizes)
        self.parts.append(self.critic)

        learning_rate, betas = settings['learning_rate'], settings['betas']
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr = learning_rate, betas = betas, weight_decay = 0., fused = True
        )

    def step(self):
        for _ in range(self.critic_steps):
            real, labels = self.batch(self.batch_size)

            with torch.no_grad():
                fake = generate(self.model, labels)

            between = torch.lerp(real, fake, torch.rand(len(real), 1, 1, 1)).requires_grad_()
            slope, = torch.autograd.grad(self.critic(between, labels).sum(), between, create_graph = True)
            real_score, fake_score = self.critic(cat((real, fake)), labels.repeat(2)).chunk(2)
            off_slope = (slope.flatten(1).norm(dim = 1) - 1).square().mean()
            loss = (fake_score - real_score).mean() + self.penalty * off_slope

            self.critic_optimizer.zero_grad()
            loss.backward()
            self.critic_optimizer.step()

        _, labels = self.batch(self.batch_size)
        self.descend(-self.critic(generate(self.model, labels), labels).mean())

class Flow(Method):
    evaluations = 50

    def __init__(self, images, labels, batch_size = 64, uniform_times = False, **kwargs):
        settings = dict(learning_rate = 2e-3, ema_decay = 0.995)
        super().__init__(images, labels, UNet(**sizes_of(images, labels)), **{**settings, **kwargs})
        self.batch_size = batch_size
        self.uniform_times = uniform_times

    def times(self, num):
        if self.uniform_times:
            return torch.rand(num)

        return (torch.randn(num) - 0.4).sigmoid()                                           # logit-normal, MeanFlow's

    def path(self, t):
        """z = (1 - t) image + t noise, its velocity v, labels."""
        images, labels = self.batch(len(t))
        noise = torch.randn_like(images)
        at = rearrange(t, 'b -> b 1 1 1')
        return (1 - at) * images + at * noise, noise - images, labels

    def step(self):
        t = self.times(self.batch_size)
        z, v, labels = self.path(t)
        self.descend((self.model(z, labels, t, t) - v).square().mean())

    def sample(self, labels, evaluations = None):
        num = evaluations or self.evaluations
        z = torch.randn(len(labels), *self.images.shape[1:])

        for t in torch.linspace(1, 0, num + 1)[:-1]:
            t = t.expand(len(labels))
            z = z - self.averaged(z, labels, t, t) / num

        return z

class MeanFlow(Flow):
    """u(z, r, t), the average velocity from r to t, is to equal v - (t - r) du/dt, a derivative along the path."""

    evaluations = 1

    def __init__(self, *args, share = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_apart = int(self.batch_size * share)       # so many with r < t; the others have r = t, flow matching

    def step(self):
        n = self.num_apart
        t = self.times(self.batch_size)
        one, other, same = t[:n], self.times(n), t[n:]
        r = cat((torch.minimum(one, other), same))
        t = cat((torch.maximum(one, other), same))
        z, v, labels = self.path(t)
        target = v.clone()

        def velocity(z, r, t):
            return self.model(z, labels[:n], r, t)

        with torch.no_grad():
            inputs = z[:n], r[:n], t[:n]
            tangents = v[:n], torch.zeros(n), torch.ones(n)
            _, slope = torch.func.jvp(velocity, inputs, tangents)
            target[:n] -= rearrange(t - r, 'b -> b 1 1 1')[:n] * slope

        error = (self.model(z, labels, r, t) - target).square().mean(dim = (1, 2, 3))
        self.descend((error / (error.detach() + 1e-3)).mean())                              # adaptive weight

    def sample(self, labels):
        noise = torch.randn(len(labels), *self.images.shape[1:])
        start, end = torch.zeros(len(labels)), torch.ones(len(labels))
        return noise - self.averaged(noise, labels, start, end)

METHODS = {
    'drifting': Drifting,
    'drifting-pixels': partial(Drifting, encoder = None),
    'meanflow': MeanFlow,
    'wgan': WGAN,
    'flow': Flow
}

# the data, and who judges

def make_judge():
    """That of train_mnist.py, of images [n 1 28 28]."""
    (images, labels), (held_out, held_out_labels) = split(*load_mnist(), num_held_out = 1_000)
    return Judge((crop(images), labels), (crop(held_out), held_out_labels))

class PhotographJudge(Judge):
    """Of images [n 3 32 32], crops of two photographs.

    It has learned from which ninth of which photograph they are, how they are turned, and how blurred or noisy, so
    that it sees both. Samples are compared with other crops of the two thirds that are trained on, and the distance is
    a multiple of that of the training crops to these. apart: images and labels of the third that nobody is trained on.
    """

    def __init__(self, num = 4_000, num_steps = 3_000):
        rng = np.random.default_rng(0)
        train, others, apart = [], [], []

        for label, (_, left, right) in enumerate(parts()):
            for part, size, rows in (right, num, train), (right, num // 2, others), (left, num // 4, apart):
                for picture, (y, x) in crops(part, size // 2, 32, rng):
                    rows.append((np.asarray(picture), label, label * 9 + int(y * 3) * 3 + int(x * 3)))

        def tensors(rows):
            pixels, labels, places = (torch.from_numpy(np.array(column)) for column in zip(*rows, strict = True))
            return rearrange(pixels / 127.5 - 1, 'n h w ch -> n ch h w').contiguous(), labels, places

        (images, labels, self.places), (*held_out, _), (*self.apart, _) = map(tensors, (train, others, apart))
        self.num_steps, self.unit = num_steps, 1.
        super().__init__((images, labels), held_out, train_classifier = self.train_classifier)
        self.unit = self(images, labels)['frechet_distance']

    def train_classifier(self, images, labels):
        torch.manual_seed(0)
        blurred = [F.interpolate(F.avg_pool2d(images, k), scale_factor = k, mode = 'bilinear') for k in (2, 4)]
        noisy = [images + std * torch.randn_like(images) for std in (0.1, 0.3)]
        kinds = images, *blurred, *noisy
        labels = cat([self.places + 18 * i for i in range(len(kinds))])
        net = encoders.Classifier(image_size = 32, channels = 3, num_classes = 18 * len(kinds))
        net.train_on(Crops(cat(kinds), labels), self.num_steps, 'judge', progress_bar = False)

        @torch.no_grad()
        def classify(x):
            features = net(x)
            logits = net.head(features)[:, ::4]                                             # of upright ones
            logits = rearrange(logits, 'n (kind label place) -> n label (kind place)', label = 2, place = 9)
            return features.double().numpy(), logits.logsumexp(dim = -1)

        return classify

    def __call__(self, images, labels):
        found = super().__call__(images, labels)
        return found | dict(frechet_distance = found['frechet_distance'] / self.unit)

DATA = dict(mnist = make_judge, photographs = PhotographJudge)

# what methods do otherwise on photographs

ON_PHOTOGRAPHS = {
    'drifting': dict(encoder = TurnsClassifier, num_groups = 2, alpha_range = (1., 1.), repulsion = 1.),
    'drifting-pixels': dict(num_groups = 2, alpha_range = (1., 1.), repulsion = 1.)
}

# the comparison

MEASURES = dict(
    frechet_distance = 'Frechet distance',
    accuracy = 'accuracy',
    precision = 'precision',
    recall = 'recall',
    novelty = 'novelty'
)

def measure(judge, images, labels):
    return dict(judge(images, labels), novelty = judge.novelty(images))

def measure_redrawn(judge, num, seed):
    """Of num training images, drawn with replacement: so few samples of a perfect copy of their distribution.

    Recall suffers, as those that repeat are near to each other.
    """
    generator = torch.Generator().manual_seed(seed)
    places = [torch.nonzero(judge.labels == i).squeeze(1) for i in range(judge.num_classes)]
    drawn = [torch.randint(len(of_class), (num // len(places),), generator = generator) for of_class in places]
    index = cat([of_class[chosen] for of_class, chosen in zip(places, drawn, strict = True)])
    return measure(judge, judge.images[index], judge.labels[index])

def row(metrics):
    quality = f'{metrics["frechet_distance"]:8.1f}  {metrics["accuracy"]:8.3f}'
    return f'{quality}  {metrics["precision"]:9.3f}  {metrics["recall"]:6.3f}  {metrics["novelty"]:7.2f}'

def draw(trained, num, num_classes, **kwargs):
    """num samples [num ch h w], as many of every class and always from the same noise, and their labels."""
    labels = torch.arange(num_classes).repeat_interleave(num // num_classes)

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return cat([trained.sample(part, **kwargs) for part in labels.split(250)]).clamp(-1, 1), labels

def check_same(saved, record, budget, num_samples, data, settings):
    """A run that goes on does so as it was started."""
    done, num, before = record['time'], record['num_samples'], record['settings']

    if record['data'] != data:
        raise SystemExit(f'{saved} was trained on {record["data"]}: pass another --results-folder')

    if done > budget:
        raise SystemExit(
            f'{saved} has been trained for {done:g} s already: '
            f'pass --budget {done:g}, or another --results-folder'
        )

    if before != settings:
        raise SystemExit(f'{saved} was trained with --set {before}: pass the same, or another --results-folder')

    if num != num_samples:
        raise SystemExit(
            f'{saved} was evaluated by {num} samples: pass --num-samples {num}, or another --results-folder'
        )

def others(method, args):
    """Other numbers of evaluations of a method, by name."""
    return {f'{method}-{num}': num for num in args.evaluations if method == 'flow'}

def run(method, seed, args, judge, path, settings):
    """Train for the budget, evaluate at times that double, at the end with more samples too.

    Saves after each evaluation, and goes on from where an earlier run in the same folder stopped. Returns the
    evaluations; the last has the one of more samples as 'final', and those of other steps of flow matching as 'flow-N'.
    """
    saved = path.with_suffix('.pt')

    if saved.exists():
        trained, used, records, random_state = torch.load(saved, weights_only = False)
        check_same(saved, records[-1], args.budget, args.num_samples, args.data, settings)
        torch.set_rng_state(random_state)
        done = records[-1]['time']
    else:
        torch.manual_seed(seed)
        start = time.process_time()
        own_folder = dict(folder = path.with_suffix('')) if method.startswith('drifting') else {}
        defaults = ON_PHOTOGRAPHS.get(method, {}) if args.data == 'photographs' else {}
        trained = METHODS[method](judge.images, judge.labels, **own_folder, **{**defaults, **settings})
        used = time.process_time() - start
        records, done = [], 0.

    def save():
        torch.save((trained, used, records, torch.get_rng_state()), saved)
        path.write_text(json.dumps(records, indent = 1))

    def evaluate(num, name = method, **kwargs):
        samples, labels = draw(trained, num, judge.num_classes, **kwargs)
        class_rows((samples + 1) / 2, 20, judge.num_classes).save(path.with_name(f'{name}-{seed}.png'))
        return measure(judge, samples, labels)

    for seconds in (args.budget / 2 ** i for i in reversed(range(args.points))):
        if seconds <= done:
            continue

        while used < seconds:
            start = time.process_time()
            trained.step()
            used += time.process_time() - start

        records.append(dict(
            method = method,
            seed = seed,
            time = seconds,
            steps = trained.updates,
            parameters = [num_parameters(part) for part in trained.parts],
            evaluations = trained.evaluations,
            num_samples = args.num_samples,
            data = args.data,
            settings = settings,
            **evaluate(args.num_samples)
        ))

        print(f'{method:15s} {used:6.0f} s {trained.updates:6d} steps  {row(records[-1])}', flush = True)
        save()

    if records[-1].get('final_samples') != args.final_samples:
        records[-1] |= dict(final_samples = args.final_samples, final = evaluate(args.final_samples))

        for name, num in others(method, args).items():
            records[-1][name] = evaluate(args.final_samples, name, evaluations = num)

        save()

    return records

def mean_of(records, statistic = torch.mean):
    return {key: statistic(torch.tensor([record[key] for record in records])).item() for key in MEASURES}

def plot(results, real, path):
    """results: {method: evaluations of every seed}; real: the measures of real images."""
    figure = Figure(figsize = (14, 3.2))
    axes = figure.subplots(1, 4)

    for axis, (key, title) in zip(axes, MEASURES.items(), strict = False):                  # novelty has no room
        for method, runs in results.items():
            at = [{record['time']: record for record in records} for records in runs]
            times = sorted(set.intersection(*map(set, at)))                                 # that all seeds have
            means = [mean_of([records[time] for records in at])[key] for time in times]
            axis.plot(times, means, marker = '.', label = method)

        axis.axhline(real[key], color = 'gray', linestyle = ':', label = 'real images')
        axis.set(title = title, xlabel = 'cpu seconds', xscale = 'log')

    axes[0].set_yscale('log')
    axes[0].legend(fontsize = 8)
    figure.tight_layout()
    figure.savefig(path, dpi = 80)

def stack_pictures(pictures, share):
    """One above the other, the left share of each, with lines in between."""
    width, heights = round(max(each.width for each in pictures) * share), [each.height + 6 for each in pictures]
    stacked = Image.new('RGB', (width, sum(heights) - 6), 'white')

    for i, picture in enumerate(pictures):
        stacked.paste(picture, (0, sum(heights[:i])))

    return stacked

def report(results, real, redrawn, args):
    """What main prints in the end. redrawn: measures of several draws of training images, as many as samples."""
    over = f'mean and deviation over {len(args.seeds)} seeds'

    lines = [
        f'\nafter {args.budget:g} cpu seconds, {args.final_samples:,} samples, {over}\n',
        f'{"":15s} evaluations  parameters   Frechet  accuracy  precision  recall  novelty'
    ]

    for method, runs in results.items():
        last = runs[0][-1]
        numbers = {'final': last['evaluations']} | others(method, args)

        for key, evaluations in numbers.items():
            name = method if key == 'final' else key
            finals = [records[-1][key] for records in runs]
            sizes = f'{evaluations:11d}  {sum(last["parameters"]):10,d}'
            lines.append(f'{name:15s} {sizes}  {row(mean_of(finals))}')

            if len(runs) > 1:
                lines.append(f'{"":15s} {"":11s}  {"":10s}  {row(mean_of(finals, torch.std))}')

    last_rows = {'all real images': real, 'as many, redrawn': mean_of(redrawn), '': mean_of(redrawn, torch.std)}
    lines += [f'{name:16s} {"":10s}  {"":10s}  {row(metrics)}' for name, metrics in last_rows.items()]
    return '\n'.join(lines)

def options():
    parser = make_parser(__doc__)
    parser.add_argument('--data', choices = list(DATA), default = 'mnist', help = 'what the images are of')
    parser.add_argument(
        '--results-folder', default = 'results/compare',
        help = 'where everything is written; runs that are there already go on up to the budget'
    )
    parser.add_argument(
        '--method', nargs = '+', choices = ('all', *METHODS), default = ['all'],
        help = 'what is trained and compared'
    )
    parser.add_argument(
        '--seeds', type = int, nargs = '+', default = [0],
        help = 'of the trainings; the split, the judge and the samples always use seed 0'
    )
    parser.add_argument('--budget', type = float, default = 600., help = 'cpu seconds of every training')
    parser.add_argument(
        '--points', type = positive, default = 7,
        help = 'number of evaluations: at the budget, at half of it, at a quarter of it and so on'
    )
    parser.add_argument(
        '--set', nargs = '+', default = [], metavar = 'NAME=VALUE',
        help = 'other settings of the methods: learning_rate, decay_start, ema_decay, batch_size, '
               'uniform_times and so on'
    )
    parser.add_argument(
        '--evaluations', type = positive, nargs = '+', default = [], metavar = 'N',
        help = 'numbers of them that flow matching is evaluated with too, at the end'
    )
    parser.add_argument(
        '--num-samples', type = positive, default = 1_000,
        help = 'of every evaluation, as many of every class'
    )
    parser.add_argument(
        '--final-samples', type = positive, default = None,
        help = 'at the end; None for five times --num-samples. The fewer, the more the Frechet distance is chance; '
               'precision and recall are of at most 5,000 of them'
    )
    args = parser.parse_args()
    args.final_samples = args.final_samples or 5 * args.num_samples
    return args

def main():
    args = options()
    torch.set_num_threads(1)
    folder = Path(args.results_folder)
    folder.mkdir(parents = True, exist_ok = True)

    pairs = [each.split('=') for each in args.set]
    settings = {name: ast.literal_eval(value) for name, value in pairs}
    judge = DATA[args.data]()
    methods = METHODS if 'all' in args.method else args.method
    results = {method: [] for method in methods}

    for method, runs in results.items():
        for seed in args.seeds:
            path = folder / f'{method}-{seed}.json'
            runs.append(run(method, seed, args, judge, path, settings))

    some = first_of_each_class(judge.labels, args.num_samples // judge.num_classes, judge.num_classes)
    plot(results, measure(judge, judge.images[some], judge.labels[some]), folder / 'compare.png')

    real = class_rows((judge.images[some] + 1) / 2, 20, judge.num_classes)
    names = [name for method in methods for name in (method, *others(method, args))]
    pictures = [*(Image.open(folder / f'{name}-{args.seeds[0]}.png') for name in names), real]
    stack_pictures(pictures, 9 / 20).save(folder / 'samples.png', optimize = True)

    redrawn = [measure_redrawn(judge, args.final_samples, seed) for seed in range(5)]
    print(report(results, measure(judge, judge.images, judge.labels), redrawn, args))
    print(f'\n{folder / "compare.png"}, {folder / "samples.png"}')

if __name__ == '__main__':
    main()
