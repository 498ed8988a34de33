"Known answers, invariances and edge cases of the metrics"
import copy, math, random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import nn

from plasticity.metrics import (DEFINITIONS, METRICS, activation_similarity, anderson_a2, clone_r2, dead_fraction, duplicate_fraction,
                                effective_rank, excess_kurtosis, feature_alignment, fresh_copy, grad_norms, ks_distance, non_gaussianity,
                                participation_ratio, rank_at, report, rows_of, saturated_fraction, shapiro_w, shapiro_weights, stable_rank,
                                trainability, unit_stats, weight_norms)
from plasticity.monitors import Monitor, stats_of
from plasticity.results import generator

torch.set_num_threads(1)
scipy = pytest.importorskip('scipy.stats')

def close(a, b, tol=1e-6): assert abs(float(a) - float(b)) <= tol * max(1, abs(float(b))), (float(a), float(b))
def normal(*shape, seed=0): return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
def both(h, **kw): return [h, stats_of(h, **kw)]     # a tensor and the state of a monitor that saw it
def zeros_in(rows, *counts):
    h = torch.ones(rows, len(counts))
    for i, k in enumerate(counts): h[:k, i] = 0
    return h

# --- known answers

def test_effective_rank_known():
    for h in both(torch.eye(64)): close(effective_rank(h), 64)
    for h in both(torch.outer(normal(50), normal(30))): close(effective_rank(h), 1)
    for h in both(torch.tensor([[3., 0], [0, 1]])): close(effective_rank(h), 1.754765)
    e = torch.tensor([[3., 0], [-3, 0], [0, 3**.5], [0, -3**.5]])    # eigenvalues of the covariance 3 : 1
    for h in both(e): close(effective_rank(h, 'covariance'), 1.754765)
    p = torch.tensor([.9, .1])                                       # diag(3, 1): eigenvalues 9 and 1
    close(torch.special.entr(p).sum().exp(), 1.384145)
    for h in both(torch.tensor([[3., 0], [-3, 0], [0, 1], [0, -1]])): close(effective_rank(h, 'covariance'), 1.384145)

def test_wide_rank_one_is_one():
    h = torch.outer(normal(1500), normal(1024, seed=1))
    close(effective_rank(h), 1, 1e-5); close(effective_rank(h.float()), 1, 2e-3); close(stable_rank(h), 1); assert rank_at(h) == 1

def test_other_ranks_known():
    for h in both(torch.tensor([[3., 0], [-3, 0], [0, 1], [0, -1]])):
        close(participation_ratio(h), 1.219512); close(stable_rank(h), 1.111111)
    for h in both(torch.eye(100)):
        close(stable_rank(h), 100); assert rank_at(h) == 99 and rank_at(h, .5) == 50 and rank_at(h, 1.) == 100
    for h in both(torch.diag(torch.tensor([10., 1., 1.]))):
        assert rank_at(h, .9) == 2 and rank_at(h, .9, 'squared') == 1
    for h in both(torch.zeros(5, 3)):
        assert effective_rank(h) == stable_rank(h) == participation_ratio(h) == rank_at(h) == effective_rank(h, 'joudaki') == 0

def test_dead_known():
    for h in both(zeros_in(100, 95, 94, 96, 100)):
        assert dead_fraction(h) == .5 and dead_fraction(h, 'joudaki') == .5
        assert dead_fraction(h, share=.94) == .75 and dead_fraction(h, share=.999) == .25
        assert dead_fraction(h, 'inactive') == .25 and dead_fraction(h, 'dormant', tau=0.) == .25
    for h in both(torch.full((50, 3), -2.)): assert dead_fraction(h) == 0
    for h in both(torch.zeros(50, 3)): assert dead_fraction(h) == dead_fraction(h, 'dormant') == dead_fraction(h, 'inactive') == 1
    for h in both(torch.full((10, 1), 1e-7)): assert dead_fraction(h) == 0
    for h in both(torch.full((10, 1), .99e-7)): assert dead_fraction(h) == 1

def test_inactive_is_under_one_percent():
    for h in both(zeros_in(1000, 990, 991, 0)): close(dead_fraction(h, 'inactive'), 1/3)

def test_dormant():
    h = torch.ones(10, 4) * torch.tensor([1., .1, .02, 0.])     # mean .28: scores 3.57, .357, .0714, 0
    for x in both(h):
        assert [float(dead_fraction(x, 'dormant', tau=t)) for t in (0., .025, .1)] == [.25, .25, .5]
    assert dead_fraction(-h, 'dormant', tau=.1) == .5

def test_dead_per_image():
    h = torch.zeros(20, 2, 5, 5); h[:, 0, 1, 1] = 1
    for x in both(h): assert dead_fraction(x) == .5 and dead_fraction(x, 'joudaki') == 1
    tokens = torch.zeros(4, 100, 3); tokens[:, :10, 0] = 1      # tokens are rows
    for x in both(tokens): close(dead_fraction(x), 2/3)

def test_duplicates_known():
    pairs = normal(500, 16).repeat_interleave(2, 1)
    for h in both(pairs): assert duplicate_fraction(h) == 1 and duplicate_fraction(h, 'joudaki') == .5
    for h in both(torch.stack([pairs[:, 0], -pairs[:, 0], pairs[:, 2]], 1)):
        close(duplicate_fraction(h), 2/3); assert duplicate_fraction(h, 'joudaki') == 0
    for h in both(torch.ones(50, 4) * torch.arange(4.)):
        assert duplicate_fraction(h) == 0
        assert duplicate_fraction(h, 'cosine') == .75      # the unit at 0 has no direction
    for h in both(normal(500, 16)): assert duplicate_fraction(h) == 0
    h = normal(400, 2000); h[:, 1999] = h[:, 3]                    # in different blocks of the matrix
    assert duplicate_fraction(h) == 2/2000 and duplicate_fraction(h, 'joudaki') == 1/2000

def test_duplicate_threshold_is_strict():
    a, b = torch.tensor([1., -1, 0, 0]), torch.tensor([0., 0, 1, -1])
    h = torch.stack([a, .6*a + .8*b], 1).double()
    assert duplicate_fraction(h, threshold=.59) == 1 and duplicate_fraction(h, threshold=.61) == 0

def test_saturation_is_independent_of_the_batch():
    h0, w = normal(10, 20), normal(20, 1, seed=1)
    seen = []
    for copies in (1, 50, 500, 5000):
        h = h0.repeat(copies, 1).requires_grad_()
        g, = torch.autograd.grad((h @ w).tanh().square().sum(), h)
        n = len(h)
        seen.append((float(saturated_fraction(h, g)), float(saturated_fraction(h, g/n, 'joudaki')),
                     float(saturated_fraction(h, g/n, loss_reduction='mean'))))
        s = stats_of(h, g/n)
        assert s.n == n
    assert len({a for a, _, _ in seen}) == 1 and all(a == c for a, _, c in seen) and seen[0][1] == 0 and seen[-1][1] == 1

def test_saturated_share_is_strict():
    h, g = torch.ones(100, 3), torch.ones(100, 3)
    for i, k in enumerate((98, 99, 100)): g[:k, i] = 0
    close(saturated_fraction(h, g), 1/3); close(saturated_fraction(h, g, share=.98), 2/3)
    s = stats_of(h, g)
    close(saturated_fraction(s), 1/3)
    zero = torch.zeros(10, 2)
    assert saturated_fraction(zero, zero) == 1 and saturated_fraction(zero, torch.ones(10, 2)) == 0

def test_saturated_range():
    h = torch.tensor([[.96, .5, -.95], [-.93, .99, -.2]]).repeat(100, 1)
    close(saturated_fraction(h, definition='range', bounds=(-1, 1)), 1/3)
    close(saturated_fraction(stats_of(h, bounds=(-1., 1.)), definition='range'), 1/3)
    with pytest.raises(ValueError, match='bounds'): saturated_fraction(h, definition='range')
    with pytest.raises(ValueError, match='g: got None'): saturated_fraction(h)
    with pytest.raises(ValueError, match='no gradients were measured'): saturated_fraction(stats_of(h))

def test_unit_stats():
    h = torch.tensor([[1., 0, -3], [3., 0, 0], [5., 0, 0]])
    for x in both(h):
        u = unit_stats(x)
        assert u['mean'].tolist() == [3, 0, -1] and u['largest'].tolist() == [5, 0, 3]
        assert torch.allclose(u['std'], h.double().std(0)) and torch.allclose(u['zeros'], torch.tensor([0, 1, 2/3]).double())

def test_clone_r2_known():
    base, other = normal(4000, 32).relu(), normal(4000, 64, seed=2).relu()
    for k in (2, 3, 4):
        for h in both(base.repeat_interleave(k, 1)):
            close(clone_r2(h, k), 1); close(feature_alignment(h, k), 1); close(activation_similarity(h, copies=k), 1)
    for k in (2, 4):
        for h in both(other): assert abs(clone_r2(h, k)) < .02 and abs(feature_alignment(h, k)) < .02
    tiled, labels = base.repeat(1, 2), torch.arange(32).repeat(2)
    for h in both(tiled): close(clone_r2(h, labels), 1); assert clone_r2(h, 2) < .1
    assert clone_r2([base.repeat_interleave(2, 1)] * 15) == 1
    close(clone_r2([base.repeat_interleave(2, 1)] * 15, definition='joudaki', grads=[base.repeat_interleave(2, 1)] * 15), .98387, 1e-5)
    assert clone_r2(torch.zeros(10, 4)) == 1                        # dead clones are clones
    noisy = base.repeat_interleave(2, 1) + 1.0 * normal(4000, 64, seed=3)
    share = float(base.var(0).mean() / (base.var(0).mean() + 1))     # of the variance that copies have in common
    close(clone_r2(noisy), share, .03); close(feature_alignment(noisy), share, .03)

def test_activation_similarity_across_networks():
    base = normal(300, 5) + 1
    close(activation_similarity(base, base.repeat_interleave(3, 1)), 1)
    close(activation_similarity(base, -base), -1)
    close(activation_similarity(base, base.repeat(1, 2), copies=torch.arange(5).repeat(2)), 1)
    other = normal(300, 5, seed=9) + 1
    cos = torch.nn.functional.cosine_similarity(base, other, dim=0).mean()
    close(activation_similarity(base, other), cos, 1e-12)
    assert abs(activation_similarity(base, other, definition='centred')) < .2
    with pytest.raises(ValueError, match='same inputs'): activation_similarity(base, other[:10])
    with pytest.raises(ValueError, match='copies=3'): clone_r2(base, 3)
    with pytest.raises(ValueError, match='label for each'): clone_r2(base, torch.zeros(3))
    with pytest.raises(ValueError, match='no unit has a copy'): clone_r2(base, torch.arange(5))

# --- the distribution tests against SciPy, unit by unit

def shapes(n):
    g = generator(n, 'shapes')
    x = torch.stack([torch.randn(n, generator=g), torch.rand(n, generator=g),
                     torch.randn(n, generator=g).relu() + 1e-3*torch.randn(n, generator=g),
                     torch.randn(n, generator=g).exp(), torch.randn(n, generator=g)*1e-6 + 1, torch.randn(n, generator=g)*1e8], 1).double()
    return torch.cat([x, torch.randn(n, 1, generator=g).relu().double() + torch.arange(n)[:, None] % 2], 1)

@pytest.mark.parametrize('n', [3, 4, 5, 6, 7, 8, 10, 11, 12, 20, 50, 51, 100, 999, 1000, 2048, 4999, 5000])
def test_scipy(n):
    x = shapes(n); a = x.numpy()
    z = (a - a.mean(0)) / a.std(0)
    for j in range(a.shape[1]):
        close(shapiro_w(x)[j], scipy.shapiro(a[:, j]).statistic)
        close(ks_distance(x)[j], scipy.kstest(z[:, j], 'norm').statistic)
        close(excess_kurtosis(x)[j], scipy.kurtosis(a[:, j]), 1e-5)
        if n > 3: close(anderson_a2(x)[j], anderson(a[:, j]))
    close(non_gaussianity(x), np.mean([1 - scipy.shapiro(a[:, j]).statistic for j in range(a.shape[1])]))
    close(non_gaussianity(x, 'kurtosis'), np.mean([abs(scipy.kurtosis(a[:, j])) for j in range(a.shape[1])]), 1e-5)

def anderson(x):
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return scipy.anderson(x, 'norm').statistic

def test_shapiro_weights_have_length_one():
    for n in (3, 4, 5, 6, 50, 5000): close(shapiro_weights(n).square().sum(), 1)
    with pytest.raises(ValueError, match='3 rows'): non_gaussianity(torch.ones(2, 3))

def test_constant_units_have_no_shape():
    h = normal(100, 4); h[:, 1] = 7.
    for d in ('shapiro', 'ks', 'anderson', 'kurtosis'):
        v = non_gaussianity(h, d, per_unit=True)
        assert v.isnan().tolist() == [False, True, False, False] and torch.isfinite(non_gaussianity(h, d))
    assert non_gaussianity(torch.ones(10, 2)).isnan()
    close(non_gaussianity(stats_of(h), 'kurtosis'), non_gaussianity(h, 'kurtosis'), 1e-9)
    with pytest.raises(ValueError, match='sums only'): non_gaussianity(stats_of(h))

# --- what the loss-of-plasticity lab's code computes, written out from its description for this test

def lab(name, h, g=None, seed=0):
    x = h.permute(0, 2, 3, 1).reshape(-1, h.shape[1]) if h.ndim == 4 else h.reshape(-1, h.shape[-1])
    some = lambda k: x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:k]] if len(x) > k else x
    if name == 'dead_fraction': return ((x.abs() < 1e-7).float().mean(0) > .95).float().mean()
    if name == 'duplicate_fraction':
        z = nn.functional.normalize(x.T, dim=1)
        return torch.triu(z @ z.T > .95, 1).any(1).float().mean()
    if name == 'effective_rank':
        s = torch.linalg.svdvals(some(1024))
        if s.sum() < 1e-9: return torch.tensor(0.)
        p = s / s.sum()
        return torch.exp(-(p * torch.log(p + 1e-12)).sum())
    if name in ('stable_rank', 'participation_ratio'):
        y = some(1024); y = y - y.mean(0)
        c = y.T @ y
        return torch.tensor(0.) if (c**2).sum() < 1e-9 else (y**2).sum()**2 / (c**2).sum()
    if name == 'saturated_fraction':
        r = g.reshape(x.shape).abs() / x.abs().mean(0).clamp(min=1e-12)
        return ((r < 1e-4).float().mean(0) > .99).float().mean()
    y, v = some(1000).numpy(), []
    for j in range(y.shape[1]):
        sd = y[:, j].std()
        z = (y[:, j] - y[:, j].mean()) / (sd + 1e-8)
        k = name.removeprefix('joudaki').strip('_') or 'shapiro'
        if sd < 1e-6: v.append(1. if k in ('shapiro', 'ks') else 10.); continue
        v.append(dict(shapiro=lambda z: 1 - scipy.shapiro(z).statistic, ks=lambda z: scipy.kstest(z, 'norm').statistic,
                      anderson=lambda z: min(anderson(z) / CRITICAL(len(z)), 10.),
                      kurtosis=lambda z: min(abs(scipy.kurtosis(z)), 10.))[k](z))
    return torch.tensor(v).mean()

def CRITICAL(n):
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return scipy.anderson(np.random.default_rng(0).normal(size=n), 'norm').critical_values[2]

@pytest.mark.parametrize('shape', [(60, 12), (1500, 10), (30, 6, 8, 8), (40, 17, 8)])
def test_joudaki(shape):
    h = torch.randn(shape, generator=generator(4)).relu()
    if h.ndim == 2: h[:, 0] = 0; h[:, 3] = h[:, 2]; h[:, 5] = 2.; h[3:, 6] = 0
    g = torch.randn(shape, generator=generator(6)) * torch.logspace(-9, 0, shape[0]).reshape(-1, *[1]*(h.ndim-1))
    g2 = g.movedim(1, -1) if h.ndim == 4 else g
    for m, fn in METRICS.items():
        for d in DEFINITIONS[m]:
            if not d.startswith('joudaki'): continue
            args = (g,) if m == 'saturated_fraction' else ()
            close(fn(h, *args, definition=d), lab(d if m == 'non_gaussianity' else m, h, g2), 2e-5)

def test_joudaki_loses_small_scales():
    h = normal(100, 5) * 1e-4
    assert stable_rank(h, 'joudaki') == lab('stable_rank', h) == 0 and participation_ratio(h) > 4

def test_joudaki_clone_r2():
    h = normal(50, 6)
    pairs = torch.stack([h[:, ::2], h[:, 1::2]])                     # copies side by side
    close(clone_r2(h, 2, 'joudaki'), 1 - (pairs.std(0) / (h.std(1, keepdim=True) + 1e-10)).mean(), 1e-12)

# --- invariances

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 40), units=st.integers(2, 12), power=st.floats(-12, 12))
def test_ranks_do_not_depend_on_scale(seed, n, units, power):
    h = normal(n, units, seed=seed)
    for fn in (effective_rank, stable_rank, participation_ratio, rank_at): close(fn(h * 10**power), fn(h), 1e-6)
    close(effective_rank(h * 10**power, 'covariance'), effective_rank(h, 'covariance'))
    assert duplicate_fraction(h * 10**power) == duplicate_fraction(h)

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 40), units=st.integers(2, 12))
def test_ranks_do_not_depend_on_rotation_or_order(seed, n, units):
    h = normal(n, units, seed=seed)
    q = torch.linalg.qr(normal(units, units, seed=seed+1)).Q
    rows, cols = torch.randperm(n, generator=generator(seed)), torch.randperm(units, generator=generator(seed, 1))
    for fn in (effective_rank, stable_rank, participation_ratio):
        close(fn(h @ q), fn(h)); close(fn(h[rows][:, cols]), fn(h), 1e-9)
    h = h.relu()
    for fn in (dead_fraction, duplicate_fraction): assert fn(h[rows][:, cols]) == fn(h)
    close(clone_r2(h[:, cols], torch.arange(units)[cols] // 2), clone_r2(h, torch.arange(units) // 2), 1e-9)

@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 60), units=st.integers(1, 10))
@example(seed=23661, n=3, units=1) # a unit that does not vary
def test_tensor_and_state_agree(seed, n, units):
    h = normal(n, units, seed=seed).relu() + normal(1, units, seed=seed+1).relu()
    s = stats_of(h[:n//2]) + stats_of(h[n//2:])
    for fn in (dead_fraction, duplicate_fraction, effective_rank, stable_rank, participation_ratio, rank_at):
        for d in DEFINITIONS[fn.__name__]: close(fn(s, definition=d), fn(h, definition=d), 1e-6)
    v = h.var(0)
    if (v > 1e-3).all(): close(non_gaussianity(s, 'kurtosis'), non_gaussianity(h, 'kurtosis'))

@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 50), units=st.integers(1, 50))
def test_effective_rank_equals_svd(seed, n, units):
    h = normal(n, units, seed=seed)
    s = torch.linalg.svdvals(h)
    close(effective_rank(h), torch.special.entr(s / s.sum()).sum().exp(), 1e-6)
    close(stable_rank(h), (s**2).sum() / s[0]**2, 1e-9)

@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), units=st.sampled_from([2, 4, 8]))
def test_duplicates_equal_corrcoef(seed, units):
    h = normal(20, units, seed=seed); h = h + 2 * h.roll(1, 1)
    r = torch.corrcoef(h.T).abs().fill_diagonal_(0)
    assert duplicate_fraction(h, threshold=.6) == (r > .6).any(1).double().mean()

# --- edge cases

@pytest.mark.parametrize('fn', [dead_fraction, duplicate_fraction, effective_rank, stable_rank, participation_ratio, rank_at,
                                non_gaussianity, unit_stats, clone_r2, feature_alignment, activation_similarity])
def test_bad_input_raises(fn):
    for bad, word in [(float('nan'), 'h: NaN in 1 of 40 values'), (float('inf'), 'h: infinite values in 1 of 40')]:
        h = torch.ones(10, 4); h[3, 2] = bad
        with pytest.raises(ValueError, match=word): fn(h)
    for empty in (torch.zeros(0, 4), torch.zeros(4, 0)):
        with pytest.raises(ValueError, match='h: got shape'): fn(empty)
    with pytest.raises(ValueError, match='samples, units'): fn(torch.zeros(4))

def test_nan_in_a_state_raises():
    h = torch.ones(5, 2); h[0, 1] = math.nan
    with pytest.raises(ValueError, match='fc1: NaN'): effective_rank(stats_of(h, name='fc1'))
    with pytest.raises(ValueError, match='nothing was measured'): effective_rank(stats_of(h) if False else _empty())
    with pytest.raises(ValueError, match='g: NaN'): saturated_fraction(torch.ones(5, 2), h)
    with pytest.raises(ValueError, match='g: got shape'): saturated_fraction(torch.ones(5, 2), torch.ones(5, 3))

def _empty():
    from plasticity.monitors import new_stats
    return new_stats('fc1', 'Linear', 3)

def test_unknown_definition():
    for m, fn in METRICS.items():
        with pytest.raises(ValueError, match=f"{m} takes '{DEFINITIONS[m][0]}'"): fn(torch.ones(3, 2), definition='nonesuch')
    with pytest.raises(ValueError, match='did you mean .cosine.'): duplicate_fraction(torch.ones(3, 2), 'cosin')
    with pytest.raises(ValueError, match='zero=0.1'): dead_fraction(stats_of(torch.ones(3, 2)), zero=.1)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.bool])
def test_dtypes(dtype):
    h = (normal(64, 6).abs() * 4).to(dtype)
    for fn in (dead_fraction, duplicate_fraction, effective_rank, stable_rank, participation_ratio, rank_at):
        v = fn(h)
        assert v.dtype == torch.float64 and v.ndim == 0
        close(v, fn(h.double()), 1e-12)

def test_numpy_and_lists(): close(effective_rank(np.eye(5)), 5); close(effective_rank([[1., 0], [0, 1]]), 2)

def test_one_row_and_one_unit():
    row = torch.tensor([[1., 2., 0.]])
    close(effective_rank(row), 1); assert duplicate_fraction(row) == 0 and participation_ratio(row) == 0
    close(dead_fraction(row), 1/3); assert unit_stats(row)['std'].tolist() == [0, 0, 0]
    unit = normal(50, 1)
    close(effective_rank(unit), 1); close(participation_ratio(unit), 1); assert duplicate_fraction(unit) == 0

def test_more_units_than_rows():
    h = normal(20, 3000)
    s = torch.linalg.svdvals(h)
    close(effective_rank(h), torch.special.entr(s / s.sum()).sum().exp())
    c = torch.linalg.svdvals(h - h.mean(0))
    close(participation_ratio(h), (c**2).sum()**2 / (c**4).sum())

def test_large_mean():
    h = normal(500, 4) + 1e6
    c = torch.cov(h.T)
    close(participation_ratio(h), c.trace()**2 / (c**2).sum()); assert duplicate_fraction(h) == 0

def test_state_over_some_units():
    h = normal(300, 40).relu(); h[:, 20] = h[:, 0]
    s = stats_of(h, max_units=20)                   # every second pair of units
    some = h[:, s.gram_units]
    close(effective_rank(s), effective_rank(some)); close(participation_ratio(s), participation_ratio(some))
    assert duplicate_fraction(s) == 2/20 and dead_fraction(s) == 0 and unit_stats(s)['mean'].shape == (40,)
    close(clone_r2(s, torch.arange(40) // 4), clone_r2(some, (torch.arange(40) // 4)[s.gram_units]))

def test_monitor_saturation_of_both_kinds():
    net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))
    x = normal(50, 6).float() * torch.logspace(0, 3, 50)[:, None]
    with Monitor(net, '0', every=1) as m: net(x).square().mean().backward()
    h = net[0](x).detach().requires_grad_()
    g, = torch.autograd.grad(net[1:](h).square().mean(), h)
    for share in (.2, .4, .6):
        close(saturated_fraction(m['0'], share=share), saturated_fraction(h, g*50, share=share))
        close(saturated_fraction(m['0'], definition='joudaki', share=share), saturated_fraction(h, g, 'joudaki', share=share))
    assert saturated_fraction(h, g, 'joudaki', share=.4) > 0

# --- parameters

def test_norms():
    net = nn.Sequential(nn.Linear(3, 4), nn.ConvTranspose1d(5, 6, 2), nn.Embedding(7, 8))
    w = weight_norms(net)
    close(w['0.weight'], net[0].weight.norm().item(), 1e-6); close(weight_norms(net, order=1)['0.weight'], net[0].weight.abs().sum().item())
    assert {k: tuple(v.shape) for k, v in weight_norms(net, per_unit=True).items()} == {
        '0.weight': (4,), '0.bias': (4,), '1.weight': (6,), '1.bias': (6,), '2.weight': (8,)}
    with pytest.raises(ValueError, match='backward'): grad_norms(net)
    net[0](torch.ones(2, 3)).sum().backward()
    assert list(grad_norms(net)) == ['0.weight', '0.bias'] and torch.allclose(grad_norms(net, True)['0.bias'], torch.full((4,), 2.))

# --- report

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(.3), nn.Conv2d(8, 6, 3),
                         nn.Tanh(), nn.Flatten(), nn.Linear(6*36, 3))

def probe(n=32):
    g = generator(2)
    return torch.randn(n, 3, 8, 8, generator=g), torch.randint(3, (n,), generator=g)

def test_report_equals_the_functions():
    m, (x, y) = net(), probe()
    r = report(m, (x, y), definitions='all', rows=None)
    m.eval()
    with torch.no_grad(): h = m[:3](x)
    h.requires_grad_()
    g, = torch.autograd.grad(nn.functional.cross_entropy(m[3:](h), y, reduction='sum'), h)
    layer = r.where(layer='2')
    for row in layer:
        if row['metric'] not in METRICS: continue
        args = () if row['metric'] != 'saturated_fraction' else (g/32,) if row['definition'] == 'joudaki' else (g,)
        close(row['value'], METRICS[row['metric']](h.detach(), *args, definition=row['definition']), 1e-5)
    assert {(r['metric'], r['definition']) for r in layer if r['metric'] in METRICS} == {
        (k, d) for k, ds in DEFINITIONS.items() if k in METRICS for d in ds if d != 'range'}
    assert 'range' in r.where(layer='5').column('definition')
    close(r.where(layer='0', metric='weight_norm')[0]['value'], m[0].weight.norm().item())
    nn.functional.cross_entropy(m(x), y).backward()
    close(r.where(layer='4', metric='grad_norm')[0]['value'], m[4].weight.grad.norm(), 1e-5)
    close(r.where(layer='2', metric='unit_mean')[0]['value'], h.detach().mean(), 1e-5)
    assert r.where(layer='2', metric='dead_fraction', definition='zero')[0]['n'] == 32
    assert r.where(layer='2', metric='effective_rank', definition='singular')[0]['n'] == 32*64
    assert r.where(layer='2', metric='dead_fraction', definition='zero')[0]['thresholds'] == 'share 0.95, zero 1e-07'

def test_report_changes_nothing():
    m, p = net(), probe()
    m(p[0]).sum().backward()
    m[1].eval()
    before = copy.deepcopy(m.state_dict()), [q.grad.clone() for q in m.parameters()], [k.training for k in m.modules()]
    rng = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    report(m, p)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), m.state_dict().values(), strict=True))
    assert all(torch.equal(a, q.grad) for a, q in zip(before[1], m.parameters(), strict=True))
    assert before[2] == [k.training for k in m.modules()]
    assert torch.equal(rng[0], torch.get_rng_state()) and rng[2] == random.getstate()
    assert (rng[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert all(not k._forward_hooks for k in m.modules())

def test_report_of_a_broken_network():
    m, p = net(), probe()
    with torch.no_grad(): m[4].weight[0, 0] = math.nan
    training = [k.training for k in m.modules()]
    with pytest.raises(ValueError, match='4: NaN or infinite activations'): report(m, p)
    big = lambda o, t: (o * 1e30).sum() * 1e30
    with pytest.raises(ValueError, match='7: NaN or infinite gradients'): report(net(), p, loss=big)
    assert training == [k.training for k in m.modules()]
    with pytest.raises(ValueError, match='empty'): report(net(), (p[0][:0], p[1][:0]))
    with pytest.raises(TypeError, match='probe'): report(net())

def test_report_options():
    m, p = net(), probe()
    some = {'dead_fraction': ['zero', 'dormant'], 'rank_at': None}
    r = report(m, p, layers=nn.ReLU, definitions=some, options={'dead_fraction': dict(share=.5)})
    got = {(k['metric'], k['definition']) for k in r if k['metric'] in METRICS}
    assert got == {('dead_fraction', 'zero'), ('dead_fraction', 'dormant'), ('rank_at', 'sum')}
    assert r[0]['thresholds'].startswith('share 0.5')
    assert {k['metric'] for k in report(m, p, definitions=['rank_at']) if k['metric'] in METRICS} == {'rank_at'}
    assert 'saturated_fraction' not in report(m, p[0]).column('metric')
    j = report(m, p, definitions='joudaki')
    assert set(j.where(layer='2').column('definition')) == {'joudaki', 'unit_stats'}
    for kw in (dict(definitions='nonesuch'), dict(definitions=['nonesuch']), dict(options=dict(nonesuch={}))):
        with pytest.raises(ValueError, match='nonesuch'): report(m, p, **kw)
    def smooth(o, t): return nn.functional.cross_entropy(o, t, label_smoothing=.1)
    report(m, p, loss=smooth)
    reg = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
    x, t = normal(20, 4).float(), normal(20, seed=1).float()
    assert list(report(reg, (x, t[:, None]))) == list(report(reg, (x, t)))
    assert report(reg, (x, t)).where(layer='1', metric='saturated_fraction')
    with pytest.raises(ValueError, match='pass loss='): report(reg, (x, normal(20, 2)))
    class Pair(nn.Sequential):
        def forward(self, x): return super().forward(x), None
    assert report(Pair(*reg), (x, t)).column('value') == report(reg, (x, t)).column('value')

def test_report_of_frozen_and_compiled_networks():
    m, p = net(), probe()
    whole = report(m, p)
    frozen = report(m.requires_grad_(False), p)
    assert [r['value'] for r in whole if r['metric'] in METRICS] == [r['value'] for r in frozen if r['metric'] in METRICS]
    n = [0]
    def backend(gm, _): n[0] += 1; return gm.forward
    compiled = report(torch.compile(m, backend=backend), p)
    assert n[0] == 0 and list(compiled) == list(frozen)

def test_report_of_a_monitor():
    m, (x, y) = net(), probe()
    with Monitor(m, every=1, rows=None) as mon:
        for _ in range(2): nn.functional.cross_entropy(m(x), y).backward()
    r = report(mon)
    for row in r:
        if row['metric'] in METRICS: close(row['value'], METRICS[row['metric']](mon[row['layer']], definition=row['definition']), 1e-9)
    assert set(METRICS) == {k for k in r.column('metric') if k in METRICS}
    with Monitor(m, every=1, gradients=False, gram=False) as mon: m(x)
    assert 'effective_rank' not in report(mon).column('metric') and 'dead_fraction' in report(mon).column('metric')

def test_report_of_torchvision_resnet():
    torchvision = pytest.importorskip('torchvision')
    torch.manual_seed(0)
    m = torchvision.models.resnet18(num_classes=4)
    r = report(m, (torch.randn(8, 3, 32, 32), torch.randint(4, (8,))))
    assert len({k['layer'] for k in r}) == 20 + 17 + 1 and 'layer1.0.relu:2' in r.column('layer')
    assert all(math.isfinite(v) for v in r.column('value') if not math.isnan(v))

# --- trainability

def test_trainability():
    from plasticity.data import get_data
    from plasticity.models import MLP
    data = get_data('digits').subset(train=300, test=100)
    make = lambda: MLP(data.shape, data.num_classes, hidden_sizes=(16,))
    torch.manual_seed(3)
    m = make(); before = copy.deepcopy(m.state_dict()); rng = torch.get_rng_state()
    kw = dict(make_model=make, steps=20, every=5, device='cpu', lr=1e-2, batch_size=32)
    a, b = trainability(m, data, **kw), trainability(m, data, **kw)
    assert a.value == b.value == float(a) and a.aged == b.aged and a.fresh.column('step') == [5, 10, 15, 20]
    assert all(torch.equal(p, q) for p, q in zip(before.values(), m.state_dict().values(), strict=True))
    assert torch.equal(rng, torch.get_rng_state())
    assert a.difference[0]['accuracy'] == a.aged[0]['accuracy'] - a.fresh[0]['accuracy']
    same = fresh_copy(m, 0)
    close(trainability(same, data, **(kw | dict(make_model=None))).value, 0, 0)
    small = lambda: MLP(data.shape, data.num_classes, hidden_sizes=(8,))
    with pytest.raises(ValueError, match='make_model'): trainability(m, data, make_model=small)
    assert trainability(m, data, epochs=1, device='cpu', split='test').split == 'test'

def test_fresh_copy():
    m = net(); m(probe()[0])
    f = fresh_copy(m, 5)
    assert not torch.equal(f[0].weight, m[0].weight) and f[1].num_batches_tracked == 0
    assert torch.equal(fresh_copy(m, 5)[0].weight, f[0].weight)
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match='scale anew; pass make_model'): fresh_copy(Odd())

def test_rows_of():
    assert rows_of(torch.zeros(2, 3, 4, 5)).x.shape == (40, 3) and rows_of(torch.zeros(2, 3, 4)).x.shape == (6, 4)
    s = stats_of(torch.ones(3, 2)); assert rows_of(s) is s

@pytest.mark.parametrize('units', [600, 1100])
def test_copies_side_by_side_are_seen_in_wide_layers(units):
    h = torch.randn(300, units, generator=generator(0, 'wide')).relu().repeat_interleave(2, 1)
    assert duplicate_fraction(stats_of(h)) == duplicate_fraction(h) == 1 and clone_r2(stats_of(h), 2) == pytest.approx(1)
    net = nn.Sequential(nn.Linear(5, 2*units), nn.ReLU())
    m = Monitor(net, every=1, gradients=False)
    with m: net(torch.randn(20, 5))
    said = report(m).where(metric='duplicate_fraction', layer='1')[0]['thresholds']
    assert said.endswith(f'1024 of {2*units} units')

def test_kurtosis_that_is_lost_in_the_sums_is_nan():
    h = torch.randn(400, 8, generator=generator(0, 'far'))
    assert non_gaussianity(stats_of(h), 'kurtosis') == pytest.approx(float(non_gaussianity(h, 'kurtosis')), rel=1e-3)
    assert torch.isnan(non_gaussianity(stats_of(h + 1e4), 'kurtosis')) and not torch.isnan(non_gaussianity(h + 1e4, 'kurtosis'))

def test_layers_without_gradients_have_no_gradient_rows():
    net = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 7))
    for p in net[:2].parameters(): p.requires_grad_(False)
    m = Monitor(net, every=1)
    with m: net(torch.randn(64, 10))
    assert {r['metric'] for r in report(m)} >= {'dead_fraction'} # before a first backward pass
    m.reset()
    with m: torch.nn.functional.cross_entropy(net(torch.randn(64, 10)), torch.randint(0, 7, (64,))).backward()
    rows = report(m, definitions='all')
    graded = {r['layer'] for r in rows if r['metric'] == 'saturated_fraction' and r['definition'] == 'gradient'}
    assert not graded & {'0', '1'} and '3' in graded

@pytest.mark.parametrize('options, name', [(dict(steps=0), 'steps'), (dict(steps=5, every=7), 'every'), (dict(steps=5, every=0), 'every')])
def test_trainability_takes_numbers_that_make_a_curve(options, name):
    from plasticity.data import get_data
    with pytest.raises(ValueError, match=name): trainability(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), get_data('digits'), **options)

def test_a_map_of_classes_is_reported():
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    x, y = torch.randn(5, 3, 8, 8), torch.randint(0, 4, (5, 8, 8))
    own = {r['layer']: r['value'] for r in report(net, (x, y), loss=torch.nn.CrossEntropyLoss()).where(metric='grad_norm')}
    assert {r['layer']: pytest.approx(r['value'], rel=1e-5) for r in report(net, (x, y)).where(metric='grad_norm')} == own
