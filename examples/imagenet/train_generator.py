"""Train a one-step generator of ImageNet, of latents or pixels, with the settings of Table 8.

accelerate launch examples/imagenet/train_generator.py DATA --preset L/2 --encoder ENCODER      # or torchrun, or python

DATA is the folder that encode_latents.py wrote (ablation, B/2, L/2, L/2-512), or the folder of class folders of images
(B/16, L/16). ENCODER is the folder encoder/ that train_mae.py wrote for the same space, or that of a published encoder.
Writes into --results-folder: generator/ (the averaged weights, for DriftingGenerator.from_pretrained), metrics.jsonl,
samples/ (a grid, a row for each of the first ten classes), checkpoints/. With --evaluate-every, --keep-best frechet and
several --ema-decay, generator/ is the best average of the best evaluation.
"""

import math
import os
import sys
import warnings
from pathlib import Path

import torch

from data import AUGMENTS, add_run_options, given, load_dataset, run_settings
from drifting_pytorch import ConvNeXtFeatures, DriftingGenerator, FeatureDriftLoss, LatentMAE, Trainer
from drifting_pytorch.drifting import PRESETS, check
from drifting_pytorch.metrics import Evaluation, inception_features

sys.path.insert(0, str(Path(__file__).parents[1]))      # examples/

from common import load_best, make_parser, process_state

SPACES = dict.fromkeys(('ablation', 'B/2', 'L/2', 'L/2-512'), 'latent') | {'B/16': 'pixel', 'L/16': 'pixel'}

# of real samples, by space. The release reads pixels with use_aug: random resized crops, 0.2 to 1 of the area, bicubic,
# and flips

AUGMENT = dict(latent = 'flip', pixel = 'crop')

# real samples that all processes of the published runs read in a step; L/2-512 as L/2

PUSHED = dict.fromkeys(('B/2', 'B/16', 'L/16'), 4096) | {'ablation': 1024, 'L/2': 2048, 'L/2-512': 2048}

# what Table 8 sets and a command may change

MODEL = [
    ('dim', int, 'width of the generator'),
    ('depth', int, 'blocks of the generator'),
    ('heads', int, 'attention heads of the generator')
]

TRAINER = [
    ('num_train_steps', int, 'optimiser steps'),
    ('num_groups', int, 'class groups per step, of all GPUs together'),
    ('num_gen', int, 'generated samples per group'),
    ('num_pos', int, 'real samples per group'),
    ('num_uncond', int, 'unconditional samples per group'),
    ('learning_rate', float, 'of AdamW'),
    ('lr_warmup_steps', int, 'steps in which the learning rate rises')
]

def options(argv):
    parser = make_parser(__doc__)
    parser.add_argument('data', help = 'folder of latents, or of class folders of images')
    parser.add_argument(
        '--preset', choices = tuple(SPACES), default = 'ablation',
        help = 'column of Table 8: the generator and its training'
    )
    parser.add_argument('--encoder', required = True, help = 'folder of a LatentMAE, from train_mae.py or published')
    parser.add_argument(
        '--convnext', default = None,
        help = "the pixel presets' second encoder: facebook/convnextv2-base-22k-224 on the hub, which the release "
               "uses, or a local folder of transformers; None for none"
    )
    parser.add_argument(
        '--augment', choices = AUGMENTS, default = None,
        help = 'what is cut out of a real image: its centre, also mirrored (flip), or a random resized crop and flip; '
               'None for crop of pixels and flip of latents, as in the release'
    )
    parser.add_argument(
        '--checkpointing', action = 'store_true',
        help = 'recompute the blocks of generator and encoder in the backward pass: less memory, more time'
    )
    parser.add_argument(
        '--group-chunk-size', type = int, default = None,
        help = 'class groups at a time on a GPU, with the same result: less memory, more time; None for all at once'
    )

    parser.add_argument(
        '--push-size', type = int, default = None,
        help = 'real samples read per step by each process, None for the share of it in those of the published runs'
    )
    parser.add_argument('--evaluate-every', type = int, default = 0, help = 'steps between evaluations, 0 for none')
    parser.add_argument(
        '--evaluate-samples', type = int, default = 2_000,
        help = 'of an evaluation, by every process. Numbers of few samples compare checkpoints of this run alone'
    )
    parser.add_argument(
        '--evaluate-features', choices = ('inception', 'encoder'), default = 'inception',
        help = "inception: of images, decoded by the VAE, needs the extra [eval]; encoder: the last layer's mean"
    )
    parser.add_argument('--inception-weights', default = None, help = 'a file, None to download it')
    parser.add_argument(
        '--keep-best', default = None,
        help = 'frechet, max:precision or max:recall: the best is generator/, and its checkpoint stays. None: the last'
    )
    parser.add_argument(
        '--ema-decay', type = float, nargs = '+', default = None,
        help = "of the averaged weights, several for --keep-best to choose from; None for the preset's"
    )

    for name, kind, what in (*MODEL, *TRAINER):
        flag = name.replace('num_train_', '').replace('_', '-')
        parser.add_argument(
            f'--{flag}', dest = name, type = kind, default = None,
            help = f"{what}, None for the preset's"
        )

    add_run_options(parser, 'results/imagenet/{preset}')
    args = parser.parse_args(argv)
    args.results_folder = args.results_folder.replace('{preset}', args.preset.replace('/', '-'))

    if args.augment is None:
        args.augment = AUGMENT[SPACES[args.preset]]

    if args.push_size is None:
        reads = int(os.environ.get('WORLD_SIZE', 1)) * args.gradient_accumulation_steps
        args.push_size = math.ceil(PUSHED[args.preset] / reads)

    return args

def make_evaluation(args, space, encoder, to_image):
    """Of samples, against real ones from all over the data. Every process computes it, on its own device."""
    data, _ = load_dataset(args, space, 'center', False)
    num = min(args.evaluate_samples, len(data))
    real, labels = zip(*(data[i * len(data) // num] for i in range(num)), strict = True)
    device = process_state(args.cpu).device
    encoder.to(device)
    inception = None

    if args.evaluate_features == 'inception':
        inception = inception_features(args.inception_weights)

    def features(x):
        x = x.to(device)

        if inception is None:
            return encoder.features(x)['layer4_mean'][:, 0]

        return inception(to_image(x) * 2 - 1 if space == 'latent' else x)

    return Evaluation(torch.stack(real), features, labels = labels, num_samples = args.evaluate_samples)

def main(argv = None):
    args = options(argv)
    space = SPACES[args.preset]
    check(
        args.convnext is None or space == 'pixel',
        f'--convnext reads pixels, the preset {args.preset} makes latents: leave it out'
    )

    torch.manual_seed(args.seed)
    of_images = args.evaluate_every > 0 and args.evaluate_features == 'inception'
    dataset, to_image = load_dataset(args, space, args.augment, args.sample_every > 0 or of_images)
    sample = dataset[0][0]

    generator = 'B/2' if args.preset == 'ablation' else args.preset             # the ablation trains the B/2 generator
    side = sample.shape[-1]

    if side != PRESETS[generator]['image_size']:
        warnings.warn(
            f'samples have {side} pixels or latents a side, those of {args.preset} {PRESETS[generator]["image_size"]}: '
            'the patches stay as large', stacklevel = 2
        )

    model = DriftingGenerator.from_preset(
        generator,
        image_size = side,
        num_classes = len(dataset.classes),
        **given(args, [name for name, *_ in MODEL])
    )

    mae = LatentMAE.from_pretrained(args.encoder)
    check(
        mae.channels == len(sample),
        f'the encoder {args.encoder} reads samples of {mae.channels} channels, '
        f'those of the preset {args.preset} have {len(sample)}: pass an encoder of the same space'
    )
    model.checkpointing = mae.checkpointing = args.checkpointing

    encoders = [mae]

    if args.convnext is not None:
        torch.set_float32_matmul_precision('high')          # TF32: it computes in float32, without bf16
        encoders.append(ConvNeXtFeatures.from_pretrained(args.convnext))

    evaluation = None

    if args.evaluate_every > 0:
        evaluation = make_evaluation(args, space, mae, to_image)

    trainer = Trainer.from_preset(
        args.preset, model, FeatureDriftLoss(encoders), dataset,
        group_chunk_size = args.group_chunk_size,
        to_image = to_image,
        evaluate = evaluation,
        **given(args, ['push_size', 'evaluate_every', 'keep_best', 'ema_decay', *(name for name, *_ in TRAINER)]),
        **run_settings(args)
    )

    trainer.train()
    load_best(trainer)

    folder = Path(args.results_folder) / 'generator'
    trainer.save_pretrained(folder)
    trainer.accelerator.print(folder)
    trainer.end_training()

if __name__ == '__main__':
    main()
