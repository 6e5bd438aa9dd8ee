"""The shortest training: real digits, in half a minute on a laptop. python examples/minimal.py [steps]"""

import sys

import torch
from sklearn.datasets import load_digits

from drifting_pytorch import DriftingGenerator, FeatureDriftLoss, Trainer
from drifting_pytorch.drifting import image_grid

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400

images, labels = load_digits(return_X_y = True)                                     # 1,797 real digits
images = torch.tensor(images, dtype = torch.float32).view(-1, 1, 8, 8) / 8 - 1      # in [-1, 1]
dataset = torch.utils.data.TensorDataset(images, torch.tensor(labels))

model = DriftingGenerator(
    image_size = 8, channels = 1, patch_size = 4, num_classes = 10,
    dim = 64, depth = 2, heads = 4, num_register_tokens = 2, num_style_tokens = 4, outer_slope = 0.1
)

loss_fn = FeatureDriftLoss(affinity_floor = 0.)                                     # raw pixels, few of them

trainer = Trainer(
    model, loss_fn, dataset,
    num_train_steps = steps, lr_warmup_steps = 20, learning_rate = 6e-3, ema_decay = 0.98,
    num_groups = 4, num_gen = 32, alpha_range = (1., 1.5),
    results_folder = 'results/minimal', overwrite = True
)

trainer.train()

samples = trainer.sample(torch.arange(10), num_samples_each = 16, seed = 0)         # sixteen of each

if trainer.accelerator.is_main_process:
    image_grid((samples + 1) / 2).save('results/minimal/samples.png')

trainer.end_training()
