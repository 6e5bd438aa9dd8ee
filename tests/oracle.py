"""The field and the loss once more, written from the formulas with loops over single pairs in float64.

Slow, and unlike the code under test.
"""

import numpy as np

# the field

def log_kernel(dist, temperature, kind = 'laplace'):
    if kind == 'laplace':
        return -dist / temperature
    return -dist ** 2 / (2 * temperature ** 2)

def affinities(log_k, normalize, floor = 0.):
    """log_k [n y]: logarithms of the kernel in one problem (-inf: no such pair).

    k_j / sum_i k_i = 1 / sum_i exp(log k_i - log k_j)
    """
    n, m = log_k.shape
    A = np.zeros((n, m))
    with np.errstate(over = 'ignore'):
        for i in range(n):
            for j in range(m):
                here = log_k[i, j]
                if here == -np.inf:
                    continue
                over_y = 1 / sum(np.exp(log_k[i, k] - here) for k in range(m))
                over_x = 1 / sum(np.exp(log_k[k, j] - here) for k in range(n))
                products = dict(both = over_y * over_x, y = over_y ** 2, none = np.exp(here) ** 2)
                A[i, j] = np.sqrt(max(products[normalize], floor))
    return A

def mean_shift(A, x, y, num_pos, a = 1., b = 1.):
    """sum over pairs of one positive and one negative: A+ A- (a (y+ - x) - b (y- - x))"""
    V = np.zeros_like(x)
    for i in range(len(x)):
        for j in range(num_pos):
            for k in range(num_pos, len(y)):
                V[i] += A[i, j] * A[i, k] * (a * (y[j] - x[i]) - b * (y[k] - x[i]))
    return V

def field(x, y_pos, y_neg, temperature, kind = 'laplace', normalize = 'both', a = 1., b = 1.):
    """Algorithm 2 for one problem; y_neg None: the points themselves without self pairs."""
    y = np.concatenate((y_pos, x if y_neg is None else y_neg))
    log_k = np.zeros((len(x), len(y)))
    for i in range(len(x)):
        for j in range(len(y)):
            dist = np.sqrt(((x[i] - y[j]) ** 2).sum())
            log_k[i, j] = log_kernel(dist, temperature, kind)

    if y_neg is None:
        for i in range(len(x)):
            log_k[i, len(y_pos) + i] = -np.inf                          # not itself

    return mean_shift(affinities(log_k, normalize), x, y, len(y_pos), a, b)

# the loss

def drift(
    gen, pos, uncond, weight, temperatures,
    floor = 1e-6, kind = 'laplace', normalize = 'both', a = 1., b = 1.
):
    """V [b g d] of the loss, S, the unit and {temperature: mean V_tau^2}.

    A.6 with the release's clamps; in y the positives come first.
    """
    B, g, d = gen.shape
    p = pos.shape[1]
    y = np.concatenate([t for t in (pos, gen, uncond) if t is not None], axis = 1)
    w = np.ones(y.shape[:2])
    if weight is not None:
        w[:, p + g:] = weight

    dist = np.zeros((B, g, y.shape[1]))
    for q in range(B):
        for i in range(g):
            for j in range(y.shape[1]):
                dist[q, i, j] = np.sqrt(max(((gen[q, i] - y[q, j]) ** 2).sum(), 1e-8))

    S = np.mean(dist * w[:, None]) / np.mean(w)
    unit = max(S / np.sqrt(d), 1e-3)
    scaled = dist / max(S, 1e-3)
    for i in range(g):
        scaled[:, i, p + i] += 100.

    total, mean_squares = np.zeros_like(gen), {}
    for temperature in temperatures:
        V = np.zeros_like(gen)
        for q in range(B):
            A = affinities(log_kernel(scaled[q], temperature, kind), normalize, floor)
            V[q] = mean_shift(A * w[q], gen[q] / unit, y[q] / unit, p, a, b)
        mean_squares[temperature] = np.mean(V ** 2)
        total += V / np.sqrt(max(mean_squares[temperature], 1e-8))

    return total, S, unit, mean_squares
