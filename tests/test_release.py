"""The authors' training, step by step: eight optimiser steps of the release's own loop, and what their networks start from."""

import json

import numpy as np
import pytest
import torch
from einops import rearrange
from torch.utils.data import TensorDataset

from drifting_pytorch import ConvNeXtV2, DriftingGenerator, FeatureDriftLoss, LatentMAE, Trainer, drift_loss
from helpers import REFERENCE, Net, by_the_rule, launch, nchw, relative, write_artifact

# a recorded training

DESCRIPTION = json.loads((REFERENCE / 'train_steps.json').read_text())
ARRAYS = np.load(REFERENCE / 'train_steps.npz')

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
        return newest_labels, self.recorded('alpha'), nchw(self.recorded('pos').numpy()), nchw(self.recorded('uncond').numpy())

    def inputs(self, labels, alpha, micro_step):
        noise = rearrange(self.recorded('noise'), '(c g) h w ch -> c g ch h w', c = len(labels))
        styles = rearrange(self.recorded('styles').long(), '(c g) s -> c g s', c = len(labels))
        return noise, labels, alpha, styles

def replay(folder, **kwargs):
    """The release's run again: the trainer, and loss, gradient norm and learning rate of every step."""
    model = read_parameters(folder / 'generator', {path: by_the_rule(path, shape).astype(np.float32) for path, shape in DESCRIPTION['generator_params'].items()})
    mae_params = {path: by_the_rule(path, shape).astype(np.float32) for path, shape in DESCRIPTION['mae_params'].items()}
    encoder = LatentMAE.from_pretrained(write_artifact(folder / 'mae', DESCRIPTION['mae'], mae_params))

    optimizer, train = DESCRIPTION['config']['optimizer'], DESCRIPTION['config']['train']
    schedule = optimizer['lr_schedule']
    data = TensorDataset(torch.zeros(64, *model.noise_shape), torch.arange(64) % model.num_classes)

    trainer = Replay(
        model.train(), FeatureDriftLoss(encoder, temperatures = train['loss_kwargs']['R_list']), data,
        num_train_steps = train['total_steps'], num_groups = train['train_batch_size'], num_gen = train['forward_dict']['gen_per_label'],
        num_pos = train['pos_per_sample'], num_uncond = train['neg_per_sample'], push_size = train['push_per_step'],
        learning_rate = schedule['learning_rate'], lr_warmup_steps = schedule['warmup_steps'], weight_decay = optimizer['weight_decay'],
        betas = (optimizer['adam_b1'], optimizer['adam_b2']), max_grad_norm = train['max_grad_norm'], ema_decay = train['ema_decay'],
        cpu = True, progress_bar = False, results_folder = folder / 'results', **kwargs
    )

    record = []

    for _ in range(train['total_steps']):
        loss, _, norms = trainer.train_step(None)
        record.append((loss.item(), norms['grad_norm'].item(), trainer.optimizer.param_groups[0]['lr']))

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
        expected = read_parameters(tmp_path / kind, params).state_dict()
        ours, theirs = ({name: state[name] - start[name] for name in start} for state in (model.state_dict(), expected))

        whole = [torch.cat([t.flatten() for t in update.values()]) for update in (ours, theirs)]
        assert relative(*whole) < 1e-2, kind
        assert max(relative(ours[name], theirs[name]) for name in start) < 0.1, kind

# the first steps: where all samples of a group coincide, and everywhere else, float32 must not lose the gradient

def samples_of(regime, d):
    generator = torch.Generator().manual_seed(d)
    draw = lambda *shape: torch.randn(*shape, d, generator = generator, dtype = torch.float64)
    gen, pos, uncond = draw(6, 32), draw(6, 24) + 1, draw(6, 8)

    if regime == 'coincident':
        gen = (0 * gen).add(gen[:, :1] / 10)
    elif regime == 'nearly coincident':
        gen = gen[:, :1] + 1e-3 * gen
    elif regime == 'clustered':
        gen, pos, uncond = (t / 10 + t[:, :1].sign() * (torch.arange(t.shape[1]) % 2)[:, None] for t in (gen, pos, uncond))
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

    assert gradients[1].norm() > 0 and relative(*gradients) < 1e-5

# what training starts from

def rules(model):
    """{name: (parameter, its standard deviation in the release)} of everything that is drawn."""
    xavier = lambda fan_in, fan_out: (2 / (fan_in + fan_out)) ** 0.5
    found = {}

    for name, p in model.named_parameters():
        if 'embed.weight' in name and 'patch' not in name or name == 'register_embed' or name in ('alpha_embed.0.weight', 'alpha_embed.2.weight'):
            found[name] = p, 0.02
        elif '.attn.to_q' in name or '.attn.to_k' in name or '.attn.to_v' in name:
            found[name] = p, xavier(p.shape[1], 3 * p.shape[0])                     # one matrix for all three
        elif '.ff.ff.0.proj.weight' in name:
            for half, part in zip(('up', 'gate'), p.chunk(2)):
                found[f'{name} {half}'] = part, xavier(p.shape[1], p.shape[0] // 2)
        elif name in ('patch_embed.weight', 'register_proj.weight') or '.attn.to_out' in name or '.ff.ff.2.weight' in name:
            found[name] = p, xavier(p.shape[1], p.shape[0])

    return found

def test_generator_starts_like_the_release_s():
    torch.manual_seed(0)
    model = DriftingGenerator(image_size = 16, channels = 4, patch_size = 2, dim = 256, depth = 2, heads = 4, num_classes = 100)
    found = rules(model)

    for name, (p, std) in found.items():
        assert abs(p.std().item() / std - 1) < 4 / p.numel() ** 0.5, name            # four standard errors of a normal, more of a uniform

    drawn = {name.split()[0] for name in found}
    ones = {name for name, p in model.named_parameters() if 'norm' in name and name.endswith('weight') or name == 'alpha_embed.3.weight'}

    for name, p in model.named_parameters():
        if name not in drawn and name != 'pos_embed':
            assert (p == (1. if name in ones else 0.)).all(), name                   # gains; biases, gates, the last layer

def test_encoder_starts_like_the_release_s():
    torch.manual_seed(0)
    model = LatentMAE(dim = 32, layers = (1, 1, 1, 1), num_classes = 100)

    for name, p in model.named_parameters():
        if p.ndim > 1:                                                               # flax's lecun_normal: variance 1 / fan_in, cut at two deviations
            std = p[0].numel() ** -0.5
            assert abs(p.std().item() / std - 1) < 4 / p.numel() ** 0.5, name
            assert p.abs().max() < 2 * std / 0.8796 + 1e-6, name
        else:
            assert (p == (0. if name.endswith('bias') else 1.)).all(), name

# the published weights, as they were trained

def test_rotary_positions_of_the_latent_models(tmp_path):
    arrays = np.load(REFERENCE / 'rotary_bf16.npz')

    model = DriftingGenerator(
        image_size = 32, channels = 4, patch_size = 2, dim = 128, depth = 1, heads = 2, num_classes = 6, num_register_tokens = 16, num_style_tokens = 5, style_codebook_size = 8, bf16_rotary = True
    )
    angles = rearrange(model.rotary, '1 n (d two) -> n d two', two = 2)
    assert (angles.numpy() == arrays['angles'][..., None]).all()                     # neighbouring numbers turn together
    assert abs(angles[..., 0].cos().numpy() - arrays['cos']).max() < 4e-3 and abs(angles[..., 0].sin().numpy() - arrays['sin']).max() < 4e-3

    # metadata ask for it, a saved config keeps it, nothing else does

    model.save_pretrained(tmp_path / 'ours')
    assert torch.equal(DriftingGenerator.from_pretrained(tmp_path / 'ours').rotary, model.rotary)

    params = {path: by_the_rule(path, shape).astype(np.float32) for path, shape in DESCRIPTION['generator_params'].items()}
    small = DESCRIPTION['generator_config']

    for i, (precision, rounded) in enumerate([({}, False), (dict(use_bf16 = True), False), (dict(use_bf16 = True, attn_fp32 = False), True)]):
        loaded = DriftingGenerator.from_pretrained(write_artifact(tmp_path / str(i), {**small, **precision}, params))
        assert loaded.bf16_rotary == rounded and torch.equal(loaded.rotary, loaded.rotary.bfloat16().float()) == rounded

    assert not DriftingGenerator(image_size = 8, channels = 1, patch_size = 2, dim = 32, depth = 1, heads = 2).bf16_rotary

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

    params = {path: by_the_rule(path, shape).astype(np.float32) for path, shape in shapes.items()}
    loaded = LatentMAE.from_pretrained(write_artifact(tmp_path / 'mae', {}, params))
    assert {name: p.shape for name, p in loaded.named_parameters()} == {name: p.shape for name, p in model.named_parameters()}
    assert loaded.mask_patch_size == 4 and loaded.patch_size == 1

    described = {key: value for key, value in DESCRIPTION['mae'].items() if key != 'num_classes'}
    params = {path: by_the_rule(path, shape).astype(np.float32) for path, shape in {**DESCRIPTION['mae_params'], 'fc/kernel': (512, 1000), 'fc/bias': (1000,)}.items()}
    assert LatentMAE.from_pretrained(write_artifact(tmp_path / 'without', described, params)).num_classes == 1000

    # of generators

    params = {path: by_the_rule(path, shape).astype(np.float32) for path, shape in DESCRIPTION['generator_params'].items()}
    needed = {key: value for key, value in DESCRIPTION['generator_config'].items() if key not in ('mlp_ratio', 'use_bf16', 'attn_fp32', 'use_remat', 'out_channels')}
    loaded = DriftingGenerator.from_pretrained(write_artifact(tmp_path / 'generator', needed, params))
    whole = DriftingGenerator.from_pretrained(write_artifact(tmp_path / 'whole', DESCRIPTION['generator_config'], params))
    assert torch.equal(loaded.sample([1, 2], seed = 0), whole.sample([1, 2], seed = 0))

    for change, says in ((dict(use_qknorm = None), 'use_qknorm = False'), (dict(out_channels = 8), 'out_channels = 8')):
        config = {key: value for key, value in {**DESCRIPTION['generator_config'], **change}.items() if value is not None}
        with pytest.raises(ValueError, match = says):
            DriftingGenerator.from_pretrained(write_artifact(tmp_path / says, config, params))

# several processes

def pushed(folder):
    """What a process reads into its queue, and which classes its groups are of."""
    labels = torch.arange(96) % 3
    data = TensorDataset(torch.arange(96.)[:, None].expand(96, 2), labels)
    settings = dict(num_groups = 5, num_gen = 4, num_pos = 4, push_size = 8, alpha_range = (1., 1.), cpu = True, progress_bar = False, results_folder = folder)
    trainer = Trainer(Net(), FeatureDriftLoss(affinity_floor = 0.), data, num_train_steps = 2, **settings)

    batches = trainer.batches()
    read = [trainer.push(batches) for _ in range(4)]
    held = trainer.queues['positives'].samples[..., 0].flatten()
    groups = trainer.draw(torch.tensor([trainer.accelerator.process_index] * 8), 0)[0]
    return [len(labels) for labels in read], sorted(held[held > 0].int().tolist()), groups.tolist(), trainer.samples_read

def test_every_process_reads_push_size_samples(tmp_path):
    """Release: the queues turn over as fast on many processes as on one, and labels come from a process's own newest samples."""
    (sizes, first, groups, total), (_, second, other_groups, _) = launch(pushed, 2, tmp_path)
    assert sizes == [8] * 4 and total == 64
    assert len(first) + len(second) >= 63 and not set(first) & set(second)                # the sample 0 looks like an empty place
    assert groups == [0] * 3 and other_groups == [1] * 2

# ConvNeXt-V2 is computed in float32, whatever the rest is

def test_convnext_stays_in_float32_under_autocast():
    torch.manual_seed(0)
    model, x = ConvNeXtV2(dims = (8, 16, 16, 16), depths = (1, 1, 1, 1), image_size = 64), torch.randn(2, 3, 32, 32)
    plain = model.features(x)
    with torch.autocast('cpu', dtype = torch.bfloat16):
        features = model.features(x.bfloat16().float())
        half = model.features(x.bfloat16())
    assert all(torch.equal(features[name], half[name]) and features[name].dtype == torch.float32 for name in plain)
    assert all(relative(model.features(x.bfloat16().float())[name], features[name]) < 1e-6 for name in plain)
