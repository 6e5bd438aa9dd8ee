"""Pretrain the feature encoder of the paper, a masked autoencoder, on ImageNet's latents or pixels.

accelerate launch examples/imagenet/train_mae.py DATA --space latent        # or torchrun --nproc-per-node 8, or python

DATA is the folder that encode_latents.py wrote, or for pixels the folder of class folders of images. The defaults are
the release's; one with --dim 640 --steps 200000 (1280 epochs) is that of the best generators. Writes into
--results-folder: encoder/ (the averaged weights, for train_generator.py), metrics.jsonl, samples/ (images, what is left
under the mask, reconstructions), checkpoints/.
"""

import sys
from pathlib import Path

import torch

from data import add_run_options, load_dataset, run_settings
from drifting_pytorch import LatentMAE, MAETrainer

sys.path.insert(0, str(Path(__file__).parents[1]))      # examples/

from common import make_parser

# the command

def options(argv):
    parser = make_parser(__doc__)
    parser.add_argument('data', help = 'folder of latents, or of class folders of images')
    parser.add_argument('--space', choices = ('latent', 'pixel'), default = 'latent', help = 'what the encoder reads')
    parser.add_argument(
        '--dim', type = int, default = 256,
        help = "width of the first stage; the paper's are 256 to 640"
    )
    parser.add_argument(
        '--patch-size', type = int, default = None,
        help = 'None for 1 of latents and 8 of pixels; 2 for latents of 64x64, whose maps are then as large'
    )
    parser.add_argument(
        '--layers', type = int, nargs = 4, default = [3, 4, 6, 3],
        help = 'residual blocks of the four stages'
    )
    parser.add_argument(
        '--checkpointing', action = 'store_true',
        help = 'recompute residual blocks in the backward pass: less memory, more time'
    )
    parser.add_argument('--steps', type = int, default = 30_000, help = 'optimiser steps, classifier included')
    parser.add_argument(
        '--batch-size', type = int, default = 8192,
        help = 'of all GPUs together, times --gradient-accumulation-steps for the batch of a step'
    )
    parser.add_argument('--learning-rate', type = float, default = 4e-3, help = 'of AdamW')
    parser.add_argument(
        '--lr-warmup-steps', type = int, default = 4_000,
        help = 'steps in which the learning rate rises'
    )
    parser.add_argument('--weight-decay', type = float, default = 0.01, help = 'of AdamW')
    parser.add_argument(
        '--ema-decay', type = float, default = 0.9995,
        help = 'of the averaged weights, which are exported'
    )
    parser.add_argument(
        '--finetune-steps', type = int, default = 0,
        help = "last steps, with a classifier: 3,000 in the paper's encoders of width 640"
    )
    parser.add_argument('--cls-weight', type = float, default = 0.1, help = 'lambda, of the classification in the loss')
    parser.add_argument('--cls-warmup-steps', type = int, default = 1_000, help = 'steps in which lambda rises')
    add_run_options(parser, 'results/imagenet/mae')
    return parser.parse_args(argv)

def main(argv = None):
    args = options(argv)
    torch.manual_seed(args.seed)
    dataset, to_image = load_dataset(args, args.space, 'crop', args.sample_every > 0)

    channels, patch_size = (4, 1) if args.space == 'latent' else (3, 8)
    patch_size = patch_size if args.patch_size is None else args.patch_size

    mae = LatentMAE(
        dim = args.dim,
        channels = channels,
        patch_size = patch_size,
        layers = tuple(args.layers),
        num_classes = len(dataset.classes),
        checkpointing = args.checkpointing
    )

    trainer = MAETrainer(
        mae, dataset,
        num_train_steps = args.steps,
        batch_size = args.batch_size,
        learning_rate = args.learning_rate,
        lr_warmup_steps = args.lr_warmup_steps,
        weight_decay = args.weight_decay,
        ema_decay = args.ema_decay,
        finetune_steps = args.finetune_steps,
        cls_weight = args.cls_weight,
        cls_warmup_steps = args.cls_warmup_steps,
        to_image = to_image,
        **run_settings(args)
    )

    trainer.train()

    folder = Path(args.results_folder) / 'encoder'
    trainer.save_pretrained(folder)
    trainer.accelerator.print(folder)
    trainer.end_training()

if __name__ == '__main__':
    main()
