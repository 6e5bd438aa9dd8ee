"""Drifting models: one-step generators trained by a drifting field.

Generative Modeling via Drifting, Deng, Li, Li, Du, He, https://arxiv.org/abs/2602.04770

The file reads top to bottom like the paper: the field (Eq. 8-12, Algorithm 2), the loss (Eq. 6, 13, 14, A.5-A.7), the generator
(A.2), the sample queue (A.8), the trainer (A.9) and the reader of the authors' published weights. Where the paper and the
authors' release differ, the release is the default and the line says so (`# release`); a decision that both leave open is
tagged `# open`.
"""

import hashlib
import inspect
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from functools import lru_cache, wraps
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import nn, cat, stack, Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Module, ModuleDict, ModuleList, Parameter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.data import DataLoader, Dataset

import einx
import jaxtyping
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object, reduce as reduce_over_processes
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from beartype import beartype
from einops import rearrange, reduce, repeat
from ema_pytorch import EMA
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from PIL import Image
from rotary_embedding_torch import RotaryEmbedding
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from x_transformers.x_transformers import Attention, FeedForward

# ───────────────────────────────────────────────────────────────────────────────
# 1. helpers
# ───────────────────────────────────────────────────────────────────────────────

# dimension letters, everywhere in this file
#
# b - batch                          n m - points
# c - class groups in a step (N_c)   f - feature locations (pixels, tokens) of one feature map
# g - generated per group (N_neg)    d - feature dimension
# p - positives per group (N_pos)    s - style tokens
# u - unconditional per group        ch h w - channels, height and width of an image
# y - every sample that acts on the generated ones: [positives | unconditional | generated]

def exists(val):
    return val is not None

def default(val, d):
    return val if exists(val) else d

# shapes in signatures are checked by jaxtyping + beartype (@typecheck) when DRIFTING_TYPECHECK=1 is set before the import.
# the public functions are checked by hand instead, always, with errors of one line that say what to do

class Shaped:
    def __init__(self, dtype):
        self.dtype = dtype

    def __getitem__(self, shape):
        return self.dtype[Tensor, shape]

Float, Int = Shaped(jaxtyping.Float), Shaped(jaxtyping.Int)

def typecheck(fn):
    if os.environ.get('DRIFTING_TYPECHECK', '0') in ('', '0'):
        return fn

    checked = jaxtyping.jaxtyped(fn, typechecker = beartype)
    return wraps(fn)(lambda *args, **kwargs: (fn if torch.compiler.is_compiling() else checked)(*args, **kwargs))

def check(condition, message):
    if not condition:
        raise ValueError(message)

def can_read(t):
    """Whether looking at the values of t is free: on an accelerator it would stall the step, in a compiled graph it would break it."""
    return t.device.type == 'cpu' and not torch.compiler.is_compiling() and t.numel() > 0

def check_range(name, t, low, high = math.inf):
    if can_read(t):
        smallest, largest = t.aminmax()     # nan if any is
        check(low <= smallest and largest <= high and smallest.isfinite() and largest.isfinite(), f'{name} must be finite and in {low} .. {high}, got {smallest} .. {largest}')

def checked_labels(labels, num_classes, batch):
    """Labels of any integer type as the int64 that indexing wants."""
    check(labels.shape == (batch,), f'labels has shape {tuple(labels.shape)}, expected ({batch},)')
    check(not labels.is_floating_point() and labels.dtype != torch.bool, f'labels must be integers, got {labels.dtype}')
    check_range('labels', labels, 0, num_classes - 1)
    return labels.long()

def check_points(ndim = None, **points):
    """Point sets [... n d] by name (None is left out): floating, not empty, finite, of the same groups and feature dimension."""
    points = {name: t for name, t in points.items() if exists(t)}
    first, ref = next(iter(points.items()))

    for name, t in points.items():
        check(torch.is_tensor(t), f'{name} must be a tensor, got {type(t).__name__}')
        given = f'{name} has shape {tuple(t.shape)}'
        mismatch = f'{given} but {first} has shape {tuple(ref.shape)}'

        check(t.is_floating_point(), f'{name} must be a floating point tensor, got {t.dtype}: convert it with .float()')
        check(t.ndim == ndim if exists(ndim) else t.ndim >= 2, f'{given}, expected {default(ndim, "at least 2")} dimensions, the last two (samples, feature dim)')
        check(t.numel() > 0, f'{given}: empty set, expected at least one sample and one feature')
        check(t.shape[:-2] == ref.shape[:-2], f'{mismatch}: the leading (group) dimensions must be equal, nothing is broadcast')
        check(t.shape[-1] == ref.shape[-1], f'{mismatch}: the feature dimension (last) must be equal')
        check(not can_read(t) or t.sum().isfinite() or t.isfinite().all(), f'{name} has non-finite values (nan or inf)')

def full_precision(t):
    """Half precision features are computed as they come, the field in float32 (float64 stays)."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()

def sum_over_processes(t):
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return reduce_over_processes(t, 'sum') if distributed else t

KEEPS_GRAPH = getattr(torch._C._autograd, '_get_current_graph_task_keep_graph', lambda: True)      # during a backward pass: was it told to retain the graph

class KnownGradient(torch.autograd.Function):
    """A loss, () or one per row of x, whose gradient is known already: no graph is kept for it. grad is that of the mean over the rows."""

    @staticmethod
    def forward(ctx, x, loss, grad):
        ctx.save_for_backward(grad)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad, = ctx.saved_tensors

        # where it is the mean that is differentiated, and only once, the gradient is handed over as it is

        if can_read(grad_loss) and not KEEPS_GRAPH() and (grad_loss == 1 / grad_loss.numel()).all():
            return grad, None, None

        return grad * (grad_loss * grad_loss.numel()).reshape(-1, *([1] * (grad.ndim - 1))), None, None

def seed_for(*key):
    """A 63-bit seed from any key, for example (seed, step, 'noise'): every draw of a run is a function of its place in the run."""
    return random.Random(repr(key)).getrandbits(63)

def seeded(*key, device = 'cpu'):
    return torch.Generator(device).manual_seed(seed_for(*key))

# weights: ours are safetensors, with the arguments of the model in config.json

def read_tensors(path):
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f'{path} is not a safetensors file: {error}') from error

def renamed(name, rules):
    """A parameter's name after all rules (pattern, ours), one after the other."""
    for pattern, ours in rules:
        name = re.sub(pattern, ours, name)
    return name

def load_checked(module, state_dict, assign = False):
    """load_state_dict, strict, with an error that fits on one line."""
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    wrong = [f'{name} {tuple(t.shape)} instead of {tuple(own[name].shape)}' for name, t in state_dict.items() if name in own and t.shape != own[name].shape]

    check(not (missing or unknown or wrong), f'the weights do not fit the model: missing {missing}, unknown {unknown}, wrong shape {wrong}')
    module.load_state_dict(state_dict, assign = True) if assign else set_model_state_dict(module, state_dict, options = TO_LOAD)

# states are those of the whole model, also where it is sharded. Not strict: load_checked looks at the names itself, and parameters without gradients have no state in an optimizer

FULL_STATE, TO_LOAD = StateDictOptions(full_state_dict = True, cpu_offload = True), StateDictOptions(full_state_dict = True, strict = False)

class Pretrained(Module, PyTorchModelHubMixin):
    """`save_pretrained(folder)` and `push_to_hub(name)` write config.json and model.safetensors, `from_pretrained` reads them, and what the authors published."""

    published, published_as = (), None      # names in the authors' repository, and their kind there

    @classmethod
    def from_pretrained(cls, name, *, revision = None):
        """A model in eval mode, in float32.

        name: one of cls.published, a repository on the hub ('user/name', downloaded once; revision: a commit, tag or branch of it), or a local folder,
            of save_pretrained or of a published model (metadata.json and ema_params.msgpack, which needs the extra [pretrained]).
        Raises ValueError for an unknown name, a damaged file, and weights that do not fit, with the list of what is missing, unknown or of another shape.
        """
        folder, published = Path(name), name in cls.published
        check(published or folder.is_dir() or re.fullmatch(r'[\w.-]+/[\w.-]+', str(name)), f'{name!r} is neither a folder nor a published model, which are {", ".join(cls.published)}')

        def fetch(file):
            if folder.is_dir():
                return folder / file
            repository, file = (RELEASE, f'models/{cls.published_as}/jax/{name}/{file}') if published else (str(name), file)
            return Path(hf_hub_download(repository, file, revision = revision))

        if published or (folder / 'metadata.json').is_file():
            config, state_dict = FROM_RELEASE[cls.published_as](*read_release_artifact(*map(fetch, ('metadata.json', 'ema_params.msgpack'))))      # section 8
        else:
            check(not folder.is_dir() or (folder / 'config.json').is_file(), f'{folder} has neither config.json nor metadata.json: expected a folder of save_pretrained or a published model')
            config, state_dict = json.loads(fetch('config.json').read_text()), {name: t.float() for name, t in read_tensors(fetch('model.safetensors')).items()}

        check(config.keys() <= inspect.signature(cls).parameters.keys(), f'{name} is not a {cls.__name__}: its config.json has {", ".join(config)}')

        with torch.device('meta'):      # the weights are taken as they are read, never two copies of them
            model = cls(**config)

        load_checked(model, state_dict, assign = True)
        model.set_buffers()
        return model.eval()

    def set_buffers(self):
        """Those that are not saved."""

RELEASE = 'Goodeat/drifting'
CODERS = {np.integer: (int, int)}      # what config.json does not know as it is

# ───────────────────────────────────────────────────────────────────────────────
# 2. drift field - Eq. 8-12, Algorithm 2, B.2, Table 1
# ───────────────────────────────────────────────────────────────────────────────

@typecheck
def squared_distances(x: Float['b n d'], y: Float['b y d']) -> Float['b n y']:
    """|x|^2 + |y|^2 - 2 x.y, one matrix product. Centre the points first: it loses the digits of a common offset."""
    x_sq, y_sq = (t.norm(dim = -1, keepdim = True).square_() for t in (x, y))
    return torch.baddbmm(y_sq.mT, x, y.mT, alpha = -2).add_(x_sq)

NORMALIZATIONS = ('both', 'y', 'none', 'gradient', 'sharp', 'sinkhorn')

def sinkhorn(log_kernel, iters):
    """The entropic transport plan [... n m] of uniform marginals, 1/n for rows and 1/m for columns, by iterations in the log domain."""
    n, m = log_kernel.shape[-2:]
    u = v = 0.

    for _ in range(iters if m > 0 else 0):
        u = -math.log(n) - (log_kernel + v).logsumexp(dim = -1, keepdim = True)
        v = -math.log(m) - (log_kernel + u).logsumexp(dim = -2, keepdim = True)

    return (log_kernel + u + v).exp()

class DriftField(Module):
    """The drifting field V_{p,q}(x): where each point should move, towards the positives and away from the negatives (Algorithm 2).

    It is anti-symmetric, V_{p,q} = -V_{q,p} (so V = 0 when p = q), and invariant to translation.

    kernel: 'laplace', exp(-|x - y| / temperature) (paper), or 'gaussian', exp(-|x - y|^2 / (2 temperature^2)).
    normalize: what turns the kernel into affinities (Table 11). 'both', the geometric mean of the softmax over y and the softmax over x
        (paper); 'y', the softmax over y only; 'none', the kernel itself, which underflows where distances far exceed the temperature.
        Or a field of later work, in which positives and negatives are normalised apart: 'gradient', the direction of the kernel's gradient (2605.10727);
        'sharp', the gradient of a scalar, see `potential` (2604.06333); 'sinkhorn', entropic optimal transport (2605.11755), whose
        temperature is the regularisation of the cost |x - y|^2 / 2, and which wants an independent batch of generated samples as negatives.
    attraction, repulsion: the factors a, b of a V+ - b V- (Table 1). Anything but a = b breaks the anti-symmetry, and the training.
    """

    def __init__(self, *, kernel = 'laplace', normalize = 'both', attraction = 1., repulsion = 1., sinkhorn_iters = 10):
        super().__init__()
        check(kernel in ('laplace', 'gaussian'), f"kernel must be 'laplace' or 'gaussian', got {kernel!r}")
        check(normalize in NORMALIZATIONS, f'normalize must be one of {", ".join(NORMALIZATIONS)}, got {normalize!r}')
        check(normalize not in ('sharp', 'sinkhorn') or kernel == 'laplace', f'normalize = {normalize!r} has a kernel of its own, leave out kernel = {kernel!r}')

        self.kernel, self.normalize, self.sinkhorn_iters = kernel, normalize, sinkhorn_iters
        self.attraction, self.repulsion = attraction, repulsion

    def extra_repr(self):
        return f'kernel = {self.kernel!r}, normalize = {self.normalize!r}, attraction = {self.attraction}, repulsion = {self.repulsion}'

    def logits(self, dist, temperature):
        return dist / -temperature if self.kernel == 'laplace' else -0.5 * (dist / temperature) ** 2

    @typecheck
    def coefficients(
        self,
        dist: Float['... n y'],                 # distances to [positives | unconditional | negatives]
        num_pos: int,
        num_neg: int,
        temperature: float | Tensor,            # a tensor is broadcast against dist
        weight: Float['... y'] | None = None,   # of each y, the guidance
        affinity_floor: float = 0.,
        weight_in_softmax: bool = False
    ) -> Float['... n y']:
        """The field as coefficients W, V(x) = sum_y W(x, y) (y - x): positive on positives, negative on the others, zero sum if a = b."""

        weight = default(weight, dist.new_ones(()).expand(*dist.shape[:-2], dist.shape[-1]))

        if self.normalize not in ('sinkhorn', 'gradient', 'sharp'):
            return self.mean_shift(dist, num_pos, temperature, weight, affinity_floor, weight_in_softmax)

        W_pos, W_neg = (
            self.transport(dist, num_pos, num_neg, temperature, weight) if self.normalize == 'sinkhorn' else
            self.density_gradient(dist, num_pos, temperature, weight)
        )

        return cat((self.attraction * W_pos, -self.repulsion * W_neg), dim = -1)

    def mean_shift(self, dist, num_pos, temperature, weight, affinity_floor = 0., weight_in_softmax = False):
        """Algorithm 2."""
        logits, weight = self.logits(dist, temperature), rearrange(weight, '... y -> ... 1 y')

        if weight_in_softmax:
            logits, weight = logits + weight.log().clamp(min = -1e6), (weight > 0).to(weight)

        A = self.affinity(logits).clamp_(min = affinity_floor ** 0.5).mul_(weight)     # release: guidance weights the normalised affinity
        A_pos, A_neg = A[..., :num_pos], A[..., num_pos:]
        sum_pos, sum_neg = (t.sum(dim = -1, keepdim = True) for t in (A_pos, A_neg))

        A_pos *= self.attraction * sum_neg      # cross weights: every positive acts together with every negative, this is the anti-symmetry
        A_neg *= -self.repulsion * sum_pos
        return A

    def affinity(self, logits):
        """The kernel, normalised: sqrt(softmax over y * softmax over x), the softmax over y, or the kernel itself. May work in place."""
        if self.normalize == 'both' and can_read(logits):

            # both softmaxes from one exponential, in place, unless one of their sums would nearly vanish

            row, column = (logits.amax(dim = dim, keepdim = True) for dim in (-1, -2))
            top = row.amax(dim = -2, keepdim = True)

            if min((row - top).min(), (column - top).min()) > -50:
                kernel = logits.sub_(top).exp_()
                over_y, over_x = (kernel.sum(dim = dim, keepdim = True) for dim in (-1, -2))
                return kernel.mul_(over_y.rsqrt_()).mul_(over_x.rsqrt_())

        if self.normalize == 'none':
            return logits.exp()

        over_y = logits.softmax(dim = -1)
        return (over_y * logits.softmax(dim = -2)).sqrt() if self.normalize == 'both' else over_y

    def log_masses(self, dist, num_pos, temperature, weight):
        """log of the kernel k [... n y], and of sum_y k c over positives and over negatives [... n 1]; c is 1, or t (|x - y| + t) if 'sharp'."""
        log_k = self.logits(dist, temperature) + rearrange(weight.log().clamp(min = -1e6), '... y -> ... 1 y')
        log_kc = log_k + (temperature * (dist + temperature)).log() if self.normalize == 'sharp' else log_k
        return log_k, [t.logsumexp(dim = -1, keepdim = True) for t in log_kc.tensor_split((num_pos,), dim = -1)]

    def density_gradient(self, dist, num_pos, temperature, weight):
        """V+ = grad log sum_y k c: for 'gradient' the kernel's own direction, for 'sharp' grad (k c) = k (y - x)."""
        log_k, log_masses = self.log_masses(dist, num_pos, temperature, weight)

        if self.normalize == 'gradient':
            log_k = log_k - ((dist.clamp(min = 1e-12) if self.kernel == 'laplace' else dist * 0 + temperature) * temperature).log()

        return ((t - log_mass).exp() for t, log_mass in zip(log_k.tensor_split((num_pos,), dim = -1), log_masses))

    def potential(self, dist, num_pos, temperature, weight):
        """The scalar [... n] of the 'sharp' field, V = -grad: the log of the mean of k c over negatives minus that over positives. It falls as q nears p."""
        _, (log_pos, log_neg) = self.log_masses(dist, num_pos, temperature, weight)
        total_pos, total_neg = (t.sum(dim = -1) for t in weight.tensor_split((num_pos,), dim = -1))
        return (log_neg - log_pos).squeeze(-1) - rearrange(total_neg.log() - total_pos.log(), '... -> ... 1')

    def transport(self, dist, num_pos, num_neg, temperature, weight):
        """V = T_pos - T_neg + (alpha - 1) (T_pos - T_uncond), T the barycenters of entropic plans, alpha - 1 from the weights (alpha - 1) (g - 1) / u."""
        split = num_pos, dist.shape[-1] - num_neg
        plans = [sinkhorn(-0.5 * block ** 2 / temperature, self.sinkhorn_iters) for block in dist.tensor_split(split, dim = -1)]
        T_pos, T_uncond, T_neg = (plan / reduce(plan, '... n m -> ... n 1', 'sum').clamp(min = 1e-30) for plan in plans)

        guidance = reduce(weight.tensor_split(split, dim = -1)[1], '... u -> ... 1 1', 'sum') / max(1, dist.shape[-2] - 1)
        return (1 + guidance) * T_pos, cat((guidance * T_uncond, T_neg), dim = -1)

    @property
    def zero_sum(self):
        """Whether the coefficients of every point sum to zero: a subclass whose do not must say so."""
        return self.attraction == self.repulsion and self.normalize not in ('gradient', 'sharp')

    def apply_coefficients(self, W, x, y):
        # open: with a != b the factors act on the mean-shift vectors V+ and V- (Eq. 10), so translation invariance stays
        V = rearrange(rearrange(W, '... t n y -> ... (t n) y') @ y, '... (t n) d -> ... t n d', n = W.shape[-2])
        return V if self.zero_sum else V.addcmul_(reduce(W, '... t n y -> ... t n 1', 'sum'), rearrange(x, '... n d -> ... 1 n d'), value = -1)

    @torch.no_grad()
    def forward(
        self,
        x: Float['... n d'],
        y_pos: Float['... p d'],
        y_neg: Float['... m d'] | None = None,
        *,
        temperature
    ) -> Float['... n d']:
        """Algorithm 2 at one temperature.

        y_neg None: the negatives are x itself, with self pairs masked.
        temperature: in the units of the distances, above 0.
        Returns V. No gradient flows through it: train on mse(x, (x + V).detach()) (Eq. 6).
        Raises ValueError for wrong ranks, unequal leading or feature dimensions, empty sets, non-finite values, temperature <= 0.
        """
        check_points(x = x, y_pos = y_pos, y_neg = y_neg)
        check(0 < temperature < math.inf, f'temperature must be above 0 and finite, got {temperature}')

        x, num_pos = full_precision(x), y_pos.shape[-2]
        y = cat((y_pos, default(y_neg, x)), dim = -2).to(x.dtype)

        with torch.autocast(x.device.type, enabled = False):
            center = reduce(y, '... y d -> ... 1 d', 'mean')
            x, y = x - center, y - center
            dist = torch.cdist(x, y, compute_mode = 'donot_use_mm_for_euclid_dist')      # exact, whatever the temperature

            if not exists(y_neg) and self.normalize != 'sinkhorn':
                dist[..., num_pos:].diagonal(dim1 = -2, dim2 = -1).add_(1e6 * temperature)   # mask self

            W = self.coefficients(dist, num_pos, y.shape[-2] - num_pos, float(temperature))
            return self.apply_coefficients(rearrange(W, '... n y -> ... 1 n y'), x, y).squeeze(-3)

# ───────────────────────────────────────────────────────────────────────────────
# 3. drift loss - Eq. 6, 13, 14, A.5-A.7
# ───────────────────────────────────────────────────────────────────────────────

class DriftStats(NamedTuple):
    scale: Tensor           # S, the mean distance: what a temperature of 1 means on this feature
    drift_rms: dict         # {temperature: lambda}, root mean square of V before it is normalised: this falls as training goes, the loss does not
    neighbors: dict         # {temperature: to how many positives a generated sample listens}, between 1 and p
    uncond_share: dict      # {temperature: the share of unconditional samples in the push}, between 0 and 1
    potential: dict         # {temperature: the scalar that the 'sharp' field descends}, a loss that falls; empty for the other fields

class Breakdown(NamedTuple):
    losses: dict            # {feature name: loss}
    stats: dict             # {feature name: DriftStats}

@typecheck
def effective_neighbors(affinity: Float['... n m']) -> Float['... n']:
    """How many of m samples each of n points really listens to: the exponential of the entropy of its affinities, between 1 and m."""
    prob = affinity / reduce(affinity, '... n m -> ... n 1', 'sum').clamp(min = 1e-12)
    return torch.special.entr(prob).sum(dim = -1).exp()

CHUNK_NUMBERS = dict(cpu = 2 ** 19, cuda = 2 ** 27)     # coordinates or coefficients that are worked on at a time: a cpu's cache, half a GiB of a GPU

def shared_sums(stages):
    """Makes a function of a generator that yields sums over its problems, and is sent what they are over those of all processes.

    answer: what is sent for sums. `.stages` is the generator, for whoever sees the problems piece by piece and adds up the sums of the pieces.
    """
    @wraps(stages)
    def run(*args, answer = sum_over_processes, **kwargs):
        generator = stages(*args, **kwargs)

        try:
            sums = next(generator)
            while True:
                sums = generator.send(answer(sums))
        except StopIteration as stop:
            return stop.value

    run.stages = stages
    return run

@shared_sums
def drift_loss(
    gen: Float['b g d'],
    pos: Float['b p d'],
    uncond: Float['b u d'] | None = None,
    *,
    uncond_weight: Float['b u'] | None = None,
    neg: Float['b m d'] | None = None,  # an independent batch of generated samples as negatives, in place of gen itself without self pairs
    temperatures = (0.02, 0.05, 0.2),   # A.6, relative to the mean distance S
    field: DriftField | None = None,
    weight_in_softmax = False,          # guidance weights the affinity (release), or the kernel before it is normalised
    affinity_floor = 1e-6,              # release: of softmax * softmax, before the root. 0 for low-dimensional data, which it freezes
    self_distance = 100.,               # release: added to the distance of a generated sample to itself, in units of S
    min_scale = 1e-3,                   # release: of S and of S / sqrt(d)
    min_dist_sq = 1e-8,                 # release
    min_drift_sq = 1e-8,                # release: of the mean of V^2
    chunk_size = None,                  # problems at a time: bounds the memory, computes distances and fields again instead of keeping them
    diagnostics = True                  # the last three fields of DriftStats, otherwise empty
) -> tuple[Float['b'], DriftStats]:
    """The drifting loss on one feature (A.6): mean over samples and dimensions of |x - stopgrad(x + V)|^2, features in units of S / sqrt(d).

    gen generated, pos real, uncond real samples of any class with weights uncond_weight >= 0 (None: ones).
    b counts independent problems (class group x location); the statistics, frozen, are shared by all of them and by all processes.
    field: the DriftField, by default Algorithm 2 as in the paper.

    Returns the loss of each problem and DriftStats. In value the loss is the mean of V^2, its gradient with respect to gen / (S / sqrt(d)) is -2 V / n.
    Each temperature's field is divided by its own root mean square, so the loss stays near a constant: watch stats.drift_rms.
    Raises ValueError for wrong ranks, unequal groups or dimensions, empty sets, non-finite values, negative weights, temperatures <= 0.
    """
    check_points(3, gen = gen, pos = pos, uncond = uncond, neg = neg)
    temperatures = tuple(float(temperature) for temperature in temperatures)
    check(temperatures and all(0 < temperature < math.inf for temperature in temperatures), f'temperatures must be one or more finite numbers above 0, got {temperatures}')
    check(not exists(uncond_weight) or exists(uncond), 'uncond_weight was given without uncond: pass the unconditional samples that it weights')
    check(default(chunk_size, 1) > 0, f'chunk_size must be above 0, got {chunk_size}')

    gen, field = full_precision(gen), default(field, DriftField())
    x_all = gen.detach()
    others = [t for t in (pos, uncond, default(neg, x_all)) if exists(t)]
    (b, g, d), p, m = gen.shape, pos.shape[1], others[-1].shape[1]

    transport, with_potential = field.normalize == 'sinkhorn', diagnostics and field.normalize == 'sharp'
    check(not transport or exists(neg), "normalize = 'sinkhorn' needs neg, an independent batch of generated samples")

    weight = gen.new_ones(b, 1, sum(t.shape[1] for t in others))                                       # b 1 y

    if exists(uncond_weight):
        check(uncond_weight.shape == uncond.shape[:2], f'uncond_weight has shape {tuple(uncond_weight.shape)}, expected {tuple(uncond.shape[:2])}')
        check_range('uncond_weight', uncond_weight, 0)
        weight[:, 0, p:-m] = uncond_weight

    # the problems are taken in chunks. What is needed twice is kept, or computed again where memory is to be bounded

    num_y = weight.shape[-1]
    size = default(chunk_size, max(1, CHUNK_NUMBERS.get(gen.device.type, 2 ** 27) // (num_y * max(d, g * len(temperatures)))))
    chunks = [slice(i, i + size) for i in range(0, b, size)]
    keep = lru_cache(maxsize = 1 if exists(chunk_size) else None)
    buffer = gen.new_empty(min(b, size), num_y, d)

    def each_chunk(fn):
        with torch.no_grad(), torch.autocast(gen.device.type, enabled = False):
            return [fn(i) for i in range(len(chunks))]

    @lru_cache(maxsize = 1)
    def points(i):
        # centred on the generated samples: |x|^2 + |y|^2 - 2 x.y keeps the digits of their distances, also where they nearly coincide

        center = x_all[chunks[i]].mean(dim = 1, keepdim = True)
        y = buffer[:len(center)]                                                                       # b y d

        for t, part in zip(others, y.split([t.shape[1] for t in others], dim = 1)):
            torch.sub(t[chunks[i]], center, out = part)

        return y[:, -g:] if not exists(neg) else x_all[chunks[i]] - center, y

    @keep
    def squares(i):
        return squared_distances(*points(i))                                                           # b g y

    @keep
    def squares_of_others(i):
        y = points(i)[1][:, :-m]
        return squared_distances(y, y)                                                                 # b (p u) (p u)

    def distances(i):
        return squares(i).clamp(min = min_dist_sq).sqrt_()

    # in high dimensions coefficients W are smaller than vectors V = sum_y W y, and where they sum to zero the length of V comes cheaper without V,
    # |V|^2 = -1/2 sum_{y, y'} W(y) W(y') |y - y'|^2

    in_coefficients = num_y < 0.7 * d
    by_distances = in_coefficients and field.zero_sum and not exists(neg)

    # one scale for the feature: the weighted mean distance (for transport its root mean square), everything below is relative to it

    power = 2 if transport else 1

    def sum_distances(i):
        if by_distances and not exists(chunk_size):
            squares_of_others(i)        # kept, while the points are at hand

        return (reduce(distances(i) ** power, 'b g y -> b 1 y', 'sum') * weight[chunks[i]]).sum()

    sum_dist, sum_weight = yield stack((sum(each_chunk(sum_distances)), weight.sum() * g))

    scale = (sum_dist / sum_weight) ** (1 / power)
    feature_scale = (scale / d ** 0.5).clamp(min = min_scale)

    # the field of each temperature as coefficients, how large it is (V^2), and where it comes from

    temperature = torch.tensor(temperatures, dtype = gen.dtype).to(gen.device, non_blocking = True)[:, None, None]

    @lru_cache(maxsize = 1)
    def coefficients(i):
        dist, w = distances(i).div_(scale.clamp(min = min_scale)), weight[chunks[i]]

        if not exists(neg):
            dist[:, :, -g:].diagonal(dim1 = -2, dim2 = -1).add_(self_distance)                         # mask self

        dist = rearrange(dist, 'b g y -> b 1 g y')
        W = field.coefficients(dist, p, m, temperature, w.expand(-1, len(temperatures), -1), affinity_floor, weight_in_softmax)
        return dist if with_potential else None, W                                                     # b 1 g y, b t g y

    @(lru_cache(maxsize = 1) if in_coefficients else keep)
    def vectors(i):
        return field.apply_coefficients(coefficients(i)[1], *points(i))                                # b t g d

    def sum_fields(i):
        dist, W = coefficients(i)

        if by_distances:
            W_all = rearrange(W, 'b t g y -> b (t g) y')
            W_others, W_gen = W_all.tensor_split((num_y - m,), dim = -1)
            products = W_gen @ squares(i)
            products[..., :-m].baddbmm_(W_others, squares_of_others(i), beta = 2)
            V_sq = -0.5 * torch.linalg.vecdot(*(rearrange(t, 'b (t g) y -> b t (g y)', g = g) for t in (products, W_all))).sum(dim = 0)
        else:
            V_sq = vectors(i).norm(dim = (2, 3)).square().sum(dim = 0)

        sums = [V_sq / (d * feature_scale ** 2)]

        if diagnostics:
            pull, push = W[..., :p], W[..., p:]
            sums += [effective_neighbors(pull).sum(dim = (0, 2)), (push[..., :-m].sum(dim = -1) / push.sum(dim = -1).clamp(max = -1e-30)).sum(dim = (0, 2))]

        if with_potential:
            sums += [field.potential(dist, p, temperature, weight[chunks[i]]).sum(dim = (0, 2))]

        return stack((*sums, torch.full_like(V_sq, len(W) * g)))

    *sums, count = yield sum(each_chunk(sum_fields))                                                   # each t
    mean_sq, *diagnosed = (total / count for total in sums)

    # each normalised to unit root mean square, they add up. Eq. 6, the mean of |x - stopgrad(x + V)|^2, has the value V^2 and the gradient -2 V

    mean_sq = mean_sq.clamp(min = 0)
    norms = mean_sq.clamp(min = min_drift_sq).sqrt() * feature_scale

    grad = torch.empty_like(x_all)

    def losses(i):
        fields = coefficients(i)[1] if in_coefficients else vectors(i)
        total = norms.reciprocal() @ rearrange(fields, 'b t g n -> b t (g n)')                         # of coefficients, or of vectors
        total = rearrange(total, 'b (g n) -> b 1 g n', g = g)
        V = (field.apply_coefficients(total, *points(i)) if in_coefficients else total).squeeze(1)
        torch.mul(V, -2 / (b * g * d * feature_scale), out = grad[chunks[i]])
        return V.square_().mean(dim = (1, 2))

    loss = cat(each_chunk(losses))

    per_temperature = [dict(zip(temperatures, values)) for values in (mean_sq.sqrt(), *diagnosed)]
    return KnownGradient.apply(gen, loss, grad), DriftStats(scale, *per_temperature, *({} for _ in range(4 - len(per_temperature))))

class FeatureDriftLoss(Module):
    """The drifting loss summed over features (Eq. 13, 14, A.5), with classifier-free guidance by unconditional negatives (A.7).

    encoder: None (raw samples), a Module with .features(x), a callable, or a list of them; each gives {name: [b f d]} for x [b ...].
    decoder: a callable in front of the encoders, for example from latents to pixels. Modules are frozen here, gradients pass through them.
    raw: add the flattened sample itself, before any decoder, as feature 'global' (release: always).
    group_chunk_size: encode so many class groups at a time, with the same result: the memory is that of one chunk, the encoder runs three times.
    chunk_statistics: with chunks, 'shared' (exact), or 'own', S and the drift's norm of every chunk by itself: cheap, another loss.
    Everything else goes to `drift_loss`: temperatures, field, affinity_floor and the other clamps, chunk_size.
    """

    def __init__(self, encoder = None, *, decoder = None, raw = True, group_chunk_size = None, chunk_statistics = 'shared', **drift_loss_kwargs):
        super().__init__()
        encoders = list(encoder) if isinstance(encoder, (list, tuple)) else [encoder] if exists(encoder) else []

        unknown = drift_loss_kwargs.keys() - inspect.signature(drift_loss).parameters.keys()
        check(not unknown, f'unknown arguments {sorted(unknown)}')
        check(raw or encoders, 'raw = False needs an encoder: there would be no feature at all')
        check(default(group_chunk_size, 1) > 0, f'group_chunk_size must be above 0, got {group_chunk_size}')
        check(chunk_statistics in ('shared', 'own'), f"chunk_statistics must be 'shared' or 'own', got {chunk_statistics!r}")
        for encoder in encoders:
            check(callable(encoder) or hasattr(encoder, 'features'), f'encoder must be None, a Module with .features(x), a callable, or a list of these, got {type(encoder).__name__}')

        self.encoders, self.decoder, self.raw = encoders, decoder, raw
        self.group_chunk_size, self.chunk_statistics = group_chunk_size, chunk_statistics
        owners = [getattr(m, '__self__', m) for m in (*encoders, decoder)]      # of methods
        self.frozen = ModuleList([m.eval().requires_grad_(False) for m in owners if isinstance(m, Module)])
        self.drift_loss_kwargs = drift_loss_kwargs
        self.needs_neg = getattr(drift_loss_kwargs.get('field'), 'normalize', None) == 'sinkhorn'

    def compile(self):
        """torch.compile of the encoders, and of the field where there is an accelerator: on a cpu its arithmetic in place is faster."""
        self.features = torch.compile(self.features)

        if torch.accelerator.is_available():
            field = self.drift_loss_kwargs.setdefault('field', DriftField())
            field.coefficients = torch.compile(field.coefficients)

    def train(self, mode = True):
        return super().train(False)    # frozen encoders stay in eval mode

    def features(self, x):
        """{name: [b f d]} of samples x [b ...]."""
        features = {'global': rearrange(x, 'b ... -> b 1 (...)')} if self.raw else {}
        x = self.decoder(x) if exists(self.decoder) else x

        for encoder in self.encoders:
            encoded = getattr(encoder, 'features', encoder)(x)
            check(isinstance(encoded, dict) and encoded, f'an encoder must return a dict {{name: [b f d]}}, got {encoded if encoded == {} else type(encoded).__name__}')

            twice = sorted(features.keys() & encoded.keys())
            check(not twice, f'two encoders return features of the same name: {twice}')
            features |= encoded

        for name, feature in features.items():
            check(feature.ndim == 3 and len(feature) == len(x), f'feature {name!r} has shape {tuple(feature.shape)}, expected ({len(x)}, locations, feature dim)')

        return features

    def forward(
        self,
        gen: Float['c g ...'],
        pos: Float['c p ...'],
        uncond: Float['c u ...'] | None = None,
        alpha: Float['c'] | None = None,        # guidance scale of each group, >= 1
        neg: Float['c m ...'] | None = None,    # other generated samples as negatives, see drift_loss
        diagnostics = True                      # see drift_loss
    ) -> tuple[Float[''], Breakdown]:
        """The loss of a step: c class groups, generated against real samples, and unconditional ones to be guided away from.

        Gradients flow to gen, through the encoder. Returns the loss and its Breakdown per feature.
        Raises ValueError for mismatched groups or sample shapes, alpha below 1, guidance without unconditional samples, and all that drift_loss refuses.
        """
        for name, t in dict(gen = gen, pos = pos, uncond = uncond, neg = neg).items():
            if exists(t):
                given = f'{name} has shape {tuple(t.shape)}'
                check(t.ndim >= 3 and t.numel() > 0, f'{given}, expected [groups, samples per group, ...sample shape], at least one of each')
                check(t.shape[0] == gen.shape[0] and t.shape[2:] == gen.shape[2:], f'{given} but gen has shape {tuple(gen.shape)}: groups and sample shape must be equal')

        c, g = gen.shape[:2]
        check(exists(alpha) or not exists(uncond), 'uncond was given without alpha: pass the guidance scale [groups], 1 is no guidance')

        if exists(alpha):
            check(torch.is_tensor(alpha) and alpha.shape == (c,), f'alpha must be a tensor of shape ({c},), one guidance scale per group, got {alpha if not torch.is_tensor(alpha) else tuple(alpha.shape)}')
            check_range('alpha', alpha, 1)
            check(exists(uncond) or not can_read(alpha) or (alpha == 1).all(), 'alpha above 1 needs uncond, the unconditional samples to be guided away from')

        weight = repeat((alpha - 1) * (g - 1) / uncond.shape[1], 'c -> c u', u = uncond.shape[1]) if exists(uncond) else None      # A.7
        samples = dict(gen = gen, pos = pos, uncond = uncond, neg = neg, uncond_weight = weight)
        samples = {kind: t for kind, t in samples.items() if exists(t)}

        kwargs = {'diagnostics': diagnostics, **self.drift_loss_kwargs}

        if not exists(self.group_chunk_size):
            return self.breakdown({name: drift_loss(**problems, **kwargs) for name, problems in self.problems(**samples)})

        # chunks of groups: in two rounds the sums that drift_loss asks for (S, and the norms of the drift) of all chunks, then each chunk's loss and gradient

        chunks = [dict(zip(samples, parts)) for parts in zip(*(t.split(self.group_chunk_size) for t in samples.values()))]
        known = {}                                                                                     # {name: [sums, ...]}

        for _ in range(2 if self.chunk_statistics == 'shared' else 0):
            totals = {}

            with torch.no_grad():
                for name, problems in (pair for chunk in chunks for pair in self.problems(**chunk)):
                    stages = drift_loss.stages(**problems, **kwargs)
                    sums = [next(stages), *map(stages.send, known.get(name, ()))][-1]
                    totals[name] = totals.get(name, 0) + sums

            del stages, problems
            known = {name: [*known.get(name, ()), sum_over_processes(total)] for name, total in totals.items()}

        results, grads = [], []

        for chunk in chunks:
            x = chunk['gen'].detach().requires_grad_()
            answers = {name: iter(sums) for name, sums in known.items()}

            with torch.enable_grad():
                loss, breakdown = self.breakdown({
                    name: drift_loss(**problems, **kwargs, answer = lambda sums, name = name: next(answers[name]) if known else sums)
                    for name, problems in self.problems(**{**chunk, 'gen': x})
                })

            share = len(x) / c
            grads.append(torch.autograd.grad(loss, x)[0] * share)
            results.append((loss.detach() * share, {name: t.detach() * share for name, t in breakdown.losses.items()}))

        losses = {name: sum(part[name] for _, part in results) for name in breakdown.losses}
        return KnownGradient.apply(gen, sum(loss for loss, _ in results), cat(grads)), Breakdown(losses, breakdown.stats)

    def problems(self, gen, pos, uncond = None, neg = None, uncond_weight = None):
        """The arguments of drift_loss, feature by feature: every location of every group is a problem of its own."""
        c, others = len(gen), {kind: t for kind, t in dict(pos = pos, uncond = uncond, neg = neg).items() if exists(t)}
        sizes = [t.shape[1] for t in others.values()]

        gen_features = self.features(rearrange(gen, 'c g ... -> (c g) ...'))

        with torch.no_grad():
            other_features = self.features(rearrange(cat(list(others.values()), dim = 1), 'c n ... -> (c n) ...'))

        for name, gen_feature in gen_features.items():
            points, other_points = (rearrange(t, '(c n) f d -> (c f) n d', c = c) for t in (gen_feature, other_features[name]))
            weight = repeat(uncond_weight, 'c u -> (c f) u', f = gen_feature.shape[1]) if exists(uncond_weight) else None
            yield name, dict(gen = points, **dict(zip(others, other_points.split(sizes, dim = 1))), uncond_weight = weight)

    @staticmethod
    def breakdown(results):
        """The sum over features {name: (loss [b], DriftStats)}."""
        losses = {name: loss.mean() for name, (loss, _) in results.items()}
        return sum(losses.values()), Breakdown(losses, {name: stats for name, (_, stats) in results.items()})

# ───────────────────────────────────────────────────────────────────────────────
# 4. feature encoders - A.3-A.5
# ───────────────────────────────────────────────────────────────────────────────

FEATURE_SETS = ('locations', 'mean_std', '2x2', '4x4')

def map_features(name, x, sets = FEATURE_SETS):
    """The features of one map x [b d h w] (A.5): 'locations', and mean and standard deviation of the whole map and of its 2x2 and 4x4 patches.

    Returns {name, name_mean, name_std, name_mean_2, name_std_2, ...: [b f d]}; patch sizes that do not divide the map are skipped.
    """
    h, w = x.shape[-2:]
    features = {name: rearrange(x, 'b d h w -> b (h w) d')} if 'locations' in sets else {}

    for feature_set, suffix, p1, p2 in (('mean_std', '', h, w), ('2x2', '_2', 2, 2), ('4x4', '_4', 4, 4)):
        if feature_set in sets and h % p1 == 0 and w % p2 == 0:
            patches = rearrange(full_precision(x), 'b d (h p1) (w p2) -> b (h w) d (p1 p2)', p1 = p1, p2 = p2)
            var, mean = torch.var_mean(patches, dim = -1, correction = 0)
            features |= {f'{name}_mean{suffix}': mean, f'{name}_std{suffix}': (var + 1e-6).sqrt()}     # b f d

    return features

def group_norm(dim):
    """At most 32 groups, the largest divisor; the release's epsilon is flax's."""
    return nn.GroupNorm(max(n for n in range(1, 33) if dim % n == 0), dim, eps = 1e-6)

def conv_norm(dim_in, dim_out, kernel = 3, stride = 1):
    return nn.Sequential(nn.Conv2d(dim_in, dim_out, kernel, stride, padding = kernel // 2, bias = False), group_norm(dim_out))

def lecun_normal_(weight):
    """The release's initialisation of the encoder, flax's: a normal of variance 1 / fan_in, cut at two deviations and widened to keep it."""
    fan_in = weight[0].numel()
    std = fan_in ** -0.5 / 0.87962566103423978
    return nn.init.trunc_normal_(weight, std = std, a = -2 * std, b = 2 * std)

class ResidualBlock(Module):
    def __init__(self, dim_in, dim_out, stride = 1):
        super().__init__()
        self.conv1 = conv_norm(dim_in, dim_out, stride = stride)
        self.conv2 = conv_norm(dim_out, dim_out)
        self.shortcut = conv_norm(dim_in, dim_out, kernel = 1, stride = stride) if stride > 1 or dim_in != dim_out else nn.Identity()

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))

class UpBlock(Module):
    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.norm = group_norm(dim_in + dim_out)
        self.proj, self.refine = conv_norm(dim_in + dim_out, dim_out), conv_norm(dim_out, dim_out)

    def forward(self, x, skip):
        x = F.interpolate(x, size = skip.shape[-2:], mode = 'bilinear')
        x = self.norm(cat((x, skip), dim = 1))
        return F.relu(self.refine(F.relu(self.proj(x))))

def run_block(block, *args, checkpointing):
    """A block of a network, computed again in the backward pass instead of keeping what is inside if checkpointing."""
    with set_checkpoint_early_stop(False):      # it stops by an exception, which einx would take for an error
        return checkpoint(block, *args, use_reentrant = False) if checkpointing and torch.is_grad_enabled() else block(*args)

class MAEBreakdown(NamedTuple):
    reconstruction: Tensor      # squared error per masked position, summed over channels (release)
    classification: Tensor      # cross entropy, 0 without labels
    accuracy: Tensor            # of the classifier, 0 without labels

class LatentMAE(Pretrained, coders = CODERS):
    """The feature encoder of the paper, a ResNet that is pretrained as a masked autoencoder on latents or pixels (A.3).

    patch_size: patches of the input that are folded into channels before the stem, 1 for latents, 8 for pixels. What is left must be divisible by 8.
    layers: residual blocks of the four stages, of widths dim, 2 dim, 4 dim, 8 dim; each stage after the first halves the resolution.
    num_classes: of the linear head on the pooled last map, None for no head.
    mask_patch_size, mask_ratio: patches of the folded input, each dropped (set to 0) with this probability.
    feature_sets: which kinds of features `.features` gives, see map_features, and 'norm_x', the norms of the input's channels.
    checkpointing: recompute each residual block in the backward pass instead of keeping what is inside.
    """

    published, published_as = ('mae_latent_256', 'mae_latent_640', 'mae_pixel_640'), 'mae'

    def __init__(
        self, *,
        dim = 256, channels = 4, patch_size = 1, layers = (3, 4, 6, 3), num_classes = 1000,
        mask_patch_size = 2, mask_ratio = 0.5,
        feature_sets = (*FEATURE_SETS, 'norm_x'), checkpointing = False
    ):
        super().__init__()
        check(len(layers) == 4 and min(layers) > 0, f'layers must be the number of blocks of four stages, got {layers}')
        check(0 < mask_ratio < 1, f'mask_ratio must be between 0 and 1, got {mask_ratio}')
        check(set(feature_sets) <= {*FEATURE_SETS, 'norm_x'}, f'feature_sets must be among {(*FEATURE_SETS, "norm_x")}, got {feature_sets}')

        self.channels, self.patch_size, self.num_classes, self.feature_sets = channels, patch_size, num_classes, feature_sets
        self.mask_patch_size, self.mask_ratio, self.checkpointing = mask_patch_size, mask_ratio, checkpointing
        self.mask_pixels = mask_patch_size * patch_size      # side of a mask patch

        dim_in, dims = channels * patch_size ** 2, [dim * 2 ** i for i in range(4)]

        self.stem = conv_norm(dim_in, dim)
        self.stages = ModuleList([
            ModuleList([ResidualBlock(before if j == 0 else after, after, stride = 2 if i > 0 and j == 0 else 1) for j in range(depth)])
            for i, (before, after, depth) in enumerate(zip((dim, *dims), dims, layers))
        ])
        self.norms = ModuleDict({f'layer{i}': group_norm(dim) for i, dim in enumerate(dims, 1)})

        # decoder: stage 4, then up to stages 3, 2, 1 and the stem

        skips = (dims[2], dims[1], dims[0], dim)
        self.bridge = conv_norm(dims[3], dims[3])
        self.ups = ModuleDict({name: UpBlock(below, skip) for name, below, skip in zip(('up43', 'up32', 'up21', 'up10'), (dims[3], *skips), skips)})
        self.to_pixels = nn.Conv2d(dim, dim_in, 1)
        self.to_logits = nn.Linear(dims[3], num_classes) if exists(num_classes) else None

        self.init_weights()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                lecun_normal_(module.weight)

                if exists(module.bias):
                    nn.init.zeros_(module.bias)

    def check_samples(self, x, multiple = 8):
        multiple *= self.patch_size
        fits = x.ndim == 4 and x.shape[1] == self.channels and x.shape[2] % multiple == 0 and x.shape[3] % multiple == 0
        check(fits, f'x has shape {tuple(x.shape)}, expected (batch, {self.channels}, height, width), both multiples of {multiple}')

    def mask_shape(self, x):
        self.check_samples(x, math.lcm(8, self.mask_patch_size))
        return x.shape[0], x.shape[2] // self.mask_pixels, x.shape[3] // self.mask_pixels

    def fold(self, x):
        """Samples [b ch h w] to the input of the stem, patches as channels."""
        self.check_samples(x)
        return rearrange(x, 'b ch (h p1) (w p2) -> b (p1 p2 ch) h w', p1 = self.patch_size, p2 = self.patch_size)

    def maps(self, x):
        """{name: [b d h w]} of a folded input: the stem, every second block of each stage, and each stage's normalised output."""
        maps = {'conv1': F.relu(self.stem(x))}
        x = maps['conv1']

        for stage, (name, norm) in zip(self.stages, self.norms.items()):
            for k, block in enumerate(stage, 1):
                x = run_block(block, x, checkpointing = self.checkpointing)

                if k % 2 == 0:
                    maps[f'{name}_blk{k}'] = x

            x = maps[name] = norm(x)

        return maps

    def features(self, x):
        """{name: [b f d]} of samples x [b ch h w], under the release's names (A.5)."""
        x = self.fold(x)
        features = {'norm_x': (reduce(full_precision(x) ** 2, 'b d h w -> b 1 d', 'mean') + 1e-6).sqrt()} if 'norm_x' in self.feature_sets else {}

        for name, feature_map in self.maps(x).items():
            features |= map_features(name, feature_map, self.feature_sets)

        return features

    def draw_mask(self, x, generator = None):
        """A random mask [b h w] over the mask patches of samples x [b ch h w]: 1 is dropped."""
        keys = torch.rand(self.mask_shape(x), generator = generator, device = generator.device if exists(generator) else x.device)
        return (keys < self.mask_ratio).to(x)

    def dropped(self, mask):
        """A mask [b h w] over mask patches as one over the pixels of samples, [b 1 h w]."""
        return repeat(mask, 'b h w -> b 1 (h p1) (w p2)', p1 = self.mask_pixels, p2 = self.mask_pixels)

    def reconstruct(self, x, mask):
        """The decoder's picture [b ch h w] of samples whose patches in mask [b h w] were dropped, and the last feature map [b d h w]."""
        expected = self.mask_shape(x)
        check(mask.shape == expected, f'mask has shape {tuple(mask.shape)}, expected {expected}, one number per mask patch')

        maps = self.maps(self.fold(x * (1 - self.dropped(mask))))

        y = F.relu(self.bridge(maps['layer4']))
        for up, skip in zip(self.ups.values(), ('layer3', 'layer2', 'layer1', 'conv1')):
            y = up(y, maps[skip])

        y = rearrange(self.to_pixels(y), 'b (p1 p2 ch) h w -> b ch (h p1) (w p2)', p1 = self.patch_size, p2 = self.patch_size)
        return y, maps['layer4']

    def forward(
        self,
        x: Float['b ch h w'],
        labels: Int['b'] | None = None,         # None: no classification
        *,
        cls_weight = 0.,                        # lambda, of the classification in the loss
        mask: Float['b mh mw'] | None = None    # None: drawn
    ) -> tuple[Float[''], MAEBreakdown]:
        """The pretraining loss, lambda * classification + (1 - lambda) * reconstruction, mean over the batch."""
        check(0 <= cls_weight <= 1, f'cls_weight must be between 0 and 1, got {cls_weight}')
        check(cls_weight == 0 or exists(labels), 'cls_weight above 0 needs labels')
        check(not exists(labels) or exists(self.to_logits), 'labels were given to a model without a classifier: set num_classes')

        mask = mask if exists(mask) else self.draw_mask(x)
        reconstruction, last = self.reconstruct(x, mask)

        positions = reduce(mask, 'b h w -> b', 'sum') * self.mask_patch_size ** 2
        error = reduce((full_precision(reconstruction) - x) ** 2 * self.dropped(mask), 'b ch h w -> b', 'sum') / (positions + 1e-8)

        cross_entropy = accuracy = torch.zeros_like(error)

        if exists(labels):
            labels = checked_labels(labels, self.num_classes, len(x))
            logits = full_precision(self.to_logits(reduce(last, 'b d h w -> b d', 'mean')))
            cross_entropy, accuracy = F.cross_entropy(logits, labels, reduction = 'none'), (logits.argmax(dim = -1) == labels).to(error)

        loss = cls_weight * cross_entropy + (1 - cls_weight) * error
        return loss.mean(), MAEBreakdown(error.mean(), cross_entropy.mean(), accuracy.mean())

# encoders of pixels: images [b 3 h w] in [-1, 1], also behind a decoder

class PixelInput(Module):
    """Resizes images (antialiased when they shrink) and normalises them, by default like ImageNet's."""

    def __init__(self, image_size = 224, mean = (0.485, 0.456, 0.406), std = (0.229, 0.224, 0.225)):
        super().__init__()
        self.image_size = image_size
        self.register_buffer('mean', torch.tensor(mean)[:, None, None], persistent = False)     # ch 1 1
        self.register_buffer('std', torch.tensor(std)[:, None, None], persistent = False)

    def forward(self, x):
        check(x.ndim == 4 and x.shape[1] == len(self.mean), f'x has shape {tuple(x.shape)}, expected images (batch, {len(self.mean)}, height, width) in [-1, 1]')
        x = F.interpolate(x, size = (self.image_size, self.image_size), mode = 'bilinear', antialias = True)
        return ((x + 1) / 2 - self.mean) / self.std

class BackboneFeatures(Module):
    """Drifting features of any vision backbone, for example of timm or torchvision with SimCLR's, MoCo's or DINO's weights.

    backbone: images -> feature maps [b d h w] or tokens [b n d] (the locations of a square map), one, a list, or a dict of them.
    num_prefix_tokens: class and register tokens in front of the others, left out. feature_sets: see map_features.
    Everything else goes to PixelInput: image_size, mean and std that the backbone was trained with.
    """

    def __init__(self, backbone, *, num_prefix_tokens = 0, feature_sets = FEATURE_SETS, **pixel_input_kwargs):
        super().__init__()
        self.backbone, self.num_prefix_tokens, self.feature_sets = backbone, num_prefix_tokens, feature_sets
        self.pixel_input = PixelInput(**pixel_input_kwargs)

    def features(self, x):
        """{'layer1': [b f d], 'layer1_mean': ...}, or under the names of the backbone's dict."""
        outputs = self.backbone(self.pixel_input(x))
        outputs = [outputs] if torch.is_tensor(outputs) else outputs
        outputs = outputs if isinstance(outputs, dict) else {f'layer{i}': out for i, out in enumerate(outputs, 1)}
        features = {}

        for name, out in outputs.items():
            if out.ndim == 3:
                tokens = out[:, self.num_prefix_tokens:]
                side = math.isqrt(tokens.shape[1])
                check(side ** 2 == tokens.shape[1], f'{name} has {tokens.shape[1]} tokens behind the {self.num_prefix_tokens} prefix tokens, expected a square number')
                out = rearrange(tokens, 'b (h w) d -> b d h w', h = side)

            check(out.ndim == 4, f'{name} has shape {tuple(out.shape)}, expected a map [b d h w] or tokens [b n d]')
            features |= map_features(name, out, self.feature_sets)

        return features

class ChannelNorm(nn.LayerNorm):
    def forward(self, x):                                                           # b d h w
        return rearrange(super().forward(rearrange(x, 'b d h w -> b h w d')), 'b h w d -> b d h w')

class ConvNeXtBlock(Module):
    """A depthwise convolution, then an MLP on every location with global response normalisation in the middle."""

    def __init__(self, dim):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(dim, dim, 7, padding = 3, groups = dim), ChannelNorm(dim, eps = 1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma, self.beta = Parameter(torch.zeros(4 * dim)), Parameter(torch.zeros(4 * dim))

    def forward(self, x):                                                           # b d h w
        h = F.gelu(self.pwconv1(rearrange(self.norm(self.dwconv(x)), 'b d h w -> b h w d')))
        energy = h.norm(dim = (1, 2), keepdim = True)                               # b 1 1 d
        h = h + self.gamma * h * energy / (energy.mean(dim = -1, keepdim = True) + 1e-6) + self.beta
        return x + rearrange(self.pwconv2(h), 'b h w d -> b d h w')

class ConvNeXtV2(Module):
    """The second encoder of the pixel models, ConvNeXt-V2 (release: base, 22k, 224), with its features under the release's names (A.4)."""

    def __init__(self, *, dims = (128, 256, 512, 1024), depths = (3, 3, 27, 3), **pixel_input_kwargs):
        super().__init__()
        self.pixel_input = PixelInput(**pixel_input_kwargs)

        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride = 4), ChannelNorm(dims[0], eps = 1e-6))
        halvings = [nn.Sequential(ChannelNorm(before, eps = 1e-6), nn.Conv2d(before, after, 2, stride = 2)) for before, after in zip(dims, dims[1:])]

        self.downs = ModuleList([stem, *halvings])
        self.stages = ModuleList([nn.Sequential(*(ConvNeXtBlock(dim) for _ in range(depth))) for dim, depth in zip(dims, depths)])
        self.norm = nn.LayerNorm(dims[-1], eps = 1e-6)

    @classmethod
    def from_state_dict(cls, state_dict, **kwargs):
        """From weights named as in the original implementation, timm or transformers; a classifier on top is left out."""
        state = {}

        for name, t in state_dict.items():
            name = renamed(name, CONVNEXT_NAMES)
            if not name.startswith(('head.', 'classifier.')):
                state[name] = t.flatten() if name.endswith(('gamma', 'beta')) else t

        stages = [len({name.split('.')[2] for name in state if name.startswith(f'stages.{i}.')}) for i in range(4)]
        check(all(stages), f'these are not the weights of a ConvNeXt-V2: blocks of the four stages {stages}')

        model = cls(dims = [len(state[f'stages.{i}.0.norm.weight']) for i in range(4)], depths = stages, **kwargs)
        load_checked(model, state)
        return model.eval()

    @classmethod
    def from_pretrained(cls, name = 'timm/convnextv2_base.fcmae_ft_in22k_in1k', *, revision = None, **kwargs):
        """model.safetensors of a repository on the hub (by default the weights that the release uses: base, 22k, 224) or of a local folder."""
        file = Path(name) / 'model.safetensors' if Path(name).is_dir() else hf_hub_download(name, 'model.safetensors', revision = revision)
        return cls.from_state_dict(read_tensors(file), **kwargs)

    def features(self, x):
        """{name: [b f d]} of images x [b 3 h w] in [-1, 1]: each stage standardised over its channels, and the pooled output."""
        with torch.autocast(x.device.type, enabled = False):        # release
            x, features = self.pixel_input(full_precision(x)), {}

            for i, (down, stage) in enumerate(zip(self.downs, self.stages)):
                x = stage(down(x))
                std, mean = torch.std_mean(x, dim = 1, correction = 0, keepdim = True)
                features |= map_features(f'convenxt_stage_{i}', (x - mean) / (std + 1e-3), ('locations', 'mean_std') if i > 0 else ('mean_std',))    # the release's spelling

            return {**features, 'global_mean': self.norm(reduce(x, 'b d h w -> b 1 d', 'mean')), 'global_std': features['convenxt_stage_3_std']}

CONVNEXT_NAMES = (
    (r'^convnextv2\.', ''), (r'^encoder\.', ''), (r'^embeddings\.patch_embeddings', 'downs.0.0'), (r'^embeddings\.layernorm', 'downs.0.1'),
    (r'^downsample_layers', 'downs'), (r'^stem', 'downs.0'), (r'^stages\.(\d+)\.downsampl(e|ing_layer)', r'downs.\1'), (r'\.(blocks|layers)\.', '.'),
    (r'conv_dw', 'dwconv'), (r'mlp\.fc', 'pwconv'), (r'^head\.norm|layernorm', 'norm'), (r'(mlp\.)?grn\.(weight|gamma)', 'gamma'), (r'(mlp\.)?grn\.(bias|beta)', 'beta')
)

# ───────────────────────────────────────────────────────────────────────────────
# 5. generator - A.2, Table 8
# ───────────────────────────────────────────────────────────────────────────────

def modulate(x, shift, scale):
    return einx.multiply('b n d, b d -> b n d', x, 1 + scale) + rearrange(shift, 'b d -> b 1 d')

class Modulation(Module):
    """adaLN-zero: shifts, scales and gates from the condition, zero at initialisation, in full precision under any autocast."""

    def __init__(self, dim, num):
        super().__init__()
        self.num = num
        self.linear = nn.Linear(dim, dim * num)

    def forward(self, cond):                                                        # b d
        with torch.autocast(cond.device.type, enabled = False):
            return self.linear(F.silu(cond.to(self.linear.weight.dtype))).chunk(self.num, dim = -1)      # num times b d

class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + 1e-6) times a gain, in full precision under any autocast (release; that of x-transformers has no epsilon)."""

    def __init__(self, dim):
        super().__init__(dim, eps = 1e-6)

    def forward(self, x):
        return super().forward(full_precision(x))

class Block(Module):
    """Attention and SwiGLU of x-transformers inside adaLN-zero.

    As in the release every linear has a bias, so they are added around the attention, and queries and keys have one gain per dimension
    of a head, shared by the heads (x-transformers: one for each head, stored as gain - 1, which trains and decays otherwise).
    """

    def __init__(self, dim, heads, dim_head, dim_ff):
        super().__init__()
        self.modulation = Modulation(dim, 6)

        self.attn_norm = RMSNorm(dim)
        self.attn = Attention(dim, heads = heads, dim_head = dim_head, qk_rmsnorm = True, flash = True, project_out = True)
        self.attn.q_rmsnorm, self.attn.k_rmsnorm = RMSNorm(dim_head), RMSNorm(dim_head)

        self.q_bias, self.k_bias, self.v_bias = (Parameter(torch.zeros(heads * dim_head)) for _ in range(3))
        self.out_bias = Parameter(torch.zeros(dim))

        self.ff_norm = RMSNorm(dim)
        self.ff = FeedForward(dim, mult = (dim_ff + 0.5) / dim, glu = True, swish = True)    # inner width is int(dim * mult)

    @typecheck
    def forward(self, x: Float['b n d'], cond: Float['b d'], rotary: Float['1 n dh']) -> Float['b n d']:
        attn_shift, attn_scale, attn_gate, ff_shift, ff_scale, ff_gate = self.modulation(cond)

        h = modulate(self.attn_norm(x), attn_shift, attn_scale)                                        # b n d
        h = self.attn(h, rotary_pos_emb = (rotary, None), q_delta = self.q_bias, k_delta = self.k_bias, v_delta = self.v_bias)
        x = x + einx.multiply('b n d, b d -> b n d', h + self.out_bias, attn_gate)

        h = modulate(self.ff_norm(x), ff_shift, ff_scale)
        return x + einx.multiply('b n d, b d -> b n d', self.ff(h), ff_gate)

    def init_weights(self):
        """Release: queries, keys and values are one xavier matrix, the two halves of SwiGLU's input one each."""
        for linear in (self.attn.to_q, self.attn.to_k, self.attn.to_v):
            nn.init.xavier_uniform_(linear.weight, gain = 0.5 ** 0.5)

        with torch.no_grad():
            for half in self.ff.ff[0].proj.weight.chunk(2):
                nn.init.xavier_uniform_(half)

def sinusoidal(t, dim):
    """[...] -> [... dim], cosines first, geometric frequencies 1 .. 1/10000."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device = t.device) / (dim // 2))
    angles = rearrange(t.float(), '... -> ... 1') * freqs
    return cat((angles.cos(), angles.sin()), dim = -1)

def sincos_2d(size, dim):
    """[size * size, dim]: the fixed sine-cosine embedding of a grid, half of the dimensions for each axis, that initialises the learned one."""
    sin_first = sinusoidal(torch.arange(size), dim // 2).roll(dim // 4, dims = -1)
    rows, cols = repeat(sin_first, 'h d -> (h w) d', w = size), repeat(sin_first, 'w d -> (h w) d', h = size)
    return cat((cols, rows), dim = -1)

class DriftingGenerator(Pretrained, coders = CODERS):
    """The one-step generator: a DiT that maps noise to samples in a single forward pass, given class, guidance scale and style (A.2).

    image_size, channels, patch_size: samples are [b channels image_size image_size], cut into patches of patch_size x patch_size.
    num_classes: None for an unconditional generator.
    num_register_tokens: in-context tokens in front of the patches, made from the condition.
    num_style_tokens, style_codebook_size: random style embeddings, the sum of one entry of each table (0 tokens: none).
    share_style_codebook: one table for all style tokens (paper) instead of one each (release).
    bf16_rotary: rotary positions rounded to bfloat16, in which latent_B_sota and latent_L_sota were trained: only for weights that were, too.
    checkpointing: recompute each block in the backward pass instead of keeping what is inside.
    """

    published, published_as = ('latent_L_sota', 'latent_B_sota', 'pixel_L_sota', 'pixel_B_sota', 'ablation'), 'gen'

    def __init__(
        self, *,
        image_size, channels, patch_size,
        dim, depth, heads, ff_mult = 4.,
        num_classes = None, num_register_tokens = 16,
        num_style_tokens = 32, style_codebook_size = 64, share_style_codebook = False,
        bf16_rotary = False, checkpointing = False
    ):
        super().__init__()
        sizes = dict(image_size = image_size, channels = channels, patch_size = patch_size, dim = dim, heads = heads, style_codebook_size = style_codebook_size)
        check(min(sizes.values()) > 0 and min(depth, num_register_tokens, num_style_tokens) >= 0, f'sizes must be above 0, and depth and numbers of tokens not negative, got {sizes}')
        check(image_size % patch_size == 0, f'image_size {image_size} must be a multiple of patch_size {patch_size}')
        check(dim % (2 * heads) == 0 and dim % 4 == 0, f'dim {dim} must be a multiple of 4 and of twice the heads {heads}: rotary embeddings turn pairs')
        check(num_classes is None or num_classes > 0, f'num_classes must be above 0, or None for an unconditional generator, got {num_classes}')

        self.noise_shape = (channels, image_size, image_size)
        self.num_classes, self.patch_size, self.num_style_tokens, self.checkpointing = num_classes, patch_size, num_style_tokens, checkpointing

        size, dim_patch, dim_head = image_size // patch_size, channels * patch_size ** 2, dim // heads
        dim_ff = math.ceil(int(2 / 3 * ff_mult * dim) / 32) * 32                                      # release

        # condition. All style tables are rows of one embedding, each token looks into its own (paper: all into the same)

        self.class_embed = nn.Embedding(num_classes, dim) if exists(num_classes) else None
        self.style_embed = nn.Embedding(style_codebook_size * (1 if share_style_codebook else num_style_tokens), dim)
        self.style_codebook_size, self.style_stride = style_codebook_size, 0 if share_style_codebook else style_codebook_size
        self.alpha_embed = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim), RMSNorm(dim))

        # tokens: [registers | patches], rotary positions over both (release: 1d)

        self.patch_embed = nn.Linear(dim_patch, dim)
        self.pos_embed = Parameter(sincos_2d(size, dim))
        self.register_proj = nn.Linear(dim, dim)
        self.register_embed = Parameter(torch.empty(num_register_tokens, dim))

        self.num_tokens, self.dim_head, self.bf16_rotary = num_register_tokens + size ** 2, dim_head, bf16_rotary
        self.set_buffers()

        # transformer

        self.blocks = ModuleList([Block(dim, heads, dim_head, dim_ff) for _ in range(depth)])
        self.final_modulation = Modulation(dim, 2)
        self.final_norm = RMSNorm(dim)
        self.to_patch = nn.Linear(dim, dim_patch)

        self.init_weights()

    @classmethod
    def from_preset(cls, name, **kwargs):
        """One of Table 8's sizes by name, see PRESETS; keyword arguments override it."""
        check(name in PRESETS, f'unknown preset {name!r}, expected one of {", ".join(PRESETS)}')
        return cls(**{**PRESETS[name], **kwargs})

    def set_buffers(self):
        rotary = RotaryEmbedding(self.dim_head, cache_if_possible = False).to(torch.bfloat16 if self.bf16_rotary else torch.float32)
        angles = rotary(torch.arange(self.num_tokens)).detach().float()       # positions, frequencies and their product in that precision
        self.register_buffer('rotary', rearrange(angles, 'n d -> 1 n d'), persistent = False)

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if exists(module.bias):
                    nn.init.zeros_(module.bias)

        for block in self.blocks:
            block.init_weights()

        embeddings = [m.weight for m in self.modules() if isinstance(m, nn.Embedding)]
        for weight in (*embeddings, self.register_embed, self.alpha_embed[0].weight, self.alpha_embed[2].weight):
            nn.init.normal_(weight, std = 0.02)

        # every block starts as the identity, and the output as 0

        for linear in (self.to_patch, *(m.linear for m in self.modules() if isinstance(m, Modulation))):
            nn.init.zeros_(linear.weight)

    def draw_styles(self, num, generator = None):
        """Random style indices [num s], uniform over the codebook."""
        device = generator.device if exists(generator) else self.pos_embed.device
        return torch.randint(self.style_codebook_size, (num, self.num_style_tokens), generator = generator, device = device)

    def condition(self, labels, alpha, styles):
        """The condition vector [b d]: class + styles + guidance scale."""
        tables = self.style_stride * torch.arange(self.num_style_tokens, device = styles.device)
        cond = reduce(self.style_embed(styles + tables), 'b s d -> b d', 'sum')
        cond = cond + 0.02 * self.alpha_embed(sinusoidal(alpha, 256).to(cond.dtype))
        return cond + self.class_embed(labels) if exists(labels) else cond

    def forward(
        self,
        noise: Float['b ch h w'],
        labels: Int['b'] | None = None,         # None when num_classes is None
        alpha: Float['b'] | float = 1.,         # guidance scale, >= 1
        styles: Int['b s'] | None = None        # None: drawn
    ) -> Float['b ch h w']:
        """Noise to samples, one network evaluation. Raises ValueError for wrong shapes, labels or styles out of range, alpha below 1, non-finite values."""
        (b, *shape), p, size = noise.shape, self.patch_size, self.noise_shape[-1] // self.patch_size

        check(tuple(shape) == self.noise_shape, f'noise has shape {tuple(noise.shape)}, expected (batch, {", ".join(map(str, self.noise_shape))})')
        check_range('noise', noise, -math.inf)

        check(self.rotary.dtype in (torch.float32, torch.float64), f'the model is {self.rotary.dtype}, positions included: make it again in float32 and run under torch.autocast for half precision')
        noise = noise.to(self.pos_embed.dtype)

        check(exists(labels) == exists(self.num_classes), f'num_classes is {self.num_classes}, so labels {"are needed" if exists(self.num_classes) else "must be None"}')
        labels = checked_labels(labels, self.num_classes, b) if exists(labels) else None

        alpha = alpha if torch.is_tensor(alpha) else torch.full((b,), float(alpha), device = noise.device)
        check(alpha.shape == (b,), f'alpha has shape {tuple(alpha.shape)}, expected a number or ({b},)')
        check_range('alpha', alpha, 1)

        styles = styles if exists(styles) else self.draw_styles(b)
        check(styles.shape == (b, self.num_style_tokens), f'styles has shape {tuple(styles.shape)}, expected ({b}, {self.num_style_tokens})')
        check_range('styles', styles, 0, self.style_codebook_size - 1)

        cond = self.condition(labels, alpha, styles)                                                   # b d

        patches = rearrange(noise, 'b ch (h p1) (w p2) -> b (h w) (p1 p2 ch)', p1 = p, p2 = p)
        x = self.patch_embed(patches) + self.pos_embed                                                 # b n d

        registers = rearrange(self.register_proj(cond), 'b d -> b 1 d') + self.register_embed
        x = cat((registers, x), dim = 1)                                                               # b (r + n) d

        for block in self.blocks:
            x = run_block(block, x, cond, self.rotary, checkpointing = self.checkpointing)

        x = x[:, registers.shape[1]:]                                                                  # b n d

        patches = self.to_patch(modulate(self.final_norm(x), *self.final_modulation(cond)))            # b n (p1 p2 ch)
        return rearrange(patches, 'b (h w) (p1 p2 ch) -> b ch (h p1) (w p2)', h = size, w = size, p1 = p, p2 = p)

    def sample(self, labels = None, **kwargs):
        """Samples [b ch h w] for labels [b], see sample_from."""
        return sample_from(self, self.noise_shape, labels, **kwargs)

@torch.no_grad()
def sample_from(model, noise_shape, labels = None, *, num_samples = None, alpha = 1., seed = None, batch_size = None):
    """Samples of any generator with the call model(noise, labels, alpha, styles), in eval mode, without gradients.

    labels [b], a tensor or a list, or num_samples for an unconditional generator; alpha: a number >= 1 or [b].
    Noise and styles are drawn on the cpu, so a seed gives the same samples on every device; batch_size only bounds the memory.
    """
    num_classes, device, training = getattr(model, 'num_classes', None), next(model.parameters()).device, model.training
    check(exists(labels) == exists(num_classes), f'num_classes is {num_classes}, so pass {"labels" if exists(num_classes) else "num_samples, no labels"}')
    check(exists(labels) != exists(num_samples), 'pass labels to a class-conditional generator, or num_samples to an unconditional one')

    num = torch.as_tensor(labels).numel() if exists(labels) else num_samples
    check(num > 0 and default(batch_size, 1) > 0, f'the number of samples and batch_size must be above 0, got {num} and {batch_size}')

    labels = checked_labels(torch.as_tensor(labels), num_classes, num) if exists(labels) else None
    alpha = torch.as_tensor(alpha, dtype = torch.float32)
    check(alpha.shape in ((), (num,)), f'alpha has shape {tuple(alpha.shape)}, expected a number or ({num},)')

    generator = torch.Generator()
    generator.manual_seed(int(seed)) if exists(seed) else generator.seed()

    noise = torch.randn(num, *noise_shape, generator = generator)
    styles = model.draw_styles(num, generator) if hasattr(model, 'draw_styles') else None
    model.eval()

    try:
        starts = range(0, num, default(batch_size, num))
        batches = [[t[i:i + starts.step].to(device) if exists(t) else None for t in (noise, labels, alpha.expand(num), styles)] for i in starts]
        return cat([model(*batch) for batch in batches])
    finally:
        model.train(training)
        if hasattr(model, 'reshard'):       # FSDP
            model.reshard()

PRESETS = {
    'B/2': dict(image_size = 32, channels = 4, patch_size = 2, dim = 768, depth = 12, heads = 12),       # latent
    'L/2': dict(image_size = 32, channels = 4, patch_size = 2, dim = 1024, depth = 24, heads = 16),      # latent
    'B/16': dict(image_size = 256, channels = 3, patch_size = 16, dim = 768, depth = 12, heads = 12),    # pixel
    'L/16': dict(image_size = 256, channels = 3, patch_size = 16, dim = 1024, depth = 24, heads = 16),   # pixel
}

# ───────────────────────────────────────────────────────────────────────────────
# 6. data - A.7, A.8
# ───────────────────────────────────────────────────────────────────────────────

IMAGE_EXTENSIONS = ('.jpeg', '.jpg', '.png', '.webp', '.bmp')

def images_in(folder):
    return sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGE_EXTENSIONS) and not entry.name.startswith('.'))

def center_crop(picture, size):
    """The centre [size, size] of a picture as ADM and DiT cut it: halved by box filter while twice too large, then bicubic to the shorter side."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize([side // 2 for side in picture.size], Image.Resampling.BOX)

    scale = size / min(picture.size)
    picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)

    left, top = ((side - size) // 2 for side in picture.size)
    return picture.crop((left, top, left + size, top + size))

class ImageFolder(Dataset):
    """Images [ch size size] in [-1, 1] of a folder, and their labels: places among its class folders, or 0 where the folder itself holds the images.

    channels: 3 (RGB), or 1 (grey). flip: mirror half of them at random. num_classes: of class folders, None if there are none.
    Raises ValueError for a folder without images or with images next to class folders, and with its name for an image that cannot be read.
    """

    def __init__(self, root, image_size, *, channels = 3, flip = False):
        check(os.path.isdir(root), f'{root} is not a folder: expected one of images, or of class folders of images')
        check(channels in (1, 3), f'channels must be 1 or 3, got {channels}')
        self.root, self.image_size, self.channels, self.flip = Path(root), image_size, channels, flip

        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.'))
        self.num_classes = len(self.classes) or None
        check(not self.classes or not images_in(root), f'{root} has both class folders and images: move the images into the folder of their class')

        folders = self.classes or ['']
        found = [images_in(self.root / name) for name in folders]
        empty = [str(self.root / name) for name, files in zip(folders, found) if not files]
        check(not empty, f'{", ".join(empty)} has no images ({", ".join(IMAGE_EXTENSIONS)}): remove it or fill it')

        self.files = [(os.path.join(name, file), label) for label, (name, files) in enumerate(zip(folders, found)) for file in files]

    def __len__(self):
        return len(self.files)

    def cut(self, picture):
        """A Pillow image as one of [image_size, image_size]."""
        return center_crop(picture, self.image_size)

    def __getitem__(self, index):
        name, label = self.files[index]

        try:
            with Image.open(self.root / name) as file:
                check(not file.mode.startswith(('I', 'F')), f'it has pixels of mode {file.mode}: convert it to 8 bits')
                picture = file.convert('RGB' if self.channels == 3 else 'L')
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:      # all that Pillow raises for broken files
            raise ValueError(f'{self.root / name} cannot be read as an image ({error})') from error

        pixels = np.array(self.cut(picture)).reshape(self.image_size, self.image_size, self.channels)
        image = rearrange(torch.from_numpy(pixels), 'h w ch -> ch h w').float() / 127.5 - 1
        return image.flip(-1) if self.flip and random.random() < 0.5 else image, label

class SampleQueue:
    """The newest real samples of every class: positives are drawn from it, and unconditional samples from a second one with a single class.

    size: samples per class, the oldest leave. They are kept on `device`, as `dtype` (None: as they come); indices are drawn on the cpu.
    """

    def __init__(self, num_classes = 1, *, size = 128, device = 'cpu', dtype = None):
        check(num_classes > 0 and size > 0, f'num_classes and size must be above 0, got {num_classes} and {size}')
        self.num_classes, self.size, self.device, self.dtype = num_classes, size, device, dtype
        self.pushed = torch.zeros(num_classes, dtype = torch.long)      # ever pushed, per class
        self.samples = None                                             # [class slot ...], allocated at the first push

    @property
    def filled(self):
        """How many samples each class holds [num_classes], on the cpu."""
        return self.pushed.clamp(max = self.size)

    def push(self, samples, labels = None):
        """samples [b ...] of labels [b] (None: one class). Raises ValueError for labels out of range, other shapes, non-finite samples."""
        b, C = len(samples), self.num_classes
        check(exists(labels) or C == 1, f'a queue of {C} classes needs labels')
        labels = checked_labels(torch.as_tensor(labels).cpu(), C, b) if exists(labels) else torch.zeros(b, dtype = torch.long)
        check_range('real samples', samples, -math.inf)

        if not exists(self.samples):
            self.samples = torch.zeros(C, self.size, *samples.shape[1:], device = self.device, dtype = default(self.dtype, samples.dtype))

        check(samples.shape[1:] == self.samples.shape[2:], f'samples of shape {tuple(samples.shape[1:])} pushed to a queue of {tuple(self.samples.shape[2:])}')

        # the place of each sample among those of its class in this push; of more than fit only the newest stay

        order = labels.argsort(stable = True)
        labels, counts = labels[order], labels.bincount(minlength = C)
        place = torch.arange(b) - (counts.cumsum(dim = 0) - counts)[labels]
        fits = place >= (counts - self.size)[labels]

        slot = (self.pushed[labels] + place) % self.size
        labels, slot, order = (t[fits].to(self.device, non_blocking = True) for t in (labels, slot, order))
        self.samples[labels, slot] = samples.detach().to(self.samples, non_blocking = True)[order]
        self.pushed += counts

    def draw(self, labels, num, generator = None):
        """Samples [c num ...] of the classes labels [c], without replacement within each row."""
        labels = checked_labels(labels.cpu(), self.num_classes, len(labels))
        filled = self.filled[labels]
        check((filled >= num).all(), f'{num} samples were asked for, but these classes hold fewer (class: samples): {dict(zip(labels[filled < num].tolist(), filled[filled < num].tolist()))}')

        keys = torch.rand(len(filled), self.size, generator = generator)
        keys.masked_fill_(einx.greater_equal('size, c -> c size', torch.arange(self.size), filled), -1.)
        labels, slot = (t.to(self.device, non_blocking = True) for t in (rearrange(labels, 'c -> c 1'), keys.topk(num, dim = -1).indices))
        return self.samples[labels, slot]       # c num ...

    def state_dict(self):
        return dict(pushed = self.pushed, **(dict(samples = self.samples) if exists(self.samples) else {}))

    def load_state_dict(self, state):
        if 'samples' in state:
            saved, own = tuple(state['samples'].shape[:2]), (self.num_classes, self.size)
            check(saved == own, f'the saved queue has (num_classes, size) {saved}, this one {own}')
            self.samples = state['samples'].to(self.device, copy = True)

        self.pushed = state['pushed'].cpu().clone()

def endless_shuffle(length, *, seed, start = 0):
    """Indices of epoch after epoch, each in an order of its own, from any position on."""
    epoch, offset = divmod(start, length)
    while True:
        yield from torch.randperm(length, generator = seeded(seed, 'epoch', epoch)).tolist()[offset:]
        epoch, offset = epoch + 1, 0

class Replayed(Dataset):
    """A dataset whose random augmentations are a function of the position in the run, whichever process or worker asks. Without labels: 0."""

    def __init__(self, dataset, seed, shape, with_labels):
        self.dataset, self.seed, self.shape, self.with_labels = dataset, seed, shape, with_labels

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, place):
        position, index = place
        seed = seed_for(self.seed, 'sample', position)
        torch.default_generator.manual_seed(seed)       # of the cpu alone: of all devices it takes longer than many a sample
        random.seed(seed)
        np.random.seed(seed % 2 ** 32)

        try:
            sample, label = self.dataset[index]
        except Exception as error:
            raise RuntimeError(f'sample {index} of the dataset cannot be read: {error}') from error

        shape = tuple(getattr(sample, 'shape', (None,)))
        check(shape == self.shape, f'sample {index} of the dataset has shape {shape}, the first one has {self.shape}')
        return sample.float(), label if self.with_labels else 0

def sample_alpha(num, *, low = 1., high = 4., power = 3., no_cfg_frac = 0., generator = None):
    """Guidance scales [num] (A.7): 1 with probability no_cfg_frac, otherwise of density proportional to alpha^-power on [low, high]."""
    uniform, skip = torch.rand(2, num, generator = generator)
    k = 1 - power

    # inverse of the cumulative density

    alpha = (low ** k + uniform * (high ** k - low ** k)) ** (1 / k) if k != 0 else low * (high / low) ** uniform
    return torch.where(skip < no_cfg_frac, 1., alpha.clamp(low, high))

# ───────────────────────────────────────────────────────────────────────────────
# 7. trainers - A.3, A.8, A.9
# ───────────────────────────────────────────────────────────────────────────────

# checkpoints: a folder of safetensors and a manifest, complete or not there at all

def save_tensors(state_dict, path, copy = True):
    """copy: tensors may share memory. Returns the file's line of the manifest."""
    save_file({name: t.detach().to('cpu', copy = copy).contiguous() for name, t in state_dict.items()}, path)
    return path.name, dict(bytes = path.stat().st_size, sha256 = sha256(path))

def sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()

def flush(path):
    """Wait until a file, or where that can be done a folder, is on the disk."""
    with suppress(OSError) if path.is_dir() or os.name == 'nt' else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

def damage(folder, rank = 0):
    """What is wrong with a checkpoint, or None. A process looks at its own queue, the first also at everything that is not a queue's."""
    try:
        files = json.loads((folder / 'manifest.json').read_text())['files']

        if missing := {'model.safetensors', 'ema.safetensors', 'optimizer.safetensors'} - files.keys():
            return f'its manifest does not have {", ".join(sorted(missing))}'

        for name, expected in files.items():
            if name == f'queue-{rank}.safetensors' or rank == 0 and not name.startswith('queue-'):
                size = (folder / name).stat().st_size
                if size != expected['bytes']:
                    return f'{name} has {size} bytes instead of {expected["bytes"]}'
                if sha256(folder / name) != expected['sha256']:
                    return f'{name} does not have the hash that the manifest gives'
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f'it is not complete ({type(error).__name__}: {error})'

def discard(folder):
    """Remove a folder so that it is never seen half removed."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f'unfinished-old-{folder.name}')))

@contextmanager
def interruptions():
    """The signals that came, Ctrl-C or SIGTERM, as a list: so that the step can end and a checkpoint be written. A second one acts at once."""
    received = []

    def remember(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])

    main = threading.current_thread() is threading.main_thread()           # others get no signals
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}      # ignored in the background of a script

    for number in handlers:
        signal.signal(number, remember)

    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

def ignore_signals(worker):
    for number in (signal.SIGINT, signal.SIGTERM):      # workers end with the process that they read for
        signal.signal(number, signal.SIG_IGN)

# pictures and records

def image_grid(images, *, min_size = 48):
    """A Pillow image of images [rows cols ch h w] in [0, 1]; tiny ones are magnified to min_size pixels, without smoothing."""
    ch, h = images.shape[2:4]
    check(ch in (1, 3), f'a picture has 1 or 3 channels, got {ch}')

    pixels = F.pad(images.float().cpu(), (1, 1, 1, 1), value = 1.)
    pixels = rearrange(pixels, 'rows cols ch h w -> (rows h) (cols w) ch').clamp(0, 1).mul(255).round().byte().numpy()

    picture = Image.fromarray(pixels[..., 0] if ch == 1 else pixels)
    zoom = math.ceil(min_size / h)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)

def settings(arguments):
    """The arguments of a trainer that are plain values, for its record."""
    return {name: value for name, value in arguments.items() if name not in ('self', 'model', 'loss_fn', 'dataset', 'to_image', 'kwargs', 'config', '__class__')}

def versions():
    found = {'python': platform.python_version()}

    for name in ('drifting-pytorch', 'torch', 'accelerate', 'x-transformers'):
        with suppress(PackageNotFoundError):        # this file alone, copied
            found[name] = version(name)

    return found

class BaseTrainer:
    """The training loop through accelerate, for any model: AdamW, warmup, averaged weights, metrics, pictures, checkpoints (A.9).

    A subclass says what is trained: backward(batches, micro_step, sync) adds the gradient of a micro step, averaged over processes if sync, and returns
    the loss () and any details; metrics(details) what to log of them as {name: tensor ()}, and which names go onto the progress bar; pictures() samples
    for the grid [b ch h w], and its number of rows.

    num_train_steps, learning_rate, lr_warmup_steps (linear from 1e-6, then constant), betas, weight_decay, max_grad_norm, ema_decay: the optimisation.
    lr_decay_start: the step from which the learning rate falls, as 1 / sqrt(step). None: never (paper).
    gradient_accumulation_steps, log_with: as in accelerate. mixed_precision: too; None is what accelerate was launched with, or else bf16 on a GPU that has it.
    compile: torch.compile of the model, and of encoders and loss. cpu: train on the cpu even where there is a GPU. num_workers: processes that read data.
    max_skipped_steps: so many steps with non-finite gradients are left out, the next one stops the run. Above 0 every step waits for its gradient norm.
    to_image: maps samples to images [b 1|3 h w] in [0, 1] for the grids. None: samples with 1 or 3 channels are in [-1, 1], others give no grid.
    log_every, sample_every, save_every: in steps, 0 for never. All goes into results_folder: metrics.jsonl, starts.jsonl (configuration, versions and
        hardware of every start), samples/, checkpoints/ (the newest keep_checkpoints). Ctrl-C and SIGTERM save a checkpoint before they act.
    resume_from_checkpoint: a checkpoint folder, or 'latest', the newest that is complete and undamaged (from the beginning if there is none). A resumed
        run repeats what it would have been; settings that prevent that are warned of.
    overwrite: remove an earlier run's metrics, samples and checkpoints from the folder. Otherwise it is refused.
    """

    shares_batch = True     # batch_size is of all processes together, or else of each

    def __init__(
        self, model, dataset, *,
        batch_size, num_train_steps = 30_000, seed = 0,
        learning_rate = 2e-4, lr_warmup_steps = 5_000, lr_decay_start = None, betas = (0.9, 0.95), weight_decay = 0.01, max_grad_norm = 2., ema_decay = 0.999,
        gradient_accumulation_steps = 1, mixed_precision = None, compile = False, cpu = False, num_workers = 0, max_skipped_steps = 0,
        to_image = None, log_with = None, log_every = 10, sample_every = 1_000, save_every = 1_000, keep_checkpoints = 3, progress_bar = True,
        results_folder = './results', resume_from_checkpoint = None, overwrite = False,
        config = {}                         # of the subclass
    ):
        self.config = settings(locals()) | config
        vars(self).update(self.config)      # every setting is an attribute

        for name in ('batch_size', 'num_train_steps', 'lr_decay_start', 'gradient_accumulation_steps', 'keep_checkpoints'):
            check(default(self.config[name], 1) > 0, f'{name} must be above 0, got {self.config[name]}')

        if not exists(mixed_precision) and 'ACCELERATE_MIXED_PRECISION' not in os.environ:
            mixed_precision = 'bf16' if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation = False) and not cpu else 'no'

        self.accelerator = accelerator = Accelerator(
            mixed_precision = mixed_precision, cpu = cpu, log_with = log_with, project_dir = results_folder,
            kwargs_handlers = [DistributedDataParallelKwargs(broadcast_buffers = False)]
        )

        accelerator.gradient_accumulation_steps = 1         # whatever the environment says: train_step accumulates
        check(accelerator.distributed_type != DistributedType.FSDP or accelerator.is_fsdp2, 'FSDP is supported in its second version: set fsdp_version to 2')
        check(hasattr(dataset, '__len__'), f'the dataset must be map-style, with a length, got {type(dataset).__name__}')

        world = accelerator.num_processes
        check(not self.shares_batch or batch_size % world == 0, f'{batch_size} samples read per step cannot be shared by {world} processes')
        self.read_here = batch_size // world if self.shares_batch else batch_size
        self.read_in_all = self.read_here * world
        check(len(dataset) >= self.read_in_all, f'the dataset has {len(dataset)} samples, fewer than the {self.read_in_all} read per step')

        first = dataset[0]
        sample = first[0] if isinstance(first, (tuple, list)) and len(first) == 2 else None
        is_float = torch.is_tensor(sample) and sample.is_floating_point()
        given = type(first).__name__ if not exists(sample) else getattr(sample, 'dtype', type(sample).__name__)
        check(is_float, f'the dataset must yield (floating point tensor, label), its first sample is {given}')

        # release: AdamW on all parameters, and the plain average of the weights from the start and at every step (the library would warm it up)

        fused = accelerator.device.type in ('cuda', 'cpu')
        optimizer = torch.optim.AdamW(model.parameters(), lr = learning_rate, betas = betas, weight_decay = weight_decay, fused = fused)
        average = deepcopy(model) if accelerator.is_fsdp2 else None
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.unwrapped = accelerator.unwrap_model(self.model)

        average = fsdp2_prepare_model(accelerator, average) if accelerator.is_fsdp2 else deepcopy(self.unwrapped)
        self.ema = EMA(self.unwrapped, average, beta = ema_decay, min_value = ema_decay, update_after_step = -1, update_every = 1, include_online_model = False, use_foreach = not accelerator.is_fsdp2)
        self.ema.update()

        if compile:
            self.unwrapped.compile()

        self.num_classes, self.sample_shape = getattr(model, 'num_classes', None), tuple(sample.shape)
        self.dataset = Replayed(dataset, seed, self.sample_shape, with_labels = exists(self.num_classes))
        self.results_folder, self.hide_bar = Path(results_folder), not (progress_bar and accelerator.is_main_process)
        self.step, self.samples_read, self.skipped, self.queues, self.unchecked = 0, 0, 0, {}, []
        self.samples_per_step, self.to_image = self.read_in_all, to_image

        # a new run does not mix with an earlier one

        try:
            self.results_folder.mkdir(parents = True, exist_ok = True)
            tempfile.TemporaryFile(dir = self.results_folder).close()
        except OSError as error:
            raise OSError(f'results_folder = {str(results_folder)!r} cannot be written to: {error}') from error

        earlier = [path for path in (self.results_folder / name for name in ('metrics.jsonl', 'starts.jsonl', 'checkpoints', 'samples')) if path.exists()]
        check(exists(resume_from_checkpoint) or overwrite or not earlier, f"{results_folder} holds an earlier run: pass resume_from_checkpoint = 'latest', overwrite = True, or another results_folder")

        if accelerator.is_main_process:
            for path in earlier if overwrite and not exists(resume_from_checkpoint) else (self.results_folder / 'checkpoints').glob('unfinished-*'):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

        accelerator.wait_for_everyone()

    @property
    def waits_for_norm(self):
        return self.max_skipped_steps > 0 or self.accelerator.device.type == 'cpu'

    @property
    def logs_this_step(self):
        return self.log_every > 0 and ((self.step + 1) % self.log_every == 0 or self.step + 1 == self.num_train_steps)

    def before_training(self, batches):
        """Once, before the first step of a run that is not resumed."""

    # the loop. Every random number is drawn from a seed made of its place in the run

    def batches(self):
        """Real batches (samples, labels) of this process, endlessly, from where the run stands."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        indices = endless_shuffle(len(self.dataset), seed = self.seed, start = self.samples_read)
        places = islice(enumerate(indices, self.samples_read), rank, None, world)

        pin_memory = self.accelerator.device.type == 'cuda'
        return iter(DataLoader(self.dataset, self.read_here, sampler = places, num_workers = self.num_workers, pin_memory = pin_memory, worker_init_fn = ignore_signals))

    def read(self, batches):
        samples, labels = next(batches)
        self.samples_read += self.read_in_all
        self.seed_model()
        return samples, torch.as_tensor(labels)

    def seed_model(self, *key):
        """For a model with dropout: what it draws next is a function of the place in the run."""
        for generator in (torch.default_generator, *torch.cuda.default_generators):
            generator.manual_seed(seed_for(self.seed, self.samples_read, *key, self.accelerator.process_index))

    def train_step(self, batches):
        """One optimiser step. Returns the loss and its details, both of the last micro step on this process, and the gradient norms."""
        accelerator, logs = self.accelerator, self.logs_this_step
        self.optimizer.zero_grad()
        self.model.train()

        warmup = min(1., self.step / self.lr_warmup_steps) if self.lr_warmup_steps > 0 else 1.
        decay = min(1., default(self.lr_decay_start, math.inf) / (self.step + 1)) ** 0.5

        for group in self.optimizer.param_groups:
            group['lr'] = (1e-6 + (self.learning_rate - 1e-6) * warmup) * decay

        for micro_step in range(self.gradient_accumulation_steps):
            loss, details = self.backward(batches, micro_step, sync = micro_step == self.gradient_accumulation_steps - 1)

        accelerator.unscale_gradients()
        parts = {name: [p.grad for p in part.parameters() if exists(p.grad)] for name, part in self.unwrapped.named_children()} if logs else {}
        grad_norms = {f'grad_norm/{name}': torch.nn.utils.get_total_norm(grads) for name, grads in parts.items() if grads}
        grad_norms['grad_norm'] = torch.nn.utils.clip_grad_norm_(self.model.parameters(), default(self.max_grad_norm, math.inf))
        grad_norms = {name: norm.full_tensor() if isinstance(norm, DTensor) else norm for name, norm in grad_norms.items()}      # of a sharded model

        # a broken step is found before it is used, if that was asked for or costs nothing, and at the latest before it is saved

        self.step += 1
        self.unchecked.append((self.step, loss, grad_norms['grad_norm'], details))

        if not self.waits_for_norm or self.check_finite():
            self.optimizer.step()
            self.ema.update()
        elif exists(accelerator.scaler):
            accelerator.scaler.update()

        return loss, details, grad_norms

    def check_finite(self):
        """Whether the steps since the last call had finite losses and gradients. The first that had not stops the run, or is one of max_skipped_steps."""
        steps, self.unchecked = self.unchecked, []

        if not steps:
            return True

        scaled = exists(self.accelerator.scaler)        # fp16: it skips steps of which the gradient alone is broken
        finite = stack([loss.isfinite() & (grad_norm.isfinite() | scaled) for _, loss, grad_norm, _ in steps])
        broken = self.accelerator.reduce(finite.float(), 'mean') < 1        # all processes say the same

        if not broken.any():
            return True

        self.skipped += 1
        step, loss, grad_norm, details = steps[broken.tolist().index(True)]
        found = ', '.join(f'{name} is {float(value)}' for name, value in self.metrics(details)[0].items() if not math.isfinite(value)) or 'the loss is finite: the model or the encoder, backwards'
        message = f'step {step}: loss {loss.item():.4g}, gradient norm {grad_norm.item():.4g}; {found}'

        if self.skipped > self.max_skipped_steps:
            good = next((folder for folder in reversed(self.checkpoints()) if not damage(folder)), 'none')
            raise FloatingPointError(f'{message}. Stopped; the last good checkpoint is {good}')

        warnings.warn(f'{message}. Left out, {self.skipped} of at most {self.max_skipped_steps}')
        return False

    def train(self):
        """Train up to num_train_steps, from the step that was resumed if any. Writes metrics, pictures and checkpoints, and seeds the process's random numbers, on the way.

        Raises FloatingPointError for non-finite losses or gradients, naming the step, what went wrong, and the last good checkpoint.
        """
        batches, accelerator = self.batches(), self.accelerator
        ask_every = 1 if accelerator.num_processes == 1 else 10         # several processes tell each other of signals every tenth step
        accelerator.init_trackers('drifting-pytorch', config = {name: str(value) for name, value in self.config.items()})

        if accelerator.is_main_process:
            device = torch.cuda.get_device_name() if accelerator.device.type == 'cuda' else str(accelerator.device)
            hardware = dict(device = device, processes = accelerator.num_processes, cpus = os.cpu_count(), platform = platform.platform())
            failed, revision = subprocess.getstatusoutput('git rev-parse HEAD')     # of the working directory, if that is a repository
            start = dict(step = self.step, time = time.strftime('%Y-%m-%d %H:%M:%S'), versions = versions(), git = None if failed else revision, hardware = hardware, precision = accelerator.mixed_precision, config = self.config)

            with open(self.results_folder / 'starts.jsonl', 'a') as file:
                file.write(json.dumps(start, default = str) + '\n')

        if self.step == 0:
            self.before_training(batches)

        self.clock, stopped = (time.perf_counter(), self.step), False

        with interruptions() as received, tqdm(initial = self.step, total = self.num_train_steps, disable = self.hide_bar) as bar:
            while self.step < self.num_train_steps and not (stopped := self.step % ask_every == 0 and any(gather_object(received))):
                logs, result = self.logs_this_step, self.train_step(batches)
                bar.update()

                if logs or len(self.unchecked) >= 10 or self.step == self.num_train_steps:
                    self.check_finite()

                if logs:
                    self.log(bar, *result)

                for every, action in ((self.sample_every, self.save_pictures), (self.save_every, self.save)):
                    if every > 0 and (self.step % every == 0 or self.step == self.num_train_steps):
                        action()

            if stopped and self.step > 0:
                self.save()
                accelerator.print(f'stopped by a signal, saved at step {self.step}')

        for tracker in accelerator.trackers:
            tracker.finish()

        if received:
            signal.raise_signal(received[0])

    def log(self, bar, loss, details, grad_norms):
        """A line of metrics.jsonl, the trackers, the progress bar."""
        metrics, on_bar = self.metrics(details)
        metrics = dict(loss = loss, **grad_norms, **metrics)

        device = self.accelerator.device
        values = self.accelerator.reduce(stack([torch.as_tensor(value, dtype = torch.float32, device = device).detach() for value in metrics.values()]), 'mean')
        metrics = dict(step = self.step, **dict(zip(metrics, values.tolist())), learning_rate = self.optimizer.param_groups[0]['lr'])

        # of the machine, not of the run: these differ when it is repeated

        (before, first_step), self.clock = self.clock, (time.perf_counter(), self.step)
        samples = (self.step - first_step) * self.samples_per_step * self.gradient_accumulation_steps
        memory = torch.cuda.max_memory_allocated(device) if device.type == 'cuda' else psutil.Process().memory_info().rss
        metrics |= {'machine/samples_per_second': samples / (self.clock[0] - before), 'machine/memory_mib': memory / 2 ** 20}

        self.accelerator.log(metrics, step = self.step)

        if self.accelerator.is_main_process:
            with open(self.results_folder / 'metrics.jsonl', 'a') as file:
                file.write(json.dumps(metrics) + '\n')

            bar.set_postfix({name: f'{metrics[name]:.4g}' for name in on_bar})

    @torch.no_grad()
    def save_pictures(self):
        has_images = exists(self.to_image) or (len(self.sample_shape) == 3 and self.sample_shape[0] in (1, 3))
        main = self.accelerator.is_main_process

        if has_images and (main or self.accelerator.is_fsdp2):         # a sharded model needs every process
            samples, rows = self.pictures()
            images = self.to_image(samples) if exists(self.to_image) else (samples + 1) / 2

            path = self.results_folder / 'samples' / f'step-{self.step:08d}.png'
            path.parent.mkdir(exist_ok = True)
            image_grid(rearrange(images, '(rows cols) ... -> rows cols ...', rows = rows)).save(path) if main else None

    def checkpoints(self):
        """The folders of this run's checkpoints, oldest first."""
        return sorted((self.results_folder / 'checkpoints').glob('step-*'))

    def save(self):
        """Write results_folder/checkpoints/step-..., and keep the newest keep_checkpoints. Until it is complete nothing has that name."""
        self.check_finite()
        accelerator, root = self.accelerator, self.results_folder / 'checkpoints'
        folder, unfinished = root / f'step-{self.step:08d}', root / f'unfinished-{self.step:08d}'

        # the main process alone is given states of models and optimizer, each has a queue

        moments = get_optimizer_state_dict(self.unwrapped, self.optimizer.optimizer, options = FULL_STATE).get('state', {})
        own_queue = f'queue-{accelerator.process_index}'
        states = {
            'model': get_model_state_dict(self.unwrapped, options = FULL_STATE),
            'ema': get_model_state_dict(self.ema.ema_model, options = FULL_STATE),
            'optimizer': {f'{name}.{kind}': t for name, kinds in moments.items() for kind, t in kinds.items()},
            own_queue: {f'{name}.{key}': t for name, queue in self.queues.items() for key, t in queue.state_dict().items()}
        }

        def in_all(work):
            """Every process does its part; an error of one is an error of all. Returns what the parts returned."""
            try:
                result, problem = work(), None
            except (OSError, SafetensorError) as error:
                result, problem = None, str(error)

            results, problems = zip(*gather_object([(result, problem)]))
            problem = next(filter(exists, problems), None)

            if exists(problem):
                shutil.rmtree(unfinished, ignore_errors = True)
                raise OSError(f'the checkpoint of step {self.step} could not be written: {problem}. The last one is {[None, *self.checkpoints()][-1]}')

            return results

        def write():
            unfinished.mkdir(parents = True, exist_ok = True)
            return [save_tensors(state, unfinished / f'{name}.safetensors', copy = name != own_queue) for name, state in states.items() if state]

        def complete(files):
            scaler = accelerator.scaler.state_dict() if exists(accelerator.scaler) else None
            state = dict(step = self.step, samples_read = self.samples_read, skipped = self.skipped, num_processes = accelerator.num_processes, scaler = scaler)

            (unfinished / 'config.json').write_text(json.dumps(getattr(self.unwrapped, '_hub_mixin_config', None)))
            (unfinished / 'manifest.json').write_text(json.dumps(dict(state, versions = versions(), config = self.config, files = files), indent = 1, default = str))

            for path in (*unfinished.iterdir(), unfinished):
                flush(path)

            discard(folder)
            unfinished.rename(folder)
            flush(root)

            for old in self.checkpoints()[:-self.keep_checkpoints]:
                discard(old)

        files = dict(line for lines in in_all(write) for line in lines)
        in_all(lambda: complete(files) if accelerator.is_main_process else None)

    def resume(self):
        """Go on from resume_from_checkpoint, if that was given and is there."""
        given, main, metrics = self.resume_from_checkpoint, self.accelerator.is_main_process, self.results_folder / 'metrics.jsonl'
        latest = given == 'latest'

        for folder in reversed(self.checkpoints()) if latest else [Path(given)] if exists(given) else []:
            problem = next(filter(exists, gather_object([damage(folder, self.accelerator.process_index)])), None)

            if not exists(problem):
                self.load(folder)

                for newer in self.checkpoints() if main else []:        # of a run that was left for one of its earlier steps: they neither count nor are removed
                    if newer.name > f'step-{self.step:08d}':
                        discard(aside := newer.with_name(f'left-{newer.name}'))
                        newer.rename(aside)

                self.accelerator.wait_for_everyone()
                break

            check(latest, f'{folder} cannot be used: {problem}')
            warnings.warn(f'{folder} cannot be used: {problem}. Going on from an earlier one, if there is any') if main else None

        # what was logged after the checkpoint will be logged again; a line cut short by a crash goes too

        def stays(line):
            with suppress(ValueError, TypeError, KeyError):
                return line.endswith('\n') and json.loads(line)['step'] <= self.step

        if main and metrics.is_file():
            lines, trimmed = metrics.read_text().splitlines(keepends = True), metrics.with_suffix('.trimmed')
            trimmed.write_text(''.join(filter(stays, lines)))
            trimmed.replace(metrics)

    def load(self, folder):
        accelerator, manifest = self.accelerator, json.loads((folder / 'manifest.json').read_text())
        check(manifest['num_processes'] == accelerator.num_processes, f'the checkpoint is of {manifest["num_processes"]} processes, these are {accelerator.num_processes}: each has a queue of its own')

        own, before = json.loads(json.dumps(self.config, default = str)), manifest['config']
        changed = [f'{name} {before[name]} -> {value}' for name, value in own.items() if name in before and value != before[name] and name not in FREE]

        if changed and accelerator.is_main_process:
            warnings.warn(f'the run goes on with other settings than it had: {", ".join(changed)}')

        load_checked(self.unwrapped, read_tensors(folder / 'model.safetensors'))
        load_checked(self.ema.ema_model, read_tensors(folder / 'ema.safetensors'))

        if self.queues:
            saved = read_tensors(folder / f'queue-{accelerator.process_index}.safetensors')
            for name, queue in self.queues.items():
                queue.load_state_dict({key.removeprefix(f'{name}.'): t for key, t in saved.items() if key.startswith(f'{name}.')})

        optimizer = {**get_optimizer_state_dict(self.unwrapped, self.optimizer.optimizer), 'state': {}}

        for name, t in read_tensors(folder / 'optimizer.safetensors').items():
            name, kind = name.rsplit('.', 1)
            optimizer['state'].setdefault(name, {})[kind] = t

        set_optimizer_state_dict(self.unwrapped, self.optimizer.optimizer, optimizer, options = TO_LOAD)

        self.step, self.samples_read, self.skipped = manifest['step'], manifest['samples_read'], manifest['skipped']

        if exists(accelerator.scaler) and manifest['scaler']:
            accelerator.scaler.load_state_dict(manifest['scaler'])

    def save_pretrained(self, folder):
        """Write the averaged model into a folder, for its from_pretrained. On every process, as it may be sharded."""
        check(isinstance(self.unwrapped, Pretrained), 'save_pretrained is for the models of this package: of others save trainer.ema.ema_model.state_dict()')
        state_dict, folder = get_model_state_dict(self.ema.ema_model, options = FULL_STATE), Path(folder)

        if self.accelerator.is_main_process:
            folder.mkdir(parents = True, exist_ok = True)
            save_tensors(state_dict, folder / 'model.safetensors')
            (folder / 'config.json').write_text(json.dumps(self.unwrapped._hub_mixin_config))

# settings that a resumed run may change and still repeat what it would have been

FREE = (
    'num_train_steps', 'num_workers', 'max_skipped_steps', 'log_with', 'log_every', 'sample_every', 'save_every', 'keep_checkpoints', 'progress_bar',
    'results_folder', 'resume_from_checkpoint', 'overwrite'
)

class Trainer(BaseTrainer):
    """Trains a generator on a map-style dataset of (sample, label) (A.8). The defaults are the paper's ablation setting; keyword arguments of BaseTrainer too.

    model: any module with the call model(noise, labels, alpha, styles), an attribute num_classes (None: unconditional, labels are ignored)
        and, if noise does not have the shape of a sample, noise_shape.
    loss_fn: any callable (gen, pos, uncond, alpha) -> (loss, Breakdown), see FeatureDriftLoss; None compares raw samples.

    num_groups, num_gen, num_pos, num_uncond: class groups per step, and generated, positive and unconditional samples per group.
    group_chunk_size: class groups at a time, for a step that does not fit into memory: the same gradient for twice to three times the computation.
    alpha_range, alpha_power, no_cfg_frac: the distribution of the guidance scale, see sample_alpha; (1, 1) trains without guidance.
    push_size: real samples read per step by every process (release); class_queue_size, uncond_queue_size: how many stay, see SampleQueue; queue_device, queue_dtype: where, and as what
        (by default on the accelerator, in float32; 'cpu' and torch.float16 for a thousand classes of large pictures).

    Several processes share the groups; the loss is that of all of them. Each has a queue of its own, of the real samples that it reads, and
    takes the labels of its groups from its newest ones. A run on fewer processes than the paper's wants a larger push_size, see the README.
    Raises ValueError, before the first step, for settings that contradict each other, a dataset that does not fit them, classes with too few samples.
    """

    shares_batch = False

    def __init__(
        self, model, loss_fn, dataset, *,
        num_groups = 64, num_gen = 64, num_pos = 64, num_uncond = 16, group_chunk_size = None,
        alpha_range = (1., 4.), alpha_power = 3., no_cfg_frac = 0.,
        push_size = 64, class_queue_size = 128, uncond_queue_size = 1000, queue_device = None, queue_dtype = None,
        **kwargs
    ):
        config = settings(locals())

        for name in ('num_groups', 'num_gen', 'num_pos', 'push_size', 'group_chunk_size'):
            check(default(config[name], 1) > 0, f'{name} must be above 0, got {config[name]}')

        check(num_gen > 1, 'num_gen must be above 1: a generated sample alone has no others to be pushed away from, it would not move')
        super().__init__(model, dataset, batch_size = push_size, config = config, **kwargs)

        # without classes, or at alpha = 1 throughout, there is nothing to guide away from

        check(1 <= alpha_range[0] <= alpha_range[1] < math.inf, f'alpha_range must be 1 <= low <= high, got {alpha_range}')
        check(0 <= no_cfg_frac <= 1, f'no_cfg_frac must be between 0 and 1, got {no_cfg_frac}')
        guided = exists(self.num_classes) and alpha_range[1] > 1
        check(not guided or 0 < num_uncond <= len(dataset), f'guidance needs 1 to {len(dataset)} (the dataset) unconditional samples, got num_uncond = {num_uncond}; alpha_range = (1, 1) trains without')

        low, high = alpha_range if guided else (1., 1.)
        self.alpha_kwargs = dict(low = low, high = high, power = alpha_power, no_cfg_frac = no_cfg_frac)

        world, device = self.accelerator.num_processes, self.accelerator.device
        check(num_groups >= world, f'num_groups {num_groups} cannot be shared by {world} processes')
        check(not exists(group_chunk_size) or self.accelerator.mixed_precision != 'fp16', 'group_chunk_size does without a loss scale, which fp16 needs: use bf16')
        check(not exists(group_chunk_size) or not self.accelerator.is_fsdp2 or num_groups % world == 0, f'a sharded model in chunks needs the same number of groups in all {world} processes, got num_groups = {num_groups}')
        check(num_pos <= class_queue_size, f'num_pos = {num_pos} does not fit into class_queue_size = {class_queue_size}')
        check(num_uncond <= uncond_queue_size or not guided, f'num_uncond = {num_uncond} does not fit into uncond_queue_size = {uncond_queue_size}')

        kwargs = dict(device = default(queue_device, device), dtype = queue_dtype)
        self.num_uncond, self.queues['positives'] = num_uncond if guided else 0, SampleQueue(default(self.num_classes, 1), size = class_queue_size, **kwargs)

        if guided:
            self.queues['unconditional'] = SampleQueue(size = uncond_queue_size, **kwargs)

        self.loss_fn = loss_fn = loss_fn if exists(loss_fn) else FeatureDriftLoss()

        if isinstance(loss_fn, Module):
            loss_fn.to(device, memory_format = torch.channels_last if device.type == 'cuda' else torch.preserve_format)

        if isinstance(loss_fn, FeatureDriftLoss):
            loss_fn.group_chunk_size = default(group_chunk_size, loss_fn.group_chunk_size)
            loss_fn.compile() if self.compile else None

        self.samples_per_step = num_groups * num_gen
        self.noise_shape, self.collapsed = tuple(getattr(model, 'noise_shape', self.sample_shape)), False
        self.resume()

    @classmethod
    def from_preset(cls, name, model, loss_fn, dataset, **kwargs):
        """With the settings of a column of Table 8, see TRAINER_PRESETS; keyword arguments override them."""
        check(name in TRAINER_PRESETS, f'unknown preset {name!r}, expected one of {", ".join(TRAINER_PRESETS)}')
        return cls(model, loss_fn, dataset, **{**TRAINER_PRESETS[name], **kwargs})

    def push(self, batches):
        """The next real samples of this process go into its queues. Returns their labels [n]."""
        samples, labels = self.read(batches)

        for queue in self.queues.values():
            queue.push(samples, labels if queue.num_classes > 1 else None)

        return labels.long()

    def before_training(self, batches):
        """Read until every class has enough positives in every process, each at most as many samples as the data have."""
        num_pos = self.num_pos

        for _ in tqdm(range(math.ceil(len(self.dataset) / self.read_here)), desc = 'filling the queue', leave = False, disable = self.hide_bar):
            self.push(batches)
            held = cat([queue.filled for queue in self.queues.values()])
            filled = self.accelerator.gather(rearrange(held, 'n -> 1 n').to(self.accelerator.device)).amin(dim = 0).tolist()
            short = {label: num for label, num in enumerate(filled[:self.queues['positives'].num_classes]) if num < num_pos}

            if not short and (self.num_uncond == 0 or filled[-1] >= self.num_uncond):
                return

        some = ', '.join(f'{label}: {num}' for label, num in islice(short.items(), 10))
        raise ValueError(f'one pass over the data left {len(short)} classes with fewer than num_pos = {num_pos} samples (class: samples): {some}. Lower num_pos, or leave them out')

    def mine(self, t):
        """The part of this process of what was drawn for all groups."""
        return t.tensor_split(self.accelerator.num_processes)[self.accelerator.process_index]

    def draw(self, newest_labels, micro_step):
        """labels [c], alpha [c], pos [c p ...], uncond [c u ...] or None, of this process's groups."""
        key, device = (self.seed, self.step, micro_step), self.accelerator.device
        generator = seeded(*key, 'queue', self.accelerator.process_index)
        alpha = self.mine(sample_alpha(self.num_groups, generator = seeded(*key), **self.alpha_kwargs))

        # release: labels of the process's newest real samples, without replacement (in turns, where more groups than samples are asked for)

        turns = math.ceil(len(alpha) / len(newest_labels))
        order = cat([torch.randperm(len(newest_labels), generator = generator) for _ in range(turns)])[:len(alpha)]
        labels = newest_labels[order]

        pos = self.queues['positives'].draw(labels, self.num_pos, generator)
        uncond = self.queues['unconditional'].draw(torch.zeros_like(labels), self.num_uncond, generator) if self.num_uncond > 0 else None

        labels, alpha = (t.to(device, non_blocking = True) for t in (labels, alpha))
        return (labels, alpha, *(t.to(device, non_blocking = True).float() if exists(t) else None for t in (pos, uncond)))

    def inputs(self, labels, alpha, micro_step, which = 'gen'):
        """What the generator is called with, for each of this process's groups: noise and styles depend on the step and the group alone."""
        g, device = self.num_gen, self.accelerator.device
        generators = [seeded(self.seed, self.step, micro_step, which, group, device = device) for group in self.mine(torch.arange(self.num_groups)).tolist()]

        noise = stack([torch.randn(g, *self.noise_shape, generator = generator, device = device) for generator in generators])
        styles = stack([self.unwrapped.draw_styles(g, generator) for generator in generators]) if hasattr(self.unwrapped, 'draw_styles') else None
        return noise, labels if exists(self.num_classes) else None, alpha, styles

    def generate(self, model, noise, labels, alpha, styles):
        """Generated samples [c g ...] of noise [c g ...], labels [c], alpha [c], styles [c g s]."""
        c, g = noise.shape[:2]
        labels, alpha = (repeat(t, 'c -> (c g)', g = g) if exists(t) else None for t in (labels, alpha))
        noise, styles = (rearrange(t, 'c g ... -> (c g) ...') if exists(t) else None for t in (noise, styles))

        gen = model(noise, labels, alpha, styles)
        check(gen.shape[1:] == self.sample_shape, f'the generator returns samples of shape {tuple(gen.shape[1:])}, those of the dataset have {self.sample_shape}')
        return rearrange(gen, '(c g) ... -> c g ...', g = g)

    def replays(self, inputs):
        """The inputs of the generator in chunks of groups; each chunk draws the same dropout whenever it comes again."""
        sizes = default(self.group_chunk_size, len(inputs[0]))
        parts = zip(*(t.split(sizes) if exists(t) else (None for _ in range(len(inputs[0]))) for t in inputs))

        for i, part in enumerate(parts):
            self.seed_model(i)
            yield part

    def samples_of(self, inputs):
        """Generated samples [c g ...] without a graph."""
        with torch.no_grad():
            return cat([self.generate(self.unwrapped, *part) for part in self.replays(inputs)])

    def backward(self, batches, micro_step, sync):
        """The gradient of one micro step. In chunks: samples without a graph, the loss's gradient on them, then chunk by chunk from there to the weights."""
        labels, alpha, pos, uncond = self.draw(self.push(batches), micro_step)
        inputs, kwargs = self.inputs(labels, alpha, micro_step), {}

        if isinstance(self.loss_fn, FeatureDriftLoss):
            kwargs['diagnostics'] = self.logs_this_step

        if getattr(self.loss_fn, 'needs_neg', False):
            kwargs['neg'] = self.samples_of(self.inputs(labels, alpha, micro_step, 'neg'))

        def loss_of(gen):
            with self.accelerator.autocast():
                result = self.loss_fn(gen, pos, uncond, alpha, **kwargs)

            check(isinstance(result, tuple) and isinstance(result[-1], Breakdown), f'loss_fn must return (loss, Breakdown), it returns {type(result).__name__}: Breakdown({{}}, {{}}) will do')
            loss, breakdown = result
            spread = [t.detach().float().std(dim = 1, correction = 0).norm() for t in (gen, pos)] if self.logs_this_step and self.num_pos > 1 else None
            share = len(labels) * self.accelerator.num_processes / self.num_groups          # processes may have unequal numbers of groups
            breakdown = breakdown._replace(losses = {name: t.detach() for name, t in breakdown.losses.items()})
            return loss, loss * share / self.gradient_accumulation_steps, StepDetails(breakdown, alpha, spread[0] / spread[1] if exists(spread) else None)

        def synced(last):
            return nullcontext() if sync and last else self.accelerator.no_sync(self.model)

        if not exists(self.group_chunk_size):
            with synced(True):
                gen, = (self.generate(self.model, *part) for part in self.replays(inputs))
                loss, weighted, details = loss_of(gen)
                self.accelerator.backward(weighted)

            return loss.detach(), details

        gen = self.samples_of(inputs).requires_grad_()
        loss, weighted, details = loss_of(gen)
        grads = torch.autograd.grad(weighted, gen)[0].split(self.group_chunk_size)

        for i, (part, grad) in enumerate(zip(self.replays(inputs), grads), 1):
            with synced(i == len(grads)):
                self.accelerator.backward((self.generate(self.model, *part) * grad).sum())

        return loss.detach(), details

    def metrics(self, details):
        """On the bar goes what tells progress: the drift before normalisation, per temperature, averaged over features."""
        breakdown, alpha, spread = details
        metrics = {'alpha/mean': alpha.mean(), 'alpha/max': alpha.max(), 'alpha/share_of_1': (alpha == 1).float().mean()}
        metrics |= {'spread': spread} if exists(spread) else {}

        for name, stats in breakdown.stats.items():
            metrics |= {f'feature/{name}/loss': breakdown.losses[name], f'feature/{name}/scale': stats.scale}

            for kind in ('drift_rms', 'neighbors', 'uncond_share', 'potential'):
                metrics |= {f'feature/{name}/{kind}/{temperature}': value for temperature, value in getattr(stats, kind).items()}

        every = [stats.drift_rms for stats in breakdown.stats.values()]
        drift = {f'drift/{temperature}': stack([rms[temperature] for rms in every]).mean() for temperature in (every[0] if every else ())}
        return {**metrics, **drift}, (*drift, 'loss')

    def log(self, bar, loss, details, grad_norms):
        super().log(bar, loss, details, grad_norms)

        if not self.collapsed and exists(details.spread) and self.step >= max(self.lr_warmup_steps, self.num_train_steps // 5) and details.spread < 0.1:
            self.collapsed = True
            warnings.warn(f'step {self.step}: the generated samples of a class spread {float(details.spread):.2g} times as far as the real ones, they collapse. Small data: affinity_floor = 0.; see "Small data" in the README')

    def sample(self, labels = None, **kwargs):
        """Samples of the averaged model, see sample_from."""
        return sample_from(self.ema.ema_model, self.noise_shape, labels, **kwargs)

    def pictures(self):
        """Ten samples each of the first ten classes, always from the same noise."""
        rows = min(10, default(self.num_classes, 10))
        which = dict(labels = torch.arange(rows).repeat_interleave(10)) if exists(self.num_classes) else dict(num_samples = rows * 10)
        return self.sample(**which, seed = self.seed), rows

class StepDetails(NamedTuple):
    breakdown: Breakdown
    alpha: Tensor               # guidance scales of the step [c]
    spread: Tensor | None       # deviation of generated samples within their groups, in that of the positives: towards 0 they collapse

# Table 8, by the names of the generator's presets: what differs from the ablation. Where the paper and the release differ the release's value stands

LARGE = dict(learning_rate = 4e-4, lr_warmup_steps = 10_000, num_train_steps = 200_000, num_groups = 128, num_uncond = 32, push_size = 128)
PIXEL = dict(num_train_steps = 100_000, num_pos = 128, alpha_power = 5., queue_device = 'cpu', queue_dtype = torch.float16)

TRAINER_PRESETS = {
    'ablation': {},                                                                 # the defaults of Trainer
    'B/2': dict(LARGE, weight_decay = 0., alpha_power = 5.),                        # paper: num_pos = 128, and one of four ema_decay
    'L/2': dict(LARGE, no_cfg_frac = 0.5, push_size = 64),
    'B/16': {**LARGE, **PIXEL, 'learning_rate': 2e-4},
    'L/16': {**LARGE, **PIXEL},
}

class MAETrainer(BaseTrainer):
    """Pretrains a LatentMAE on a map-style dataset of (sample, label) (A.3); keyword arguments of BaseTrainer too. The encoder to use is trainer.ema.ema_model.

    batch_size: the paper's is 8192, with its learning rate of 4e-3; smaller batches want a smaller one.
    finetune_steps, cls_weight, cls_warmup_steps: in the last finetune_steps the weight lambda of the classification rises linearly to cls_weight.
    The pictures are of samples, of what is left of them, and of reconstructions.
    """

    def __init__(
        self, model, dataset, *,
        batch_size = 8192, learning_rate = 4e-3, lr_warmup_steps = 4_000, ema_decay = 0.9995,
        finetune_steps = 0, cls_weight = 0.1, cls_warmup_steps = 1_000,
        **kwargs
    ):
        config = settings(locals())
        super().__init__(model, dataset, batch_size = batch_size, learning_rate = learning_rate, lr_warmup_steps = lr_warmup_steps, ema_decay = ema_decay, config = config, **kwargs)
        check(finetune_steps == 0 or exists(model.num_classes), 'finetune_steps needs a model with a classifier: set num_classes')
        self.finetune_start = self.config['finetune_start'] = self.num_train_steps - finetune_steps if finetune_steps > 0 else None

        if self.accelerator.is_fsdp2:
            torch.distributed.fsdp.register_fsdp_forward_method(self.ema.ema_model, 'reconstruct')

        self.resume()

    def cls_weight_at(self, step):
        """lambda, 0 in the first of the finetune_steps (release)."""
        return self.cls_weight * min(1., max(0, step - self.finetune_start) / max(1, self.cls_warmup_steps)) if exists(self.finetune_start) else 0.

    def backward(self, batches, micro_step, sync):
        (samples, labels), device = self.read(batches), self.accelerator.device
        check_range('real samples', samples, -math.inf)

        labels = checked_labels(labels, self.num_classes, len(labels)).to(device, non_blocking = True) if exists(self.num_classes) else None
        samples = samples.to(device, non_blocking = True)
        mask = self.unwrapped.draw_mask(samples, seeded(self.seed, self.step, micro_step, self.accelerator.process_index, device = samples.device))

        with nullcontext() if sync else self.accelerator.no_sync(self.model):
            loss, details = self.model(samples, labels, cls_weight = self.cls_weight_at(self.step), mask = mask)
            self.accelerator.backward(loss / self.gradient_accumulation_steps)

        return loss.detach(), MAEBreakdown(*(t.detach() for t in details))

    def metrics(self, details):
        return {**details._asdict(), 'cls_weight': self.cls_weight_at(self.step - 1)}, ('reconstruction', 'accuracy')

    def pictures(self):
        """Of the first ten samples: as they are, what is left under the mask, the reconstruction of the rest."""
        model = self.ema.ema_model.eval()
        samples = stack([self.dataset[i, i][0] for i in range(min(10, len(self.dataset)))]).to(self.accelerator.device)
        mask = model.draw_mask(samples, seeded(self.seed, 'picture', device = samples.device))
        dropped = model.dropped(mask)

        left = samples * (1 - dropped)
        restored = left + model.reconstruct(samples, mask)[0] * dropped
        model.reshard() if self.accelerator.is_fsdp2 else None
        return cat((samples, left, restored)), 3

# ───────────────────────────────────────────────────────────────────────────────
# 8. published weights - reading the release's artifacts
# ───────────────────────────────────────────────────────────────────────────────

def read_release_artifact(metadata, weights):
    """The model config and the parameters, {'a/b/c': tensor}, of a published artifact: its files metadata.json and ema_params.msgpack."""
    try:
        import msgpack
    except ImportError as error:
        raise ImportError("the release's weights are msgpack files: pip install 'drifting-pytorch[pretrained]'") from error

    check(metadata.is_file() and weights.is_file(), f'{weights.parent} is not an artifact of the release: expected metadata.json and ema_params.msgpack')

    def to_tensor(code, data):      # extension type 1 is an array: (shape, dtype name, bytes)
        shape, dtype, raw = msgpack.unpackb(data, max_bin_len = len(data))
        check(code == 1 and isinstance(getattr(torch, dtype, None), torch.dtype), f'unknown array type {code}, {dtype!r}')
        return torch.frombuffer(bytearray(raw), dtype = getattr(torch, dtype)).reshape(shape)

    def flatten(tree, *path):
        name = '/'.join(path)

        if torch.is_tensor(tree):
            return {name: tree}

        check(isinstance(tree, dict), f'expected nested maps of arrays, found {type(tree).__name__} at {name or "the top"}')

        if '__msgpack_chunked_array__' in tree:     # arrays above 1 GiB come in pieces; lists may come as maps {'0': ..., '1': ...}
            shape, chunks = (value if isinstance(value, list) else [value[str(i)] for i in range(len(value))] for value in (tree['shape'], tree['chunks']))
            return {name: cat([chunk.flatten() for chunk in chunks]).reshape(shape)}

        return {name: t for key, branch in tree.items() for name, t in flatten(branch, *path, key).items()}

    try:
        with open(weights, 'rb') as file:           # array by array, never the whole file
            unpacker = msgpack.Unpacker(file, ext_hook = to_tensor, max_buffer_size = 2 ** 31 - 1)
            params = flatten(unpacker.unpack())
            check(not file.read(1) and unpacker.tell() == weights.stat().st_size, 'there is something behind the last array')
    except (ValueError, TypeError, RuntimeError, KeyError, EOFError, msgpack.UnpackException) as error:
        raise ValueError(f'{weights} is not a msgpack file of arrays: {error or "it ends too early"}') from error

    return json.loads(metadata.read_text())['model_config'], params

def translated(params, rules):
    """The parameters under our names and in PyTorch's layout. params is emptied on the way, so that none is held twice."""
    state = {}

    for path in list(params):
        t = params.pop(path)
        t = rearrange(t, '... i o -> o i ...') if path.endswith('/kernel') else t       # (in, out), or (h, w, in, out)
        state[renamed(path, (*rules, (r'(kernel|scale|embedding)$', 'weight'), ('/', '.')))] = t.float().contiguous()

    return state

# what the release's reader takes where a config does not say it

MAE_DEFAULTS = dict(base_channels = 64, in_channels = 3, input_patch_size = 1, num_classes = 1000, patch_size = 4, layers = (2, 2, 2, 2))

GENERATOR_DEFAULTS = dict(
    num_classes = 1001, noise_classes = 0, noise_coords = 1, input_size = 32, in_channels = 3, n_cls_tokens = 0, patch_size = 2,
    hidden_size = 1152, depth = 28, num_heads = 16, mlp_ratio = 4., use_qknorm = False, use_swiglu = False, use_rope = False, use_rmsnorm = False,
    use_bf16 = False, attn_fp32 = True
)

def mae_from_release(config, params):
    """The arguments and the state dict of a LatentMAE from the release's config and parameters."""
    state = translated(params, [
        (r'^encoder/conv1', 'stem/0'), (r'^encoder/gn1', 'stem/1'), (r'^encoder/(layer\d)_norm', r'norms/\1'), (r'^encoder/stages_(\d+)/layers_(\d+)', r'stages/\1/\2'),
        (r'^decoder/(up\d+)', r'ups/\1'), (r'^decoder/head', 'to_pixels'), (r'^decoder/bridge', 'bridge'), (r'^fc', 'to_logits'),
        (r'/(conv|gn)(\d)', r'/conv\2/\1'), (r'/proj_(conv|gn)', r'/shortcut/\1'), (r'/conv/', '/0/'), (r'/gn/', '/1/'), (r'concat_norm_fn', 'norm')
    ])

    config = {**MAE_DEFAULTS, **config}
    names = dict(dim = 'base_channels', channels = 'in_channels', patch_size = 'input_patch_size', num_classes = 'num_classes', mask_patch_size = 'patch_size', layers = 'layers')
    return {ours: config[theirs] for ours, theirs in names.items()}, state

def generator_from_release(config, params):
    """The arguments and the state dict of a DriftingGenerator from the release's config and parameters."""
    config = {**GENERATOR_DEFAULTS, **config}

    for option in ('use_qknorm', 'use_swiglu', 'use_rope', 'use_rmsnorm'):
        check(config[option], f'the published generator has {option} = False, which this generator does not offer')

    for name, same in (('out_channels', 'in_channels'), ('cond_dim', 'hidden_size')):
        check(config.get(name, config[same]) == config[same], f'the published generator has {name} = {config.get(name)} and {same} = {config[same]}, here they are the same')

    num_styles = config['noise_coords'] if config['noise_classes'] > 0 else 0

    state = translated(params, [
        (r'/Dense_0', ''), (r'^LightningDiT_0/blocks_', 'blocks/'), (r'^LightningDiT_0/', 'dit/'), (r'^Embed_0', 'class_embed'), (r'^noise_embeds_', 'style/'),
        (r'^TimestepEmbedder_0/TorchLinear_0', 'alpha_embed/0'), (r'^TimestepEmbedder_0/TorchLinear_1', 'alpha_embed/2'), (r'^RMSNorm_0', 'alpha_embed/3'),
        (r'^dit/TorchLinear_0', 'patch_embed'), (r'^dit/TorchLinear_1', 'register_proj'),
        (r'^dit/FinalLayer_0/TorchLinear_0', 'final_modulation/linear'), (r'^dit/FinalLayer_0/TorchLinear_1', 'to_patch'), (r'^dit/FinalLayer_0/RMSNorm_0', 'final_norm'),
        (r'Attention_0/TorchLinear_0', 'qkv'), (r'Attention_0/TorchLinear_1/kernel', 'attn/to_out/weight'), (r'Attention_0/TorchLinear_1/bias', 'out_bias'), (r'Attention_0/(\w)_norm', r'attn/\1_rmsnorm'),
        (r'SwiGLUFFN_0/TorchLinear_0', 'gate'), (r'SwiGLUFFN_0/TorchLinear_1', 'up'), (r'SwiGLUFFN_0/TorchLinear_2', 'ff/ff/2'),
        (r'TorchLinear_0', 'modulation/linear'), (r'RMSNorm_0', 'attn_norm'), (r'RMSNorm_1', 'ff_norm')
    ])

    def take(name):
        check(name in state, f'the published weights lack the parameter that becomes {name}')
        return state.pop(name)

    def interleave(t, heads):   # the release rotates the first half of a head with the second, x-transformers neighbours
        return rearrange(t, '(h two d) ... -> (h d two) ...', h = heads, two = 2)

    heads = config['num_heads']
    state['style_embed.weight'] = cat([torch.empty(0, config['hidden_size']), *(take(f'style.{i}.weight') for i in range(num_styles))])
    state['pos_embed'], state['register_embed'] = (rearrange(take(f'dit.{name}'), '1 n d -> n d') for name in ('pos_embed', 'cls_embed'))

    for block in (f'blocks.{i}' for i in range(config['depth'])):
        for name, weight, bias in zip('qkv', take(f'{block}.qkv.weight').chunk(3), take(f'{block}.qkv.bias').chunk(3)):
            state[f'{block}.attn.to_{name}.weight'], state[f'{block}.{name}_bias'] = (t.clone() if name == 'v' else interleave(t, heads) for t in (weight, bias))

        for name in (f'{block}.attn.q_rmsnorm.weight', f'{block}.attn.k_rmsnorm.weight'):
            state[name] = interleave(take(name), 1)

        for kind in ('weight', 'bias'):
            state[f'{block}.ff.ff.0.proj.{kind}'] = cat((take(f'{block}.up.{kind}'), take(f'{block}.gate.{kind}')))

    names = dict(
        image_size = 'input_size', channels = 'in_channels', patch_size = 'patch_size', dim = 'hidden_size', depth = 'depth', heads = 'num_heads', num_classes = 'num_classes',
        num_register_tokens = 'n_cls_tokens', ff_mult = 'mlp_ratio'
    )
    arguments = {ours: config[theirs] for ours, theirs in names.items()}

    return dict(
        **arguments, num_style_tokens = num_styles, style_codebook_size = max(1, config['noise_classes']),
        bf16_rotary = config['use_bf16'] and not config['attn_fp32']
    ), state

FROM_RELEASE = dict(mae = mae_from_release, gen = generator_from_release)
