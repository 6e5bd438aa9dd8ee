"""The generator of convolutions: shapes, what its condition reaches, sampling, files, refusals, a training."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from drifting_pytorch import ConvGenerator, DriftingGenerator
from helpers import raises_one_line, relative, tiny_generator, trainer

def small(**kwargs):
    torch.manual_seed(0)
    return ConvGenerator(**{**dict(image_size = 8, channels = 1, num_classes = 3, dim = 16, dim_noise = 8), **kwargs})

@pytest.mark.parametrize('image_size', [8, 12, 28, 32, 40, 64])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('num_classes, noise_channels', [(None, 0), (3, 0), (3, 2)])
def test_shapes_and_gradients(image_size, channels, num_classes, noise_channels):
    sizes = dict(image_size = image_size, channels = channels, num_classes = num_classes)
    model = small(**sizes, noise_channels = noise_channels)
    labels = None if num_classes is None else torch.tensor([0, 2, 1])
    samples = model(torch.randn(3, *model.noise_shape), labels, 1.5)
    assert samples.shape == (3, channels, image_size, image_size)
    assert samples.abs().max() < 1

    samples.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name

def test_every_condition_and_all_noise_act():
    model = small()
    noise, labels, alpha = torch.randn(2, 8), torch.tensor([0, 1]), torch.tensor([1., 2.])
    samples = model(noise, labels, alpha)
    others = (noise + torch.eye(8)[0], labels, alpha), (noise, labels + 1, alpha), (noise, labels, alpha + 1)
    for other in others:
        assert (model(*other) != samples).any(dim = 1).all()

    assert torch.equal(model(noise, [0, 1], [1., 2.]), samples)
    assert torch.equal(model(noise, labels), model(noise, labels, torch.ones(2)))
    assert relative(model.double()(noise, labels, alpha), samples) < 1e-5

def test_noise_of_a_place_acts_there(tmp_path):
    model = small(image_size = 32, noise_channels = 2).eval()
    assert model.noise_shape == (8 + 2 * 8 ** 2 + 2 * 16 ** 2,)
    noise, labels = torch.randn(1, *model.noise_shape), torch.tensor([1])
    last = model(noise, labels)
    others = noise.clone()
    others[0, -16 ** 2 + 3 * 16 + 5] += 1                   # of the second channel of the last map, row 3, column 5
    assert not torch.equal(model(others, labels), last)
    rows, columns = (model(others, labels) - last)[0, 0].nonzero().unbind(dim = 1)
    assert (rows.min(), rows.max()) == (4, 10) and (columns.min(), columns.max()) == (8, 14)

    model.save_pretrained(tmp_path)
    assert torch.equal(ConvGenerator.from_pretrained(tmp_path).sample([0, 1], seed = 0), model.sample([0, 1], seed = 0))
    with raises_one_line('noise has shape (1, 8), expected (batch, 648)'):
        model(noise[:, :8], labels)
    with raises_one_line('noise_channels must be a whole number from 0 on'):
        small(noise_channels = -1)

def test_a_constant_map_is_a_picture_without_a_grid():
    to_image = small(image_size = 32, channels = 3).to_image
    torch.nn.init.normal_(to_image[0].bias)
    picture = to_image(torch.randn(1, 8, 1, 1).expand(1, 8, 16, 16))[..., 4:-4, 4:-4]
    assert picture.std(dim = (2, 3)).max() < 1e-5
    assert picture.mean(dim = (2, 3)).std() > 1e-2

def test_dark_pixels_keep_a_gradient_in_half_precision():
    model = small()
    model.to_image.register_forward_hook(lambda module, inputs, out: out.sub(5.).bfloat16())       # as on a GPU
    samples = model(torch.randn(2, 8), [0, 1])
    assert samples.dtype == torch.float32
    assert torch.tensor(-5.).bfloat16().tanh() == -1
    assert samples.min() > -1
    samples.sum().backward()
    assert (model.to_image[0].bias.grad > 0).all()

def test_output_convolutions_start_as_the_identity(tmp_path):
    plain, fine = small(), small(output_conv_dim = 6)
    fine.load_state_dict(plain.state_dict(), strict = False)
    noise, labels = torch.randn(2, 8), torch.tensor([0, 1])
    assert torch.equal(fine(noise, labels), plain(noise, labels))

    torch.nn.init.normal_(fine.output_convs[-1].weight)
    samples = fine(noise, labels)
    assert not torch.equal(samples, plain(noise, labels)) and samples.abs().max() <= 1
    samples.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in fine.parameters())

    fine.save_pretrained(tmp_path)
    assert torch.equal(ConvGenerator.from_pretrained(tmp_path)(noise, labels), samples)
    with raises_one_line('output_conv_dim must be a whole number from 0 on'):
        small(output_conv_dim = -1)

def test_the_same_seed_gives_the_same_samples():
    model = small(noise_channels = 1)
    samples = model.sample([0, 1, 2], seed = 0)
    assert torch.equal(model.sample([0, 1, 2], seed = 0), samples)
    assert relative(model.sample([0, 1, 2], seed = 0, batch_size = 2), samples) < 1e-5
    assert not torch.equal(model.sample([0, 1, 2], seed = 1), samples)
    assert small(num_classes = None).sample(num_samples = 2).shape == (2, 1, 8, 8)

def test_saved_models_are_read_back(tmp_path):
    for image_size in (8, 64):
        folder = tmp_path / str(image_size)
        model = small(image_size = image_size).eval()
        model.save_pretrained(folder)
        again = ConvGenerator.from_pretrained(folder)
        assert not again.training
        assert torch.equal(again.sample([0, 1], seed = 0), model.sample([0, 1], seed = 0))

    tiny_generator().save_pretrained(tmp_path / 'other')
    with raises_one_line('is not a ConvGenerator'):
        ConvGenerator.from_pretrained(tmp_path / 'other')
    with raises_one_line('is not a DriftingGenerator'):
        DriftingGenerator.from_pretrained(tmp_path / '8')

def test_sizes_of_numpy(tmp_path):
    sizes = dict(image_size = 8, channels = 1, num_classes = 3, dim = 16, dim_noise = 4, noise_channels = 2)
    model = ConvGenerator(**{name: np.int64(size) for name, size in sizes.items()})
    model.save_pretrained(tmp_path)
    again = ConvGenerator.from_pretrained(tmp_path)
    assert torch.equal(again.sample([0, 1], seed = 0), model.sample([0, 1], seed = 0))

def test_nothing_is_published(tmp_path):
    with raises_one_line("'pixel_B_sota' is neither a folder nor a published model, which are none"):
        ConvGenerator.from_pretrained('pixel_B_sota')
    (tmp_path / 'metadata.json').write_text('{}')
    with raises_one_line('No such file or directory'):
        ConvGenerator.from_pretrained(tmp_path)

@pytest.mark.parametrize('call, says', [
    (lambda m, x, y: small(image_size = 30), 'a multiple of 4 from 8 to 32, or of 8 up to 64, got 30'),
    (lambda m, x, y: small(image_size = 36), 'a multiple of 4 from 8 to 32, or of 8 up to 64, got 36'),
    (lambda m, x, y: small(image_size = 72), 'got 72'),
    (lambda m, x, y: small(image_size = 4), 'image_size must be a multiple of 4 from 8 to 32'),
    (lambda m, x, y: small(channels = 0), 'channels must be a whole number from 1 on, got 0'),
    (lambda m, x, y: small(image_size = None), 'image_size must be a whole number from 1 on, got None'),
    (lambda m, x, y: small(num_classes = 2.), 'num_classes must be a whole number from 1 on, got 2.0'),
    (lambda m, x, y: small(dim = 24), 'dim must be a multiple of 16, got 24'),
    (lambda m, x, y: small(dim_noise = 0), 'dim_noise must be a whole number from 1 on'),
    (lambda m, x, y: m(x[:, 1:], y), 'noise has shape (2, 7), expected (batch, 8)'),
    (lambda m, x, y: m(x.long(), y), 'noise must be floating point'),
    (lambda m, x, y: m(x / 0, y), 'noise must be finite'),
    (lambda m, x, y: m(x), 'num_classes is 3, so labels are needed'),
    (lambda m, x, y: small(num_classes = None)(x, y), 'num_classes is None, so labels must be None'),
    (lambda m, x, y: m(x, y + 2), 'labels must be finite and in 0 .. 2'),
    (lambda m, x, y: m(x, y[:1]), 'labels has shape (1,), expected (2,)'),
    (lambda m, x, y: m(x, y, 0.5), 'alpha must be finite and in 1 .. inf'),
    (lambda m, x, y: m(x, y, torch.ones(3)), 'alpha has shape (3,), expected (2,), or a number'),
    (lambda m, x, y: m.sample(), 'pass labels'),
])
def test_bad_input_is_one_clear_line(call, says):
    with raises_one_line(says):
        call(small(), torch.ones(2, 8), torch.tensor([0, 1]))

def test_it_is_trained(tmp_path):
    """Grey squares, darker or lighter by their class."""
    labels = torch.arange(60) % 3
    brightness = labels / 2 - 0.5 + 0.1 * torch.randn(60)
    images = brightness.reshape(60, 1, 1, 1).expand(60, 1, 8, 8).contiguous()
    settings = dict(num_train_steps = 60, ema_decay = 0.9, log_every = 0)
    t = trainer(tmp_path, small(noise_channels = 1), TensorDataset(images, labels), **settings)
    t.train()
    means = t.sample([0, 1, 2], seed = 0).mean(dim = (1, 2, 3))
    assert (means.diff() > 0.2).all()

    t.save_pretrained(tmp_path / 'saved')
    saved = ConvGenerator.from_pretrained(tmp_path / 'saved')
    assert torch.equal(saved.sample([0, 1, 2], seed = 0), t.sample([0, 1, 2], seed = 0))
