"Late entries of a parameter take the steps of a fresh optimizer"
import copy, math

import pytest
import torch
from torch import nn

from plasticity.ages import OLD, give_ages, ripen
from plasticity.edits import Reset, Widen
from plasticity.records import replay

A = torch.optim.Adam
MAKE = dict(adam=dict(), betas=dict(betas=(.5, .99)), l2=dict(weight_decay=.1), up=dict(maximize=True), foreach=dict(foreach=True),
            loop=dict(foreach=False), fused=dict(fused=True), adamw=dict(decoupled_weight_decay=True, weight_decay=0))

def late(make, t0, steps=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    w, twin = (torch.zeros(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    opt, other = make([w]), make([twin])
    for _ in range(t0):
        w.grad = torch.randn(4, 3, generator=g, dtype=torch.float64); twin.grad = w.grad.clone(); opt.step(); other.step()
    assert give_ages(opt, w)
    for k in ('age', 'exp_avg', 'exp_avg_sq'): opt.state[w][k][1] = 0
    alone = w[1:2].detach().clone().requires_grad_(); fresh = make([alone])
    for i in range(steps):
        w.grad = torch.randn(4, 3, generator=g, dtype=torch.float64)*(1 + i); twin.grad, alone.grad = w.grad.clone(), w.grad[1:2].clone()
        opt.step(); other.step(); fresh.step()
        assert (w[1] - alone[0]).abs().max() < 1e-9
    assert torch.equal(w[[0, 2, 3]], twin[[0, 2, 3]])

@pytest.mark.parametrize('t0', [1, 7, 300])
@pytest.mark.parametrize('name', MAKE)
def test_late_rows_are_fresh_and_old_rows_untouched(name, t0): late(lambda p: A(p, lr=.01, **MAKE[name]), t0)

def test_a_closure_is_called_first_and_once():
    w, twin, calls = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True), []
    opt, other = A([w], lr=.1), A([twin], lr=.1)
    def closure_of(p, o):
        def closure():
            calls.append(1); o.zero_grad(); loss = (p**2).sum(); loss.backward(); return loss
        return closure
    opt.step(closure_of(w, opt)); other.step(closure_of(twin, other))
    give_ages(opt, w); calls.clear()
    loss = opt.step(closure_of(w, opt)); other.step(closure=closure_of(twin, other))
    assert len(calls) == 2 and loss.item() > 0 and torch.equal(w, twin)

def trained(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)); opt = A(net.parameters(), lr=.01)
    x, y = torch.randn(16, 5), torch.randint(3, (16,))
    train(net, opt, x, y, 20)
    return net, opt, x, y

def train(net, opt, x, y, n):
    for _ in range(n): opt.zero_grad(); nn.functional.cross_entropy(net(x), y).backward(); opt.step()

def test_ages_are_saved_and_copied_with_the_optimizer():
    net, opt, x, y = trained()
    Widen('0', 2, start='zero').apply(net, opt, x); train(net, opt, x, y, 3)
    twin, third = copy.deepcopy(net), copy.deepcopy((net, opt))
    other = A(twin.parameters(), lr=.01); other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for n, o in ((net, opt), (twin, other), third): train(n, o, x, y, 10)
    for n in (twin, third[0]): assert all(torch.equal(a, b) for a, b in zip(net.parameters(), n.parameters(), strict=True))
    assert (opt.state[net[0].weight]['age'].unique() == torch.tensor([13., OLD])).all()

def test_undo_leaves_no_ages():
    net, opt, x, y = trained()
    record = Widen('0', 2, start='zero').apply(net, opt, x)
    assert 'age' in opt.state[net[0].weight] and 'young' in opt.param_groups[0]
    replay(net, record.inverse(), opt)
    assert all('age' not in s for s in opt.state.values()) and 'young' not in opt.param_groups[0]

def test_a_rollback_leaves_no_ages():
    from plasticity.edits import edit
    net, opt, x, y = trained()
    with pytest.raises(ZeroDivisionError), edit(net, opt, x) as e: e.widen('0', 2, start='zero'); 1/0
    assert all('age' not in s for s in opt.state.values()) and 'young' not in opt.param_groups[0]

def test_new_units_wake_up():
    "Zero outgoing weights: after some steps the new incoming weights have moved about as far as those of a fresh optimizer would"
    net, opt, x, y = trained()
    Widen('0', 3, start='zero').apply(net, opt, x)
    at, twin = [6, 7, 8], copy.deepcopy(net); fresh = A(twin.parameters(), lr=.01)
    before = net[0].weight[at].detach().clone()
    train(net, opt, x, y, 60); train(twin, fresh, x, y, 60)
    moved, free = (net[0].weight[at] - before).norm(), (twin[0].weight[at] - before).norm()
    assert .6 < moved/free < 1.4

def test_a_fused_step_that_is_skipped_changes_nothing():
    w = torch.ones(3, requires_grad=True); opt = A([w], lr=.1)
    w.grad = torch.ones(3); opt.step(); give_ages(opt, w); opt.state[w]['age'][0] = 0
    opt.grad_scale, opt.found_inf = torch.tensor(4.), torch.tensor(1.)
    before = {k: v.clone() for k, v in opt.state[w].items()}
    ripen(opt, (opt,), {})
    assert all(torch.equal(v, before[k]) for k, v in opt.state[w].items())
    opt.found_inf.zero_(); w.grad.mul_(4)
    ripen(opt, (opt,), {})
    assert opt.state[w]['age'].tolist() == [1, OLD, OLD]

def test_a_counter_on_the_device(monkeypatch):
    "Where the optimizer's counter is a tensor that must not be read, the coefficients are tensors too"
    from plasticity import ages
    left = ages._left
    monkeypatch.setattr(ages, '_left', lambda *a: torch.tensor(left(*a), dtype=torch.float64))
    late(lambda p: A(p, lr=.01), 7)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('how', [dict(fused=True), dict(capturable=True), dict(foreach=True), dict(foreach=False)])
def test_on_a_gpu(how):
    torch.manual_seed(0)
    w, twin = (torch.zeros(4, 3, device='cuda', requires_grad=True) for _ in range(2))
    opt, other = A([w], lr=.01, **how), A([twin], lr=.01, **how)
    for _ in range(50): w.grad = torch.randn_like(w); twin.grad = w.grad.clone(); opt.step(); other.step()
    give_ages(opt, w)
    for k in ('age', 'exp_avg', 'exp_avg_sq'): opt.state[w][k][1] = 0
    alone = w[1:2].detach().clone().requires_grad_(); fresh = A([alone], lr=.01, **how)
    for _ in range(20):
        w.grad = torch.randn_like(w); twin.grad, alone.grad = w.grad.clone(), w.grad[1:2].clone()
        with torch.cuda.device(0): torch.cuda.set_sync_debug_mode('error'); opt.step(); torch.cuda.set_sync_debug_mode('default')
        other.step(); fresh.step()
    assert (w[1] - alone[0]).abs().max() < 1e-5 and torch.equal(w[[0, 2, 3]], twin[[0, 2, 3]])

@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('cls', [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop])
def test_weights_in_bfloat16_train_on(cls, fused):
    if fused and cls in (torch.optim.NAdam, torch.optim.RMSprop): pytest.skip('has no fused step')
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).bfloat16()
    x, y = torch.randn(16, 5).bfloat16(), torch.randn(16, 3)
    opt = cls(net.parameters(), lr=.01, **(dict(fused=True) if fused else {}))
    def step():
        opt.zero_grad(); loss = (net(x).float() - y).square().mean(); loss.backward(); opt.step()
        return float(loss.detach())
    losses = [step() for _ in range(5)]
    for change in (Widen('0', 4, start='zero'), Reset('0', [0, 1])):
        change.apply(net, opt, examples=x)
        losses += [step() for _ in range(300)]
    assert all(map(math.isfinite, losses)) and losses[-1] < .9*losses[4] and net[2].weight[:, 6:].abs().min() > 0
