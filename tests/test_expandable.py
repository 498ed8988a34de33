"Strategies keep their counters, limits hold, the front keeps its promises"
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

from plasticity.data import get_data
from plasticity.expandable import (STRATEGIES, ActivityBasedGrowth, AdaptiveGrowth, DENTrainer, DynamicExpandableNetwork,
                                   GradientBasedGrowth, Growth, GrowthStrategy, LossBasedGrowth, analyze_layer_importance, as_samples,
                                   export_onnx, grow, growth_summary, perform, plot_river, plot_training_history, prune_back,
                                   visualize_network_architecture)
from plasticity.edits import Widen
from plasticity.models import make_model
from plasticity.training import Callback, Trainer

torch.set_num_threads(1)
SLOW = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

def data(n=60, seed=0, classes=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g)
    return (x, torch.randint(classes, (n,), generator=g)) if classes else (x, torch.sin(3*x[:, :1]))

def network(**options):
    torch.manual_seed(0)
    return DynamicExpandableNetwork(4, 1, [3, 3], **options)

class Scripted(GrowthStrategy):
    "Grows when asked, and notes when it was"
    def __init__(self, **options): super().__init__(**options); self.asked = []
    def should_grow(self, metrics, network, epoch): self.asked.append(epoch); return True, 'script'
    def determine_growth_action(self, metrics, network): return dict(type='width', layer_idx=0, num_neurons=4)

@given(cooldown=st.integers(0, 5), epochs=st.integers(1, 16))
@settings(max_examples=10, **SLOW)
def test_cooldown_is_exact(cooldown, epochs):
    t = DENTrainer(network(), Scripted(cooldown=cooldown), device='cpu')
    h = t.train(data(), epochs=epochs)
    want = [e for e in range(1, epochs + 1, cooldown + 1) if epochs - e >= max(1, cooldown)]
    assert [e['epoch'] for e in h['growth_events']] == want == t.growth_strategy.asked

@given(st.lists(st.sampled_from([1., .9, .8, .5, .4999, float('nan')]), min_size=1, max_size=25), st.integers(1, 4))
@settings(max_examples=60, **SLOW)
def test_patience_is_exact(losses, patience):
    s, best, wait = LossBasedGrowth(patience=patience, min_delta=1e-2), float('inf'), 0
    for i, v in enumerate(losses):
        if v < best - 1e-2: best, wait = v, 0
        else: wait += 1
        assert s.should_grow(dict(loss=v), None, i)[0] == (wait >= patience)
        if wait >= patience: s.begin(); best, wait = float('inf'), 0

def test_the_transient_of_a_growth_triggers_nothing():
    "A loss that jumps after growth and then falls is not taken for a plateau, however high it stays"
    class Jump(LossBasedGrowth):
        def should_grow(self, metrics, network, epoch):
            loss = 1. if epoch <= 5 else 9. - .1*epoch
            return super().should_grow(dict(metrics, loss=loss), network, epoch)
    h = DENTrainer(network(), Jump(patience=3, cooldown=2), device='cpu').train(data(), epochs=30)
    assert [e['epoch'] for e in h['growth_events']] == [4]

@given(limit=st.integers(20, 90), k=st.sampled_from([1, 5, 40]), kind=st.sampled_from(['width', 'depth']))
@settings(max_examples=12, **SLOW)
def test_size_limit(limit, k, kind):
    class Some(Scripted):
        def determine_growth_action(self, metrics, network):
            at = dict(layer_idx=1) if kind == 'width' else dict(position=1)
            return dict(type=kind, num_neurons=k) | at
    net = network()
    before = net.get_num_parameters()
    h = DENTrainer(net, Some(cooldown=0, max_network_size=limit), device='cpu').train(data(), epochs=6)
    now = net.get_num_parameters()
    assert now <= max(limit, before) and now == sum(p.numel() for p in net.parameters())
    if kind == 'width' and limit >= before and k == 40: assert now + 5 > limit  # a unit costs five here
    assert len(h['num_parameters']) == 6 and h['num_parameters'][-1] == now

def test_flops_budget():
    net = network()
    x, y = data()
    free = 3*net.flops()*len(x)*10
    small = DENTrainer(net, Scripted(cooldown=0, flops_budget=1.2*free), device='cpu').train((x, y), epochs=10)
    assert small['flops'][-1] <= 1.2*free and sum(small['layer_sizes'][-1]) > 6
    none = DENTrainer(network(), Scripted(cooldown=0, flops_budget=free), device='cpu').train((x, y), epochs=10)
    assert not none['growth_events'] and none['flops'][-1] == free

def test_flops_are_counted():
    net = network()
    h = DENTrainer(net, device='cpu', callbacks=[g := Growth(Scripted(cooldown=3))]).train(data(), epochs=4)
    per = [2*(4*n + n*3 + 3) for n in (3, 7, 7, 7)]
    assert h['flops'] == [3*60*sum(per[:i + 1]) for i in range(4)] and g.spent == h['flops'][-1]

def test_a_model_that_reads_tokens_grows():
    torch.manual_seed(0)
    x, y = torch.randint(20, (64, 6)), torch.randint(3, (64,))
    net = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 3))
    den = grow(net, x[:4], task_type='classification')
    h = DENTrainer(den, device='cpu', callbacks=[g := Growth(Scripted(cooldown=1))]).train((x, y), epochs=4)
    assert net[0].embedding_dim > 8 and h['flops'][0] == 3*64*2*(48*6 + 6*3) and g.events

@pytest.mark.parametrize('name', list(STRATEGIES))
def test_every_strategy_grows_and_saves(name, tmp_path):
    def make():
        kw = dict(patience=2, cooldown=1) | dict(loss=dict(min_delta=1.), gradient=dict(gradient_threshold=1e-6, min_delta=1.),
                                                 activity=dict(activity_threshold=.1), adaptive=dict(loss_threshold=1.))[name]
        return DENTrainer(network(), STRATEGIES[name](**kw), device='cpu', learning_rate=1e-2)
    a = make()
    h = a.train(data(), epochs=9)
    assert h['growth_events'] and all(abs(e['loss_after']/e['loss_before'] - 1) < 1e-3 for e in h['growth_events'])
    a.save_checkpoint(tmp_path/'c.pt')
    b = make().load_checkpoint(tmp_path/'c.pt')
    assert b.growth_strategy.state_dict() == a.growth_strategy.state_dict() and b.growth.rest == a.growth.rest
    assert b.network.get_layer_sizes() == a.network.get_layer_sizes()
    ha, hb = (t.train(data(), epochs=8) for t in (a, b))
    assert ha['train_loss'] == hb['train_loss'] and ha['growth_events'] == hb['growth_events']
    for p, q in zip(a.network.parameters(), b.network.parameters(), strict=True): assert torch.equal(p, q)

def test_adaptive_goes_deeper_when_wider_did_not_help():
    s = AdaptiveGrowth(patience=1, cooldown=0, loss_threshold=10., gradient_threshold=0., max_depth=3)
    net = network()
    h = DENTrainer(net, s, device='cpu').train(data(), epochs=8)
    kinds = [e['type'] for e in h['growth_events']]
    assert kinds[:2] == ['width', 'depth'] and len(net.get_layer_sizes()) == 3 and 'depth' not in kinds[2:]

def test_gradient_metrics_are_the_gradients():
    seen = {}
    class Look(GrowthStrategy):
        needs = 'gradients',
        def should_grow(self, metrics, network, epoch): seen.update(metrics); return False, None
    net = network()
    x, y = data()
    first = [p.detach().clone() for p in net.parameters()]
    DENTrainer(net, Look(), device='cpu', batch_size=60, learning_rate=0.).train((x, y), epochs=7)
    assert all(torch.equal(a, b) for a, b in zip(first, net.parameters(), strict=True))
    net.zero_grad(); F.mse_loss(net(x), y).backward()
    whole = torch.stack([p.grad.norm() for p in net.parameters()]).norm().item()
    assert abs(seen['gradient_norm']/whole - 1) < 1e-4
    assert seen['layer_gradients'] == pytest.approx([x.made.grad.norm().item()/3 for x in net.layers], rel=1e-4)

@pytest.mark.parametrize('make, says', [
    (lambda: LossBasedGrowth(patience=0), 'patience'), (lambda: LossBasedGrowth(cooldown=-1), 'cooldown'),
    (lambda: LossBasedGrowth(max_neurons_per_expansion=0), 'max_neurons'), 
    (lambda: AdaptiveGrowth(max_network_size=0), 'max_network_size'),
    (lambda: GradientBasedGrowth(gradient_threshold=-1), 'gradient_threshold'),
    (lambda: ActivityBasedGrowth(activity_threshold=2), 'activity'),
    (lambda: Growth('los'), 'loss'), (lambda: perform(network(), dict(type='wide')), 'width'),
    (lambda: DENTrainer(network(), device='cpu', optimizer='adm'), 'adam'),
    (lambda: as_samples(torch.zeros(3, 2), torch.zeros(2)), '3 inputs'),
    (lambda: as_samples(torch.zeros(0, 2), torch.zeros(0)), 'no samples'), (lambda: DENTrainer(network(), device='gpu'), 'device'),
    (lambda: as_samples(torch.zeros(3, 2), torch.zeros(3), 'classification'), 'class numbers'),
    (lambda: DENTrainer(network(), device='cpu').continual_learning(data(), rehearsal=1.), 'rehearsal'),
    (lambda: DENTrainer(network(), device='cpu').continual_learning(data(), rehearsal=.5), 'nothing was learned'),
    (lambda: DENTrainer(network(), device='cpu').evaluate(), 'nothing'), (lambda: plot_river([dict(epoch=1)]), 'sizes')])
def test_errors(make, says):
    with pytest.raises(ValueError, match=says): make()

def test_errors_of_type():
    with pytest.raises(TypeError, match='grow'): DENTrainer(nn.Linear(2, 2))
    with pytest.raises(TypeError, match='data'): DENTrainer(network(), device='cpu').train('data')
    with pytest.raises(TypeError, match='patience'): Scripted(patiense=3)

@pytest.mark.parametrize('optimizer', ['adam', 'sgd', 'rmsprop', torch.optim.AdamW])
def test_optimizers(optimizer):
    t = DENTrainer(network(), Scripted(cooldown=1), optimizer=optimizer, device='cpu')
    h = t.train(data(), epochs=5)
    assert len(h['growth_events']) == 2 and np.isfinite(h['train_loss']).all()
    assert {id(p) for g in t.optimizer.param_groups for p in g['params']} == {id(p) for p in t.network.parameters()}

def test_all_kinds_of_data():
    class Pairs(Dataset):
        def __len__(self): return 30
        def __getitem__(self, i): return torch.full((4,), float(i)), i % 3
    x, y = data(30, classes=3)
    given = [(x, y), (x.numpy(), y.numpy()), TensorDataset(x, y), DataLoader(TensorDataset(x, y), 8), Pairs()]
    given.append(DataLoader(Pairs(), 8, shuffle=True))
    for d in given:
        net = DynamicExpandableNetwork(4, 3, [5], task_type='classification')
        t = DENTrainer(net, device='cpu')
        h = t.train(d, epochs=2, val_loader=d)
        assert len(h['val_accuracy']) >= 2 and set(t.evaluate(d)) == {'loss', 'accuracy'}
        assert t.trainer.batch_size == (8 if isinstance(d, DataLoader) else 32)
        assert t.predict(d if isinstance(d, (Dataset, DataLoader)) else d[0]).shape == (30, 3)

def test_one_column_of_targets():
    "A flat regression target is a column: no broadcasting to a square"
    x, y = data()
    a, b = (DENTrainer(network(), device='cpu').train((x, t), epochs=2)['train_loss'] for t in (y, y[:, 0]))
    assert a == b

def test_images_and_a_convolutional_body():
    torch.manual_seed(0)
    x, y = torch.randn(24, 3, 8, 8), torch.randint(3, (24,))
    net = DynamicExpandableNetwork((3, 8, 8), 3, model='cnn', channels=(3, 4), hidden_sizes=(5,), normalization='batch', dropout=.1,
                                   task_type='classification')
    h = DENTrainer(net, AdaptiveGrowth(patience=1, cooldown=1, loss_threshold=9.), device='cpu', batch_size=8).train((x, y), epochs=6)
    assert h['growth_events'] and all(abs(e['loss_after'] - e['loss_before']) < 1e-4*e['loss_before'] for e in h['growth_events'])

def test_growing_does_not_change_the_run():
    "A strategy that never grows leaves the same bits as none, and so does one that is switched off"
    class Never(GrowthStrategy):
        needs = 'gradients', 'activity'
        def should_grow(self, metrics, network, epoch): return False, None
    runs = [DENTrainer(network(dropout=.2), s, device='cpu').train(data(), epochs=4, enable_growth=e)['train_loss']
            for s, e in ((None, True), (Never(), True), (Scripted(), False))]
    assert runs[0] == runs[1] == runs[2]

def test_the_one_trainer_with_a_foreign_model():
    from plasticity.data import get_data
    d = get_data('synthetic_regression', n=100)
    model = make_model('mlp', d.shape, d.num_classes, seed=0, hidden_sizes=(4,))
    g = Growth(Scripted(cooldown=1))
    Trainer(model, d, device='cpu', callbacks=[g]).fit(4)
    assert model.sizes()['hidden_sizes'] == (12,) and len(g.events) == 2

def test_actions():
    net = network()
    perform(net, dict(type='width', layer_idx=-1, num_neurons=2)); perform(net, dict(type='depth', position=0, num_neurons=2))
    perform(net, dict(type='prune', layer_idx=1, num_neurons=1)); perform(net, Widen(net.layers[1].group, 3))
    assert net.get_layer_sizes() == [2, 5, 5] and [e['type'] for e in net.events] == ['width', 'depth', 'prune', 'widen']

@pytest.mark.parametrize('change', [lambda n: n.expand_layer_width(0, 3), lambda n: n.expand_depth(1, 7),
                                    lambda n: n.shrink_layer_width(0, 2)])
def test_undo(change):
    net = network()
    opt = torch.optim.Adam(net.parameters())
    net(data()[0]).sum().backward(); opt.step(); net.attach(opt)
    net.layer_numbers()
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, [v.clone() for s in opt.state.values() for v in s.values()]
    mark = net.remember()
    change(net)
    net.undo(mark)
    after = net.state_dict()
    assert list(after) == list(before) and all(torch.equal(v, before[k]) for k, v in after.items())
    assert all(torch.equal(a, b) for a, b in zip(state, [v for s in opt.state.values() for v in s.values()], strict=True))
    net.expand_layer_width(0, 2); net.expand_depth(0)

def test_freezing_keeps_old_tasks_to_the_bit():
    net = DynamicExpandableNetwork(4, 1, [6, 6], 'tanh', normalization='batch')
    t = DENTrainer(net, Scripted(cooldown=1), device='cpu', optimizer='adam', learning_rate=.05)
    t.train(data(), epochs=3)
    old = t.predict(data(seed=5)[0])
    net.add_head(1)
    t.continual_learning(data(seed=9), epochs=6, freeze=True)
    new = t.evaluate(data(seed=9))['loss']
    net.use_head(0)
    assert torch.allclose(t.predict(data(seed=5)[0]), old, atol=1e-6) and net.get_layer_sizes()[0] > 10 and new < 1.5
    assert not any(type(c).__name__ == 'Frozen' for c in t.trainer.callbacks)

def test_prune_back_keeps_the_loss():
    t = DENTrainer(network(), device='cpu', learning_rate=.01)
    t.train(data(), epochs=30)
    t.network.expand_layer_width(0, 20)
    before = t.evaluate()['loss']
    assert prune_back(t, .01) >= 20 and t.evaluate()['loss'] <= before*1.01

def test_pictures(tmp_path):
    t = DENTrainer(network(), Scripted(cooldown=1), device='cpu')
    h = t.train(data(), epochs=5, val_loader=data(seed=1))
    for i, fig in enumerate([plot_training_history(h, tmp_path/'a.png'), plot_river(h), plot_training_history(t.trainer),
                             visualize_network_architecture(t.network, tmp_path/'b.png')]):
        fig.savefig(tmp_path/f'{i}.png')
    assert len(growth_summary(h)) == len(h['growth_events']) == 2 and (tmp_path/'b.png').stat().st_size > 1000
    plot_training_history(DENTrainer(network(), device='cpu').train(data(), epochs=2))
    assert analyze_layer_importance(t.network).column('units') == t.network.get_layer_sizes()

def test_onnx(tmp_path):
    for name in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(name)
    nets = [network(), DynamicExpandableNetwork((3, 8, 8), 3, model='cnn', channels=(3,), hidden_sizes=(4,), normalization='batch')]
    for i, net in enumerate(nets):
        for j in range(2): net.expand_layer_width(j, 3)
        net.expand_depth(1)
        assert export_onnx(net, tmp_path/f'{i}.onnx') < 1e-5

def test_onnx_missing(monkeypatch, tmp_path):
    import sys
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(ImportError, match='pip install'): export_onnx(network(), tmp_path/'x.onnx')

def test_grow_again_is_the_same_object():
    net = network()
    assert grow(net) is net
    with pytest.raises(TypeError, match='examples'): grow(nn.Linear(2, 2))

# what a second pair of eyes found

class Once(GrowthStrategy):
    "One action at the first epoch"
    cooldown = 0
    def __init__(self, action=None): super().__init__(); self.action, self.did = action, 0
    def should_grow(self, metrics, network, epoch): return not self.did, 'asked'
    def determine_growth_action(self, metrics, network): self.did = 1; return self.action

class Branches(nn.Module):
    def __init__(self):
        super().__init__(); self.a, self.b, self.mid, self.head = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(9, 7), nn.Linear(7, 1)
    def forward(self, x): return self.head(torch.tanh(self.mid(torch.cat([self.a(x).relu(), self.b(x).relu()], 1))))

def six(n=120):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    return x, (x[:, :1]*x[:, 1:2]).sin()

@pytest.mark.parametrize('case', ['zero', 'copy', 'concat', 'depth'])
def test_frozen_units_are_held_where_they_went(case):
    x, y = six()
    torch.manual_seed(0)
    net = grow(Branches(), x[:2], task_type='regression') if case == 'concat' else DynamicExpandableNetwork(
        6, 1, [4, 4], seed=1, start='copy' if case == 'copy' else 'zero')
    action = dict(type='depth', position=1, num_neurons=4) if case == 'depth' else dict(type='width', layer_idx=0, num_neurons=3)
    t = DENTrainer(net, Once(action), learning_rate=.01, device='cpu')
    t.train((x, y), epochs=5, enable_growth=False)
    net.add_head(1)
    def old():
        net.use_head(0); p = t.predict(x); net.use_head(1)
        return p
    before, sizes = old(), net.get_layer_sizes()
    t.continual_learning(x, -y, epochs=3, freeze=True)
    assert net.get_layer_sizes() != sizes and (old() - before).abs().max() < 1e-5*before.abs().max() < before.std()

def test_moments_follow_a_network_that_was_deepened_before_its_optimizer(tmp_path):
    x, y = torch.randn(100, 4), torch.randn(100, 4)
    def make(): return DynamicExpandableNetwork(4, 4, [4, 4], seed=1)
    net = make(); net.expand_depth(1)
    a = DENTrainer(net, learning_rate=.01, device='cpu')
    a.train((x, y), epochs=3); a.save_checkpoint(tmp_path/'c.pt')
    b = DENTrainer(make(), learning_rate=.01, device='cpu').load_checkpoint(tmp_path/'c.pt')
    for t in (a, b): t.train((x, y), epochs=2)
    assert torch.equal(a.predict(x), b.predict(x))

def test_checkpoints_of_others_are_refused(tmp_path):
    data = six()
    def make(strategy=None, optimizer='adam', activation='relu', inputs=6):
        return DENTrainer(DynamicExpandableNetwork(inputs, 1, [4], seed=1, activation=activation), strategy, optimizer, device='cpu')
    a = make(LossBasedGrowth()); a.train(data, epochs=1); a.save_checkpoint(tmp_path/'c.pt')
    for options, word in ((dict(activation='tanh'), 'activation'), (dict(inputs=7), '[67]'), (dict(optimizer='sgd'), 'optimizer'),
                          (dict(strategy=AdaptiveGrowth()), 'growth')):
        other = make(**dict(strategy=LossBasedGrowth()) | options)
        with pytest.raises(ValueError, match=f'^path: .*{word}'): other.load_checkpoint(tmp_path/'c.pt')
    make(LossBasedGrowth()).load_checkpoint(tmp_path/'c.pt').train(data, epochs=1)

def test_a_loader_is_read_as_it_reads():
    x, y = six(100)
    part = DataLoader(TensorDataset(x, y), 20, sampler=SubsetRandomSampler(range(50)))
    halved = DataLoader(TensorDataset(x, y), 20, collate_fn=lambda b: (torch.stack([v[0] for v in b])/2, torch.stack([v[1] for v in b])))
    t = DENTrainer(DynamicExpandableNetwork(6, 1, [4], seed=0), device='cpu')
    t.train(part, epochs=1)
    assert len(t.trainer.data.x_train) == 50 and {tuple(v) for v in t.trainer.data.x_train.tolist()} == {tuple(v) for v in x[:50].tolist()}
    t.train(halved, epochs=1)
    assert torch.equal(t.trainer.data.x_train, x/2)

def test_memory_holds_the_samples_of_each_task_alone():
    t = DENTrainer(DynamicExpandableNetwork(6, 2, [4], seed=0, task_type='classification'), device='cpu')
    ones = torch.ones(150).long()
    t.train((torch.zeros(150, 6), ones), epochs=1)
    for k in (1, 2): t.continual_learning(torch.full((150, 6), float(k)), ones, epochs=1, rehearsal=.5)
    assert [(m[1].unique().tolist(), len(m[1])) for m in t.memory] == [([float(k)], 150) for k in range(3)]

def test_images_as_a_data_set_stay_whole():
    d = get_data('digits')
    t = DENTrainer(DynamicExpandableNetwork(d.shape, 10, [32], seed=0, task_type='classification'), device='cpu')
    t.train(d, epochs=3)
    right = (t.predict(d.x_test).argmax(1) == d.y_test).double().mean().item()
    assert right == pytest.approx(t.evaluate(d)['accuracy'], abs=1e-9) and right > .6
    t.continual_learning(d, epochs=1, rehearsal=.2)
    n = len(d.x_test)
    t.train(d, epochs=1, val_loader=(torch.rand(7, *d.shape), torch.zeros(7).long()))
    assert len(d.x_test) == n

def test_inputs_in_the_networks_own_precision():
    x, y = six()
    net = DynamicExpandableNetwork(6, 1, [4], seed=0).double()
    t = DENTrainer(net, device='cpu')
    t.train((x, y), epochs=1)
    assert t.predict(x).dtype == torch.float64
    words = torch.randint(0, 10, (50, 3))
    model = nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))
    t = DENTrainer(grow(model, words[:2]), device='cpu')
    t.train((words, words[:, 0] % 2), epochs=2)
    assert t.predict(words).shape == (50, 2)

class SaveAt(Callback):
    def __init__(self, at, path): self.at, self.path = at, path
    def after_step(self, trainer):
        if trainer.step == self.at: trainer.save(self.path)

@pytest.mark.parametrize('at', [8, 10])
@pytest.mark.parametrize('strategy', [GradientBasedGrowth, LossBasedGrowth, ActivityBasedGrowth])
def test_a_run_stopped_in_an_epoch_grows_as_the_unbroken_one(tmp_path, strategy, at):
    x, _ = six(100)
    y = torch.randn(100, 1, generator=torch.Generator().manual_seed(1))
    options = dict(patience=1, cooldown=0) | (dict(gradient_threshold=0., min_delta=10) if strategy is GradientBasedGrowth else
                                              dict(activity_threshold=.1) if strategy is ActivityBasedGrowth else dict(min_delta=10))
    def make(at):
        net = DynamicExpandableNetwork(6, 1, [4, 4], seed=1)
        callbacks = [Growth(strategy(**options)), SaveAt(at, tmp_path/"c")]
        return Trainer(net, as_samples((x, y)), batch_size=20, device="cpu", eval_every=0, callbacks=callbacks)
    whole = make(at).fit(6)
    again = make(-1).load(tmp_path/'c').fit()
    assert whole.callbacks[0].events and whole.callbacks[0].events == again.callbacks[0].events
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))

def test_layers_under_a_norm_grow_by_whole_copies():
    net = DynamicExpandableNetwork(6, 1, [16, 16], seed=1, normalization='layer')
    DENTrainer(net, LossBasedGrowth(patience=2, cooldown=1), device='cpu', learning_rate=0.).train(six(), epochs=9)
    assert net.get_layer_sizes() in ([32, 16], [16, 32], [32, 32])
    net = DynamicExpandableNetwork(6, 1, [16, 16], seed=1, normalization='layer')
    small = LossBasedGrowth(patience=2, cooldown=1, max_network_size=net.get_num_parameters() + 50)
    DENTrainer(net, small, device='cpu', learning_rate=0.).train(six(), epochs=9)
    assert net.get_layer_sizes() == [16, 16]

def test_where_a_closed_form_has_too_few_directions_units_start_at_zero():
    net = DynamicExpandableNetwork(6, 1, [16, 16], seed=1)
    t = DENTrainer(net, LossBasedGrowth(patience=2, cooldown=1, start='gradmax'), device='cpu', learning_rate=0.)
    with pytest.warns(UserWarning, match='gradmax: .*directions'): t.train(six(), epochs=9)
    assert sum(net.get_layer_sizes()) > 32

def test_copies_under_a_layer_norm_come_apart():
    net = DynamicExpandableNetwork(6, 1, [8, 8], seed=1, normalization='layer')
    t = DENTrainer(net, learning_rate=.01, device='cpu')
    t.train(six(), epochs=5)
    before = t.predict(six()[0])
    net.expand_layer_width(0, 8)
    assert (t.predict(six()[0]) - before).abs().max() < 1e-5
    t.train(six(), epochs=20)
    w = net.body.layers[0].linear.weight
    assert (w[0::2] - w[1::2]).abs().max() > .05

def test_runs_too_short_to_grow_say_so():
    t = DENTrainer(DynamicExpandableNetwork(6, 1, [4], seed=1), LossBasedGrowth(patience=3, cooldown=2), device='cpu')
    with pytest.warns(UserWarning, match='epochs: got 3, .*patience 3.*last 2'): t.train(six(), epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        t.train(six(), epochs=3, enable_growth=False); t.train(six(), epochs=12)

@pytest.mark.parametrize('n', [994, 993, 1000])
def test_activity_is_told_from_many_samples(n):
    "Not from what is left for the epoch's last batch"
    class Noting(ActivityBasedGrowth):
        def should_grow(self, metrics, network, epoch): self.told = metrics['activity']; return False, None
    x = torch.randn(n, 10, generator=torch.Generator().manual_seed(0))
    y, s = x[:, :1].sin() + x[:, 1:2]*x[:, 2:3], Noting()
    DENTrainer(DynamicExpandableNetwork(10, 1, [64, 64], seed=1), s, device='cpu').train((x, y), epochs=8)
    assert min(s.told) > .85

def test_closed_forms_see_more_than_the_last_batch():
    x = torch.randn(66, 40, generator=torch.Generator().manual_seed(0))
    net = DynamicExpandableNetwork(40, 8, [16], seed=1, start='gradmax')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        DENTrainer(net, Scripted(cooldown=1), device='cpu').train((x, x[:, :8].sin()), epochs=2)
    assert net.get_layer_sizes() == [20]

def test_a_sample_is_a_batch_where_its_rows_are_large_or_tokens():
    from types import SimpleNamespace
    from plasticity.policies import _sample
    from plasticity.text import Bytes, TextData
    text = TextData('text', torch.arange(9000) % 256, torch.arange(90), Bytes(), 8)
    large, small = (as_samples((torch.zeros(600, k), torch.zeros(600))) for k in (5000, 9))
    for d, n in ((text, 20), (large, 20), (small, 512)):
        x, y = _sample(SimpleNamespace(x=next(iter(d.batches(20)))[0][:1], batch_size=20, data=d, seed=0, epoch=1))
        assert len(x) == len(y) == n

@pytest.mark.parametrize('name', list(STRATEGIES))
def test_a_network_without_hidden_layers_gets_one(name):
    kw = dict(patience=1, cooldown=1) | dict(loss=dict(min_delta=1.), gradient=dict(gradient_threshold=1e-6, min_delta=1.),
                                             activity={}, adaptive=dict(loss_threshold=1.))[name]
    net = DynamicExpandableNetwork(4, 1, [], seed=0)
    h = DENTrainer(net, STRATEGIES[name](max_neurons_per_expansion=5, **kw), device='cpu').train(data(), epochs=9)
    first = h['growth_events'][0]
    assert first['type'] == 'depth' and first['new_sizes'] == [5] and abs(first['loss_after']/first['loss_before'] - 1) < 1e-5
    assert len(h['growth_events']) > 1

def test_all_layers_of_none():
    assert LossBasedGrowth(layers='all').determine_growth_action({}, DynamicExpandableNetwork(4, 1, []))['type'] == 'depth'

def test_strategies_of_your_own_speak_numpy_or_are_told_what_to_say():
    class Numpy(Scripted):
        def determine_growth_action(self, metrics, network): return dict(type='width', layer_idx=np.argmax([0, 1]), num_neurons=np.int64(2))
    class Silent(Scripted):
        def determine_growth_action(self, metrics, network): pass
    net = network()
    DENTrainer(net, Numpy(cooldown=1), device='cpu').train(data(), epochs=2)
    assert net.get_layer_sizes() == [3, 5]
    with pytest.raises(TypeError, match='determine_growth_action: Silent gave None, takes a dict'):
        DENTrainer(network(), Silent(cooldown=1), device='cpu').train(data(), epochs=2)

def test_one_hot_targets_are_named():
    with pytest.raises(ValueError, match=r'targets: got the shape \(6, 3\), .* class numbers'):
        as_samples(torch.zeros(6, 2), torch.eye(3).repeat(2, 1).long(), 'classification')
    assert as_samples(torch.zeros(6, 2), torch.zeros(6, 1).long(), 'classification').y_train.shape == (6,)
