"""A folder of crops of scikit-learn's two photographs, a flower and a temple, to try train_images.py on.

python examples/measure/photographs.py results/photographs
python examples/train_images.py results/photographs --held-out results/photographs-apart --minutes 4

The left third of each photograph is kept apart, for FOLDER-apart.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))      # examples/

from common import make_parser, positive

def parts():
    """(name, left third [h w ch], right two thirds) of every photograph."""
    data = load_sample_images()

    for name, pixels in zip(data.filenames, data.images, strict = True):
        yield Path(name).stem, *np.split(pixels, [pixels.shape[1] // 3], axis = 1)

def crops(part, num, size, rng):
    """(image of size pixels a side, where its centre is: y and x from 0 to 1), num of them."""
    for _ in range(num):
        side = rng.integers(64, 129)
        y, x = (rng.integers(size - side + 1) for size in part.shape[:2])
        picture = Image.fromarray(part[y:y + side, x:x + side]).resize((size, size))
        yield picture, ((y + side / 2) / part.shape[0], (x + side / 2) / part.shape[1])

def main():
    parser = make_parser(__doc__)
    parser.add_argument('folder', type = Path, help = 'where the crops are written, a folder per photograph')
    parser.add_argument('--crops', type = positive, default = 2_000, help = 'of each photograph, a fourth apart')
    parser.add_argument('--size', type = positive, default = 32, help = 'pixels of a side, made from 64 to 128')
    args = parser.parse_args()
    rng = np.random.default_rng(0)

    for name, left, right in parts():
        for part, suffix, num in (right, '', args.crops), (left, '-apart', args.crops // 4):
            folder = args.folder.with_name(args.folder.name + suffix) / name
            folder.mkdir(parents = True, exist_ok = True)

            for i, (picture, _) in enumerate(tqdm(crops(part, num, args.size, rng), desc = str(folder), total = num)):
                picture.save(folder / f'{i:05d}.png')

if __name__ == '__main__':
    main()
