"The slowly-changing regression problem, and its kernel"
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from plasticity.slow_regression import SETTINGS, Bits, Learners, _bits, learn, replace, run, slow_regression

def with_bias(words, inputs=20): return torch.cat([_bits(words, inputs), torch.ones(*words.shape, 1)], -1)

# the stream ------------------------------------------------------

def test_bits_change_when_they_should():
    b = Bits([0, 1], examples=40, every=10)
    words = torch.cat([b.task(k)[0] for k in range(4)], 1)
    slow, fast = words & 2**15 - 1, words >> 15
    for k in range(4): assert (slow[:, 10*k:10*k + 10] == slow[:, 10*k:10*k + 1]).all()
    assert (slow[:, 0] != slow[:, 10]).all() and (slow[0] != slow[1]).all() and fast.unique().numel() > 10

def test_one_bit_flips():
    b = Bits([3], examples=200, every=10, redraw=False)
    slow = torch.stack([b.task(k)[0][0, 0] & 2**15 - 1 for k in range(20)])
    changed = (slow[1:] ^ slow[:-1]).tolist()
    assert all(bin(c).count('1') == 1 for c in changed) and len(set(changed)) > 3

def test_fast_bits_are_fair():
    words, _ = Bits([0], examples=20_000, every=20_000).task(0)
    bits = _bits(words[0] >> 15, 5)
    assert (bits.mean(0) - .5).abs().max() < .02
    assert (torch.corrcoef(torch.cat([bits[1:], bits[:-1]], 1).T) - torch.eye(10)).abs().max() < .03

def test_target_matches_a_loop_over_units():
    b = Bits([5], examples=8, every=8)
    words, y = b.task(0)
    for t in range(8):
        x, want = [int(words[0, t]) >> j & 1 for j in range(20)], b.c[0].item()
        for i in range(100):
            w, bias = b.w[0, i].tolist(), b.b[0, i].item()
            tau = .7*21 - (20 - sum(w) + bias)/2
            want += b.v[0, i].item()*(sum(a*c for a, c in zip(w, x, strict=True)) + bias > tau)
        assert y[0, t] == want

def test_streams_do_not_depend_on_neighbours():
    a, b = Bits([7], examples=20, every=10), Bits([1, 7], examples=20, every=10)
    assert torch.equal(a.task(1)[0][0], b.task(1)[0][1]) and torch.equal(a.task(1)[1][0], b.task(1)[1][1])

def test_what_makes_no_stream():
    with pytest.raises(ValueError, match='multiple of every'): Bits([0], examples=15, every=10)
    with pytest.raises(ValueError, match='slow: got 21'): Bits([0], examples=10, every=10, slow=21)
    with pytest.raises(ValueError, match="no 'relu .1'; did you mean 'relu .01'"): Learners(['relu .1'], 1, [0])
    with pytest.raises(ValueError, match="no option 'momentum'"): Learners([dict(momentum=.9)], 1, [0])
    with pytest.raises(ValueError, match="activation: got 'gelu'"): Learners([dict(activation='gelu')], 1, [0])
    with pytest.raises(ValueError, match='engine'): run(None, None, None, 'numba')
    with pytest.raises(ValueError, match='divisor'): slow_regression(['relu .01'], 1, examples=30, every=10, bins=2, device='cpu')

# the learners --------------------------------------------------

@pytest.mark.parametrize('name', [n for n, o in SETTINGS.items() if 'rate' not in o])
def test_learner_is_autograds(name):
    option, s = SETTINGS[name], Learners([name], 1, [4])
    act = dict(relu=nn.ReLU, tanh=nn.Tanh, leaky_relu=nn.LeakyReLU, linear=nn.Identity)[option.get('activation', 'relu')]()
    net = nn.Linear(20, 1) if name.startswith('linear') else nn.Sequential(nn.Linear(20, 5), act, nn.Linear(5, 1))
    ps = list(net.parameters())
    with torch.no_grad():
        rows = 1 if name.startswith('linear') else 5
        ps[0].copy_(s.w[0, :rows, :20]); ps[1].zero_()
        if rows == 5: ps[2].copy_(s.v); ps[3].zero_()
    opt = torch.optim.SGD(ps, lr=option['lr'], weight_decay=option.get('weight_decay', 0.))
    words, y = Bits([4], examples=60, every=60).task(0)
    for t, x in enumerate(with_bias(words[0])):
        e, _ = learn(s, x[None], y[:, t])
        loss = (net(x[:20]) - y[0, t])**2
        opt.zero_grad(); loss.sum().backward(); opt.step()
        assert e.item()**2 == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    assert torch.allclose(s.w[0, :rows, :20], ps[0], atol=1e-5) and torch.allclose(s.w[0, :rows, 20], ps[1], atol=1e-5)
    if rows == 5: assert torch.allclose(s.v[0], ps[2][0], atol=1e-5) and torch.allclose(s.c, ps[3], atol=1e-5)

def test_start_is_kaiming():
    s = Learners(['relu .01', 'tanh .01', 'linear .01'], 200, range(200))
    for k, bound in enumerate([math.sqrt(6/20), 5/3*math.sqrt(3/20), math.sqrt(3/20)]):
        w = s.w[200*k:200*k + 200, :1 if k == 2 else 5, :20]
        assert bound*.99 < w.abs().max() <= bound and w.mean().abs() < .02 and w.var() == pytest.approx(bound**2/3, rel=.05)
    assert s.v[:200].var() == pytest.approx(1/5, rel=.1) and (s.w[:, :, 20] == 0).all() and (s.c == 0).all()

def test_replacements_add_up():
    s = Learners([dict(rate=r, maturity=m) for r, m in ((1e-2, 10), (1e-2, 0), (3e-3, 100))], 2, [0, 1])
    words, y = Bits([0, 1], examples=600, every=600).task(0)
    run(s, words, y)
    assert (s.replaced - (s.rate*s.exposed).floor()).abs().max() == 0
    assert (s.exposed[2:4] == 600*5).all() and (s.exposed[:2] < 600*5 - 50).all()
    assert (s.replaced >= torch.tensor([26., 26, 30, 30, 4, 4])).all()

@pytest.mark.parametrize('utility', ['adaptable', 'contribution'])
def test_one_replacement_by_hand(utility):
    s = Learners([dict(lr=.01, rate=.05, maturity=2, utility=utility)], 1, [2])
    words, y = Bits([2], examples=40, every=40).task(0)
    mean, util, age, seen, gone = torch.zeros(5), torch.zeros(5), torch.zeros(5), 0, 0
    for t, x in enumerate(with_bias(words[0])):
        _, h = learn(s, x[None], y[:, t])
        w, v, c = s.w[0].clone(), s.v[0].clone(), s.c[0].clone()
        replace(s, h)
        age += 1
        fade = 1 - .99**age
        mean = .99*mean + .01*h[0]
        now = v.abs()*((h[0] - mean/fade).abs()/w[:, :20].abs().mean(1) if utility == 'adaptable' else h[0].abs())
        util = .99*util + .01*now
        mature = age > 2
        seen += mature.sum().item()
        if seen*.05 >= gone + 1 - 1e-6 and mature.any():
            k = min((i for i in range(5) if mature[i]), key=lambda i: (util/fade)[i].item())
            gone += 1
            assert s.v[0, k] == 0 and s.age[0, k] == 0 and s.mean[0, k] == 0 and s.utility[0, k] == 0 and s.w[0, k, 20] == 0
            assert not torch.isclose(s.w[0, k, :20], w[k, :20]).all() and s.w[0, k, :20].abs().max() <= s.bound[0]
            assert s.c[0] == pytest.approx((c + v[k]*mean[k]/fade[k]).item(), abs=1e-5)
            mean[k] = util[k] = age[k] = 0
            keep = [i for i in range(5) if i != k]
        else: keep = list(range(5)); assert torch.equal(s.c[0], c)
        assert torch.equal(s.w[0, keep], w[keep]) and torch.equal(s.v[0, keep], v[keep])
        assert torch.allclose(s.mean[0], mean, atol=1e-6) and torch.equal(s.age[0], age)
        assert torch.allclose(s.utility[0], util, rtol=1e-4, atol=1e-7)
    assert gone == s.replaced.item() >= 5

def test_fresh_weights_are_uniform():
    s = Learners([dict(lr=0., rate=.2, maturity=0)], 40, range(40))
    words, y = Bits(range(40), examples=60, every=60).task(0)
    run(s, words, y)
    z = s.w[:, :, :20]/s.bound[:, None, None]
    assert z.abs().max() <= 1 and z.mean().abs() < .03 and z.var() == pytest.approx(1/3, rel=.05) and z.flatten().unique().numel() > 3900

def test_members_are_independent():
    words, y = Bits([3, 5], examples=50, every=50).task(0)
    names = ['relu .01', dict(rate=.02), 'tanh .01', dict(rate=.05, utility='contribution')]
    many, lone = Learners(names, 2, [3, 5]), Learners(names[3:], 1, [5])
    e, f = run(many, words, y), run(lone, words[1:], y[1:])
    assert torch.allclose(e[7], f[0], rtol=1e-5) and torch.allclose(many.w[7], lone.w[0], atol=1e-6)
    assert many.replaced[7] == lone.replaced[0] > 3

# the kernel, in Triton's interpreter --------------------------------------------------

KERNEL = """
import torch
from plasticity.slow_regression import Bits, Learners, run
names = ['relu .01', 'tanh .01', 'linear .01', 'leaky relu .01', 'weight decay 1e-2', dict(rate=.1, maturity=2),
         dict(rate=.1, maturity=2, utility='contribution')]
a, b = (Learners(names, 1, [6]) for _ in range(2))
words, y = Bits([6], examples=24, every=24).task(0)
e, f = run(a, words, y, 'torch'), run(b, words, y, 'triton')
assert ((e - f).abs()/e).max() < 1e-5, (e, f)
assert torch.equal(a.replaced, b.replaced) and a.replaced[5] >= 9, a.replaced
for k in ('w', 'v', 'c', 'mean', 'utility', 'age', 'exposed'): assert (getattr(a, k) - getattr(b, k)).abs().max() < 1e-5, k
print('the same')
"""

def test_kernel_is_the_plain_version():
    pytest.importorskip('triton')
    env = os.environ | dict(TRITON_INTERPRET='1', OMP_NUM_THREADS='1')
    out = subprocess.run([sys.executable, '-c', KERNEL], env=env, capture_output=True, text=True, timeout=200)
    assert out.stdout.strip().endswith('the same'), out.stderr[-2000:]

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_kernel_on_a_gpu():
    out = slow_regression(['relu .01', 'tanh .01', 'linear .01', 'continual backprop'], 4, examples=50_000, every=1_000, device='cuda')
    cpu = slow_regression(['relu .01', 'linear .01'], 4, examples=1_000, every=20, device='cpu')
    gpu = slow_regression(['relu .01', 'linear .01'], 4, examples=1_000, every=20, device='cuda')
    assert out['difference'] < 1e-3 and torch.allclose(torch.tensor(cpu['curves']), torch.tensor(gpu['curves']), rtol=1e-2)

# three rows of the table --------------------------------------------------

def test_relu_loses_continual_backprop_holds_linear_stays():
    names = ['relu .01', 'linear .01', 'continual backprop']
    out = slow_regression(names, seeds=30, examples=100_000, every=2_000, device='cpu', seed=0)
    relu, linear, cbp = (out['table'].where(setting=n)[0] for n in names)
    assert relu['last'] - relu['first'] > .1 and relu['last'] - linear['last'] > .05 and relu['last'] - cbp['last'] > .15
    assert cbp['last'] < cbp['first'] + .05 and cbp['last'] < linear['last'] and abs(linear['last'] - linear['first']) < .1
