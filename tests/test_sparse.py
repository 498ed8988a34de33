"A sparse layer computes what the dense one with a mask computes, costs what its links cost, and is edited like any other"
import copy

import pytest, torch
from hypothesis import example, given, settings, strategies as st
from torch import nn

from plasticity.edits import edit, load_record, replay
from plasticity.remedies import UPGD
from plasticity.sparse import (FULL_FROM, MODES, SparseLinear, choose_mode, draw_places, from_dense, measure_modes, random_layer,
                               random_places)
from plasticity.sparse_network import Fill, MinimalNetwork, Sprout
from plasticity.training import NoisySGD
import plasticity.sparse as sparse_module

def masked(layer, x):
    w = layer.matrix().detach().clone().requires_grad_()
    b = layer.bias.detach().clone().requires_grad_() if layer.bias is not None else None
    return w, b, nn.functional.linear(x, w, b)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 1), st.sampled_from(MODES), st.booleans(), st.integers(0, 9),
       st.integers(0, 99))
def test_equals_dense_with_mask(i, o, density, mode, bias, batch, seed):
    g = torch.Generator().manual_seed(seed)
    at = torch.randperm(i*o, generator=g)[:int(i*o*density)]
    layer = SparseLinear(i, o, at // i, at % i, torch.randn(len(at), generator=g), bias=bias, mode=mode)
    x = torch.randn(batch, i, generator=g, requires_grad=True); x2 = x.detach().clone().requires_grad_()
    t = torch.randn(batch, o, generator=g)
    y = layer(x); w, b, z = masked(layer, x2)
    assert torch.allclose(y, z, atol=1e-6)
    (y*t).sum().backward(); (z*t).sum().backward()
    assert layer.n_links == len(at) == int(layer.mask().sum()) and (layer.running == mode or layer.full)
    if len(at): assert torch.allclose(x.grad, x2.grad, atol=1e-5)
    got = layer.values.grad if layer.values.grad is not None else torch.zeros_like(layer.values)
    if layer.full: assert torch.allclose(got.view(o, i), w.grad*layer.mask(), atol=1e-5)
    else: assert torch.allclose(got, w.grad[layer.mask()], atol=1e-5)
    if bias: assert torch.allclose(layer.bias.grad, b.grad, atol=1e-5)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.data(), st.sampled_from(MODES))
def test_links_come_and_go_with_values_and_moments(i, o, data, mode):
    seed = data.draw(st.integers(0, 99)); g = torch.Generator().manual_seed(seed)
    n = data.draw(st.integers(1, i*o)); at = torch.randperm(i*o, generator=g)
    net = nn.Sequential(SparseLinear(i, o, at[:n] // i, at[:n] % i, torch.randn(n, generator=g), mode=mode), nn.Linear(o, 2))
    layer, adam, x = net[0], torch.optim.Adam(net.parameters()), torch.randn(6, i, generator=g)
    net(x).square().mean().backward(); adam.step()
    def seen():
        m = adam.state[layer.values]; k = layer.keys()
        at_ = k if layer.full else torch.arange(len(k))
        three = layer.values.data, m['exp_avg'], m['exp_avg_sq']
        return {int(a): tuple(t[b].item() for t in three) for a, b in zip(k, at_, strict=True)}
    old, y = seen(), net(x).detach()
    new = at[n:n + data.draw(st.integers(0, 5))]
    state = copy.deepcopy((net.state_dict(), adam.state_dict()['state']))
    with edit(net, adam, x) as e: e.connect('0', new // i, new % i)
    assert torch.allclose(net(x), y, atol=1e-6) and layer.n_links == n + len(new)
    now = seen()
    assert all(now[k] == v for k, v in old.items()) and all(now[int(k)][:2] == (0, 0) for k in new)
    gone = layer.keys()[:2]
    with edit(net, adam, x) as f: f.disconnect('0', gone // i, gone % i)
    assert layer.n_links == n + len(new) - len(gone)
    for r in (f.record, e.record): replay(net, r.inverse(), adam)
    for k, v in net.state_dict().items(): assert torch.equal(v, state[0][k]), k
    for a, b in zip(adam.state_dict()['state'].values(), state[1].values(), strict=True):
        for k in ('exp_avg', 'exp_avg_sq'):
            if layer.full and a[k].shape == layer.values.shape: continue
            assert torch.equal(a[k], b[k])

def test_zero_weight_links_keep_the_function_to_the_bit_and_records_survive_a_file(tmp_path):
    net = nn.Sequential(random_layer(30, 20, .05), nn.Tanh(), random_layer(20, 4, .2)); x = torch.randn(9, 30); y = net(x).detach()
    other = copy.deepcopy(net)
    free = (~net[0].mask()).nonzero()[:7]
    with edit(net, None, x) as e: e.connect('0', *free.T)
    assert torch.equal(net(x), y)
    e.record.save(tmp_path/'r'); replay(other, load_record(tmp_path/'r'))
    assert torch.equal(other[0].keys(), net[0].keys())

def test_refusals_leave_the_layer_as_it_was():
    layer = random_layer(6, 5, .3, mode='gather'); before = copy.deepcopy(layer.state_dict()); r, c, _ = layer.links()
    for call, match in ((lambda: layer.connect(r[:1], c[:1], [1.]), 'exists'), (lambda: layer.connect([9], [0], [1.]), 'rows'),
                        (lambda: layer.disconnect(*(~layer.mask()).nonzero()[0, :, None]), 'no link'),
                        (lambda: SparseLinear(3, 3, [0, 0], [1, 1]), 'twice'), (lambda: SparseLinear(0, 3), 'in_features'),
                        (lambda: SparseLinear(3, 3, mode='coo'), 'mode'), (lambda: layer(torch.randn(2, 7)), 'features')):
        with pytest.raises(ValueError, match=match): call()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())

def test_rolled_back_links_compute_what_they_did():
    net = nn.Sequential(random_layer(6, 5, .3, mode='gather'), nn.Linear(5, 2)); x = torch.randn(4, 6, requires_grad=True)
    y = net(x); y.sum().backward(); first = x.grad.clone(); x.grad = None
    free = (~net[0].mask()).nonzero()[:3].T
    with pytest.raises(RuntimeError, match='stop'):
        with edit(net, None, x.detach()) as e:
            r, c, _ = net[0].links(); e.disconnect('0', r[:3], c[:3]); e.connect('0', *free, torch.ones(3).tolist())
            raise RuntimeError('stop')
    net(x).sum().backward()
    assert torch.equal(net(x), y) and torch.equal(x.grad, first)

@pytest.mark.parametrize('mode', MODES)
def test_saved_with_its_links(mode):
    a, b = random_layer(9, 7, .4, mode=mode), random_layer(9, 7, .1, seed=3)
    b.load_state_dict(a.state_dict()); x = torch.randn(3, 9)
    assert torch.allclose(a(x), b(x), atol=1e-6) and b.n_links == a.n_links
    adam = torch.optim.Adam(b.parameters()); b(x).sum().backward(); adam.step()

def test_memory_is_in_proportion_to_links():
    layer = random_layer(2**18, 2**18, 1e-7)
    x = torch.randn(2, 2**18, requires_grad=True); layer(x).sum().backward()
    kept = [layer.values, layer.values.grad, layer.cols, layer.index()['rows']] + [layer.cache['turned'][k] for k in ('rows', 'order')]
    assert sum(t.numel()*t.element_size() for t in kept) == 24*layer.n_links and layer.n_links == int(2**36*1e-7)

@pytest.mark.parametrize('mode', ['gather', 'csr'])
def test_blocks_do_not_change_the_result(monkeypatch, mode):
    layer, x = random_layer(50, 40, .2, mode=mode), torch.randn(5, 50, requires_grad=True)
    def run():
        layer.cache = x.grad = layer.values.grad = None
        y = layer(x); (y*y).sum().backward()
        return y.detach(), x.grad, layer.values.grad
    whole = run(); monkeypatch.setattr(sparse_module, 'BLOCK', 7); monkeypatch.setattr(sparse_module, 'PORTION', 11); parts = run()
    assert len(layer.cache['parts']) > 5 and layer.cache['rows'] is layer.cache['turned']['rows'] is None
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts, strict=True))

def test_draws_are_distinct_exact_and_free():
    g = torch.Generator().manual_seed(0)
    taken = torch.arange(0, 2**22, 5)
    for total, n in ((10, 10), (2**22, 1000), (2**22, 2**20)):
        k = draw_places(total, n, g, taken[taken < total] if total > 10 else None)
        assert len(k.unique()) == n and int(k.max()) < total
        if total > 10: assert not torch.isin(k, taken).any()
    with pytest.raises(ValueError): draw_places(10, 11, g)
    assert len(random_places(784, 256, 1e-4)[0]) == 20 and len(random_places(10, 3, 1e-4)[0]) == 1

@pytest.mark.parametrize('init', ['xavier', 'he'])
def test_first_weights_follow_the_links_that_exist(init):
    layer = random_layer(400, 300, .2, init, mode='gather'); r, c, v = layer.links()
    k = layer.fan_in()[r].float() if init == 'he' else layer.fan_in()[r].float() + layer.fan_out()[c].float()
    z = v*(k/2).sqrt()
    assert abs(z.std() - 1) < .02 and abs(z.mean()) < .02

def test_to_and_from_dense():
    lin = nn.Linear(12, 8); m = torch.rand(8, 12) < .3; x = torch.randn(5, 12)
    s = from_dense(lin, m); want = nn.functional.linear(x, lin.weight*m, lin.bias)
    assert torch.allclose(s(x), want, atol=1e-6) and torch.allclose(s.to_dense()(x), want, atol=1e-6)
    assert from_dense(lin, bias=False).bias is None and from_dense(lin).full and from_dense(lin).n_links == 96

def test_any_leading_dimensions_dtype_and_empty():
    layer = random_layer(6, 4, .5, mode='gather').double()
    assert layer(torch.randn(2, 3, 6).double()).shape == (2, 3, 4) and layer(torch.randn(6).double()).shape == (4,)
    assert torch.equal(SparseLinear(3, 2)(torch.randn(4, 3)), torch.zeros(4, 2)) and layer(torch.randn(0, 6).double()).shape == (0, 4)

def test_sparse_step_is_faster_and_measured_choice_works():
    t = {r['mode']: r['ms'] for r in measure_modes(1024, 1024, 1e-3, repeats=5)}
    assert t['gather'] < t['nn.Linear']/4
    assert random_layer(64, 64, .01, mode='measured').mode in MODES and choose_mode(1.) == 'dense'

def test_gradients_are_those_of_finite_differences():
    layer = random_layer(5, 4, .5, mode='gather').double(); x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v: torch.func.functional_call(layer, dict(values=v), (x,)), (x, layer.values))

# ---- a full matrix above a density

def _moments(layer, adam):
    "{place: (value, first and second moment)} of the links"
    k = layer.keys(); at = k if layer.full else torch.arange(len(k))
    three = layer.values.data, adam.state[layer.values]['exp_avg'], adam.state[layer.values]['exp_avg_sq']
    return {int(a): tuple(t[b].item() for t in three) for a, b in zip(k, at, strict=True)}

def _image(net, adam):
    state = adam.state_dict()['state'].values()
    return {**net.state_dict(), **{f'{i}/{k}': v for i, s in enumerate(state) for k, v in s.items() if k != 'age'}}

@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 99), st.booleans())
@example(2, 10, 0, False) # FULL_FROM to the link
def test_the_form_changes_with_the_density_and_back(i, o, seed, ema):
    g = torch.Generator().manual_seed(seed); at = torch.randperm(i*o, generator=g); n = int(FULL_FROM*(i*o)); more = at[n:n + 1 + seed % 3]
    net = nn.Sequential(SparseLinear(i, o, at[:n] // i, at[:n] % i, torch.randn(n, generator=g)), nn.Tanh(), nn.Linear(o, 2))
    layer, adam, x = net[0], torch.optim.Adam(net.parameters()), torch.randn(6, i, generator=g)
    for _ in range(2): adam.zero_grad(); net(x).square().mean().backward(); adam.step()
    averaged = {k: v.detach().clone() for k, v in net.named_parameters()} if ema else None
    old, y = _moments(layer, adam), net(x).detach()
    assert not layer.full
    with edit(net, adam, x, ema=[averaged] if ema else ()) as e: e.connect('0', more // i, more % i)
    assert layer.full and torch.allclose(net(x), y, atol=1e-6)
    now = _moments(layer, adam)
    assert all(now[k] == v for k, v in old.items()) and all(now[int(k)][:2] == (0, 0) for k in more)
    assert layer.values.data[~layer.present].eq(0).all()
    if ema: assert torch.equal(averaged['0.values'], layer.values)
    for _ in range(3): adam.zero_grad(); net(x).square().mean().backward(); adam.step()
    middle, kept = _image(net, adam), _moments(layer, adam)
    gone = layer.keys()[-len(more) - 1:].flip(0)
    with edit(net, adam, x) as f: f.disconnect('0', gone // i, gone % i)
    assert not layer.full and all(kept[k] == v for k, v in _moments(layer, adam).items())
    replay(net, f.record.inverse(), adam)
    again = _image(net, adam)
    assert layer.full and all(torch.equal(v, again[k]) for k, v in middle.items())
    with edit(net, adam, x) as e: e.disconnect('0', more // i, more % i); e.connect('0', more // i, more % i)
    replay(net, e.record.inverse(), adam)
    again = _image(net, adam)
    assert all(torch.equal(v, again[k]) for k, v in middle.items())

def test_undone_at_once_the_list_is_there_again():
    net = nn.Sequential(random_layer(10, 10, .3), nn.Linear(10, 2)); adam, x = torch.optim.Adam(net.parameters()), torch.randn(7, 10)
    net(x).square().mean().backward(); adam.step(); before = copy.deepcopy(_image(net, adam))
    free = (~net[0].mask()).nonzero()[torch.randperm(70)[:20]]
    with edit(net, adam, x) as e: e.connect('0', *free.T, torch.ones(20))
    assert net[0].full and net[0].n_links == 50
    replay(net, e.record.inverse(), adam)
    assert not net[0].full and all(torch.equal(v, before[k]) for k, v in _image(net, adam).items())
    with pytest.raises(RuntimeError, match='stop'):
        with edit(net, adam, x) as e: e.connect('0', *free.T); raise RuntimeError('stop')
    assert not net[0].full and all(torch.equal(v, before[k]) for k, v in _image(net, adam).items())

def test_a_wider_matrix_stays_one_until_its_links_change_and_comes_back():
    net = MinimalNetwork([6, 5, 4, 3], .6); adam, x = torch.optim.Adam(net.parameters()), torch.randn(9, 6)
    net(x).square().mean().backward(); adam.step(); before = copy.deepcopy(_image(net, adam))
    assert net.links['0_1'].full
    with edit(net, adam, x) as e:
        e.do(Sprout(1, 9))
        e.connect('links.0_1', [12], [0], [.5])
    assert not net.links['0_1'].full and net.links['0_1'].n_links == 19
    replay(net, e.record.inverse(), adam)
    here = {len(m.present): m.present for m in net.links.values() if m.full}        # absent links' second moments mean nothing
    def seen(v): return v[here[len(v)]] if v.ndim and len(v) in here else v
    assert net.links['0_1'].full and all(torch.equal(seen(v), seen(before[k])) for k, v in _image(net, adam).items())

OPTIMIZERS = dict(adam=lambda p: torch.optim.Adam(p, 1e-2), adamw=lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=.1, amsgrad=True),
                  sgd=lambda p: torch.optim.SGD(p, .1, momentum=.9, weight_decay=.01), rms=lambda p: torch.optim.RMSprop(p, 1e-3))

@pytest.mark.parametrize('density', [.6, .95])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_absent_links_stay_absent_and_the_rest_learns_as_a_list(name, density, monkeypatch):
    monkeypatch.setattr(sparse_module, 'STIR', 4)
    made = [nn.Sequential(random_layer(30, 20, density, mode=m), nn.Tanh(), random_layer(20, 5, density, mode=m))
            for m in ('auto', 'gather')]
    x, t = torch.randn(16, 30), torch.randn(16, 5)
    for net in made:
        opt = OPTIMIZERS[name](net.parameters())
        for _ in range(30): opt.zero_grad(); (net(x) - t).square().mean().backward(); opt.step()
        net.state = opt.state[net[0].values]
    a, b = made[0][0], made[1][0]
    assert a.full and not b.full and a.values[~a.present].eq(0).all() and a.values.grad[~a.present].eq(0).all()
    assert torch.allclose(made[0](x), made[1](x), atol=1e-5) and torch.allclose(a.matrix(), b.matrix(), atol=1e-5)
    assert not made[0].state['momentum_buffer'][~a.present].any() if name == 'sgd' else True
    for k in {'exp_avg_sq', 'square_avg'} & {*made[0].state}:
        v = made[0].state[k]
        assert (v[~a.present] > 0).all() and v[~a.present].max() <= v[a.present].max()*1.05
        assert torch.allclose(v[a.present], made[1].state[k], rtol=1e-3)

def test_moments_of_other_parameters_are_left_alone():
    half, lin = random_layer(8, 8, .6), nn.Linear(8, 8); lin.weight.data[0] = 0
    adam = torch.optim.Adam([*half.parameters(), *lin.parameters()]); x = torch.zeros(4, 8)
    (half(torch.randn(4, 8)).sum() + lin(x).sum()).backward(); adam.step()
    assert adam.state[lin.weight]['exp_avg_sq'].eq(0).all() and adam.state[half.values]['exp_avg_sq'].gt(0).all()

@pytest.mark.parametrize('density', [.1, .5, .97, 1.])
def test_any_form_takes_the_state_of_any_other(density):
    x = torch.randn(3, 9)
    for mode in ('auto', 'gather'):
        a = random_layer(9, 7, density, mode=mode); state = a.state_dict()
        for there in (.05, .6, 1.):
            b = random_layer(9, 7, there, seed=3); b.load_state_dict(state)
            assert b.full == a.full and torch.allclose(a(x), b(x), atol=1e-6) and b.n_links == a.n_links and torch.equal(a.keys(), b.keys())
            b.load_state_dict({k: v for k, v in state.items() if k == 'values' or v.numel()})   # as files were that hold one form only
            b(x).sum().backward(); assert torch.allclose(a(x), b(x), atol=1e-6) and b.values.grad.shape == a.values.shape
            free = (~b.mask()).nonzero()[:1]
            if len(free): b.connect(*free.T, [1.]); assert b.n_links == a.n_links + 1

def test_a_shared_gradient_is_not_changed_and_copies_are_their_own():
    layer = random_layer(6, 6, .75); other = nn.Parameter(torch.zeros(6, 6))
    ((layer.weight() + other)*torch.ones(6, 6)).sum().backward()
    assert other.grad.eq(1).all() and torch.equal(layer.values.grad.view(6, 6), layer.mask().float())
    twin = copy.deepcopy(layer); twin.disconnect(*twin.links()[:2])
    assert twin.n_links == 0 and layer.n_links == 27 and layer(torch.ones(1, 6)).abs().sum() > 0
    d = copy.deepcopy(layer).double(); d.zero_grad(); d(torch.randn(2, 6).double()).sum().backward()
    assert d.values.grad[~d.present].eq(0).all() and d.values.grad.dtype == torch.float64
    x = torch.randn(4, 6); p = dict(layer.named_parameters())
    def loss(p, x): return torch.func.functional_call(layer, p, (x,)).square().sum()
    each = torch.func.vmap(torch.func.grad(lambda p, x: loss(p, x[None])), (None, 0))(p, x)
    assert each['values'].shape == (4, 36)

@pytest.mark.parametrize('kind', ['tanh', 'sigmoid', 'relu'])
@pytest.mark.parametrize('mode, densities', [
    *[('auto', d) for d in ((.9, .05, .6), (.05, .9, .05), (.5, .95, 1.), (1., 1., .02))],
    *[('dense', d) for d in ((.3, .32, .34), (.3, .02, .9))]])
def test_networks_of_both_forms_compute_what_their_layers_do(kind, mode, densities):
    sizes = [12, 10, 9, 8]
    net = MinimalNetwork(sizes, .05, kind, mode=mode)
    for k, d in enumerate(densities):
        m, want = net.links[f'{k}_{k + 1}'], random_layer(sizes[k], sizes[k + 1], d, bias=False); m.load_state_dict(want.state_dict())
    net.links['0_2'].connect([3], [4], [.7]); net.links['0_3'].connect([1], [2], [-.3])
    with torch.no_grad(): net.bias.normal_()
    x, t, grads = torch.randn(5, 12), torch.randn(5, 8), []
    for f in (net, lambda v: net.trace(v)[-1]):
        net.zero_grad(); (f(x)*t).sum().backward()
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()])
    assert net._program()['kind'] == 'lists'
    assert torch.allclose(net(x), net.trace(x)[-1], atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))
    for a, b in zip(net.links.values(), net.links.values(), strict=True):
        if a.full and a.n_links: assert a.values.grad[~b.present].eq(0).all()

def test_a_large_layer_keeps_twelve_bytes_a_link_beside_optimizer_and_gradient(monkeypatch):
    monkeypatch.setattr(sparse_module, 'BLOCK', 2**10)
    layer = random_layer(2**10, 2**10, .01, mode='csr', bias=False)
    layer(torch.randn(2, 2**10, requires_grad=True)).sum().backward()
    def held(v):
        if isinstance(v, dict): return sum(map(held, v.values()))
        return v.numel()*v.element_size() if isinstance(v, torch.Tensor) else 0
    assert held(layer.cache) + held(layer.values) == 12*layer.n_links + 8*(2**10 + 1)

def test_a_matrix_written_anew_between_forward_and_backward_is_no_matter():
    net = MinimalNetwork([12, 10, 9, 8], .3, mode='dense'); x, t, v = torch.randn(5, 12), torch.randn(5, 8), net.links['1_2'].values.data
    assert not any(m.full for m in net.links.values()) and {q['way'] for q in net._program()['parts']} == {'dense'}
    (net(x)*t).sum().backward(); want = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad(); y = net(x); v.mul_(2)
    with torch.no_grad(): assert not torch.allclose(net(x), y)
    v.div_(2); (y*t).sum().backward()
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(want, (p for p in net.parameters() if p.grad is not None), strict=True))

@pytest.mark.parametrize('mode', ['auto', *MODES])
@pytest.mark.parametrize('density', [.2, .5, .7, 1.])
def test_mixed_precision(mode, density):
    "Under autocast every way to compute gives the same outputs and gradients, to bf16's precision; backward within it or after it"
    for within in (False, True):
        layer = random_layer(12, 9, density, mode=mode)
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
        dense, x2 = layer.to_dense(), x.detach().clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16):
            y = layer(x)
            if within: y.square().sum().backward()
        if not within: y.square().sum().backward()
        z = dense(x2); z.square().sum().backward()
        assert torch.allclose(y.float(), z, atol=.05) and torch.allclose(x.grad, x2.grad, atol=.3)
        got = layer.values.grad.view(9, 12)[layer.mask()] if layer.full else layer.values.grad
        assert torch.allclose(got, dense.weight.grad[layer.mask()], atol=.3)
        net, plain = MinimalNetwork([12, 8, 6, 3], density, mode=mode), x.detach()
        want = net(plain)
        with torch.autocast('cpu', torch.bfloat16):
            got = net(plain)
            got.float().square().sum().backward()
        assert torch.allclose(got.float(), want, atol=.05) and all(m.values.grad.isfinite().all() for m in net.links.values() if m.n_links)

def test_optimizers_of_other_models_may_have_noise_of_any_kind():
    layer = random_layer(20, 10, .7); layer(torch.randn(3, 20)).sum().backward()
    assert layer.full and not layer.mask().all()
    p = nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)
    for noise in (torch.tensor([.1, 0.]), .1, 0, None):
        sgd = torch.optim.SGD([p], lr=.1); sgd.param_groups[0]['noise'] = noise; sgd.step()
    assert torch.allclose(p, torch.full((2,), .6))

@pytest.mark.parametrize('make', [lambda p: NoisySGD(p, lr=.1, noise=.5), lambda p: UPGD(p, lr=.1, noise=.1)])
def test_noise_of_an_optimizer_makes_no_links(make):
    for layer in (random_layer(20, 10, .7), random_layer(20, 10, .95)):
        opt, x = make(layer.parameters()), torch.randn(8, 20)
        for _ in range(3):
            opt.zero_grad(); layer(x).square().sum().backward(); opt.step()
        assert layer.full and (layer.matrix()[~layer.mask()] == 0).all() and (layer.matrix()[layer.mask()] != 0).all()

@pytest.mark.parametrize('optimizer', [lambda p: NoisySGD(p, lr=.1, noise=.1), lambda p: UPGD(p, lr=.1, noise=.1)])
def test_noise_makes_no_links_in_a_copy(optimizer):
    layer, x = random_layer(6, 5, .7), torch.randn(8, 6)
    layer(x).sum().backward()
    layer = copy.deepcopy(layer)
    opt = optimizer(layer.parameters())
    for _ in range(3):
        opt.zero_grad(); layer(x).square().sum().backward(); opt.step()
    assert layer.full and not layer.values[~layer.present].any()

@pytest.mark.parametrize('density', [.2, .7])
def test_a_link_named_twice_is_refused(density):
    layer = random_layer(6, 5, density)
    before = layer.matrix().clone()
    (r, c), (row, col) = (~layer.mask()).nonzero()[0].tolist(), layer.mask().nonzero()[0].tolist()
    with pytest.raises(ValueError, match=f'rows, cols: got the link {r} <- {c} twice'): layer.connect([r, r], [c, c], [1., 2.])
    with pytest.raises(ValueError, match=f'rows, cols: got the link {row} <- {col} twice'): layer.disconnect([row, row], [col, col])
    assert torch.equal(layer.matrix(), before) and layer.n_links == int(layer.mask().sum())

@pytest.mark.parametrize('density', [.1, .5, .95, 1.])
def test_filled_a_layer_is_dense_and_comes_back(density):
    torch.manual_seed(0)
    net = nn.Sequential(random_layer(10, 8, density), nn.Tanh(), nn.Linear(8, 3))
    adam, x = torch.optim.AdamW(net.parameters(), 1e-2), torch.randn(6, 10)
    def train():
        adam.zero_grad(); net(x).square().sum().backward(); adam.step()
    for _ in range(3): train()
    before, y, mask = copy.deepcopy(_image(net, adam)), net(x).detach(), net[0].mask()
    with edit(net, adam, x) as e: e.do(Fill('0'))
    assert net[0].n_links == 80 and net[0].full and torch.allclose(net(x), y, atol=1e-6) and not net[0].absent()[0].numel()
    replay(net, e.record.inverse(), adam)
    assert torch.equal(net[0].mask(), mask) and torch.allclose(net(x), y, atol=1e-6)
    if not net[0].full: assert all(torch.equal(v, before[k]) for k, v in _image(net, adam).items())
    with edit(net, adam, x) as e: e.do(Fill('0'))
    twin, t = nn.Sequential(net[0].to_dense(), nn.Tanh(), copy.deepcopy(net[2])), torch.optim.SGD(net.parameters(), .1)
    sgd = torch.optim.SGD(twin.parameters(), .1)
    for _ in range(3):
        for m, o in ((net, t), (twin, sgd)): o.zero_grad(); m(x).square().sum().backward(); o.step()
    assert torch.allclose(net[0].matrix(), twin[0].weight, atol=1e-5)
    with pytest.raises(TypeError, match="layer: '2' is a Linear; takes the path of a SparseLinear"):
        with edit(net, adam, x) as e: e.do(Fill('2'))

@pytest.mark.parametrize('density', [.1, .6])
def test_wrong_links_are_named(density):
    layer = random_layer(6, 5, density); free = [v[:1] for v in layer.absent()]; before = layer.matrix().detach().clone()
    for call, error, says in ((lambda: layer.connect(*free, [1., 2.]), ValueError, 'values: got 2 for 1 links'),
                              (lambda: layer.connect(*free, []), ValueError, 'values: got 0 for 1 links'),
                              (lambda: layer.connect([0], [0, 1], [1., 2.]), ValueError, 'rows, cols: got 1 and 2'),
                              (lambda: layer.connect([.5], [1], [1.]), TypeError, 'rows: got torch.float32, takes indices'),
                              (lambda: layer.disconnect([1], [True]), TypeError, 'cols: got torch.bool, takes indices'),
                              (lambda: SparseLinear(6, 5, [0], [1.7]), TypeError, 'cols: got torch.float32'),
                              (lambda: SparseLinear(6, 5, [0, 0], [1, 1]), ValueError, 'rows, cols: got the link 0 <- 1 twice'),
                              (lambda: from_dense(nn.Linear(6, 5), torch.ones(5, 7)), ValueError, r'mask: got \(5, 7\), takes \(5, 6\)')):
        with pytest.raises(error, match=says): call()
    assert torch.equal(layer.matrix(), before) and layer.n_links == int(layer.mask().sum())
    net = nn.Sequential(layer)
    with pytest.raises(TypeError, match='rows: got torch.float32, takes indices'):
        with edit(net, None, torch.randn(2, 6)) as e: e.connect('0', [.5], [1])

def test_noise_in_a_layer_that_is_a_list_again():
    net = nn.Sequential(random_layer(12, 10, .6)); opt, x = NoisySGD(net.parameters(), lr=.1, noise=.1), torch.randn(4, 12)
    def train():
        opt.zero_grad(); net(x).square().sum().backward(); opt.step()
    train(); assert net[0].full
    gone = net[0].mask().nonzero()[:60].T
    with edit(net, opt, x) as e: e.disconnect('0', *gone)
    train(); assert not net[0].full and (net[0].values != 0).all() and net[0].n_links == 12
    with edit(net, opt, x) as e: e.do(Fill('0'))
    train(); assert net[0].full and (net[0].values != 0).all()

def test_moments_of_links_that_were_absent_are_their_own(monkeypatch):
    monkeypatch.setattr(sparse_module, 'STIR', 2)
    net = nn.Sequential(random_layer(12, 10, .6)); adam, x = torch.optim.Adam(net.parameters(), 1e-2), torch.randn(4, 12)
    twin = None
    for k in range(9):
        if k == 4:
            with edit(net, adam, x) as e: e.do(Fill('0'))
            twin = nn.Sequential(net[0].to_dense()); other = torch.optim.Adam(twin.parameters(), 1e-2)
            for a, b in ((net[0].values, twin[0].weight), (net[0].bias, twin[0].bias)):
                other.state[b] = {n: v.clone().view_as(b) if v.ndim else v.clone() for n, v in adam.state[a].items()}
        for m, o in ((net, adam), (twin, k > 3 and other)):
            if m is not None: o.zero_grad(); m(x).square().sum().backward(); o.step()
    assert torch.allclose(net[0].matrix(), twin[0].weight, atol=1e-6)
