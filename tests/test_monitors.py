"Edge cases of the monitors: what a notebook page would not show"
import copy, random, weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from plasticity.monitors import (IN_CACHE, LayerStats, Monitor, SUMS, MOST_VALUES, activation_bounds, peak, row_index, select,
                                 stats_of, take_rows, unit_axis)
from plasticity.results import generator

torch.set_num_threads(1)

def mlp(): return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))

def cnn():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(.3), nn.Conv2d(8, 6, 3),
                         nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(.5), nn.Linear(6*36, 3))

def resnet(whole=False):
    "Torchvision's ResNet-18, whole or an eighth as wide"
    torchvision = pytest.importorskip('torchvision')
    net = torchvision.models.resnet18(num_classes=3)
    if whole: return net
    for parent in [*net.modules()]:
        for k, m in parent.named_children():
            if isinstance(m, nn.Conv2d):
                setattr(parent, k, nn.Conv2d(m.in_channels//8 or 3, m.out_channels//8, m.kernel_size, m.stride, m.padding, bias=False))
            elif isinstance(m, nn.BatchNorm2d): setattr(parent, k, nn.BatchNorm2d(m.num_features//8))
    net.fc = nn.Linear(64, 3)
    return net

def run(net, x, y, steps=4, monitor=None, opt=None):
    "Train a few steps on fixed batches; gives weights, buffers, gradients and the global random states"
    torch.manual_seed(0)
    opt = opt or torch.optim.SGD(net.parameters(), lr=.05, momentum=.9)
    grads = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
        grads.append([p.grad.clone() for p in net.parameters()])
    return dict(state=net.state_dict(), grads=grads, torch=torch.get_rng_state(), python=random.getstate(),
                numpy=np.random.get_state()[1])  # noqa: NPY002

def same(a, b):
    assert all(torch.equal(a['state'][k], b['state'][k]) for k in a['state'])
    assert all(torch.equal(p, q) for s, t in zip(a['grads'], b['grads'], strict=True) for p, q in zip(s, t, strict=True))
    assert torch.equal(a['torch'], b['torch']) and (a['numpy'] == b['numpy']).all() and a['python'] == b['python']

def hooks(net):
    return sum(len(d) for m in net.modules() for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks,
                                                       m._forward_hooks_with_kwargs, m._forward_pre_hooks_with_kwargs,
                                                       m._forward_hooks_always_called))

CASES = [(mlp, (32, 6)), (cnn, (16, 3, 8, 8)), (resnet, (4, 3, 32, 32))]

@pytest.mark.parametrize('make,shape', CASES)
@pytest.mark.parametrize('every', [1, 3])
def test_measuring_changes_no_bit(make, shape, every):
    torch.manual_seed(1)
    a = make(); b = copy.deepcopy(a)
    x, y = torch.randn(shape), torch.randint(3, shape[:1])
    before = {k: set(vars(m)) for k, m in b.named_modules()}
    plain = run(a, x, y)
    with Monitor(b, every=every, rows=64) as m: measured = run(b, x, y)
    same(plain, measured)
    assert m.measured == (4 if every == 1 else 2) and m.step == 4
    assert hooks(b) == 0 and before == {k: set(vars(k2)) for k, k2 in b.named_modules()}
    assert len(m) > 0 and all(torch.isfinite(s.sums).all() for s in m)

def test_statistics_are_of_the_value_at_the_hook():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 2)
        def forward(self, x):
            h = self.a(x)
            self.kept = h.detach().clone()
            h += 3.; h.relu_()
            return self.b(h)
    net, x = InPlace(), torch.randn(20, 5)
    with Monitor(net, 'a', every=1) as m:
        net(x).sum().backward()
        assert torch.allclose(m['a'].sum, net.kept.double().sum(0))
    # the gradient is of that value too: d loss / d a = relu'(a + 3) * column sums of b
    g = ((net.kept + 3 > 0) * net.b.weight.sum(0)).double()
    assert torch.allclose(m['a'].grad_abs, g.abs().sum(0) * 20)    # 'mean' multiplies by the batch size
    assert m['a'].grad_n[0] == 20

def test_sums_equal_direct_computation_over_several_steps():
    net = mlp()
    xs = [torch.randn(10, 6) for _ in range(7)]
    with Monitor(net, '1', every=2) as m:
        for x in xs: net(x).square().mean().backward()
    h = torch.cat([net[:2](x) for x in xs[::2]]).detach().double()
    s = m['1']
    assert s.n == s.samples == 40 and s.passes == 4
    for k, v in dict(sum=h.sum(0), square=(h*h).sum(0), cube=(h**3).sum(0), fourth=(h**4).sum(0), abs=h.abs().sum(0),
                     zeros=(h.abs() < 1e-7).double().sum(0)).items():
        assert torch.allclose(getattr(s, k), v, rtol=1e-12), k
    assert torch.allclose(s.gram, h.T @ h, rtol=1e-12) and torch.equal(s.largest, h.abs().amax(0))
    assert torch.equal(s.active, (h > 0).double().sum(0)) and torch.allclose(s.var, h.var(0, unbiased=False), atol=1e-12)

def test_gradient_is_of_the_summed_loss():
    x, y = torch.randn(50, 6), torch.randint(3, (50,))
    net = mlp()
    with Monitor(net, '1', every=1) as m: nn.functional.cross_entropy(net(x), y).backward()
    with Monitor(net, '1', every=1, loss_reduction='sum') as s: nn.functional.cross_entropy(net(x), y, reduction='sum').backward()
    with Monitor(net, '1', every=1, scale=1024.) as c: (nn.functional.cross_entropy(net(x), y) * 1024).backward()
    h = net[:2](x).detach().requires_grad_()
    nn.functional.cross_entropy(net[2:](h), y, reduction='sum').backward()
    for k in (m, s, c):
        assert torch.allclose(k['1'].grad_abs, h.grad.double().abs().sum(0), rtol=1e-4)
        assert torch.allclose(k['1'].grad_square, h.grad.double().square().sum(0), rtol=1e-4)
    ratio = h.grad.abs() / h.detach().abs().mean(0).clamp(min=1e-12)
    assert torch.equal(m['1'].saturated, (ratio < 1e-4).double().sum(0))
    assert torch.equal(m['1'].saturated_mean, (ratio / 50 < 1e-4).double().sum(0))

def test_grad_scaler_and_overflow():
    net, x = mlp(), torch.randn(8, 6)
    scaler = torch.amp.GradScaler('cpu', init_scale=256.)
    with Monitor(net, '1', every=1, scale=scaler) as m: scaler.scale(net(x).sum()).backward()
    with Monitor(net, '1', every=1) as p: net(x).sum().backward()
    assert torch.allclose(m['1'].grad_abs, p['1'].grad_abs, rtol=1e-5)
    with Monitor(net, '1', every=1) as o: (net(x).sum() * torch.inf).backward()
    assert o['1'].n == 8 and (o['1'].grad_n == 0).all() and torch.isfinite(o['1'].sums).all()

def test_evaluation_is_neither_measured_nor_counted():
    net = mlp().eval()
    with Monitor(net, every=1) as m:
        net(torch.randn(4, 6)); net.train(); net(torch.randn(4, 6)); net.eval(); net(torch.randn(4, 6))
    assert m.step == 1 and m['1'].n == 4

def test_without_gradients():
    net = mlp()
    with Monitor(net, every=1, gradients=False) as m: net(torch.randn(4, 6)).sum().backward()
    assert (m['1'].grad_n == 0).all() and m['1'].n == 4
    with Monitor(net, every=1) as m, torch.no_grad(): net(torch.randn(4, 6))
    assert m['1'].n == 4

def test_a_layer_without_gradient_does_not_hold_the_step_back():
    class Side(nn.Module):
        def __init__(self): super().__init__(); self.a, self.side = nn.Linear(4, 4), nn.Linear(4, 4)
        def forward(self, x): self.side(x); return self.a(x)
    net = Side()
    with Monitor(net, every=1) as m:
        for _ in range(3): net(torch.randn(5, 4)).sum().backward()
    assert m['side'].n == m['a'].n == 15 and (m['side'].grad_n == 0).all() and (m['a'].grad_n == 15).all()

def test_nothing_is_kept_after_the_step():
    net = mlp()
    with Monitor(net, every=1) as m:
        loss = net(torch.randn(9, 6)).sum()
        assert m._watch is not None
        loss.backward()
        assert m._watch is None
    assert m.held > 0 and 'more during a measured step' in repr(m)
    with Monitor(net, '1', every=1) as m:       # also when the graph is kept
        loss = net(torch.randn(9, 6)).sum()
        rows = weakref.ref(m._watch.records[0].x)
        loss.backward(retain_graph=True)
        assert rows() is None
        loss.backward()
    assert m['1'].grad_n[0] == 9

def test_memory_is_bounded():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    with Monitor(net, every=1, rows=50) as m:
        net(torch.randn(4, 3, 20, 20)).mean().backward(); first = m.nbytes
        for _ in range(5): net(torch.randn(4, 3, 20, 20)).mean().backward()
    assert m['1'].n == 6*48  # 12 positions of each of 4 images
    assert m.nbytes == first and m['1'].samples == 24
    wide = nn.Linear(4, 3000)
    with Monitor(wide, every=1, max_units=100) as m: wide(torch.randn(5, 4)).sum().backward()
    s = m['Linear']
    assert s.gram.shape == (100, 100) and len(s.gram_units.unique()) == 100 and s.sums.shape == (len(SUMS), 3000)
    assert take_rows(torch.zeros(2*MOST_VALUES//1000, 1000), 1, 10**9).numel() <= MOST_VALUES

def test_conv_samples_are_images_active_anywhere():
    h = torch.zeros(10, 2, 8, 8)
    h[:, 0, 3, 5] = 1.
    s = stats_of(h, rows=16)
    assert s.samples == 10 and s.active.tolist() == [10, 0] and s.largest.tolist() == [1, 0]

def test_maps_of_one_position():
    h = torch.randn(100, 3, 1, 1).relu()
    for rows, samples in ((None, 100), (80, 80), (64, 64), (20, 50)): # 50: every other image, as of any map of 100 images
        s = stats_of(h, rows=rows)
        assert s.samples == samples and s.n == min(rows or 100, 100)
    s, flat = stats_of(h), stats_of(h.flatten(1))
    assert torch.equal(s.active, flat.active) and torch.equal(s.largest, flat.largest) and torch.equal(s.active, (h[..., 0, 0] > 0).sum(0))

@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
def test_largest_of_each_image(memory):
    h = torch.randn(6, 5, 9, 7, generator=generator(0)).contiguous(memory_format=memory)
    for x in (h, -h.abs(), h.abs(), h[:, ::2, 1:], torch.zeros_like(h)): assert torch.equal(peak(x, (2, 3)), x.abs().amax((2, 3)))
    h[2, 3, 4, 5] = torch.nan
    assert torch.equal(peak(h, (2, 3)).isnan(), h.isnan().any(-1).any(-1))
    out = torch.empty(6, 12)[:, 3:8]
    assert peak(h, (2, 3), out) is out and torch.equal(out.nan_to_num(9.), peak(h, (2, 3)).nan_to_num(9.))

def test_wide_layers_are_summed_in_parts():
    rows, units = 300, 3 * IN_CACHE // 300 + 5
    h, g = torch.randn(rows, units, generator=generator(0)), torch.randn(rows, units, generator=generator(1)) * 1e-4
    s, d = stats_of(h, g, gram=False), h.double()
    for k, v in dict(sum=d.sum(0), square=(d*d).sum(0), cube=(d**3).sum(0), fourth=(d**4).sum(0), abs=d.abs().sum(0),
                     grad_abs=g.double().abs().sum(0), grad_square=g.double().square().sum(0)).items():
        assert torch.allclose(getattr(s, k), v, rtol=1e-12, atol=1e-11), k
    assert torch.equal(s.saturated, (g.double().abs() < 1e-4*d.abs().mean(0)).double().sum(0)) and torch.equal(s.largest, d.abs().amax(0))

def test_a_new_module_in_an_empty_place_is_seen():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(), nn.Linear(4, 2))
    with Monitor(net, every=1) as m:
        net(torch.randn(5, 4)).sum().backward()
        net[1] = nn.Sequential(nn.ReLU())
        net(torch.randn(5, 4)).sum().backward()
    assert m['1.0'].n == 5 and m['0'].n == 10

def test_shared_and_repeated_modules():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a, self.act = nn.Linear(4, 4), nn.ReLU(); self.b = self.a
        def forward(self, x):
            for _ in range(12): x = self.act(self.b(self.act(self.a(x))))
            return x
    net = Twice()
    with Monitor(net, every=1) as m: net(torch.randn(5, 4)).sum().backward()
    assert 'act' in m and 'act:2' in m and 'act:8' in m and 'act:9' not in m
    assert m['act'].n == 5 and m['act:8'].n == 5*17 and m['a'].n == 5 and 'b' not in m

def test_tuples_and_tokens():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.att, self.out = nn.LSTM(4, 6, batch_first=True), nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)
        def forward(self, x): h, _ = self.rnn(x); h, _ = self.att(h, h, h); return self.out(h[:, -1])
    net = Net()
    with Monitor(net, ['rnn', 'att', nn.Linear], every=1) as m: net(torch.randn(3, 7, 4)).sum().backward()
    assert m['rnn'].units == 6 and m['rnn'].n == 21 and m['att'].n == 21 and m['out'].n == 3
    assert (m['rnn'].grad_n == 21).all()

def test_axis_of_units():
    net = nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Conv1d(5, 4, 3), nn.GELU())
    with Monitor(net, every=1) as m: net(torch.randn(2, 3, 20)).sum().backward()
    assert [s.units for s in m] == [5, 5, 4, 4] and m['2'].samples == 2
    last = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU())
    with Monitor(last, every=1) as m: last(torch.randn(2, 4, 4, 6)).sum().backward()
    assert [s.units for s in m] == [9, 9] and m['1'].n == m['2'].n == 32
    with Monitor(last, '2', every=1, axis={'2': 1}) as m: last(torch.randn(2, 4, 4, 6)).sum().backward()
    assert m['2'].units == 4
    assert unit_axis(None, torch.zeros(3, 4, 5)) == 2 and unit_axis(None, torch.zeros(7)) == 0

def test_unbatched_input():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    with Monitor(net, '0', every=1) as m: net(torch.randn(3, 8, 8)).sum().backward()
    assert m['0'].units == 5 and m['0'].samples == 1 and m['0'].n == 36
    lin = nn.Linear(4, 3)
    with Monitor(lin, every=1) as m: lin(torch.randn(4)).sum().backward()
    assert m['Linear'].n == 1 and torch.equal(m['Linear'].grad_abs, torch.ones(3).double())

@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_memory_formats_and_dtypes(memory, dtype):
    h = torch.randn(4, 6, 5, 5).to(dtype).contiguous(memory_format=memory)
    s = stats_of(h)
    rows = h.permute(0, 2, 3, 1).reshape(-1, 6).double()
    assert torch.allclose(s.gram, rows.T @ rows) and torch.allclose(s.sum, rows.sum(0)) and s.gram.dtype == torch.float64
    assert torch.equal(s.largest, rows.abs().amax(0))

def test_autocast():
    net, x = mlp(), torch.randn(16, 6)
    with Monitor(net, every=1) as m, torch.autocast('cpu', torch.bfloat16):
        net(x).float().sum().backward()
    assert m['1'].gram.dtype == torch.float64
    with torch.autocast('cpu', torch.bfloat16): h = net[:2](x).double()
    assert torch.allclose(m['1'].gram, h.T @ h, rtol=1e-12)

def counting():
    n = [0]
    def backend(gm, _): n[0] += 1; return gm.forward
    return n, backend

class Own(nn.Sequential):
    "What PyTorch 2.11 compiles in place, unlike a plain nn.Sequential"
    def forward(self, x):
        for m in self: x = m(x)
        return x

@pytest.mark.parametrize('in_place', [False, True])
def test_compiled(in_place):
    n, backend = counting()
    net = Own(*mlp())
    if in_place: net.compile(backend=backend); model = net
    else: model = torch.compile(net, backend=backend)
    x = torch.randn(8, 6)
    call = getattr(net, '_compiled_call_impl', None)
    with Monitor(model, every=3) as m:
        for _ in range(9): model(x).sum().backward()
    assert n[0] == 1, 'nothing but the first compilation'
    assert m.measured == 3 and m['1'].n == 24 and (m['1'].grad_n == 24).all()
    assert hooks(net) == 0 and getattr(net, '_compiled_call_impl', None) is call
    model(x)
    assert n[0] == 1 and torch._dynamo.eval_frame._stance.stance == 'default'

def test_compiled_part():
    n, backend = counting()
    net = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), backend=backend), nn.Linear(5, 2))
    assert list(select(net)) == ['0.0', '0.1', '1']
    with Monitor(net, every=2) as m:
        for _ in range(4): net(torch.randn(8, 6)).sum().backward()
    assert m['0.1'].n == 16 and n[0] == 1

def test_recomputed_forward_is_not_counted_twice():
    from torch.utils.checkpoint import checkpoint
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.body, self.head = mlp(), nn.Linear(3, 2)
        def forward(self, x): return self.head(checkpoint(self.body, x, use_reentrant=False))
    net = Net()
    with Monitor(net, every=1) as m: net(torch.randn(8, 6)).sum().backward()
    assert m['body.1'].n == 8 and m['body.1'].passes == 1

def test_forward_that_raises():
    class Bad(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Linear(4, 4)
        def forward(self, x):
            if self.a(x).shape[0] == 1: raise RuntimeError('bad batch')
            return self.a(x)
    net = Bad()
    with Monitor(net, every=1) as m:
        with pytest.raises(RuntimeError, match='bad batch'): net(torch.randn(1, 4))
        net(torch.randn(5, 4)).sum().backward()
    assert hooks(net) == 0 and torch._dynamo.eval_frame._stance.stance == 'default' and m['a:2'].n == 5

def test_width_change_starts_the_layer_anew():
    net = mlp()
    with Monitor(net, every=1) as m:
        net(torch.randn(4, 6)).sum().backward()
        net[0], net[2] = nn.Linear(6, 20), nn.Linear(20, 12)
        net(torch.randn(4, 6)).sum().backward()
    assert m['0'].units == 20 and m['0'].n == 4 and m['4'].n == 8

def test_select():
    net = resnet(whole=True)
    assert len(select(net)) == 20 + 9 + 1
    assert set(select(net, 'layer1.*.conv?')) == {f'layer1.{i}.conv{j}' for i in (0, 1) for j in (1, 2)}
    assert list(select(net, [nn.Linear, 'conv1'])) == ['conv1', 'fc'] and list(select(net, net.fc)) == ['fc']
    assert list(select(net, lambda name, m: name.endswith('bn1') and m.num_features == 512)) == ['layer4.0.bn1', 'layer4.1.bn1']
    with pytest.raises(ValueError, match=r"layers='layer1.0.rleu'.*did you mean 'layer1.0.relu'"): select(net, 'layer1.0.rleu')
    with pytest.raises(ValueError, match='Embedding'): select(net, ['fc', nn.Embedding])
    with pytest.raises(TypeError, match='layers=3'): select(net, 3)
    with pytest.raises(ValueError, match='no conv, linear or activation'): select(nn.Sequential(nn.Flatten()))

def test_wrong_arguments():
    for kw, word in [(dict(every=0), 'every'), (dict(every=1.5), 'every'), (dict(rows=0), 'rows'),
                     (dict(loss_reduction='men'), 'loss_reduction')]:
        with pytest.raises(ValueError, match=word): Monitor(mlp(), **kw)
    with Monitor(net := mlp()) as m, pytest.raises(RuntimeError, match='attached'): m.attach()
    assert hooks(net) == 0
    with pytest.raises(KeyError, match='no layer'): m['nonesuch']

def test_state_dict_and_reset():
    net = mlp()
    with Monitor(net, every=2) as m:
        for _ in range(3): net(torch.randn(4, 6)).sum().backward()
        saved = m.state_dict()
        k = Monitor(net, every=2); k.load_state_dict(saved)
        with k:
            net(torch.randn(4, 6)).sum().backward()
            net(torch.randn(4, 6)).sum().backward()
    assert m['1'].n == 12 and k['1'].n == 12 and saved['stats']['1']['n'] == 8
    assert k['3'].bounds == (-1., 1.)
    m.reset()
    assert len(m) == 0 and m.step == 0

def test_state_dict_survives_the_trainers_files(tmp_path):
    from plasticity.training import load_state, save_state
    net = mlp()
    with Monitor(net, every=1) as m: net(torch.randn(4, 6)).sum().backward()
    save_state(tmp_path / 'm', m.state_dict())
    k = Monitor(net); k.load_state_dict(load_state(tmp_path / 'm'))
    assert torch.equal(k['3'].sums, m['3'].sums) and k['3'].bounds == (-1., 1.) and k['3'].n == 4

def test_merge():
    h, g = torch.randn(60, 5), torch.randn(60, 5) * 1e-4
    whole, parts = stats_of(h, g), stats_of(h[:25], g[:25]) + stats_of(h[25:], g[25:])
    assert torch.allclose(whole.gram, parts.gram) and torch.equal(whole.largest, parts.largest) and parts.n == 60
    assert torch.allclose(whole.sums[:SUMS.index('saturated')], parts.sums[:SUMS.index('saturated')])
    with pytest.raises(ValueError, match='units is 5 and 4'): whole + stats_of(h[:, :4])
    with pytest.raises(ValueError, match='Gram'): whole + stats_of(h, max_units=3)
    with pytest.raises(TypeError): whole + 1
    assert isinstance(copy.deepcopy(whole), LayerStats) and not hasattr(whole, 'nonesuch')

def test_callback():
    from plasticity.data import get_data
    from plasticity.models import MLP
    from plasticity.training import Trainer
    data = get_data('digits').subset(train=320, test=64)
    nets = []
    for on in (False, True):
        torch.manual_seed(0)
        nets.append(MLP(data.shape, data.num_classes))
        m = Monitor(nets[-1], every=4)
        t = Trainer(nets[-1], data, batch_size=32, device='cpu', callbacks=[m] if on else []).fit(steps=20)
    assert t.step == 20 and m.measured == 5 and all(s.n == 160 for s in m) and hooks(nets[1]) == 0
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))

@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 40), positions=st.integers(1, 40), rows=st.integers(1, 60))
def test_row_index_is_distinct_even_and_near_the_number_asked_for(n, positions, rows):
    rows = min(rows, n*positions)
    i = row_index(n, positions, rows)
    assert len(i.unique()) == len(i) <= rows and i.max() < n*positions
    each = (i // positions).bincount()
    assert len(each[each > 0].unique()) == 1 and len(i) >= rows/2

SIZE = st.integers(1, 5)

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), SIZE, SIZE, SIZE, SIZE, st.integers(1, 40), st.integers(0, 5))
def test_rows_of_any_memory_layout(seed, n, c, h, w, rows, layout):
    x = torch.randn(n, c, h, w, generator=generator(seed))
    x = [x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), torch.randn(n, 2*c, h, 2*w)[:, ::2, :, ::2],
         x[:1].expand(n, c, h, w), x[:, :, :1].expand(n, c, h, w)][layout]
    flat = x.movedim(1, -1).reshape(n*h*w, c)
    want = flat if rows >= n*h*w else flat[row_index(n, h*w, rows)]
    got = take_rows(x, 1, rows)
    assert torch.equal(got, want) and got.is_contiguous() and got.data_ptr() != x.data_ptr()
    tokens = x.flatten(2).transpose(1, 2)
    assert torch.equal(take_rows(tokens, 2, rows), want)

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 8))
def test_sums_of_any_shape(seed, n, units):
    h = torch.randn(n, units, generator=generator(seed), dtype=torch.float64).relu()
    s = stats_of(h)
    assert torch.allclose(s.mean, h.mean(0)) and torch.allclose(s.var, h.var(0, unbiased=False), atol=1e-10) and s.n == n

def test_bounds():
    assert activation_bounds(nn.Hardtanh(-2, 3)) == (-2., 3.) and activation_bounds(nn.GELU()) is None
    h = torch.tensor([[-1., .95, 0.], [-.91, .89, .2]])
    assert stats_of(h, bounds=(-1., 1.)).near.tolist() == [2, 1, 0]

class Cell(nn.Module):
    "One layer called several times, and one that only sometimes is"
    def __init__(self, calls=8):
        super().__init__()
        self.calls = calls
        self.cell, self.aside, self.act, self.head, self.turn = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3), 0
    def forward(self, x):
        self.turn += 1
        for _ in range(self.calls): x = self.act(self.cell(x))
        return self.head(x + self.aside(x) if self.turn % 3 else x)

@pytest.mark.parametrize('make,shape', [*CASES, (Cell, (32, 6)), (lambda: Cell(10), (32, 6))])
@pytest.mark.parametrize('kw', [{}, dict(gradients=False), dict(gram=False), dict(max_units=5), dict(rows=3)])
@pytest.mark.parametrize('cast', [False, True])
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA'))])
def test_a_bank_gives_the_same_bits(make, shape, kw, cast, device, monkeypatch):
    "States in common tensors against states of their own: the same sums, whatever the sizes of the batches and the kind of pass"
    from plasticity import monitors
    if device == 'cuda' and make is resnet: pytest.skip('its backward pass is not deterministic on a GPU')
    results, built = [], []
    init = monitors.Bank.__init__
    monkeypatch.setattr(monitors.Bank, '__init__', lambda self, rs: (built.append(len(rs)), init(self, rs))[1])
    for banks in (True, False):
        if not banks: monkeypatch.setattr(monitors, '_settled', lambda rs: False)
        torch.manual_seed(1)
        net, x, y = make().to(device), torch.randn(shape).to(device), torch.randint(3, shape[:1]).to(device)
        with Monitor(net, every=1, **kw) as m:
            for step in range(16):
                n = len(x) // 2 if step == 5 else len(x)
                with torch.autocast(device, torch.bfloat16, enabled=cast), torch.set_grad_enabled(step != 7):
                    loss = nn.functional.cross_entropy(net(x[:n]), y[:n])
                if step not in (7, 9): loss.backward(retain_graph=step == 8)  # 9: a pass that nobody follows
                if step == 8: loss.backward()
                if step == 10: saved = copy.deepcopy(m.state_dict())
                if step == 3: m.load_state_dict(copy.deepcopy(m.state_dict()))
        results.append((m.state_dict(), saved))
    assert built or getattr(net, 'calls', 0) > 8 # calls that share a state have no bank
    for a, b in zip(*results, strict=True):
        assert a['stats'].keys() == b['stats'].keys()
        for k, s in a['stats'].items():
            for f, v in s.items():
                assert torch.equal(v, b['stats'][k][f]) if isinstance(v, torch.Tensor) else v == b['stats'][k][f], (k, f)

def test_a_bank_holds_nothing_between_steps():
    net, x, y = cnn(), torch.randn(16, 3, 8, 8), torch.randint(3, (16,))
    with Monitor(net, every=1) as m:
        for _ in range(4): nn.functional.cross_entropy(net(x), y).backward()
        banks = {p.slot.bank for p in m._plans.values()}
        assert len(banks) < len(m) and all(b.x is b.g is b.tops is None for b in banks if not b.small)
        assert all(getattr(s, k) is None for b in banks for s in b.slots for k in ('x', 'into', 'g', 'grad_into', 'top'))
        assert m['0'].sums.untyped_storage().data_ptr() == m['4'].sums.untyped_storage().data_ptr()
        assert all(v.is_contiguous() for s in m.state_dict()['stats'].values() for v in s.values() if isinstance(v, torch.Tensor))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA')
def test_on_a_gpu_the_additions_are_one_graph():
    net, x, y = cnn().cuda(), torch.randn(16, 3, 8, 8).cuda(), torch.randint(3, (16,)).cuda()
    with Monitor(net, every=1) as m:
        for _ in range(5): nn.functional.cross_entropy(net(x), y).backward()
        banks = {p.slot.bank for p in m._plans.values()}
        assert all(b.graph is not None for b in banks) and all(s.n > 0 and torch.isfinite(s.sums).all() for s in m)

def test_two_monitors_leave_the_compiler_on():
    import torch._dynamo
    net, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(8, 4)
    with Monitor(net, every=1) as a, Monitor(net, every=2) as b:
        for _ in range(4): net(x).sum().backward()
    assert torch._dynamo.eval_frame._stance.stance == 'default' and len(a.stats) and len(b.stats)

def test_a_target_computed_before_backward_costs_no_gradients():
    net, x = mlp(), torch.randn(40, 6)
    m = Monitor(net, every=1)
    with m:
        for _ in range(2):
            out = net(x)
            with torch.no_grad(): target = net(x + 1)
            (out - target).square().mean().backward()
    s = m['1']
    assert s.n == 80 and float(s.grad_n[0]) == 80
