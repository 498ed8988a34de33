"Surgery: operations, optimizers, graphs"
import gc, warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from plasticity.surgery import (MOMENTS, OPS, Surgeon, find, held, kept_sizes, newcomers, no_waiting_graph, put, scale, set_data, take,
                                unscale,
                                unwrapped, write)
from plasticity.units import LiveGraph, WrappedModel

OPT = dict(
    sgd=lambda p: torch.optim.SGD(p, .1, momentum=.9), nesterov=lambda p: torch.optim.SGD(p, .1, momentum=.9, nesterov=True),
    adam=torch.optim.Adam, amsgrad=lambda p: torch.optim.Adam(p, amsgrad=True), foreach=lambda p: torch.optim.Adam(p, foreach=True),
    fused=lambda p: torch.optim.AdamW(p, fused=True), adamw=torch.optim.AdamW, nadam=torch.optim.NAdam, radam=torch.optim.RAdam,
    rmsprop=torch.optim.RMSprop, centered=lambda p: torch.optim.RMSprop(p, centered=True, momentum=.9), adagrad=torch.optim.Adagrad,
    adadelta=torch.optim.Adadelta, adamax=torch.optim.Adamax, rprop=torch.optim.Rprop, asgd=torch.optim.ASGD,
    adafactor=lambda p: torch.optim.Adafactor(p, lr=.01))

def pair(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

def step(net, opt, n=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        x = torch.randn(8, net[0].weight.shape[1], generator=g)
        opt.zero_grad(); net(x).square().mean().backward(); opt.step()

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_operations_are_undone_exactly(dtype):
    t = (torch.randn(5, 7, 3) * 100).to(dtype)
    order = torch.tensor([6, 0, 2, 3])
    lost = torch.tensor([1, 4, 5])
    assert torch.equal(put(take(t, 1, torch.tensor([0, 2, 3, 6])), 1, lost, take(t, 1, lost)), t)
    assert torch.equal(take(t, 1, order), t[:, [6, 0, 2, 3]])
    if dtype.is_floating_point:
        by = torch.rand(2, dtype=torch.float64); at = torch.tensor([1, 4])
        small = scale(t, 1, at, by, 2)
        assert torch.equal(unscale(small, 1, at, by, t[:, [1, 4]], 2), t)
        moved = write(small, 1, torch.tensor([4]), 3.)
        assert torch.allclose(unscale(moved, 1, at, by, t[:, [1, 4]], 2)[:, 4].double(),
                              (3. / by[1] ** 2).to(dtype).double().expand(5, 3), rtol=1e-2)

def test_shares_add_up_in_half_precision():
    w = torch.randn(2000, 1).bfloat16()
    parts = [scale(w, 1, torch.tensor([0]), torch.tensor([s], dtype=torch.float64)) for s in (.6, .4)]
    gap = ((parts[0].double() + parts[1].double()) / w.double() - 1)
    assert gap.abs().max() < .006 and abs(gap.mean()) < 3e-4

def test_memory_format_is_kept():
    t = torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last)
    assert take(t, 0, torch.tensor([0, 2])).is_contiguous(memory_format=torch.channels_last)
    assert put(t, 1, torch.tensor([2]), t[:, :1]).is_contiguous(memory_format=torch.channels_last)

@pytest.mark.parametrize('name', OPT)
def test_every_optimizer_goes_on(name):
    net = pair(); opt = OPT[name](net.parameters()); step(net, opt)
    kept = {k: v.clone() for k, v in opt.state[net[0].weight].items() if isinstance(v, torch.Tensor)}
    sched = lr_scheduler.StepLR(opt, 1); w = net[0].weight
    s = Surgeon(net, opt)
    for op in (dict(op='take', tensor='0.weight', dim=0, order=torch.tensor([0, 1, 1, 2])),
               dict(op='take', tensor='0.bias', dim=0, order=torch.tensor([0, 1, 1, 2])),
               dict(op='fresh', tensor='0.weight', dim=0, at=torch.tensor([2]), new=True), dict(op='take', tensor='2.weight', dim=1,
                                                                                                order=torch.tensor([0, 1, 1,
                                                                                                                    2]))): s.run(op)
    s.keep_sizes(['0.weight', '2.weight'])
    for k, v in opt.state[w].items():
        if k == 'age': assert ((v == 0) == torch.tensor([False, False, True, False])[:, None]).all()
        elif isinstance(v, torch.Tensor) and v.dim() == 2 and v.shape[0] == 4: assert torch.equal(v[[0, 1, 3]], kept[k])
        elif isinstance(v, torch.Tensor) and v.dim() == 0: assert torch.equal(v, kept[k])
    step(net, opt); sched.step()
    assert net[0].weight is w and all(torch.isfinite(p).all() for p in net.parameters()) and net[0].out_features == 4

@pytest.mark.parametrize('name', OPT)
def test_rollback_and_undo_are_exact(name):
    net = pair(); opt = OPT[name](net.parameters()); step(net, opt)
    def image(): return [p.detach().clone() for p in net.parameters()] + [v.clone() for p in net.parameters() for v
                                                                          in opt.state[p].values() if isinstance(v, torch.Tensor)]
    def same(a, b): return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))
    before, grads = image(), [p.grad for p in net.parameters()]
    third = torch.tensor([1/3, 1/3], dtype=torch.float64)
    def work(s):
        s.run(dict(op='take', tensor='0.weight', dim=0, order=torch.tensor([2, 2, 0])))
        s.run(dict(op='scale', tensor='0.weight', dim=0, at=torch.tensor([0, 1]), by=third, target='moment'))
        s.run(dict(op='scale', tensor='2.weight', dim=1, at=torch.tensor([0, 1]), by=third))
        s.run(dict(op='write', tensor='2.bias', dim=0, at=torch.tensor([1]), value=7.))
        s.run(dict(op='fresh', tensor='2.weight', dim=0, at=torch.tensor([1])))
    s = Surgeon(net, opt); work(s); s.rollback()
    assert same(image(), before) and all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True)) and not s.ops and not s.undo
    work(s)
    assert not same(image()[:1], before[:1])
    for op in reversed(list(s.undo)): s.run(op)
    assert same(image(), before)

def test_new_rows_start_no_faster_than_a_fresh_optimizer():
    for name in ('sgd', 'adam', 'amsgrad', 'adamw', 'fused', 'foreach', 'nadam', 'radam', 'rmsprop', 'centered', 'adagrad', 'adadelta',
                 'adamax'):
        for size in (1., 1e-3):
            for seed in range(3):
                late, fresh, old = moves(OPT[name], seed, size)
                assert late <= 1.2 * fresh, (name, size, late, fresh)
                assert late >= .01 * fresh, (name, size, late, fresh)
                assert old == 0, name

def moves(make, seed, size, t0=120, steps=10):
    "Largest of the first steps of a late row, and of the same row under a fresh optimizer; change of the old rows' steps"
    g = torch.Generator().manual_seed(seed)
    layer, twin = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
    twin.load_state_dict(layer.state_dict())
    opt, same = make(list(layer.parameters())), make(list(twin.parameters()))
    for _ in range(t0):
        layer.weight.grad = size * torch.randn(4, 6, generator=g); twin.weight.grad = layer.weight.grad.clone(); opt.step(); same.step()
    s = Surgeon(layer, opt)
    s.run(dict(op='take', tensor='weight', dim=0, order=torch.tensor([0, 1, 2, 3, 3])))
    s.run(dict(op='fresh', tensor='weight', dim=0, at=torch.tensor([4]), new=True))
    alone = nn.Parameter(layer.weight[4:].detach().clone()); other, late, new = make([alone]), [], []
    for _ in range(steps):
        grad = size * torch.randn(5, 6, generator=g)
        a, b = layer.weight[4].detach().clone(), alone[0].detach().clone()
        layer.weight.grad, alone.grad, twin.weight.grad = grad, grad[4:].clone(), grad[:4].clone()
        opt.step(); other.step(); same.step()
        late.append((layer.weight[4] - a).abs().max().item()); new.append((alone[0] - b).abs().max().item())
    return max(late), max(new), (layer.weight[:4] - twin.weight).abs().max().item()

def test_unknown_optimizer_is_indexed_and_says_so():
    class Odd(torch.optim.Optimizer):
        def __init__(self, params): super().__init__(params, {})
        def step(self):
            for g in self.param_groups:
                for p in g['params']:
                    self.state[p].setdefault('seen', torch.zeros_like(p)).add_(p.grad); self.state[p].setdefault('odd', torch.zeros(17))
    net = pair(); opt = Odd(net.parameters()); step(net, opt)
    seen = opt.state[net[0].weight]['seen'].clone()
    with pytest.warns(UserWarning, match='Odd'):
        Surgeon(net, opt).run(dict(op='take', tensor='0.weight', dim=0, order=torch.tensor([2, 0])))
    assert torch.equal(opt.state[net[0].weight]['seen'], seen[[2, 0]]) and len(opt.state[net[0].weight]['odd']) == 17

def test_followers_follow():
    net = pair(); avg, plain = swa_utils.AveragedModel(net), {k: v.clone() for k, v in net.state_dict().items()}
    s = Surgeon(net, None, [avg, plain])
    s.run(dict(op='take', tensor='0.weight', dim=0, order=torch.tensor([1])))
    s.run(dict(op='scale', tensor='0.weight', dim=0, at=torch.tensor([0]), by=torch.tensor([.5], dtype=torch.float64)))
    s.keep_sizes(['0.weight'])
    assert torch.equal(avg.module[0].weight, net[0].weight) and torch.equal(plain['0.weight'],
                                                                            net[0].weight) and avg.module[0].out_features == 1

def test_graphs():
    net = pair(); named = dict(net.named_parameters()); x = torch.randn(3, 4)
    y = net(x); loss = y.square().mean()
    with pytest.raises(LiveGraph, match='0.weight'): no_waiting_graph(named)
    loss.backward(retain_graph=True)
    with pytest.raises(LiveGraph): no_waiting_graph(named)
    loss.backward()
    no_waiting_graph(named)
    assert held(net[0].weight)
    set_data(net[0].weight, torch.randn(3, 5)); net(torch.randn(2, 5)).mean().backward()
    assert net[0].weight.grad.shape == (3, 5)
    del y, loss; gc.collect()
    assert not held(net[0].bias)
    net.requires_grad_(False); no_waiting_graph(named)

def test_hooks_and_attributes_of_a_parameter_stay():
    net, seen = pair(), []
    net[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.shape)); net[0].weight.mine = 'yes'
    Surgeon(net).run(dict(op='take', tensor='0.weight', dim=1, order=torch.tensor([0, 1])))
    net(torch.randn(2, 2)).mean().backward()
    assert seen == [(3, 2)] and net[0].weight.mine == 'yes'

def test_wrappers():
    net = pair()
    assert unwrapped(nn.DataParallel(net)) is net
    with pytest.raises(WrappedModel, match='script'): unwrapped(torch.jit.script(net))
    with pytest.raises(TypeError): unwrapped(3)
    class DistributedDataParallel(nn.Module): pass
    with pytest.raises(WrappedModel, match='wrap it again'): unwrapped(DistributedDataParallel())

def test_wrong_arguments():
    with pytest.raises(TypeError, match='optimizer'): Surgeon(pair(), 3)
    with pytest.raises(TypeError, match='ema'): Surgeon(pair(), None, [3])
    with pytest.raises(ValueError, match='take'): Surgeon(pair()).run(dict(op='tak'))
    with pytest.raises(KeyError, match='9.weight'): Surgeon(pair()).slots('9.weight')
    assert find(pair(), '9.weight') is None

def test_optimizers_and_followers_of_another_model_are_named():
    net, other = pair(), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match='holds none of the parameters'): Surgeon(net, torch.optim.Adam(other.parameters()))
    Surgeon(net, [torch.optim.Adam(other.parameters()), torch.optim.SGD([net[0].bias])])
    with pytest.raises(TypeError, match='LBFGS'): Surgeon(net, torch.optim.LBFGS(net.parameters()))
    for follower in (other, swa_utils.AveragedModel(other)):
        with pytest.raises(ValueError, match=r"'0.weight' has shape \(3, 4\) here and \(5, 4\) there"): Surgeon(net, None, [follower])
    with pytest.raises(ValueError, match='no such parameter'): Surgeon(net, None, nn.Linear(4, 3))

@pytest.mark.parametrize('m,names', [
    (nn.Conv2d(6, 4, 3), 'in_channels out_channels'), (nn.ConvTranspose2d(6, 4, 3, groups=2),
                                                       'in_channels out_channels'), (nn.BatchNorm2d(3), 'num_features'),
    (nn.BatchNorm1d(3, affine=False), 'num_features'), (nn.GroupNorm(2, 4), 'num_channels'), (nn.GroupNorm(4, 4),
                                                                                              'num_channels num_groups'),
    (nn.LayerNorm(5), 'normalized_shape'), (nn.RMSNorm(5), 'normalized_shape'), (nn.Embedding(5, 2), 'embedding_dim'), (nn.PReLU(3),
                                                                                                                        'num_parameters'),
    (nn.LSTM(3, 4, proj_size=2), 'input_size hidden_size proj_size'), (nn.GRU(3, 4), 'hidden_size'), (nn.RNN(3, 4),
                                                                                                      'hidden_size'), (nn.LSTMCell(3, 4),
                                                                                                                       'hidden_size'),
    (nn.Bilinear(2, 3, 4), 'out_features in1_features in2_features'), (nn.MultiheadAttention(6, 2), 'embed_dim head_dim')])
def test_sizes_of_torch_modules_are_what_they_say(m, names):
    sizes = kept_sizes(m)
    assert set(names.split()) <= set(sizes) and all(getattr(m, k) == v for k, v in sizes.items())

def test_newcomers_without_any_past():
    assert newcomers(torch.zeros(3, 2), 0, torch.tensor([0, 1, 2]), 'peak').abs().max() == 0
    assert newcomers(torch.tensor([[0., 0.], [4., 0.], [9., 9.]]), 0, torch.tensor([2]), 'peak')[2].tolist() == [4., 4.]
    assert all(len(r) == 2 for m in MOMENTS.values() for r in m.values()) and set(OPS) >= {'take', 'put', 'scale', 'unscale', 'write',
                                                                                           'fresh', 'attr'}

def test_known_optimizers_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for make in OPT.values():
            net = pair(); opt = make(net.parameters()); step(net, opt, 2)
            for n, _ in net.named_parameters(): Surgeon(net, opt).slots(n)
