"Edits: function kept, optimizer carried, undo and replay bit for bit, refusals"
import copy, gc, json, os, subprocess, sys, weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

import zoo
from plasticity.edits import (Clone, Connect, Deepen, Disconnect, Edit, EditRecord, Prune, Reset, Widen, edit, replay)
from plasticity.starts import fresh_tensors
from plasticity.surgery import set_data
from plasticity.units import (BilinearUnits, EditError, FrozenUnits, HardCodedShape, Indivisible, LastUnits, LiveGraph, MixedUnits,
                              NotPreserved,
                              TiedUnits, UnseenParameters, WrappedModel, units)

RATE = dict(sgd=lambda p: torch.optim.SGD(p, .02), momentum=lambda p: torch.optim.SGD(p, .02, momentum=.9),
            adam=lambda p: torch.optim.Adam(p, 1e-3),
            amsgrad=lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True), adamw=lambda p: torch.optim.AdamW(p, 1e-3), nadam=torch.optim.NAdam,
            radam=torch.optim.RAdam, rmsprop=lambda p: torch.optim.RMSprop(p, 1e-3, centered=True,
                                                                           momentum=.5), adagrad=torch.optim.Adagrad)

def mlp(act=nn.Tanh): return nn.Sequential(nn.Linear(5, 6), act(), nn.Linear(6, 4), act(), nn.Linear(4, 3))
def cnn(): return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(),
                                nn.Linear(3*16, 2))
def gated(): return nn.Sequential(nn.Linear(5, 8), nn.GLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
class Recurrent(nn.Module):
    def __init__(self): super().__init__(); self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
    def forward(self, x): return self.head(self.rnn(x)[0][:, -1])
MODELS = dict(mlp=(mlp, (7, 5)), cnn=(cnn, (6, 2, 6, 6)), gated=(gated, (7, 5)), lstm=(Recurrent, (6, 5, 3)))

def made(name, seed=0, opt='adam', steps=3):
    torch.manual_seed(seed)
    factory, shape = MODELS[name]
    net = zoo.shake(factory(), seed); x = torch.randn(shape); o = RATE[opt](net.parameters())
    for _ in range(steps): train(net, o, x)
    return net, o, x

def train(net, opt, x, y=None, n=1):
    for _ in range(n):
        out = net(x); loss = (out - (0 if y is None else y)).square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
    return loss.detach()

def image(net, opt=None):
    "Every tensor and plain attribute, with the optimizer's"
    out = {k: v.detach().clone() for k, v in [*net.named_parameters(), *net.named_buffers()]}
    for n, p in net.named_parameters():
        if opt is not None and p in opt.state:
            out |= {(n, k): v.clone() if isinstance(v, torch.Tensor) else v for k, v in opt.state[p].items()}
    for n, m in net.named_modules():
        out |= {('attr', n, k): v for k, v in vars(m).items() if isinstance(v, (int, tuple)) and not k.startswith('_')}
    return out

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype if isinstance(v, torch.Tensor) else v == b[k]
                                        for k, v in a.items())

@torch.no_grad()
def out(net, x):
    was = net.training; net.eval(); y = net(x); net.train(was)
    return y

# ---- function, moments, undo

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('opt', ['adam', 'momentum', 'rmsprop'])
def test_verbs_keep_what_they_promise(name, opt):
    net, o, x = made(name, opt=opt)
    params, hooks = list(net.parameters()), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    for g_name in [g.name for g in units(net, x) if 'widen' not in g.blocked]:
        for do in (lambda e, g: e.widen(g, 3), lambda e, g: e.widen(g, 2, start='zero'), lambda e, g: e.clone(g, 2), lambda e,
                   g: e.widen(g, 1, noise=0., source=[0])):
            y, before = out(net, x), image(net, o)
            with edit(net, o, x) as e: do(e, g_name)
            assert torch.allclose(out(net, x), y, atol=2e-5)
            train(copy.deepcopy(net), RATE[opt](net.parameters()), x)
            replay(net, e.record.inverse(), o)
            assert same(image(net, o), before)
        for do in (lambda e, g: e.prune(g, [1]), lambda e, g: e.reset(g, [0, 1])):
            before = image(net, o)
            with edit(net, o, x) as e: do(e, g_name)
            replay(net, e.record.inverse(), o)
            assert same(image(net, o), before)
    assert all(a is b for a, b in zip(params, net.parameters(), strict=True)) and all(any(p is q for q in o.param_groups[0]['params'])
                                                                                      for p in params)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]

def test_prune_and_reset_equal_the_masked_network():
    net, o, x = made('cnn')
    masked = copy.deepcopy(net)
    with torch.no_grad(): masked[6].weight.view(2, 3, 16)[:, [0, 2]] = 0
    pruned = copy.deepcopy(net)
    Prune('3', [0, 2]).apply(pruned, examples=x)
    assert torch.allclose(out(pruned, x), out(masked, x), atol=1e-6) and pruned[3].weight.shape[0] == 1
    Reset('3', [0, 2]).apply(net, o, x)
    assert torch.allclose(out(net, x), out(masked, x), atol=1e-6) and not torch.equal(net[3].weight[0], masked[3].weight[0])
    assert o.state[net[3].weight]['exp_avg'][[0, 2]].abs().max() == 0 and o.state[net[3].weight]['exp_avg'][1].abs().max() > 0

def test_reset_moves_the_mean_into_the_bias():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)); x = torch.randn(50, 3)
    mean = net[:2](x).mean(0).detach(); y = net(x).mean(0).detach()
    Reset('0', [1, 3], mean=mean[[1, 3]].tolist()).apply(net, None, x)
    assert torch.allclose(net(x).mean(0), y, atol=1e-5) and net[2].weight[:, [1, 3]].abs().max() == 0

@pytest.mark.parametrize('opt', ['sgd', 'momentum', 'adam', 'amsgrad', 'adamw', 'nadam', 'radam', 'adagrad'])
def test_moments_are_those_of_a_network_made_by_hand(opt):
    "Training the widened network equals training a hand-made one with hand-made moments"
    net, o, x = made('mlp', opt=opt, steps=4)
    hand = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)); ho = RATE[opt](hand.parameters())
    i, a = [0, 1, 2, 2, 3, 4, 5], torch.tensor([1, 1, .6, .4, 1, 1, 1.])
    train(hand, ho, x)
    with torch.no_grad():
        for q, p in zip(hand.parameters(), net.parameters(), strict=True):
            w, s = p.detach().clone(), {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in o.state[p].items()}
            if p is net[0].weight or p is net[0].bias:
                w = w[i]; f = a.view(-1, *[1]*(w.dim() - 1))
                power = dict(momentum_buffer=1, exp_avg=1, exp_avg_sq=2, max_exp_avg_sq=2, sum=2)
                s = {k: v[i] * f ** power[k] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in s.items()}
            if p is net[2].weight:
                w = w[:, i] * a; s = {k: v[:, i] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in s.items()}
            q.copy_(w); ho.state[q] = s
    Widen('0', 1, source=[2], split=.6).apply(net, o, x)
    for p, q in zip(net.parameters(), hand.parameters(), strict=True): assert torch.allclose(p, q, atol=1e-7)
    for _ in range(5): train(net, o, x), train(hand, ho, x)
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(net.parameters(), hand.parameters(), strict=True))

def test_gradients_after_widening():
    net, _, x = made('mlp', opt='sgd'); net.double(); x = x.double()
    grads = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    Widen('0', 2, source=[1, 1], split=.5).apply(net, None, x)
    new = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    assert torch.allclose(new[0][1:4], grads[0][1].expand(3, 5) / 3) and torch.allclose(new[2][:, 1:4], grads[2][:, [1]].expand(4, 3))
    assert torch.allclose(new[0][4:], grads[0][2:]) and torch.allclose(new[4], grads[4])

def test_uneven_copies_become_different_and_even_ones_do_not():
    for split, apart in ((.6, True), (.5, False)):
        net, o, x = made('mlp', opt='adam'); y = torch.randn(7, 3)
        Widen('0', 1, source=[2], split=split).apply(net, o, x)
        for _ in range(30): train(net, o, x, y)
        assert (((net[0].weight[2] - net[0].weight[3]).abs().max() > 1e-4) == apart)

@pytest.mark.parametrize('opt', RATE)
def test_first_steps_of_new_units(opt):
    "No larger than a fresh optimizer's on the same loss; those of the old units are what they would have been"
    for seed in range(3):
        net, o, x = made('mlp', seed, opt, 60); y = torch.randn(7, 3)
        train(net, o, x, y, 5)
        alone = copy.deepcopy(net); ao = RATE[opt](alone.parameters()); ao.load_state_dict(copy.deepcopy(o.state_dict()))
        Widen('0', 2, source=[1, 4], start='zero', seed=seed).apply(net, o, x)
        twin, sizes = copy.deepcopy(net), []; fresh = RATE[opt](twin.parameters())
        for i in range(10):
            a, b, c, d = (m[j].weight.detach().clone() for j in (0, 2) for m in (net, twin))
            train(net, o, x, y); train(twin, fresh, x, y); train(alone, ao, x, y)
            sizes.append([(net[0].weight - a)[[2, 6]].abs().max().item(), (twin[0].weight - b)[[2, 6]].abs().max().item(),
                          (net[2].weight - c)[:, [2, 6]].abs().max().item(), (twin[2].weight - d)[:, [2, 6]].abs().max().item()])
            if i == 0: assert torch.allclose(net[0].weight[[0, 1, 3, 4, 5, 7]], alone[0].weight, atol=1e-6)
        most = torch.tensor(sizes).amax(0)
        assert most[0] <= 1.2 * most[1] and most[2] <= 1.2 * most[3] and most[2] >= .02 * most[3], (seed, most)

@pytest.mark.parametrize('opt', RATE)
def test_first_step_of_a_copy_is_its_units(opt):
    net, o, x = made('mlp', opt=opt, steps=60)
    Widen('0', 1, source=[1]).apply(net, o, x); a, train_ = net[0].weight.detach().clone(), train(net, o, x)
    move = net[0].weight.detach() - a
    assert move[2].abs().max() <= 1.02 * move[1].abs().max() and move[2].abs().max() >= .4 * move[1].abs().max() and torch.isfinite(train_)

# ---- Net2Net

def test_net2net_of_the_same_draw():
    "Widen, then 100 steps: the hand-written Net2Net of the same draw, MLP and CNN"
    torch.manual_seed(0)
    for net, x, hand_wide in ((mlp(nn.ReLU), torch.randn(32, 5), _net2net_mlp), (cnn(), torch.randn(8, 2, 6, 6), _net2net_cnn)):
        source, y = [1, 3, 1], torch.randn(len(x), net[-1].out_features)
        hand = hand_wide(net, source)
        Widen('0', 3, source=source, split=.5).apply(net, None, x)
        opts = [torch.optim.SGD(m.parameters(), .05, momentum=.9) for m in (net, hand)]
        curves = [[train(m, o, x, y).item() for _ in range(100)] for m, o in zip((net, hand), opts, strict=True)]
        assert torch.allclose(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-3), (curves[0][-1], curves[1][-1])

def _mapping(n, source):
    m = list(range(n)) + source
    return m, torch.tensor([m.count(j) for j in m], dtype=torch.float32)

def _net2net_mlp(net, source):
    m, count = _mapping(6, source)
    big = copy.deepcopy(net); big[0], big[2] = nn.Linear(5, 9), nn.Linear(9, 4)
    with torch.no_grad():
        big[0].weight.copy_(net[0].weight[m]); big[0].bias.copy_(net[0].bias[m])
        big[2].weight.copy_(net[2].weight[:, m] / count); big[2].bias.copy_(net[2].bias)
    return big

def _net2net_cnn(net, source):
    m, count = _mapping(4, source)
    big = copy.deepcopy(net); big[0], big[1], big[3] = nn.Conv2d(2, 7, 3, padding=1), nn.BatchNorm2d(7), nn.Conv2d(7, 3, 3)
    with torch.no_grad():
        for i in (0, 1):
            for k, v in net[i].state_dict().items(): big[i].state_dict()[k].copy_(v[m] if v.dim() else v)
        big[3].weight.copy_(net[3].weight[:, m] / count.view(-1, 1, 1)); big[3].bias.copy_(net[3].bias)
    return big

# ---- records

def test_replay_in_another_process(tmp_path):
    net, o, x = made('cnn')
    torch.save(net.state_dict(), tmp_path/'base.pt'); torch.save(o.state_dict(), tmp_path/'opt.pt')
    with edit(net, o, x) as e:
        e.widen('0', 3, noise=.1); e.clone('3', 3); e.prune('0', [0, 2]); e.deepen('2'); e.reset('3', [1]); e.disconnect('7', [0], [5])
    e.record.save(tmp_path/'record')
    torch.save((net.state_dict(), o.state_dict()), tmp_path/'after.pt')
    code = f'''
import sys, torch; sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_edits import cnn
from plasticity.edits import EditRecord, replay
net = cnn(); net.load_state_dict(torch.load('base.pt')); o = torch.optim.Adam(net.parameters(),
                                                                              1e-3); o.load_state_dict(torch.load('opt.pt'))
replay(net, EditRecord.load('record.json'), o)
want, opt = torch.load('after.pt')
assert all(torch.equal(v, want[k]) for k, v in net.state_dict().items()) and net.state_dict().keys() == want.keys()
for i, s in opt['state'].items():
    assert all(torch.equal(v, o.state_dict()['state'][i][k]) for k, v in s.items())
'''
    env = dict(os.environ, OMP_NUM_THREADS='1',
               PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]))
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path, env=env)

# ---- sessions

def test_a_session_is_all_or_nothing():
    net, o, x = made('mlp'); before = image(net, o)
    with pytest.raises(LastUnits):
        with edit(net, o, x) as e: e.widen('0', 2); e.clone('2'); e.prune('0', range(8))
    assert same(image(net, o), before)
    with edit(net, o, x) as e:
        e.widen('0', 2)
        with pytest.raises(ValueError, match='index'): e.prune('0', [99])
        e.prune('0', [0])
    assert net[0].out_features == 7 and [d['edit']['edit'] for d in e.record.edits] == ['Widen', 'Prune']

def test_groups_follow_the_edits_of_a_session_and_no_others():
    net, o, x = made('mlp'); u = units(net, x); a, b = u['0'], u['2']
    with edit(net, o, x) as e: e.widen(a, 2, source=[1, 3]); e.widen(b, 1); e.prune(a, [0]); e.clone([a, b])
    assert net[2].weight.shape == (10, 14) and e.record.new['0'] == list(range(1, 14, 2))
    with pytest.raises(EditError, match='before an edit'): Widen(a).apply(net, o, x)
    fresh = units(net, x)
    assert fresh['0'].n == 14 and fresh['2'].n == 10

def test_new_units_are_where_the_record_says():
    net, _, x = made('mlp'); row = net[0].weight[3].detach().clone()
    r = Widen('0', 2, source=[3, 0]).apply(net, None, x)
    assert r.new == {'0': [1, 5]} and torch.equal(net[0].weight[5], row) and torch.equal(net[0].weight[4], row)

def test_everything_cloned_at_once():
    net, _, x = made('cnn'); y = out(net, x)
    Clone(factor=3).apply(net, examples=x)
    assert net[3].weight.shape[:2] == (9, 12) and torch.allclose(out(net, x), y, atol=1e-5)

def test_same_draw_everywhere():
    a, b = (made('mlp')[0] for _ in range(2)); x = made('mlp')[2]
    torch.manual_seed(5); Widen('0', 3, start='zero', seed=7).apply(a, None, x)
    torch.manual_seed(6); torch.rand(3); state = torch.get_rng_state(); Widen('0', 3, start='zero', seed=7).apply(b, None, x)
    assert torch.equal(torch.get_rng_state(), state) and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))

def test_followers_schedulers_and_scalers():
    net, o, x = made('cnn'); avg = swa_utils.AveragedModel(net); flat = {k: v.clone() for k, v in net.state_dict().items()}
    other = copy.deepcopy(net); sched, scaler = lr_scheduler.CosineAnnealingLR(o, 10), torch.amp.GradScaler('cpu')
    ya, groups = out(avg.module, x), o.param_groups
    with edit(net, o, x, ema=[avg, flat, other]) as e: e.widen('0', 3); e.deepen('2'); e.prune('3', [0]) if False else None
    assert torch.allclose(out(avg.module, x), ya, atol=1e-5) and torch.equal(other[0].weight, net[0].weight)
    assert {k: v.shape for k, v in flat.items()} == {k: v.shape for k,
                                                     v in net.state_dict().items()} and all(torch.equal(v, net.state_dict()[k]) for k,
                                                                                            v in flat.items())
    avg.update_parameters(net); train(net, o, x); sched.step()
    assert o.param_groups is groups and sched.optimizer is o and scaler.is_enabled()

def test_memory_is_given_back():
    net, o, x = made('cnn'); old = weakref.ref(net[3].weight.data.untyped_storage()) if False else None
    keep = [weakref.ref(m) for m in net.modules()]
    for _ in range(3):
        with edit(net, o, x) as e: e.widen('0', 2)
        replay(net, e.record.inverse(), o)
    del net, o, e; gc.collect()
    assert all(r() is None for r in keep) and old is None

def test_nothing_piles_up():
    "As many tensors and bytes after twenty edits that were undone as after three"
    net, o, x = made('cnn'); counts = []
    def alive():
        gc.collect()
        found = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        return len(found), sum(t.numel() * t.element_size() for t in found)
    for i in range(20):
        with edit(net, o, x, ema=copy.deepcopy(net)) as e: e.widen('0', 2); e.clone('3'); e.prune('0', [1]); e.deepen('2')
        replay(net, e.record.inverse(), o); train(net, o, x)
        with pytest.raises(LastUnits):
            with edit(net, o, x) as e: e.widen('0', 1); e.prune('3', range(3))
        del e
        if i in (3, 19): counts.append(alive())
    assert counts[0] == counts[1], counts

def test_observers_do_not_see_the_trial():
    net, o, x = made('cnn'); seen = dict(observer=0, hook=0)
    def observer(m, args, y): seen['observer'] += 1
    def hook(m, args, y): seen['hook'] += 1
    observer.observes_only = True
    handles = [net[0].register_forward_hook(f) for f in (observer, hook)]
    with edit(net, o, x) as e: e.widen('0', 2); e.deepen('2')
    with edit(net, o, x, data=(x, torch.zeros(6, 2)), loss=nn.functional.mse_loss) as e: e.widen('3', 1, start='copy')
    assert seen['observer'] == 0 and seen['hook'] > 0
    seen['hook'] = 0; out(net, x)
    assert seen == dict(observer=1, hook=1) and len(net[0]._forward_hooks) == 2
    for h in handles: h.remove()
    assert not net[0]._forward_hooks

def test_outputs_are_shared_by_the_edits_of_a_session_and_no_longer():
    "Each further edit runs the examples once; weights changed in between, or another promise, are noticed"
    net, _, x = made('mlp'); runs = []
    net.register_forward_hook(lambda m, args, y: runs.append(1))
    Widen('0').apply(net, None, x); units(net, x); runs.clear()
    with edit(net, None, x) as e:
        e.widen('0', 1); a = len(runs)
        e.widen('2', 1); b = len(runs)
        e.prune('0', [0]); c = len(runs)
        with torch.no_grad(): net[4].weight.mul_(2.)
        e.widen('0', 1); d = len(runs)
        net[4].weight.data.mul_(3.) # leaves no trace in the version
        e.widen('0', 1)
    assert (a, b - a, c - b, d - c) == (2, 1, 2, 2) and all(r['error'] < 1e-5 for r in e.record.edits)

def test_training_mode_and_buffers_are_left_alone():
    net, o, x = made('cnn'); net.train(); net[1].eval(); seen = net[1].num_batches_tracked.item()
    Widen('0', 1).apply(net, o, x)
    assert net.training and not net[1].training and net[1].num_batches_tracked == seen

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    net, _, x = made('cnn'); net, x = net.to(dtype), x.to(dtype); y = out(net, x)
    with edit(net, None, x) as e: e.widen('0', 3); e.clone('3'); e.widen('3', 1, start='zero')
    tol = {torch.bfloat16: .1, torch.float16: .02, torch.float64: 1e-12}[dtype]
    assert all(p.dtype == dtype for p in net.parameters()) and (out(net, x) - y).abs().max() < tol
    assert all(d['error'] < 1e-4 for d in e.record.edits) or dtype != torch.float64

def test_under_autocast_and_frozen():
    net, _, x = made('cnn'); net[0].requires_grad_(False)
    with torch.autocast('cpu', torch.bfloat16): Widen('0', 2).apply(net, None, x)
    assert not net[0].weight.requires_grad and net[0].out_channels == 6

def test_zero_layers_do_not_blind_the_trial():
    class Crossed(nn.Module): # the trace sees one group; the forward reads it otherwise when it is wider
        def __init__(self):
            super().__init__(); self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
            nn.init.zeros_(self.b.weight); nn.init.zeros_(self.b.bias)

        def forward(self, x):
            h = self.a(x).relu()
            return self.b(h if h.shape[1] == 4 else h * torch.arange(h.shape[1]))
    net = Crossed(); before = image(net)
    with pytest.raises(NotPreserved): Widen('a').apply(net, None, torch.randn(5, 3))
    assert same(image(net), before)

# ---- depth, links, starts

@pytest.mark.parametrize('act', [nn.ReLU, nn.Tanh, nn.GELU])
@pytest.mark.parametrize('at', ['0', '1', '2', '3', '4'])
def test_deepen_at_every_position(act, at):
    torch.manual_seed(0); net = mlp(act); o = torch.optim.Adam(net.parameters()); x = torch.randn(7, 5); y = net(x).detach()
    r = Deepen(at).apply(net, o, x)
    assert torch.equal(net(x), y) and len(o.param_groups[0]['params']) == len(list(net.parameters()))
    train(net, o, x); assert not torch.equal(net(x), y)
    replay(net, r.inverse(), o)
    assert len(net) == 5 and len(o.param_groups[0]['params']) == 6

def test_deepen_blocks_of_torchvision():
    import torchvision
    torch.manual_seed(0)
    for name, at, size, more in (('resnet18', 'layer2.0', 32, {}), ('resnet50', 'layer1', 32, {}),
                                 ('vit_b_16', 'encoder.layers.encoder_layer_3', 32, dict(image_size=32)),
                                 ('convnext_tiny', 'features.1.1', 32, {})):
        net = zoo.shake(torchvision.models.get_model(name, weights=None, **more)).eval(); x = torch.randn(2, 3, size, size); y = out(net, x)
        r = Deepen(at).apply(net, None, x)
        assert torch.equal(out(net, x), y), name
        if name != 'resnet50': assert r.edits[0]['kind'] == 'block', name

def test_deepen_transformer_and_refusals():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True), 2,
                                enable_nested_tensor=False); x = torch.randn(2, 3, 8); y = out(net, x)
    Deepen('layers.1').apply(net, None, x)
    assert net.num_layers == len(net.layers) == 3 and torch.equal(out(net, x), y)
    for bad, text in ((dict(at='layers.9'), 'no module'), (dict(at='layers.0', kind='wide'), 'kind'), (dict(at=''), 'at'),
                      (dict(at='layers.0', kind='identity'), 'ReLU')):
        with pytest.raises(ValueError, match=text): Deepen(**bad).apply(net, None, x)

class Sparse(nn.Module):
    "A layer that stores its links, in the order (row, column)"
    def __init__(self, n, m):
        super().__init__(); self.n, self.m = n, m
        self.values = nn.Parameter(torch.zeros(0)); self.register_buffer('index', torch.zeros(2, 0, dtype=torch.long))
    def forward(self, x): return x.new_zeros(len(x), self.m).index_add(1, self.index[0], x[:, self.index[1]] * self.values)
    def _set(self, index, values, old):
        key = (index[0] * self.n + index[1]).argsort()
        set_data(self.index, index[:, key]); set_data(self.values, values[key])
        return dict(values=old[key])
    def connect(self, rows, cols, values):
        new = torch.stack([rows, cols])
        return self._set(torch.cat([self.index, new], 1), torch.cat([self.values.data, values.to(self.values)]),
                         torch.cat([torch.arange(len(self.values)), torch.full((len(rows),), -1)]))
    def disconnect(self, rows, cols):
        gone = ((self.index[0][:, None] == rows) & (self.index[1][:, None] == cols)).any(1); keep = (~gone).nonzero()[:, 0]
        return self._set(self.index[:, keep], self.values.data[keep], keep)

def test_links_of_a_sparse_layer():
    torch.manual_seed(0)
    net = nn.Sequential(Sparse(5, 4), nn.Tanh(), nn.Linear(4, 2)); x = torch.randn(8, 5)
    Connect('0', [0, 1, 3], [2, 0, 4], [.5, -1., 2.]).apply(net, None, x)
    o = torch.optim.Adam(net.parameters()); train(net, o, x, n=3); y, before = out(net, x), image(net, o)
    avg, kept = o.state[net[0].values]['exp_avg'].clone(), net[0].values.detach().clone()
    with edit(net, o, x) as e: e.connect('0', [1, 0], [3, 0])
    assert torch.equal(out(net, x), y) and net[0].index.tolist() == [[0, 0, 1, 1, 3], [0, 2, 0, 3, 4]]
    assert o.state[net[0].values]['exp_avg'][[1, 2, 4]].equal(avg) and net[0].values[[1, 2, 4]].equal(kept)
    replay(net, e.record.inverse(), o); assert same(image(net, o), before)
    with edit(net, o, x) as e: e.disconnect('0', [1], [0])
    assert len(net[0].values) == 2; train(net, o, x)
    net2, o2 = net, o; replay(net2, e.record.inverse(), o2); assert len(net[0].values) == 3
    with pytest.raises(ValueError, match='twice'): Connect('0', [1, 1], [1, 1]).apply(net, o, x)
    with pytest.raises(TypeError, match='Tanh'): Connect('1', [1], [1]).apply(net, o, x)

def test_disconnect_is_undone_bit_for_bit():
    net, o, x = made('mlp'); before = image(net, o)
    with edit(net, o, x) as e: e.disconnect('2', [0, 3], [1, 5]); e.connect('2', [0], [1], [.25]); e.connect('2', [1], [1], [0.])
    assert net[2].weight[3, 5] == 0 and net[2].weight[0, 1] == .25
    replay(net, e.record.inverse(), o); assert same(image(net, o), before)
    with pytest.raises(ValueError, match='rows'): Disconnect('2', [9], [0]).apply(net, o, x)

def test_a_new_entry_of_a_dense_layer_is_young():
    "Its first step is that of a fresh Adam; undone, nothing is left of it"
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(32, 5)
    adam = torch.optim.Adam(net.parameters(), lr=.01)
    def step(): adam.zero_grad(); net(x).square().sum().backward(); adam.step()
    for _ in range(20): step()
    before = image(net, adam)
    record = Connect('0', [1], [2], [.7]).apply(net, adam, x)
    assert all(adam.state[net[0].weight][k][1, 2] == 0 for k in ('exp_avg', 'exp_avg_sq', 'age'))
    replay(net, record.inverse(), adam); assert same(image(net, adam), before)
    replay(net, record, adam); step()
    assert abs(abs(net[0].weight[1, 2].item() - .7) - .01) < 1e-6

@pytest.mark.parametrize('start', ['gradmax', 'tiny'])
@pytest.mark.parametrize('act', [nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid])
def test_closed_forms(start, act):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), act(), nn.Linear(5, 4)); x, y = torch.randn(64, 6), torch.randn(64,
                                                                                                         4); loss = nn.functional.mse_loss
    old, best = out(net, x), {}
    for s in (start, 'zero'):
        m = copy.deepcopy(net)
        r = Widen('0', 2, start=s, seed=3).apply(m, None, x, data=(x, y), loss=loss)
        assert torch.allclose(out(m, x), old, atol=1e-5)
        g = torch.autograd.grad(loss(m(x), y), [m[0].weight, m[2].weight]); new = r.new['0']
        best[s] = g[0][new].square().sum() + g[1][:, new].square().sum()
    assert best[start] > 0
    if start == 'gradmax' and act is nn.Tanh: assert best['gradmax'] > best['zero']

def test_closed_forms_of_convolutions_and_refusals():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
                        nn.Linear(64, 3))
    x, y = torch.randn(6, 2, 8, 8), torch.randint(3, (6,)); loss = nn.functional.cross_entropy
    for s in ('gradmax', 'tiny'):
        m = copy.deepcopy(net); Widen('0', 2, start=s).apply(m, None, x, data=(x, y), loss=loss)
        assert torch.allclose(out(m, x), out(net, x), atol=1e-5) and m[0].out_channels == 5
    for at, more, text in (('2', dict(data=(x, y), loss=loss), 'closed form'), ('0', {}, 'data, loss'),
                           ('0', dict(data=(x, y), loss=lambda o, y: torch.tensor(1.)), 'gradient')):
        with pytest.raises(ValueError, match=text): Widen(at, 1, start='gradmax').apply(net, None, x, **more)

# ---- plain data

def test_edits_are_plain_data(tmp_path):
    net, o, x = made('mlp'); g = units(net, x)['0']
    edits = [Widen(g, 2, source=torch.tensor([0, 1])), Clone(['0', '2'], 2), Prune('0', torch.tensor([1])),
             Reset('0', [0], mean=torch.zeros(1)), Deepen('1', width=3), Connect('0', [0], [1]), Disconnect('0', [0], [1])]
    for e in edits:
        again = Edit.from_json(json.loads(json.dumps(e.to_json())))
        assert again == e and type(again) is type(e)
    with pytest.raises(ValueError, match='Widen'): Edit.from_json(dict(edit='Wide'))
    with pytest.raises(ValueError, match='split'): Edit.from_json(dict(edit='Widen', group='0', splitt=1))
    r = edits[0].apply(net, o, x); path = r.save(tmp_path/'a')
    assert EditRecord.load(path).edits == r.edits and sorted(p.suffix for p in tmp_path.iterdir()) == ['.json', '.safetensors']
    data = path.with_suffix('.safetensors').read_bytes(); path.with_suffix('.safetensors').write_bytes(data[:-1] + b'x')
    with pytest.raises(ValueError, match='written with'): EditRecord.load(path)
    path.write_text('{}')
    with pytest.raises(ValueError, match='record'): EditRecord.load(path)

def test_replay_needs_the_model_it_was_made_from():
    net, o, x = made('mlp'); other = mlp(); r = Widen('0', 2).apply(net, o, x)
    replay(other, r)
    with pytest.raises(ValueError, match='starts from'): replay(other, r)
    assert other[0].out_features == 8

def test_undo_after_training_keeps_what_was_learned():
    net, o, x = made('mlp'); kept = net[0].weight.detach().clone()
    r = Prune('0', [2]).apply(net, o, x); train(net, o, x, n=3); learned = net[0].weight.detach().clone()
    replay(net, r.inverse(), o)
    assert torch.equal(net[0].weight[2], kept[2]) and torch.equal(net[0].weight[[0, 1, 3, 4, 5]], learned)
    train(net, o, x)

# ---- refusals: the right error, with names, and nothing changed

class Tied(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(6, 4))
    def forward(self, x): return (x @ self.w.T).tanh() @ self.w
class Scaled(nn.Module):
    def __init__(self): super().__init__(); self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 3)
    def forward(self, x): return (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x)
class Hard(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
    def forward(self, x): return self.b(self.a(x).relu().view(-1, 6))
class Soft(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
    def forward(self, x): h = self.a(x).relu(); return self.b(h * (1. if h.shape[1] == 6 else 1.1))
class Unused(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)
    def forward(self, x): return self.b(self.a(x).relu()) if x.shape[0] < 100 else self.c(self.a(x).relu())
class Divided(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
    def forward(self, x):
        h = self.a(x).relu()
        if h.shape[1] % 2: raise ValueError(f'{h.shape[1]} channels are not divisible by 2')
        return self.b(h)

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
REFUSED = {
    FrozenUnits: (lambda: nn.Sequential(nn.Linear(4, 3)), lambda e: e.widen('0'), '0.weight'),
    MixedUnits: (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)), lambda e: e.prune('0', [0]), 'layer_norm'),
    BilinearUnits: (Scaled, lambda e: e.widen('q'), 'q.weight'),
    TiedUnits: (Tied, lambda e: e.widen(0), 'w'),
    HardCodedShape: (Hard, lambda e: e.widen('a'), 'view|shape|size'),
    NotPreserved: (Soft, lambda e: e.widen('a'), 'tolerance'),
    UnseenParameters: (Unused, lambda e: e.widen('a'), r'c\.'),
    LastUnits: (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), lambda e: e.prune('0', [0, 1, 2]), 'all 3'),
    Indivisible: (Divided, lambda e: e.widen('a'), 'divisible'),
}

@pytest.mark.parametrize('error', REFUSED, ids=lambda e: e.__name__)
def test_refusals_name_the_reason_and_change_nothing(error):
    factory, do, text = REFUSED[error]
    torch.manual_seed(0); net = factory(); x = X if error is not BilinearUnits else X[None]
    o = torch.optim.Adam(net.parameters()); train(net, o, x, n=2)
    before, grads = image(net, o), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    with pytest.raises(error, match=text) as caught:
        with edit(net, o, x) as e: do(e)
    assert same(image(net, o), before) and all(torch.equal(net.get_parameter(n).grad, g) for n, g in grads.items())
    if error in (HardCodedShape, Indivisible): assert isinstance(caught.value.__cause__, Exception)
    train(net, o, x)

def test_live_graph_and_wrapped():
    net, o, x = made('mlp'); loss = net(x).square().mean(); before = image(net, o)
    with pytest.raises(LiveGraph, match='weight'): Widen('0').apply(net, o, x)
    assert same(image(net, o), before)
    loss.backward(); o.step(); Widen('0').apply(net, o, x); train(net, o, x)
    with pytest.raises(WrappedModel): Widen('0').apply(torch.jit.trace(net, x), None, x)
    fast = torch.compile(net, backend='eager'); fast(x); Widen('0').apply(fast, o, x)
    assert net[0].out_features == 8 and torch.allclose(fast(x), net(x))

def test_wrong_arguments_are_named():
    net, o, x = made('mlp')
    wrong = [(lambda e: e.widen('0', 0), 'k:'), (lambda e: e.widen('0', start='none'), 'start'), (lambda e: e.widen('0', split=1), 'split'),
             (lambda e: e.widen('0', source='max'), 'source'), (lambda e: e.widen('0', source=[6]), 'source'),
             (lambda e: e.widen('0', noise=-1), 'noise'), (lambda e: e.clone('0', 1.5), 'factor'), (lambda e: e.prune('0', []), 'index'),
             (lambda e: e.prune('0', [0, 0]), 'twice'), (lambda e: e.reset('0', [0], mean=[1, 2]), 'mean'),
             (lambda e: e.reset('0', [0], moments='x'), 'moments')]
    for do, text in wrong:
        with pytest.raises(ValueError, match=text):
            with edit(net, o, x) as e: do(e)
    with pytest.raises(TypeError, match='examples'): edit(net, o)
    with pytest.raises(EditError, match='group'): Widen('7').apply(net, o, x)

def test_approximate_pruning_through_a_norm():
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    Prune('0', [1, 2], approx=True).apply(net, None, X)
    assert net[1].normalized_shape == (4,) and net(X).shape == (5, 2)

def test_weight_norm_side_that_cannot_be_scaled_is_refused_or_exact():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), nn.ReLU(),
                        nn.Linear(3, 2)); y = net(X).detach(); before = image(net)
    with pytest.raises(EditError): Widen('0').apply(net, None, X)
    assert same(image(net), before)
    Widen(units(net, X)['2'].name, 2).apply(net, None, X)
    assert torch.allclose(net(X), y, atol=1e-5)

def test_hidden_sizes_are_found_on_modules():
    class Heads(nn.Module):
        def __init__(self): super().__init__(); self.n_head, self.d = 2, 3; self.qkv, self.out = nn.Linear(4, 18), nn.Linear(6, 4)
        def forward(self, x):
            q, k, v = (t.view(*x.shape[:2], self.n_head, self.d).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], self.n_head * self.d))
    torch.manual_seed(0); net = Heads().double(); x = torch.randn(2, 5, 4).double(); y = net(x).detach()
    g = next(g for g in units(net, x) if g.axis == 'head')
    r = Widen(g, 1).apply(net, None, x)
    assert net.n_head == 3 and torch.allclose(net(x), y)
    replay(net, r.inverse()); assert net.n_head == 2 and torch.equal(net(x), y)
    auto = nn.Sequential(nn.Linear(4, 12), nn.Unflatten(1, (3, 4)), nn.Flatten(), nn.Linear(12, 2))
    Prune(units(auto, X)[0].name, [0]).apply(auto, None, X)
    assert 12 not in auto[0].weight.shape

def test_shared_parameters_are_edited_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__(); self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight

        def forward(self, x): return self.c(self.a(x).tanh() + self.b(x).tanh())
    torch.manual_seed(0); net = Twice(); y = net(X).detach()
    Widen('a', 2).apply(net, None, X)
    assert net.b.weight is net.a.weight and torch.allclose(net(X), y, atol=1e-5) and net.a.weight.shape == (6, 4)
    net.requires_grad_(True); train(net, torch.optim.Adam(net.parameters()), X)

class Gated(nn.Module):
    def __init__(self, units=1, bias=0.):
        super().__init__()
        self.up, self.mid, self.head = nn.Linear(3, 2*units), nn.Linear(units, 1), nn.Linear(1, 2)
        nn.init.constant_(self.mid.bias, bias)
    def forward(self, x): return self.head(torch.relu(self.mid(nn.functional.glu(self.up(x)))))

def test_a_single_unit_whose_places_cannot_be_told_apart():
    "One gated unit: value and gate stand side by side, and whether copies go behind each or behind both only the output tells"
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0); net = Gated(bias=-100.)           # its output shows nothing
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for edit_ in (Widen('up', 3), Widen('up', 2, start='zero'), Clone('up', 2)):
        with pytest.raises(NotPreserved, match='up.*places'): edit_.apply(net, None, x)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net = Gated(2, bias=-100.); Widen('up', 1).apply(net, None, x)     # two units stand apart
    assert net.up.weight.shape == (6, 3)
    many = Gated(2, bias=100.); Widen('up', 1).apply(many, None, x)

class Square(nn.Linear):
    "Starts with orthogonal rows, which no row can do by itself"
    def reset_parameters(self):
        nn.init.orthogonal_(self.weight); nn.init.zeros_(self.bias)

@pytest.mark.parametrize('layer', [lambda: nn.Linear(16, 6), lambda: nn.Conv2d(4, 6, 2), lambda: Square(16, 6)])
def test_new_rows_are_drawn_as_the_whole_layer_would_be(layer):
    "Of a layer whose rows are drawn one by one only the new ones are; the spread is that of the whole layer"
    first = layer()
    conv, orthogonal = isinstance(first, nn.Conv2d), isinstance(first, Square)
    net = nn.Sequential(first, nn.ReLU(), *([nn.Flatten()] if conv else []), nn.Linear(6, 2))
    x, old = torch.randn(3, 4, 2, 2) if conv else torch.randn(3, 16), first.weight.detach().clone()
    with edit(net, None, x) as e: e.widen('0', 8, start='zero', source=[-1])
    new, again = first.weight.detach()[6:].flatten(1), fresh_tensors(first, 0, '0', rows=None if orthogonal else 8)['weight'].flatten(1)
    assert torch.equal(first.weight[:6], old) and torch.equal(new, again[6:] if orthogonal else again)
    assert len(new.unique()) == new.numel() and (net[-1].weight[:, 6:] == 0).all()
    if orthogonal: assert torch.allclose(new @ new.T, torch.eye(8), atol=1e-5)
    else: assert .2 < new.abs().max() <= .25 and new.std().item() == pytest.approx(.25 / 3**.5, rel=.2)

class Gained(nn.Linear):
    "A linear layer with a gain that its own reset does not know"
    def __init__(self, i, o):
        super().__init__(i, o)
        self.gain, self.table = nn.Parameter(torch.full((o,), 2.)), nn.Parameter(torch.ones(o, 3))
        self.register_buffer('seen', torch.full((o,), 5.))
    def forward(self, x): return super().forward(x)*self.gain*self.table.sum(1)/self.seen

@pytest.mark.parametrize('edit_of', [lambda g: Widen(g, 3, start='zero'), lambda g: Reset(g, [0, 1])])
def test_what_no_initialisation_draws_is_not_left_to_chance(edit_of):
    torch.manual_seed(0)
    net, x = nn.Sequential(Gained(5, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(8, 5)
    assert set(fresh_tensors(net[0])) == {'weight', 'bias'}
    edit_of(units(net, x)[0]).apply(net, None, examples=x)
    assert (net[0].gain == 2).all() and (net[0].seen == 5).all() and net[0].table.isfinite().all() and net[0].weight.std() > .1

# what only a second pair of eyes saw: functions that moved although the trial saw nothing

class Reads(nn.Module):
    "A hidden layer and what `how` makes of it"
    def __init__(self, how, bias=True):
        super().__init__()
        self.a, self.c, self.d, self.hid, self.how = nn.Linear(6, 8, bias), nn.Linear(8, 5, bias), nn.Linear(6, 4), 8, how
    def forward(self, x, *more): return self.how(self, self.a(x).relu(), x, *more)

def noisy(m, h, x): return m.c(h + .1*torch.randn(len(h), m.hid) if m.training else h)
class Kept:
    __slots__ = 'inner',
    def __init__(self, inner): self.inner = inner
def scaled(m, h): return m.c(h)/h.shape[-1]**.5

@pytest.mark.parametrize('how', [
    lambda m, h, x: scaled(m, h).masked_fill(x[:, :5] > .5, -1e9), # masked logits
    lambda m, h, x: torch.cat([scaled(m, h), 1e3*m.d(x)], 1), # columns of different size
    lambda m, h, x: (m.c(h), h.square().mean(-1).detach().numpy()), lambda m, h, x: (m.c(h), h.detach().mean().item()),
    lambda m, h, x: (m.c(h), Kept(scaled(m, h))), # tensors in an object with slots
    lambda m, h, x: m.c(h/(1 + h.shape[1]**.5) if m.training else h)]) # only in training
def test_no_difference_is_silent(how):
    torch.manual_seed(0)
    net, x = Reads(how).train(), torch.randn(16, 6)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(EditError): Widen('a', 3).apply(net, None, x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

def test_code_that_runs_in_training_alone_is_tried():
    torch.manual_seed(0)
    net, x = Reads(noisy).train(), torch.randn(16, 6)
    Widen('a', 3).apply(net, None, x)
    net(x).sum().backward()
    assert net.hid == 11

def test_examples_that_show_nothing_are_refused():
    net = Reads(lambda m, h, x: scaled(m, h), bias=False)
    with pytest.raises(NotPreserved, match='examples: .*zeros'): Widen('a', 8).apply(net, None, torch.zeros(1, 6))

class Outer(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b, self.o = nn.Linear(5, 6), nn.Linear(5, 4), nn.Linear(24, 3)
    def forward(self, x): return self.o(torch.einsum('bi,bj->bij', self.a(x).tanh(), self.b(x).relu()).flatten(1))

@pytest.mark.parametrize('first, second', [('widen', 'widen'), ('widen', 'prune'), ('prune', 'reset'), ('prune', 'widen'),
                                           ('clone', 'widen'), ('widen', 'reset')])
def test_two_groups_of_one_dimension_in_one_session(first, second):
    do = dict(widen=lambda e, g: e.widen(g, 2), prune=lambda e, g: e.prune(g, [1]), clone=lambda e, g: e.clone(g, 2),
              reset=lambda e, g: e.reset(g, [0]))
    nets = []
    for split in (False, True):
        torch.manual_seed(0)
        net, x = Outer().double(), torch.randn(7, 5).double()
        opt = torch.optim.Adam(net.parameters()); net(x).square().sum().backward(); opt.step(); opt.zero_grad()
        sessions = [[(first, 'a')], [(second, 'b')]] if split else [[(first, 'a'), (second, 'b')]]
        for steps in sessions:
            with edit(net, opt, x) as e:
                for verb, g in steps: do[verb](e, g)
        nets.append((net(x).detach(), {k: v.shape for k, v in net.state_dict().items()}))
    assert nets[0][1] == nets[1][1] and torch.allclose(nets[0][0], nets[1][0], atol=1e-12)

@pytest.mark.parametrize('make', [lambda ps: torch.optim.Adam(ps, betas=(0., .9)), lambda ps: torch.optim.RMSprop(ps, alpha=0.)])
def test_optimizers_without_an_average_go_on(make):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(16, 6)
    opt = make(net.parameters())
    def step(): opt.zero_grad(); net(x).square().mean().backward(); opt.step(); opt.zero_grad()
    step(); Reset('0', [1]).apply(net, opt, x); step(); Widen('0', 2, start='zero').apply(net, opt, x); step()
    assert all(p.isfinite().all() for p in net.parameters())

def test_edits_inside_inference_mode():
    def make(): torch.manual_seed(0); return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, net, other = torch.randn(16, 6), make(), make()
    record = Widen('0', 2).apply(make(), None, x)
    with torch.inference_mode(): replay(net, record); Widen('0', 2).apply(other, None, x)
    for m in (net, other): m(x).sum().backward(); assert m[0].weight.grad.shape == (10, 6)
    with torch.inference_mode(), pytest.raises(ValueError, match='^model: 0.weight was made in'): Widen('0', 2).apply(make(), None, x)

def test_records_hold_ranges_and_sets(tmp_path):
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(16, 6)
    Prune('0', range(2)).apply(net, None, x).save(tmp_path/'a'); Prune('0', {1, 3}).apply(net, None, x).save(tmp_path/'b')

def test_clone_of_a_list_refuses_what_it_would_leave_out():
    net, x = Outer(), torch.randn(7, 5)
    u = units(net, x)
    with pytest.raises(ValueError, match="^group: 'b.* shares places"): Clone([u['a'], u['b']], 2).apply(net, None, x)
    assert net.o.in_features == 24 and len(Clone(None, 2).apply(net, None, x).new) >= 1
