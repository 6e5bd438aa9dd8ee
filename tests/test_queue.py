"""What a step draws from: queues of real samples, guidance scales, the order of the data; and the grid of pictures."""

import math
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from drifting_pytorch import SampleQueue
from drifting_pytorch.drifting import SeededDataset, endless_shuffle, image_grid, sample_alpha
from helpers import raises_one_line

# the queue

def labelled(labels, start = 0):
    """Samples [b 1] that tell when they were pushed, and of which class they are: class + 0.001 * time."""
    labels = torch.tensor(labels)
    time = torch.arange(start, start + len(labels))
    return (labels + 0.001 * time).unsqueeze(-1), labels

def drawn(queue, label, num):
    """Of one class, sorted."""
    return sorted(queue.draw(torch.tensor([label]), num).flatten().tolist())

def test_queue_keeps_the_newest_of_each_class(rng):
    queue, unconditional = SampleQueue(3, size = 4), SampleQueue(size = 5)
    time, pushed = 0, []

    for _ in range(20):
        labels = torch.randint(3, (7,), generator = rng).tolist()
        samples, y = labelled(labels, time)
        queue.push(samples, y)
        unconditional.push(samples)
        pushed += samples.flatten().tolist()
        time += len(labels)

    for label in range(3):
        newest = [s for s in pushed if int(s) == label][-4:]
        assert np.allclose(drawn(queue, label, 4), sorted(newest))

    assert np.allclose(drawn(unconditional, 0, 5), sorted(pushed[-5:]))

def test_queue_takes_more_than_it_holds_at_once():
    queue = SampleQueue(2, size = 3)
    queue.push(*labelled([0] * 10 + [1] * 2))
    assert np.allclose(drawn(queue, 0, 3), [0.007, 0.008, 0.009])
    assert queue.filled.tolist() == [3, 2]

def test_queue_draws_without_replacement_and_uniformly(rng):
    queue = SampleQueue(2, size = 8)
    queue.push(*labelled([0] * 6 + [1] * 6))

    positives = queue.draw(torch.tensor([0, 1] * 2000), 3, rng).squeeze(-1)
    assert (positives[::2] < 1).all()                                   # only its own class
    assert (positives[1::2] >= 1).all()
    assert all(len(set(row)) == 3 for row in positives.tolist())

    counts = np.unique(positives[::2].flatten().numpy().round(3), return_counts = True)[1]
    assert len(counts) == 6
    assert abs(counts / counts.sum() - 1 / 6).max() < 0.02              # 6000 draws, 4 standard deviations

    again = (queue.draw(torch.tensor([0, 1]), 3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(*again)

@pytest.mark.parametrize('call, says', [
    (
        lambda q: q.draw(torch.tensor([0, 1]), 3),
        'these classes hold fewer than 3 samples (class: samples): {1: 2}'
    ),
    (lambda q: q.push(*labelled([2])), 'labels must be finite and in 0 .. 1'),
    (lambda q: q.push(torch.zeros(1, 1)), 'a queue of 2 classes needs labels'),
    (lambda q: q.push(torch.zeros(1, 2), torch.tensor([0])), 'real samples has shape (1, 2), expected (1, 1)'),
    (lambda q: q.push(torch.full((1, 1), float('nan')), torch.tensor([0])), 'real samples must be finite'),
    (lambda q: q.draw(torch.tensor([4]), 1), 'labels must be finite and in 0 .. 1'),
    (lambda q: SampleQueue(2, size = 5).load_state_dict(q.state_dict()), 'the saved queue'),
])
def test_queue_errors(call, says):
    queue = SampleQueue(2, size = 4)
    queue.push(*labelled([0, 0, 0, 1, 1]))
    with raises_one_line(says):
        call(queue)

# draws

@pytest.mark.parametrize('power', [0., 1., 1 + 1e-15, 1 - 1e-6, 1.001, 3., 5.])
def test_alpha_has_the_density_of_the_paper(rng, power):
    alpha = sample_alpha(20_000, power = power, generator = rng).double().numpy()
    assert alpha.min() >= 1
    assert alpha.max() <= 4

    # Kolmogorov-Smirnov against the integral of the density, by quadrature

    grid = np.linspace(1, 4, 3001)
    density = grid ** -power
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    expected = np.interp(np.sort(alpha), grid, cumulative / cumulative[-1])
    distance = abs(expected - np.arange(len(alpha)) / len(alpha)).max()
    assert distance < 1.95 / math.sqrt(len(alpha))                      # p = 0.001

def test_alpha_without_guidance(rng):
    alpha = sample_alpha(10_000, power = 3., no_cfg_frac = 0.3, generator = rng)
    assert abs((alpha == 1).float().mean().item() - 0.3) < 0.02
    assert (sample_alpha(100, low = 1., high = 1., generator = rng) == 1).all()

def test_shuffle_covers_every_epoch_and_starts_anywhere():
    order = list(islice(endless_shuffle(7, seed = 1), 21))
    assert all(sorted(order[i:i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert order[:7] != order[7:14]
    assert list(islice(endless_shuffle(7, seed = 1, start = 9), 12)) == order[9:]

@pytest.mark.parametrize('rest, with_labels', [
    ([], False),
    ([torch.arange(9)], False),
    ([torch.arange(9)], True),
    ([torch.arange(9, dtype = torch.uint8)], True),
    ([torch.arange(9).view(9, 1)], True),
    ([torch.arange(9.)], False),
    ([torch.arange(9.).double().view(9, 1)], False),
    ([torch.arange(18).view(9, 2)], False),
])
def test_tensors_are_read_at_once_as_one_by_one(rest, with_labels):
    tensors = TensorDataset(torch.randn(9, 4, 3).double().transpose(1, 2), *rest)
    whole, single = (SeededDataset(dataset, 0, with_labels) for dataset in (tensors, Subset(tensors, range(9))))

    batches = (dataset.batch([(0, 5), (1, 8), (2, 5)]) for dataset in (whole, single))
    for found, expected in zip(*batches, strict = True):
        torch.testing.assert_close(found, expected, rtol = 0, atol = 0, check_stride = True)

def test_tensors_that_are_augmented_are_read_one_by_one():
    class Negative(TensorDataset):
        def __getitem__(self, index):
            x, label = super().__getitem__(index)
            return -x, label

    samples, labels = SeededDataset(Negative(torch.ones(4, 3), torch.arange(4)), 0, True).batch([(0, 2), (1, 3)])
    assert (samples == -1).all() and labels.tolist() == [2, 3]

def test_image_grid():
    images = torch.tensor([0., 0.5, 1., 2.]).view(2, 2, 1, 1, 1)
    picture = np.asarray(image_grid(images, min_size = 1))
    assert picture.shape == (6, 6)
    assert picture[1::3, 1::3].tolist() == [[0, 128], [255, 255]]
    assert (picture[::3] == 255).all()                                  # white between the images
    assert image_grid(torch.zeros(1, 2, 3, 4, 4), min_size = 8).size == (24, 12)
