"""The authors' training: eight optimiser steps of the release's own loop, and what their networks start from."""

import json

import numpy as np
import pytest
import torch
from einops import rearrange
from torch.utils.data import TensorDataset

from drifting_pytorch import DriftingGenerator, FeatureDriftLoss, LatentMAE, Trainer, drift_loss
from helpers import REFERENCE, Net, by_the_rule, launch, nchw, relative, write_artifact

# a recorded training

DESCRIPTION = json.loads((REFERENCE / 'train_steps.json').read_text())
ARRAYS = np.load(REFERENCE / 'train_steps.npz')

def parameters(shapes):
    """{path: array} of {path: shape}."""
    return {path: by_the_rule(path, shape).astype(np.float32) for path, shape in shapes.items()}

def read_parameters(folder, params):
    """A generator with these parameters, {path: array}, through a published artifact's layout."""
    return DriftingGenerator.from_pretrained(write_artifact(folder, DESCRIPTION['generator_config'], params))

class Replay(Trainer):
    """Fed with what went into the release's steps."""

    def recorded(self, name):
        return torch.from_numpy(ARRAYS[f'step{self.step}/{name}'])

    def push(self, batches):
        return self.recorded('labels')

    def draw(self, newest_labels, micro_step):
        pos, uncond = (nchw(self.recorded(name).numpy()) for name in ('pos', 'uncond'))
        return newest_labels, self.recorded('alpha'), pos, uncond

    def inputs(self, labels, alpha, micro_step):
        noise = rearrange(self.recorded('noise'), '(c g) h w ch -> c g ch h w', c = len(labels))
        styles = rearrange(self.recorded('styles').long(), '(c g) s -> c g s', c = len(labels))
        return noise, labels, alpha, styles

def replay(folder, **kwargs):
    """The release's run again: the trainer, and loss, gradient norm and learning rate of every step."""
    model = read_parameters(folder / 'generator', parameters(DESCRIPTION['generator_params']))
    mae = write_artifact(folder / 'mae', DESCRIPTION['mae'], parameters(DESCRIPTION['mae_params']))
    encoder = LatentMAE.from_pretrained(mae)

    optimizer, train = DESCRIPTION['config']['optimizer'], DESCRIPTION['config']['train']
    schedule = optimizer['lr_schedule']
    data = TensorDataset(torch.zeros(64, *model.noise_shape), torch.arange(64) % model.num_classes)
    loss_fn = FeatureDriftLoss(encoder, temperatures = train['loss_kwargs']['R_list'])

    trainer = Replay(
        model.train(), loss_fn, data,
        num_train_steps = train['total_steps'],
        num_groups = train['train_batch_size'],
        num_gen = train['forward_dict']['gen_per_label'],
        num_pos = train['pos_per_sample'],
        num_uncond = train['neg_per_sample'],
        push_size = train['push_per_step'],
        learning_rate = schedule['learning_rate'],
        lr_warmup_steps = schedule['warmup_steps'],
        weight_decay = optimizer['weight_decay'],
        betas = (optimizer['adam_b1'], optimizer['adam_b2']),
        max_grad_norm = train['max_grad_norm'],
        ema_decay = train['ema_decay'],
        cpu = True,
        progress_bar = False,
        results_folder = folder / 'results',
        **kwargs
    )

    record = []

    for _ in range(train['total_steps']):
        loss, _, norm = trainer.train_step(None)
        record.append((loss.item(), norm.item(), trainer.optimizer.param_groups[0]['lr']))

    return trainer, np.array(record).T

@pytest.mark.parametrize('kwargs', [{}, dict(group_chunk_size = 3)])
def test_training_follows_the_release(tmp_path, kwargs):
    trainer, (losses, norms, rates) = replay(tmp_path, **kwargs)

    assert np.allclose(losses, ARRAYS['loss'], rtol = 1e-4)
    assert np.allclose(norms, ARRAYS['g_norm'], rtol = 2e-3)
    assert np.allclose(rates, ARRAYS['lr'], rtol = 2e-5)

    # the update since the start, of all parameters together and of the worst one

    start = DriftingGenerator.from_pretrained(tmp_path / 'generator').state_dict()

    for kind, model in (('params', trainer.unwrapped), ('ema', trainer.ema.ema_model)):
        params = {key.removeprefix(f'{kind}/'): ARRAYS[key] for key in ARRAYS.files if key.startswith(f'{kind}/')}
        states = model.state_dict(), read_parameters(tmp_path / kind, params).state_dict()
        ours, theirs = ({name: state[name] - start[name] for name in start} for state in states)

        whole = [torch.cat([t.flatten() for t in update.values()]) for update in (ours, theirs)]
        assert relative(*whole) < 1e-2, kind
        assert max(relative(ours[name], theirs[name]) for name in start) < 0.1, kind

# the first steps: where all samples of a group coincide, and everywhere else, float32 must not lose the gradient

def every_other(t):
    return (torch.arange(t.shape[1]) % 2)[:, None]

def samples_of(regime, d):
    generator = torch.Generator().manual_seed(d)

    def draw(*shape):
        return torch.randn(*shape, d, generator = generator, dtype = torch.float64)

    gen, pos, uncond = draw(6, 32), draw(6, 24) + 1, draw(6, 8)

    if regime == 'coincident':
        gen = (0 * gen).add(gen[:, :1] / 10)
    elif regime == 'nearly coincident':
        gen = gen[:, :1] + 1e-3 * gen
    elif regime == 'clustered':
        gen, pos, uncond = (t / 10 + t[:, :1].sign() * every_other(t) for t in (gen, pos, uncond))
    elif regime == 'far away':
        gen, pos, uncond = (t + 30 for t in (gen, pos, uncond))
    elif regime == 'tiny':
        gen, pos, uncond = (1e-3 * t for t in (gen, pos, uncond))

    return [t.float() for t in (gen, pos, uncond)]

@pytest.mark.parametrize('regime', ['coincident', 'nearly coincident', 'spread', 'clustered', 'far away', 'tiny'])
@pytest.mark.parametrize('d', [2, 16, 512])
def test_float32_keeps_the_gradient(regime, d):
    samples, gradients = samples_of(regime, d), []

    for dtype in (torch.float32, torch.float64):
        gen, pos, uncond = (t.to(dtype) for t in samples)
        gen = gen.detach().requires_grad_()
        loss, _ = drift_loss(gen, pos, uncond, uncond_weight = torch.full((6, 8), 2., dtype = dtype))
        gradients += torch.autograd.grad(loss.mean(), gen)

    assert gradients[1].norm() > 0
    assert relative(*gradients) < 1e-5

# what training starts from

def xavier(fan_in, fan_out):
    return (2 / (fan_in + fan_out)) ** 0.5

NORMAL = ('register_embed', 'style_embed.weight', 'class_embed.weight', 'alpha_embed.0.weight', 'alpha_embed.2.weight')
LINEAR = ('patch_embed.weight', 'register_proj.weight')

def rules(model):
    """{name: (parameter, its standard deviation in the release)} of everything that is drawn."""
    found = {}

    for name, p in model.named_parameters():
        if name.endswith('bias'):
            continue
        if name in NORMAL:
            found[name] = p, 0.02
        elif '.attn.to_q' in name or '.attn.to_k' in name or '.attn.to_v' in name:
            found[name] = p, xavier(p.shape[1], 3 * p.shape[0])                     # one matrix for all three
        elif '.ff.ff.0.proj.weight' in name:
            up, gate = p.chunk(2)
            found[f'{name} up'] = up, xavier(*reversed(up.shape))
            found[f'{name} gate'] = gate, xavier(*reversed(gate.shape))
        elif name in LINEAR or '.attn.to_out' in name or '.ff.ff.2.weight' in name:
            found[name] = p, xavier(p.shape[1], p.shape[0])

    return found

def is_gain(name):
    return name.endswith('norm.weight') or name == 'alpha_embed.3.weight'

def test_generator_starts_like_the_release_s():
    torch.manual_seed(0)
    model = DriftingGenerator(
        image_size = 16, channels = 4, patch_size = 2, dim = 256, depth = 2, heads = 4, num_classes = 100
    )
    found = rules(model)

    for name, (p, std) in found.items():
        assert abs(p.std().item() / std - 1) < 4 / p.numel() ** 0.5, name            # at least four standard errors

    drawn = {name.split()[0] for name in found}

    for name, p in model.named_parameters():
        if name not in drawn and name != 'pos_embed':
            expected = 1. if is_gain(name) else 0.                                   # gains; biases, gates, last layer
            assert (p == expected).all(), name

def test_encoder_starts_like_the_release_s():
    torch.manual_seed(0)
    model = LatentMAE(dim = 32, layers = (1, 1, 1, 1), num_classes = 100)

    for name, p in model.named_parameters():
        if p.ndim > 1:      # flax's lecun_normal: variance 1 / fan_in, cut at two deviations
            std = p[0].numel() ** -0.5
            assert abs(p.std().item() / std - 1) < 4 / p.numel() ** 0.5, name
            assert p.abs().max() < 2 * std / 0.8796 + 1e-6, name
        else:
            expected = 0. if name.endswith('bias') else 1.
            assert (p == expected).all(), name

# the published weights, as they were trained

def test_rotary_positions_of_the_latent_models(tmp_path):
    arrays = np.load(REFERENCE / 'rotary_bf16.npz')

    model = DriftingGenerator(
        image_size = 32, channels = 4, patch_size = 2, dim = 128, depth = 1, heads = 2, num_classes = 6,
        num_register_tokens = 16, num_style_tokens = 5, style_codebook_size = 8, bf16_rotary = True
    )
    angles = rearrange(model.rotary, '1 n (d two) -> n d two', two = 2)
    assert (angles.numpy() == arrays['angles'][..., None]).all()     # neighbouring numbers turn together
    assert abs(angles[..., 0].cos().numpy() - arrays['cos']).max() < 4e-3
    assert abs(angles[..., 0].sin().numpy() - arrays['sin']).max() < 4e-3

    # metadata ask for it, a saved config keeps it, nothing else does

    model.save_pretrained(tmp_path / 'ours')
    assert torch.equal(DriftingGenerator.from_pretrained(tmp_path / 'ours').rotary, model.rotary)

    params = parameters(DESCRIPTION['generator_params'])
    bf16 = dict(use_bf16 = True)
    precisions = ({}, False), (bf16, False), (dict(bf16, attn_fp32 = False), True)

    for i, (precision, rounded) in enumerate(precisions):
        config = {**DESCRIPTION['generator_config'], **precision}
        loaded = DriftingGenerator.from_pretrained(write_artifact(tmp_path / str(i), config, params))
        assert loaded.bf16_rotary == rounded
        assert torch.equal(loaded.rotary, loaded.rotary.bfloat16().float()) == rounded

    small = dict(image_size = 8, channels = 1, patch_size = 2, dim = 32, depth = 1, heads = 2)
    assert not DriftingGenerator(**small).bf16_rotary

def without(config, *names):
    return {key: value for key, value in config.items() if key not in names}

def test_optional_keys_are_read_as_by_the_release(tmp_path):
    """Its encoder training writes metadata without num_classes, which its reader takes for 1000."""
    model = LatentMAE(dim = 64, channels = 3, layers = (2, 2, 2, 2), mask_patch_size = 4, num_classes = 1000)
    shapes = {'fc/kernel': (512, 1000), 'fc/bias': (1000,)}

    for path, shape in DESCRIPTION['mae_params'].items():
        if path.startswith('decoder'):
            shapes[path] = shape if path != 'decoder/head/kernel' else (1, 1, 64, 3)

    shapes['decoder/head/bias'] = (3,)
    shapes['encoder/conv1/kernel'] = (3, 3, 3, 64)

    for path, shape in DESCRIPTION['mae_params'].items():
        if path.startswith('encoder') and path not in shapes:
            shapes[path] = shape

            if '/layers_0/' in path and 'proj' not in path:
                second = path.replace('/layers_0/', '/layers_1/')
                shapes[second] = (*shape[:-2], shape[-1], shape[-1]) if len(shape) == 4 else shape

    loaded = LatentMAE.from_pretrained(write_artifact(tmp_path / 'mae', {}, parameters(shapes)))
    ours, theirs = ({name: p.shape for name, p in m.named_parameters()} for m in (loaded, model))
    assert ours == theirs
    assert loaded.mask_patch_size == 4
    assert loaded.patch_size == 1

    described = without(DESCRIPTION['mae'], 'num_classes')
    params = parameters({**DESCRIPTION['mae_params'], 'fc/kernel': (512, 1000), 'fc/bias': (1000,)})
    loaded = LatentMAE.from_pretrained(write_artifact(tmp_path / 'without', described, params))
    assert loaded.num_classes == 1000

    # of generators

    config, params = DESCRIPTION['generator_config'], parameters(DESCRIPTION['generator_params'])
    needed = without(config, 'mlp_ratio', 'use_bf16', 'attn_fp32', 'use_remat', 'out_channels')
    loaded = DriftingGenerator.from_pretrained(write_artifact(tmp_path / 'generator', needed, params))
    whole = DriftingGenerator.from_pretrained(write_artifact(tmp_path / 'whole', config, params))
    assert torch.equal(loaded.sample([1, 2], seed = 0), whole.sample([1, 2], seed = 0))

    refused = (
        (without(config, 'use_qknorm'), 'use_qknorm = False'),
        ({**config, 'out_channels': 8}, 'out_channels = 8'),
    )
    for config, says in refused:
        with pytest.raises(ValueError, match = says):
            DriftingGenerator.from_pretrained(write_artifact(tmp_path / says, config, params))

# several processes

def pushed(folder):
    """What a process reads into its queue, and which classes its groups are of."""
    labels = torch.arange(96) % 3
    data = TensorDataset(torch.arange(96.)[:, None].expand(96, 2), labels)
    trainer = Trainer(
        Net(), FeatureDriftLoss(affinity_floor = 0.), data,
        num_train_steps = 2, num_groups = 5, num_gen = 4, num_pos = 4, push_size = 8, alpha_range = (1., 1.),
        cpu = True, progress_bar = False, results_folder = folder
    )

    batches = trainer.batches()
    read = [trainer.push(batches) for _ in range(4)]
    held = trainer.queues['positives'].samples[..., 0].flatten()
    groups = trainer.draw(torch.tensor([trainer.accelerator.process_index] * 8), 0)[0]
    sizes, held = [len(labels) for labels in read], sorted(held[held > 0].int().tolist())
    return sizes, held, groups.tolist(), trainer.samples_read

def test_every_process_reads_push_size_samples(tmp_path):
    """Release: on more processes the queues turn over as fast, and labels are of a process's own samples."""
    (sizes, first, groups, total), (_, second, other_groups, _) = launch(pushed, 2, tmp_path)
    assert sizes == [8] * 4
    assert total == 64
    assert len(first) + len(second) >= 63       # the sample 0 looks like an empty place
    assert not set(first) & set(second)
    assert groups == [0] * 3
    assert other_groups == [1] * 2
