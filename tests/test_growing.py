"Growth keeps the function, the optimizer and everything else that a reader has in hand"
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from plasticity.growing import DynamicExpandableNetwork, grow

torch.set_num_threads(1)
SLOW = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

def batch(n=64, features=6, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=g)
    return x.to(dtype), torch.sin(2*x[:, :2]).to(dtype)

def trained(activation='relu', dtype=torch.float32, sizes=(7, 5), optimizer='adam', steps=30, **options):
    "A network that has learned a little, its optimizer and a scheduler"
    torch.manual_seed(0)
    net = DynamicExpandableNetwork(6, 2, sizes, activation, task_type='regression', **options).to(dtype)
    kw = dict(lr=1e-2) if optimizer == 'adam' else dict(lr=1e-2, momentum=.9)
    opt = dict(adam=torch.optim.Adam, sgd=torch.optim.SGD)[optimizer](net.parameters(), **kw)
    plan = torch.optim.lr_scheduler.StepLR(opt, 20)
    for _ in range(steps): step(net, opt, dtype); plan.step()
    net.attach(opt)
    return net, opt, plan

def step(net, opt, dtype):
    x, y = batch(dtype=dtype)
    loss = F.mse_loss(net(x), y)
    opt.zero_grad(); loss.backward(); opt.step()
    return loss.item()

def kept(net, opt): # old values, moments, flags by parameter
    return {p: (p.detach().clone(), p.requires_grad, {k: v.clone() for k, v in opt.state[p].items()}) for p in net.parameters()}

def check(net, opt, plan, change, dtype):
    "What every growth has to keep"
    x, y = batch(dtype=dtype, seed=3)
    was, groups, old = kept(net, opt), opt.param_groups, net(x)
    before = F.mse_loss(old, y).item()
    change(net)
    new = net(x)
    assert (new - old).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5)
    assert abs(F.mse_loss(new, y).item()/before - 1) < 1e-3
    assert net.optimizer is opt and opt.param_groups is groups and plan.optimizer is opt
    assert {id(p) for g in groups for p in g['params']} == {id(p) for p in net.parameters()}
    for p, (v, flag, state) in was.items():
        at = tuple(slice(0, s) for s in v.shape)
        assert p.dtype == dtype and p.requires_grad == flag and torch.equal(p[at], v)
        for k, m in state.items(): assert torch.equal(opt.state[p][k][at] if m.dim() else opt.state[p][k], m)
    fresh = [p for p in net.parameters() if p not in was or p.shape != was[p][0].shape]
    step(net, opt, dtype); plan.step()
    return fresh, was

@given(activation=st.sampled_from(['relu', 'tanh', 'gelu']), double=st.booleans(), layer=st.integers(0, 1), k=st.sampled_from([1, 8, 100]),
       optimizer=st.sampled_from(['adam', 'sgd']), start=st.sampled_from(['zero', 'orthogonal']))
@settings(max_examples=18, **SLOW)
def test_width(activation, double, layer, k, optimizer, start):
    dtype = torch.float64 if double else torch.float32
    net, opt, plan = trained(activation, dtype, optimizer=optimizer)
    n = net.get_layer_sizes()[layer]
    check(net, opt, plan, lambda net: net.expand_layer_width(layer, k, start=start), dtype)
    assert net.get_layer_sizes()[layer] == n + k
    new_learns(net, opt, dtype, layer, n, activation)

def new_learns(net, opt, dtype, layer, n, activation):
    "The new units of a layer get gradients, and no two become alike"
    for _ in range(3): step(net, opt, dtype)
    made, read = net.layers[layer].made.detach(), net.layers[layer].read[0].detach()
    g = net.layers[layer].made.grad
    if activation != 'relu': assert (g[n:].abs().sum(1) > 0).all()
    assert (read[:, n:] != 0).any(0).float().mean() > (.4 if activation == 'relu' else .99)
    far = torch.cdist(made.double(), made.double()) + torch.eye(len(made))
    assert far[n:].min() > 1e-4

@given(activation=st.sampled_from(['relu', 'tanh', 'gelu']), double=st.booleans(), position=st.integers(0, 2),
       k=st.sampled_from([None, 3, 5, 7, 20]), optimizer=st.sampled_from(['adam', 'sgd']))
@settings(max_examples=18, **SLOW)
def test_depth(activation, double, position, k, optimizer):
    dtype = torch.float64 if double else torch.float32
    net, opt, plan = trained(activation, dtype, optimizer=optimizer)
    sizes = net.get_layer_sizes()
    fresh, was = check(net, opt, plan, lambda net: net.expand_depth(position, k), dtype)
    assert any(p not in was for p in fresh)
    after = net.get_layer_sizes()
    assert after[:position] + after[position+1:] == sizes and (k is None or after[position] == k)
    for _ in range(2): step(net, opt, dtype)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fresh if p.dim() > 1)

@given(st.lists(st.tuples(st.sampled_from(['width', 'depth']), st.integers(0, 5), st.sampled_from([1, 4, 9])), min_size=2, max_size=5),
       st.sampled_from(['relu', 'tanh']), st.sampled_from(['none', 'batch']))
@settings(max_examples=10, **SLOW)
def test_any_sequence(changes, activation, norm):
    net, opt, plan = trained(activation, torch.float64, normalization=norm)
    net.eval()
    for kind, at, k in changes:
        n = len(net.get_layer_sizes())
        x = batch(dtype=torch.float64)[0]
        old = net(x)
        if kind == 'width': net.expand_layer_width(at % n, k)
        else: net.expand_depth(at % (n + 1), k)
        assert (net(x) - old).abs().max() <= 1e-12
        net.train(); step(net, opt, torch.float64); net.eval()
    twin = DynamicExpandableNetwork(6, 2, (7, 5), activation, task_type='regression', normalization=norm).double().eval()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x), net(x)) and twin.get_layer_sizes() == net.get_layer_sizes()

@pytest.mark.parametrize('start', ['zero', 'copy', 'replicate', 'orthogonal', 'gradmax', 'tiny'])
def test_starts(start):
    net, opt, plan = trained('tanh', torch.float64)
    x, y = batch(dtype=torch.float64)
    old = net(x)
    net.expand_layer_width(1, 2, start=start, data=(x, y), loss=F.mse_loss)
    assert (net(x) - old).abs().max() < 1e-12 and net.get_layer_sizes() == [7, 7]
    loss = step(net, opt, torch.float64)
    for _ in range(20): last = step(net, opt, torch.float64)
    assert last < loss

def test_orthogonal_rows():
    net, *_ = trained('tanh', torch.float64, sizes=(3, 4))
    net.expand_layer_width(0, 2, start='orthogonal')
    w = net.layers[0].made.detach()
    assert w[:3].mm(w[3:].T).abs().max() < 1e-12 and abs(w[3] @ w[4]) < 1e-12
    net.expand_layer_width(0, 9, start='orthogonal')  # more units than inputs: as far apart as they can be
    assert torch.isfinite(net.layers[0].made).all()

def test_start_of_your_own():
    from plasticity.edits import Widen
    net, *_ = trained('tanh')
    net.expand_layer_width(0, 2, start=lambda group, k, seed: Widen(group, k, source=[0], seed=seed))
    assert net.get_layer_sizes() == [9, 5]

class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(3, 2)
    def forward(self, x): return self.c(torch.tanh(self.b(F.relu(self.a(x)))))

def test_grow_a_model_that_is_not_ours():
    model = Foreign().double()
    x, _ = batch(dtype=torch.float64)
    opt = torch.optim.Adam(model.parameters())
    net = grow(model, x[:2], optimizer=opt)
    old = model(x)
    net.expand_layer_width(1, 5); net.expand_layer_width('a', 2); net.expand_depth(1, 6); net.expand_depth(2)
    assert (net(x) - old).abs().max() < 1e-12 and net.get_layer_sizes()[0] == 6
    assert len(opt.param_groups[0]['params']) == len(list(net.parameters()))

@pytest.mark.parametrize('model, shape, options', [
    ('cnn', (3, 12, 12), dict(channels=(4, 6), hidden_sizes=(5,), normalization='batch')),
    ('resnet', (3, 12, 12), dict(channels=(4, 8), blocks=(2, 1))),
    ('resnet', (3, 12, 12), dict(channels=(4, 8), blocks=(1, 1), block='bottleneck')),
    ('mlp', (1, 5, 5), dict(hidden_sizes=(4, 4)))])
def test_bodies(model, shape, options):
    torch.manual_seed(0)
    net = DynamicExpandableNetwork(shape, 3, model=model, task_type='classification', **options).double()
    x = torch.randn(4, *shape, dtype=torch.float64)
    net.train(); net(x); net.eval()
    for i in range(len(net.get_layer_sizes())):
        old, n = net(x), net.get_layer_sizes()[i]
        net.expand_layer_width(i, 3)
        assert (net(x) - old).abs().max() < 1e-11 and net.get_layer_sizes()[i] == n + 3
    for i in reversed(range(len(net.get_layer_sizes()) + 1)):
        old, n = net(x), len(net.get_layer_sizes())
        net.expand_depth(i)
        assert (net(x) - old).abs().max() < 1e-11 and len(net.get_layer_sizes()) > n

def test_norms_that_mix_units():
    net = DynamicExpandableNetwork(6, 2, (8, 8), normalization='layer').double().eval()
    x = batch(dtype=torch.float64)[0]
    old = net(x)
    with pytest.raises(Exception, match='multiple of 8'): net.expand_layer_width(0, 3)
    net.expand_layer_width(0, 8)
    assert (net(x) - old).abs().max() < 1e-10 and net.get_layer_sizes() == [16, 8]

@pytest.mark.parametrize('call, says', [
    (lambda n: n.expand_layer_width(2, 4), 'layer_idx'), (lambda n: n.expand_layer_width(-3, 4), 'layer_idx'),
    (lambda n: n.expand_layer_width(0, 0), 'num_neurons'), (lambda n: n.expand_layer_width(0, 1.5), 'num_neurons'),
    (lambda n: n.expand_layer_width(0, True), 'num_neurons'), (lambda n: n.expand_layer_width(0, 4, start='zeros'), 'zero'),
    (lambda n: n.expand_layer_width(0, 4, start='gradmax'), 'data'), (lambda n: n.expand_depth(3), 'position'),
    (lambda n: n.expand_depth(-4), 'position'), (lambda n: n.expand_depth(0, 0), 'num_neurons'),
    (lambda n: n.expand_layer_width('x', 1), 'x')])
def test_wrong_arguments(call, says):
    net, *_ = trained(steps=1)
    with pytest.raises((ValueError, KeyError), match=says): call(net)
    assert net.get_layer_sizes() == [7, 5]

@pytest.mark.parametrize('options, says', [(dict(hidden_sizes=(0,)), 'hidden_sizes'), (dict(activation='rellu'), 'relu'),
                                           (dict(task_type='regresion'), 'regression'), (dict(dropout=1.5), 'dropout'),
                                           (dict(model='mpl'), 'mlp')])
def test_wrong_networks(options, says):
    with pytest.raises(ValueError, match=says): DynamicExpandableNetwork(6, 2, **options)

def test_checkpoint_of_a_grown_network(tmp_path):
    net, *_ = trained('gelu', torch.float64)
    net.expand_depth(1, 4); net.expand_layer_width(0, 3); net.expand_depth(0, 2)
    net.save_checkpoint(tmp_path/'net.pt')
    x = batch(dtype=torch.float64)[0]
    for twin in (DynamicExpandableNetwork(6, 2, (7, 5), 'gelu', task_type='regression'), DynamicExpandableNetwork(6, 2, (3,)),
                 DynamicExpandableNetwork.from_checkpoint(tmp_path/'net.pt')):
        twin.load_checkpoint(tmp_path/'net.pt')
        assert torch.equal(twin(x), net(x)) and twin.get_layer_sizes() == net.get_layer_sizes() and twin.events == net.events
        twin.expand_layer_width(0, 2)
    (tmp_path/'bad.pt').write_bytes(b'\x80\x04nonsense')
    with pytest.raises(ValueError, match='bad.pt'): net.load_checkpoint(tmp_path/'bad.pt')
    with pytest.raises(FileNotFoundError): net.load_checkpoint(tmp_path/'none.pt')

def test_a_copy_grows_alone():
    net, *_ = trained()
    twin = copy.deepcopy(net)
    twin.expand_layer_width(0, 3)
    assert net.get_layer_sizes() == [7, 5] and twin.get_layer_sizes() == [10, 5]

def test_prune_back():
    net, opt, _ = trained('tanh', torch.float64)
    net.expand_layer_width(0, 4)
    x = batch(dtype=torch.float64)[0]
    old = net(x)
    net.shrink_layer_width(0, 4)  # the new ones have no outgoing weight yet: nothing is lost
    assert (net(x) - old).abs().max() < 1e-12 and net.get_layer_sizes() == [7, 5]
    step(net, opt, torch.float64)

def test_frozen_and_shared_flags():
    net, opt, _ = trained()
    for p in net.layers[0].module.parameters(): p.requires_grad_(False)
    net.expand_layer_width(0, 3)
    assert not net.layers[0].made.requires_grad and net.layers[0].read[0].requires_grad

def test_heads():
    net, opt, _ = trained(dtype=torch.float64)
    x = batch(dtype=torch.float64)[0]
    old = net(x)
    i = net.add_head(3)
    assert i == 1 and net(x).shape == (64, 3) and torch.equal(net(x, head=0), old)
    net.expand_layer_width(1, 4)
    assert (net(x, head=0) - old).abs().max() < 1e-12 and net(x).shape == (64, 3)
    net.use_head(0)
    assert (net(x) - old).abs().max() < 1e-12
    assert {id(p) for g in opt.param_groups for p in g['params']} == {id(p) for p in net.parameters()}
    twin = DynamicExpandableNetwork(6, 2, (7, 5), task_type='regression').double()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x, head=1), net(x, head=1))
    with pytest.raises(ValueError, match='head'): net.use_head(2)

@pytest.mark.parametrize('change', [lambda n: n.expand_layer_width(0, 3), lambda n: n.expand_layer_width(1, 3)])
def test_a_loss_from_before_cannot_be_used_in_silence(change):
    net, *_ = trained()
    loss = net(batch()[0]).sum()
    change(net)
    with pytest.raises(RuntimeError): loss.backward()

def test_small_fresh_networks_grow():
    "Their examples reach some of their units"
    for seed in range(60): DynamicExpandableNetwork(1, 1, [2], seed=seed).expand_layer_width(0, 2)
    net, images = DynamicExpandableNetwork(3, 1, [2]), DynamicExpandableNetwork((1, 4, 4), 2, [2], task_type='classification')
    assert net.examples.shape == (32, 3) and images.examples.shape == (2, 1, 4, 4)

def test_numbers_of_numpy():
    net = DynamicExpandableNetwork(3, 1, [4, 4], seed=0)
    net.expand_layer_width(np.int64(1), np.int64(2)); net.expand_depth(np.int64(1), np.int64(3))
    net.shrink_layer_width(np.int64(0), np.int32(1))
    assert net.get_layer_sizes() == [3, 3, 6] and type(net.events[0]['num_neurons']) is int
    with pytest.raises(ValueError, match='num_neurons: got .*2.5'): net.expand_layer_width(0, np.float64(2.5))
