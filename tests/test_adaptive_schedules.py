"Schedules: counted calls, cooldown, enough samples; moving averages; scheduled edits"
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plasticity.adaptive import AdaptiveMLP, AffineLayers, FullLayers, IdleUnits, WeakUnits, WeakWeights
from plasticity.data import Data
from plasticity.edits import Prune, Widen
from plasticity.models import make_model
from plasticity.quantization import FakeQuantize
from plasticity.results import generator
from plasticity.schedules import Averages, Schedule, Scheduled, active_share
from plasticity.training import Trainer

torch.set_num_threads(1)

def small(n=64, seed=0):
    x = torch.randn(n, 4, generator=generator(seed, 'x'))
    y = (x[:, 0] > 0).long()
    return Data('small', x, y, x[:16], y[:16])

@pytest.mark.parametrize(('every', 'calls'), [(100, 10), (500, 2), (1000, 1), (1001, 0), (1, 1000)])
def test_counted_calls_of_the_seeds_schedules(every, calls):
    s = Schedule(every)
    assert [t for t in range(1, 1001) if s(t)] == [t for t in range(1, 1001) if t % every == 0] and s.fired == calls

@given(every=st.integers(1, 20), cooldown=st.integers(0, 50), start=st.integers(0, 30), steps=st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_cooldown_is_exact(every, cooldown, start, steps):
    s, last, want, got = Schedule(every, cooldown=cooldown, start=start), None, [], []
    for t in range(1, steps + 1):
        if t % every == 0 and t > start and (last is None or t > last + cooldown): want.append(t); last = t
        if s(t): got.append(t)
    assert got == want and s.fired == len(want)

def test_a_condition_is_asked_only_when_due():
    asked = []
    s = Schedule(10, when=lambda v: v > 3, cooldown=20)
    def value(): asked.append(1); return 5
    fired = [t for t in range(1, 101) if s(t, stats=value)]
    assert fired == [10, 40, 70, 100] and len(asked) == 4
    s = Schedule(10, when=lambda v: False)
    assert not any(s(t, stats=value) for t in range(1, 101)) and s.asked == 10

def test_enough_samples_since_the_last_time():
    s = Schedule(10, min_samples=1000)
    assert [t for t in range(1, 101) if s(t, samples=64*t)] == [20, 40, 60, 80, 100]    # 16 steps at least, on a multiple of 10
    assert not Schedule(10, min_samples=1000)(10, samples=999) and Schedule(10, min_samples=1000)(10, samples=1000)

def test_limit_and_end():
    assert [t for t in range(1, 101) if Schedule(10)(t)] == list(range(10, 101, 10))
    s = Schedule(10, limit=3, stop=80)
    assert [t for t in range(1, 101) if s(t)] == [10, 20, 30]
    s = Schedule(10, stop=30)
    assert [t for t in range(1, 101) if s(t)] == [10, 20, 30]

def test_a_schedule_goes_on_from_its_state():
    a, b = Schedule(5, cooldown=7), Schedule(5, cooldown=7)
    first = [t for t in range(1, 33) if a(t)]
    b.load_state_dict(a.state_dict())
    assert [t for t in range(33, 90) if a(t)] == [t for t in range(33, 90) if b(t)] and first == [5, 15, 25]

@pytest.mark.parametrize(('options', 'name'), [(dict(every=0), 'every'), (dict(every=1.5), 'every'), (dict(cooldown=-1), 'cooldown'),
                                               (dict(min_samples=-1), 'min_samples'), (dict(when=3), 'when'), (dict(limit=0), 'limit')])
def test_wrong_arguments_say_their_name(options, name):
    with pytest.raises(ValueError, match=name): Schedule(**{'every': 1} | options)

@pytest.mark.parametrize(('make', 'name'), [
    (lambda: Averages(decay='x'), 'decay'), (lambda: Averages(every=0), 'every'), (lambda: Averages(rows=0), 'rows'),
    (lambda: Scheduled(3, propose=5), 'propose'), (lambda: FullLayers(ratio=-1), 'ratio'), (lambda: FullLayers(ratio='x'), 'ratio'),
    (lambda: FullLayers(threshold='x'), 'threshold'), (lambda: FullLayers(max_width=0), 'max_width'),
    (lambda: FullLayers(max_depth=-1), 'max_depth'), (lambda: FullLayers(solved='no'), 'solved'), (lambda: IdleUnits(alive=2), 'alive'),
    (lambda: WeakUnits(threshold=-1), 'threshold'), (lambda: WeakWeights(threshold='a'), 'threshold'),
    (lambda: AffineLayers(explained=1.1), 'explained'), (lambda: AdaptiveMLP(4, 2, (3,), start='nought'), 'start')])
def test_policies_look_at_their_arguments(make, name):
    with pytest.raises(ValueError, match=f'^{name}: got'): make()

def test_a_policy_on_a_model_that_cannot_change_says_so():
    with pytest.raises(TypeError, match='model: got a MLP'):
        Trainer(make_model('mlp', 4, 2, seed=0), small(), batch_size=16, device='cpu', callbacks=[FullLayers(4)]).fit(1)

@pytest.mark.parametrize('accumulate', [1, 3])
def test_odd_steps_and_samples_in_training_however_a_batch_is_cut(accumulate):
    p = Scheduled(Schedule(7, cooldown=9, min_samples=155), lambda t: Widen('layers.0.linear', 1, start='zero'))
    Trainer(make_model('mlp', 4, 2, seed=1, hidden_sizes=(4,)), small(93), batch_size=10, accumulate=accumulate, device='cpu',
            callbacks=[p], eval_every=0).fit(9)                                               # the last batch of ten has three rows
    want, last, before = [], None, 0
    for t in range(1, 91):
        seen = t//10*93 + t % 10*10
        if t % 7 == 0 and (last is None or t > last + 9) and seen - before >= 155: want.append(t); last, before = t, seen
    assert [e['step'] for e in p.events] == want == [21, 42, 63, 84] and p.samples == 9*93

def test_one_activation_over_ninety_percent_of_millions():
    class Given(nn.Module):
        def __init__(self): super().__init__(); self.act, self.w, self.on = nn.ReLU(), nn.Linear(1, 1000), 0
        def forward(self, x):
            h = torch.zeros(len(x)*1000); h[:self.on] = 1.
            return self.act(h.view(len(x), 1000) + 0*self.w(x))
    net = Given()
    a = Averages(net, layers='act', decay=.9, every=1, rows=3000)
    with a:
        for more, full in ((0, False), (3, True)):                                            # .9 and .900001
            net.on = 2_700_000 + more
            a.of.clear(); net(torch.ones(3000, 1)); a.update()
            assert a.full('act', .9) is full

def test_active_share_counts_activations_exactly():
    h = torch.ones(10, 10)
    h[:, 0] = 0
    assert active_share(h) == .9
    h[0, 0] = 2
    assert active_share(h) == .91
    assert active_share(h, of='units') == 1. and active_share(torch.zeros(3, 4)) == 0

class Fixed(nn.Module):
    "Activations that are given"
    def __init__(self, share): super().__init__(); self.act, self.w, self.share = nn.ReLU(), nn.Linear(1, 100), share
    def forward(self, x):
        h = torch.ones(len(x), 100) + 0*self.w(x)
        return self.act(torch.cat([h[:, :self.share], 0*h[:, self.share:]], 1))

@pytest.mark.parametrize('decay', [0., .5, .99])
@pytest.mark.parametrize(('active', 'full'), [(89, False), (90, False), (91, True)])
def test_ninety_percent_is_not_more_than_ninety_percent(decay, active, full):
    net = Fixed(active)
    a = Averages(net, layers='act', decay=decay, every=1)
    with a:
        for _ in range(37): net(torch.ones(8, 1)); a.update()
    assert a['act'].updates == 37 and a.full('act', .9) is full

def test_averages_are_those_of_the_formula():
    net, decay, g = nn.Sequential(nn.Linear(3, 5), nn.ReLU()), .9, generator(0, 'avg')
    a, mean, var, weight = Averages(net, layers='1', decay=decay, every=1), 0, 0, 0
    with a:
        for _ in range(20):
            x = torch.randn(32, 3, generator=g)
            h = net(x).detach().double(); a.update()
            mean, var = decay*mean + (1 - decay)*h.mean(0), decay*var + (1 - decay)*h.var(0, correction=0)
            weight = decay*weight + 1 - decay
    torch.testing.assert_close(a['1'].mean, mean/weight); torch.testing.assert_close(a['1'].var, var/weight)
    assert a['1'].samples == 640

def test_averages_do_not_change_the_run():
    def run(callbacks):
        t = Trainer(make_model('mlp', 4, 2, seed=0, hidden_sizes=(8,)), small(), batch_size=16, device='cpu', callbacks=callbacks)
        return t.fit(3).model.state_dict()
    a, b = run([]), run([Averages(every=2)])
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_scheduled_edits_change_model_and_optimizer_together():
    net = make_model('mlp', 4, 2, seed=0, hidden_sizes=(8, 8))
    grow = Scheduled(Schedule(4, cooldown=4), lambda t: Widen('layers.0.linear', 2, start='zero'))
    t = Trainer(net, small(), batch_size=16, device='cpu', callbacks=[grow]).fit(5)           # 20 steps
    assert net.sizes()['hidden_sizes'] == (14, 8) and [e['step'] for e in grow.events] == [4, 12, 20]
    assert t.optimizer.state[net.layers[0].linear.weight]['exp_avg'].shape == (14, 4)
    assert len([r for r in t.history if 'edit' in r]) == 3

def test_a_refused_edit_is_told_and_changes_nothing():
    net = make_model('mlp', 4, 2, seed=0, hidden_sizes=(8,))
    gone = Scheduled(Schedule(4), lambda t: Prune('layers.0.linear', list(range(8))))
    t = Trainer(net, small(), batch_size=16, device='cpu', callbacks=[gone]).fit(1)
    assert net.sizes()['hidden_sizes'] == (8,) and 'LastUnits' in gone.events[0]['refused'] and t.step == 4

def test_a_scheduled_run_resumes_to_the_same_bits(tmp_path):
    def make():
        from plasticity.growing import DynamicExpandableNetwork
        net = DynamicExpandableNetwork(4, 2, (6,), task_type='classification', seed=1)
        grow = Scheduled(Schedule(3, cooldown=2), lambda t: Widen(t.model.layers[0].group, 1, source=[-1], start='zero', seed=t.step))
        return Trainer(net, small(), batch_size=16, device='cpu', callbacks=[grow, Averages(every=2)])
    whole = make().fit(4)
    part = make().fit(4, steps=7); part.save(tmp_path)
    rest = make().load(tmp_path).fit()
    a, b = whole.model.state_dict(), rest.model.state_dict()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert whole.callbacks[0].events == rest.callbacks[0].events

@pytest.mark.parametrize('answer', [False, True])
def test_policies_ask_the_condition_of_their_schedule(answer):
    asked = []
    def when(stats): asked.append(stats); return answer
    def net(): return AdaptiveMLP(4, 2, (6,), seed=0)
    def fit(c): return Trainer(net(), small(), batch_size=16, device='cpu', callbacks=[c], eval_every=0).fit(steps=4)
    def last(): return asked.pop()
    s = lambda: Schedule(2, when=when)
    p = Scheduled(s(), lambda t: Widen('body.layers.0.linear', 1))
    assert (t := fit(p)) is last() and len(p.events) == p.schedule.fired == 2*answer and p.schedule.asked == 2
    p = FullLayers(s(), threshold=0.)
    fit(p); assert last() is p.averages and p.averages.of and len(p.events) == p.schedule.fired == 2*answer
    for p in (FakeQuantize(4, s()), WeakWeights(s(), .1)):
        t = fit(p); assert last() is t and p.schedule.fired == 2*answer and p.schedule.asked == 2
