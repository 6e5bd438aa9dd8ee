"""Encode a folder of class folders of images (ImageNet's layout) with the Stable Diffusion VAE, for all trainings.

accelerate launch examples/imagenet/encode_latents.py IMAGES LATENTS        # or torchrun --nproc-per-node 8, or python

Writes into LATENTS: shard-00000.npy and so on, the mean and standard deviation of the posterior of every image and of
its mirror image ([n flip moment ch h w]); manifest.json, what they are (complete once it lists the shards); and with
--skip-unreadable shard-00000.unreadable.txt, the images that were left out of a shard. All of ImageNet takes 42 GB.
Started again with the same arguments it writes what is not there.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from data import ClassFolders
from drifting_pytorch.drifting import check

sys.path.insert(0, str(Path(__file__).parents[1]))      # examples/

from common import load_vae, make_parser, process_state, sha256, write_whole

# images and their latents

class Readable(Dataset):
    """Images, or as a string why there is none."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, index):
        try:
            return self.images[index][0]
        except ValueError as error:
            return str(error)

def collate(items):
    """Images [b 3 h w] or None, and {place in the batch: why there is none}."""
    images = [item for item in items if torch.is_tensor(item)]
    errors = {i: item for i, item in enumerate(items) if not torch.is_tensor(item)}
    return torch.stack(images) if images else None, errors

@torch.inference_mode()
def posterior_moments(vae, images):
    """[b flip moment ch h w] of images [b 3 H W]: flip: as they are, mirrored; moment: mean, standard deviation."""
    both = rearrange([images, images.flip(-1)], 'flip b ch h w -> (b flip) ch h w')
    posterior = vae.encode(both).latent_dist
    return rearrange([posterior.mean, posterior.std], 'moment (b flip) ch h w -> b flip moment ch h w', flip = 2)

def write_manifest(folder, manifest):
    write_whole(folder / 'manifest.json', json.dumps(manifest, indent = 1).encode())

def finish(folder, plan, files, shards, scaling_factor):
    """The manifest of a complete folder. Whichever process ends last finds all shards; a tie writes the same twice."""
    left_out, listed = set(), []

    for path, shard in shards.items():
        note = path.with_suffix('.unreadable.txt')
        names = note.read_text(encoding = 'utf-8').splitlines() if note.exists() else []
        left_out |= set(names)
        listed.append(dict(file = path.name, images = len(shard) - len(names)))

    labels = [label for name, label in files if name not in left_out]
    first = np.load(next(iter(shards)), mmap_mode = 'r')

    write_manifest(folder, dict(
        **plan,
        images = len(labels),
        counts = np.bincount(labels, minlength = len(plan['classes'])).tolist(),
        unreadable = sorted(left_out),
        scaling_factor = scaling_factor,
        shape = first.shape[-3:],
        layout = 'image, (as it is, mirrored), (mean, std), channel, height, width',
        shards = listed
    ))

def options(argv):
    parser = make_parser(__doc__)
    parser.add_argument('images', help = 'folder of class folders of images')
    parser.add_argument('latents', help = 'folder to write')
    parser.add_argument(
        '--vae', default = 'stabilityai/sd-vae-ft-mse',
        help = "name on the Hugging Face hub or local folder of diffusers' AutoencoderKL"
    )
    parser.add_argument('--image-size', type = int, default = 256, help = 'of the centre crop')
    parser.add_argument(
        '--dtype', choices = ('float16', 'float32'), default = 'float16',
        help = 'of the numbers on disk'
    )
    parser.add_argument(
        '--shard-size', type = int, default = 4096,
        help = 'images of a shard, what is lost at most by an interruption; 32 kB each at the other defaults'
    )
    parser.add_argument('--batch-size', type = int, default = 32, help = 'images encoded at once')
    parser.add_argument('--num-workers', type = int, default = 8, help = 'image loading processes for each GPU')
    parser.add_argument(
        '--skip-unreadable', action = 'store_true',
        help = 'leave images out that cannot be read, and list them, instead of stopping'
    )
    parser.add_argument('--cpu', action = 'store_true', help = 'run on the cpu even where there is a GPU')
    return parser.parse_args(argv)

def encode(vae, images, shards, args, bar):
    """Of each shard: moments [b flip moment ch h w] of its batches, names of images that cannot be read."""
    device = next(vae.parameters()).device
    batches = [shard[i:i + args.batch_size] for shard in shards for i in range(0, len(shard), args.batch_size)]
    loader = DataLoader(
        Readable(images), batch_sampler = batches, collate_fn = collate, num_workers = args.num_workers
    )
    batches = zip(batches, loader, strict = True)           # never across shards

    for shard in shards:
        moments, unreadable = [], []

        for _ in range(0, len(shard), args.batch_size):
            batch, (pixels, errors) = next(batches)

            for error in errors.values():
                check(
                    args.skip_unreadable,
                    f'{error}: replace it, or pass --skip-unreadable to leave such images out'
                )

            unreadable += [images.files[batch[place]][0] for place in errors]

            if pixels is not None:
                moments.append(posterior_moments(vae, pixels.to(device)).cpu().numpy().astype(args.dtype))

            bar.update(len(batch))

        yield moments, unreadable

def main(argv = None):
    args = options(argv)
    state = process_state(args.cpu)
    folder = Path(args.latents)
    message = f'--image-size must be a multiple of 64, got {args.image_size}: the encoder halves latents three times'
    check(args.image_size % 64 == 0, message)
    images = ClassFolders(args.images, args.image_size)

    # one folder holds one encoding: the manifest says of what, and lists the shards when all are there

    names = '\n'.join(name for name, _ in images.files)
    plan = dict(
        vae = args.vae,
        image_size = args.image_size,
        dtype = args.dtype,
        shard_size = args.shard_size,
        classes = images.classes,
        files_sha256 = sha256([names.encode()])
    )

    folder.mkdir(parents = True, exist_ok = True)
    manifest = plan

    if (folder / 'manifest.json').exists():
        manifest = json.loads((folder / 'manifest.json').read_text())

    other = ', '.join(key for key in plan if manifest.get(key) != plan[key])
    check(not other, f'{folder} holds latents of another {other}: pass the arguments of that run, or another folder')

    if manifest is plan and state.is_main_process:
        write_manifest(folder, plan)

    # every process takes its share of the shards and needs nothing of the others

    num, size = len(images), args.shard_size
    ranges = [range(start, min(start + size, num)) for start in range(0, num, size)]
    shards = {folder / f'shard-{i:05d}.npy': shard for i, shard in enumerate(ranges)}
    mine = list(shards.items())[state.process_index::state.num_processes]
    mine = {path: shard for path, shard in mine if not path.exists()}

    if not mine and manifest.get('shards'):
        return

    vae = load_vae(args.vae).to(state.device)
    total = sum(map(len, mine.values()))
    which = f'process 1 of {state.num_processes}'

    with tqdm(total = total, unit = ' images', desc = which, disable = not state.is_main_process) as bar:
        encoded = encode(vae, images, mine.values(), args, bar)

        for (path, shard), (moments, unreadable) in zip(mine.items(), encoded, strict = True):
            check(
                moments,
                f'none of the {len(shard)} images of {path.name} can be read, the first is {unreadable[:1]}: '
                f'check the folder {args.images}'
            )

            note = path.with_suffix('.unreadable.txt')      # before the shard, which is what says that both are there
            note.unlink(missing_ok = True)

            if unreadable:
                write_whole(note, '\n'.join(unreadable).encode())

            write_whole(path, partial(np.save, arr = np.concatenate(moments)))

    if all(path.exists() for path in shards):
        finish(folder, plan, images.files, shards, vae.config.scaling_factor)

if __name__ == '__main__':
    main()
