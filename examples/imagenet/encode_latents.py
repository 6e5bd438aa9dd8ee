"""Encode a folder of class folders of images (ImageNet's train layout) with the Stable Diffusion VAE, once, for all latent trainings.

accelerate launch examples/imagenet/encode_latents.py IMAGES LATENTS        # or torchrun --nproc-per-node 8, or python

Writes into LATENTS: shard-00000.npy and so on, the mean and standard deviation of the posterior of every image and of its mirror image
([n flip moment ch h w]); manifest.json, what they are (complete once it lists the shards); and with --skip-unreadable
shard-00000.unreadable.txt, the images that were left out of a shard. All of ImageNet takes 42 GB. Started again with the same arguments it writes what is not there.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from einops import rearrange
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from data import ClassFolders, load_vae
from drifting_pytorch.drifting import check

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
    return torch.stack(images) if images else None, {i: item for i, item in enumerate(items) if not torch.is_tensor(item)}

@torch.inference_mode()
def posterior_moments(vae, images):
    """[b flip moment ch h w] of images [b 3 H W]: flip: as they are, mirrored; moment: mean, standard deviation."""
    both = rearrange([images, images.flip(-1)], 'flip b ch h w -> (b flip) ch h w')
    posterior = vae.encode(both).latent_dist
    return rearrange([posterior.mean, posterior.std], 'moment (b flip) ch h w -> b flip moment ch h w', flip = 2)

def write_whole(path, write, writer = ''):
    """The file is there whole or not at all: written under another name, flushed, renamed. writer tells processes apart that may write the same file at once."""
    unfinished = path.with_name(f'unfinished{writer}-{path.name}')

    with open(unfinished, 'wb') as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())

    unfinished.replace(path)

def write_manifest(folder, manifest):
    write_whole(folder / 'manifest.json', lambda file: file.write(json.dumps(manifest, indent = 1).encode()), PartialState().process_index)

def finish(folder, plan, files, shards, scaling_factor):
    """The manifest of a complete folder. Whichever process ends last finds all shards; a tie writes the same twice."""
    left_out, listed = set(), []

    for path, shard in shards.items():
        note = path.with_suffix('.unreadable.txt')
        names = note.read_text().splitlines() if note.exists() else []
        left_out |= set(names)
        listed.append(dict(file = path.name, images = len(shard) - len(names)))

    labels = [label for name, label in files if name not in left_out]
    counts = np.bincount(labels, minlength = len(plan['classes'])).tolist()

    write_manifest(folder, dict(
        **plan, images = len(labels), counts = counts, unreadable = sorted(left_out), scaling_factor = scaling_factor,
        shape = np.load(next(iter(shards)), mmap_mode = 'r').shape[-3:], layout = 'image, (as it is, mirrored), (mean, std), channel, height, width',
        shards = listed
    ))

def main(argv = None):
    parser = argparse.ArgumentParser(description = __doc__.split('\n')[0], formatter_class = argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('images', help = 'folder of class folders of images')
    parser.add_argument('latents', help = 'folder to write')
    parser.add_argument('--vae', default = 'stabilityai/sd-vae-ft-mse', help = "name on the Hugging Face hub or local folder of diffusers' AutoencoderKL")
    parser.add_argument('--image-size', type = int, default = 256, help = 'of the centre crop')
    parser.add_argument('--dtype', choices = ('float16', 'float32'), default = 'float16', help = 'of the numbers on disk')
    parser.add_argument('--shard-size', type = int, default = 4096, help = 'images of a shard, what is lost at most by an interruption; 32 kB each at the other defaults')
    parser.add_argument('--batch-size', type = int, default = 32, help = 'images encoded at once')
    parser.add_argument('--num-workers', type = int, default = 8, help = 'image loading processes for each GPU')
    parser.add_argument('--skip-unreadable', action = 'store_true', help = 'leave images out that cannot be read, and list them, instead of stopping')
    parser.add_argument('--cpu', action = 'store_true', help = 'run on the cpu even where there is a GPU')
    args = parser.parse_args(argv)

    state, folder = PartialState(cpu = args.cpu), Path(args.latents)
    images = ClassFolders(args.images, args.image_size)

    # one folder holds one encoding: the manifest says of what, and lists the shards when all are there

    names = '\n'.join(name for name, _ in images.files)
    plan = dict(vae = args.vae, image_size = args.image_size, dtype = args.dtype, shard_size = args.shard_size, classes = images.classes, files_sha256 = hashlib.sha256(names.encode()).hexdigest())

    folder.mkdir(parents = True, exist_ok = True)
    manifest = json.loads((folder / 'manifest.json').read_text()) if (folder / 'manifest.json').exists() else plan
    other = [key for key in plan if manifest.get(key) != plan[key]]
    check(not other, f'{folder} holds latents of another {", ".join(other)}: pass the arguments of that run, or another folder')

    if manifest is plan and state.is_main_process:
        write_manifest(folder, plan)

    # every process takes its share of the shards and needs nothing of the others

    starts = range(0, len(images), args.shard_size)
    shards = {folder / f'shard-{i:05d}.npy': range(start, min(start + args.shard_size, len(images))) for i, start in enumerate(starts)}
    mine = {path: shard for path, shard in list(shards.items())[state.process_index::state.num_processes] if not path.exists()}

    if not mine and manifest.get('shards'):
        return

    vae = load_vae(args.vae).to(state.device)
    batches = [shard[i:i + args.batch_size] for shard in mine.values() for i in range(0, len(shard), args.batch_size)]      # never across shards
    loader = iter(DataLoader(Readable(images), batch_sampler = batches, collate_fn = collate, num_workers = args.num_workers))

    with tqdm(total = sum(map(len, mine.values())), unit = ' images', desc = f'process 1 of {state.num_processes}', disable = not state.is_main_process) as bar:
        for path, shard in mine.items():
            moments, unreadable = [], []

            for i in range(0, len(shard), args.batch_size):
                pixels, errors = next(loader)
                check(args.skip_unreadable or not errors, f'{next(iter(errors.values()), "")}: replace it, or pass --skip-unreadable to leave such images out')

                unreadable += [images.files[shard[i + place]][0] for place in errors]
                if pixels is not None:
                    moments.append(posterior_moments(vae, pixels.to(state.device)).cpu().numpy().astype(args.dtype))
                bar.update(len(shard[i:i + args.batch_size]))

            check(moments, f'none of the {len(shard)} images of {path.name} can be read, the first is {unreadable[:1]}: check the folder {args.images}')

            note = path.with_suffix('.unreadable.txt')      # before the shard, which is what says that both are there
            note.unlink(missing_ok = True)
            if unreadable:
                write_whole(note, lambda file: file.write('\n'.join(unreadable).encode()))

            write_whole(path, lambda file: np.save(file, np.concatenate(moments)))

    if all(path.exists() for path in shards):
        finish(folder, plan, images.files, shards, vae.config.scaling_factor)

if __name__ == '__main__':
    main()
