"""Class-conditional generation of the 1,797 real 8x8 digits of scikit-learn, on a laptop, in five minutes.

python examples/train_digits.py

Writes into --results-folder: samples.png (a row per class), samples.npz (images [1000 1 8 8] in [0, 1], labels [1000]),
metrics.json (quality next to the same figures of real digits), curves.png (the diagnostics over training), and what
the Trainer writes.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.distance import cdist
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch.utils.data import TensorDataset

from common import class_rows, frechet_distance, load_digits, make_parser, num_parameters, plot_curves, positive
from drifting_pytorch import DriftField, DriftingGenerator, FeatureDriftLoss, Trainer

# metrics, all on pixels in [0, 1] flattened to 64 numbers

def nearest(a, b):
    """Distance of each a to its nearest b: mean, and the 5 % smallest (copies would bring it to 0)."""
    distance = cdist(a, b).min(axis = 1)
    return dict(mean = distance.mean(), percentile_5 = np.percentile(distance, 5))

def spread(images, labels):
    """Mean distance between two images of one class (collapse would bring it to 0), averaged over classes."""
    classes = [images[labels == i] for i in range(10)]
    within = [cdist(c, c).sum() / (len(c) * (len(c) - 1)) for c in classes]
    return float(np.mean(within))

def evaluate(samples, labels, real, real_labels, seed = 0):
    """Quality of samples [n 64], and the same figures for real digits that were held out."""
    train, held_out, train_labels, held_out_labels = train_test_split(
        real, real_labels, test_size = 0.3, stratify = real_labels, random_state = seed
    )

    classifier = SVC(gamma = 0.8, C = 10).fit(train, train_labels)
    accuracy_per_class = [classifier.score(samples[labels == i], labels[labels == i]) for i in range(10)]

    halves = [train_test_split(real, test_size = 0.5, random_state = i) for i in range(10)]
    real_distance = float(np.mean([frechet_distance(a, b) for a, b in halves]))
    distance = frechet_distance(samples, real)

    return dict(
        samples = dict(
            accuracy = classifier.score(samples, labels),
            accuracy_per_class = accuracy_per_class,
            nearest_real = nearest(samples, real),
            spread_within_class = spread(samples, labels),
            frechet_distance = distance,
            frechet_ratio = distance / real_distance
        ),
        real = dict(
            accuracy = classifier.score(held_out, held_out_labels),
            nearest_real = nearest(held_out, train),
            spread_within_class = spread(held_out, held_out_labels),
            frechet_distance_between_halves = real_distance
        )
    )

def as_points(images):
    return images.flatten(1).numpy().astype(np.float64)

def report(result, steps):
    """What main prints."""
    ours, real = result['samples'], result['real']
    our_nearest, real_nearest = ours['nearest_real'], real['nearest_real']
    real_distance, ratio = real['frechet_distance_between_halves'], ours['frechet_ratio']

    return f'''
trained {result["parameters"]:,} parameters for {steps} steps in {result["seconds"]:.0f} s

                             samples   real held-out digits
recognised as their class    {ours["accuracy"]:7.3f}   {real["accuracy"]:7.3f}
nearest real digit, mean     {our_nearest["mean"]:7.3f}   {real_nearest["mean"]:7.3f}
nearest real digit, 5 %      {our_nearest["percentile_5"]:7.3f}   {real_nearest["percentile_5"]:7.3f}
spread within a class        {ours["spread_within_class"]:7.3f}   {real["spread_within_class"]:7.3f}
Frechet distance             {ours["frechet_distance"]:7.3f}   {real_distance:7.3f}   ({ratio:.2f} times)
'''

def options():
    parser = make_parser(__doc__)
    parser.add_argument('--results-folder', default = 'results/digits', help = 'where everything is written')
    parser.add_argument('--steps', type = positive, default = 1_600, help = 'optimiser steps')
    parser.add_argument('--groups', type = positive, default = 10, help = 'class groups per step')
    parser.add_argument('--num-gen', type = positive, default = 32, help = 'generated samples per group')
    parser.add_argument('--num-pos', type = positive, default = 128, help = 'real samples per group')
    parser.add_argument('--learning-rate', type = float, default = 4e-3, help = 'of AdamW')
    parser.add_argument(
        '--lr-decay-start', type = int, default = 300,
        help = 'the step from which on the learning rate falls as 1 / sqrt(step)'
    )
    parser.add_argument(
        '--affinity-floor', type = float, default = 0.,
        help = "lower bound of softmax * softmax; the release's 1e-6 keeps these samples at the mean of their class"
    )
    parser.add_argument(
        '--repulsion', type = float, default = 1.01,
        help = 'how much stronger samples repel each other than real ones attract them: above 1 they differ more'
    )
    parser.add_argument(
        '--alpha-range', type = float, nargs = 2, default = [1., 1.2],
        help = 'guidance scales of the training. Samples have scale 1: the others make their shapes better'
    )
    parser.add_argument('--dim', type = int, default = 64, help = 'width of the generator')
    parser.add_argument('--depth', type = int, default = 3, help = 'blocks of the generator')
    parser.add_argument(
        '--output-conv-dim', type = int, default = 16,
        help = 'width of the convolutions behind its patches, 0 for none'
    )
    parser.add_argument(
        '--outer-slope', type = float, default = 0.1,
        help = 'share that stays of what exceeds [-1, 1], where pictures are cut off anyway, 1 for all of it'
    )
    parser.add_argument(
        '--seed', type = int, default = 0,
        help = 'of the whole run; the final samples always use seed 0'
    )
    parser.add_argument('--threads', type = positive, default = 2, help = 'cpu threads')
    parser.add_argument(
        '--sample-every', type = int, default = 200,
        help = 'steps between sample grids in samples/, 0 for none'
    )
    parser.add_argument(
        '--save-every', type = int, default = 400,
        help = 'steps between checkpoints in checkpoints/, 0 for none'
    )
    parser.add_argument('--resume', default = None, help = "a checkpoint folder to go on from, or 'latest'")
    return parser.parse_args()

def main():
    args = options()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    folder = Path(args.results_folder)

    images, digits = load_digits()
    dataset = TensorDataset(images, digits)

    model = DriftingGenerator(
        image_size = 8,
        channels = 1,
        patch_size = 4,                 # few tokens, many steps
        dim = args.dim,
        depth = args.depth,
        heads = 4,
        num_classes = 10,
        num_register_tokens = 4,
        num_style_tokens = 8,
        style_codebook_size = 16,
        output_conv_dim = args.output_conv_dim,
        outer_slope = args.outer_slope
    )

    trainer = Trainer(
        model,
        FeatureDriftLoss(affinity_floor = args.affinity_floor, field = DriftField(repulsion = args.repulsion)),
        dataset,
        num_train_steps = args.steps,
        num_groups = args.groups,
        num_gen = args.num_gen,
        num_pos = args.num_pos,
        alpha_range = tuple(args.alpha_range),
        learning_rate = args.learning_rate,
        lr_warmup_steps = 50,
        lr_decay_start = args.lr_decay_start,
        ema_decay = max(0., 1 - 10 / args.steps),   # over the last tenth of the steps
        sample_every = args.sample_every,
        save_every = args.save_every,
        seed = args.seed,
        cpu = True,
        results_folder = folder,
        resume_from_checkpoint = args.resume,
        overwrite = args.resume is None             # this folder is the example's own
    )

    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start

    trainer.accelerator.wait_for_everyone()
    trainer.end_training()

    if not trainer.accelerator.is_main_process:     # of several, one looks at the result
        return

    labels = torch.arange(10).repeat_interleave(100)
    samples = ((trainer.sample(labels, seed = 0) + 1) / 2).clamp(0, 1)

    np.savez_compressed(folder / 'samples.npz', images = samples.numpy(), labels = labels.numpy())
    class_rows(samples, 20).save(folder / 'samples.png')
    plot_curves(folder / 'curves.png', folder)

    quality = evaluate(as_points(samples), labels.numpy(), as_points((images + 1) / 2), digits.numpy())
    result = dict(settings = vars(args), parameters = num_parameters(model), seconds = seconds, **quality)
    (folder / 'metrics.json').write_text(json.dumps(result, indent = 1))
    print(f'{report(result, args.steps)}\n{folder / "samples.png"}')

if __name__ == '__main__':
    main()
