"Adaptive networks: parity, growth by the rule, layers in and out, skips, the command line"
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from plasticity.adaptive import AdaptiveMLP, AffineLayers, FullLayers, IdleUnits, WeakUnits, adaptation, parity_network, parity_start
from plasticity.data import Data, get_data
from plasticity.edits import load_record, replay
from plasticity.growing import grow
from plasticity.models import num_parameters
from plasticity.results import generator
from plasticity.schedules import Schedule
from plasticity.training import Trainer
from plasticity.units import EditError

torch.set_num_threads(1)

def every_count(n):
    "One row for each number of bits set, and random ones"
    rows = torch.tril(torch.ones(n + 1, n), -1)
    return torch.cat([rows, torch.randint(2, (256, n), generator=generator(n)).float()])

@pytest.mark.parametrize('n', range(2, 65))
def test_parity_is_exact_at_the_start(n):
    x = every_count(n)
    y = x.sum(1).long() % 2
    net = parity_network(n)
    with torch.no_grad(): assert (net(x).argmax(1) == y).all()
    assert net.get_layer_sizes() == [n]

def test_hidden_unit_k_fires_when_k_bits_are_set():
    net, x = parity_network(6), torch.tril(torch.ones(7, 6), -1)
    g = net.layers[0]
    h = F.relu(F.linear(x, g.made, g.module.bias))
    assert torch.equal(h > 0, x.sum(1)[:, None] >= torch.arange(1, 7))
    w = net.heads.weight[1] - net.heads.weight[0]
    assert all(a*b < 0 for a, b in zip(w[:-1].tolist(), w[1:].tolist(), strict=True))

def test_parity_data():
    d = get_data('parity', bits=8)
    assert len(d.x_train) == 256 and torch.equal(d.y_train, d.x_train.sum(1).long() % 2) and len(d.x_train.unique(dim=0)) == 256
    assert torch.equal(d.normalize(d.x_train), d.x_train)
    d = get_data('parity', bits=40)
    counts = d.x_test.sum(1)
    assert counts.min() <= 3 and counts.max() >= 37 and torch.equal(d.y_test, counts.long() % 2)
    assert Trainer(parity_network(40), d, device='cpu').evaluate()['accuracy'] == 1.
    with pytest.raises(ValueError, match='bits'): get_data('parity', bits=0)

def blobs(n=128, seed=0):
    x = torch.randn(n, 6, generator=generator(seed, 'x'))
    return Data('blobs', x, (x[:, 0]*x[:, 1] > 0).long(), x, (x[:, 0]*x[:, 1] > 0).long())

def share_net(active, width=100):
    "A layer of which this many units of a hundred are always active, the others never"
    net = AdaptiveMLP(6, 2, (width,), seed=0)
    g = net.layers[0]
    with torch.no_grad():
        g.made.zero_(); g.module.bias.copy_(torch.where(torch.arange(width) < active, 1., -1.))
    return net

@pytest.mark.parametrize(('active', 'size'), [(89, 100), (90, 100), (91, 110), (100, 110)])
def test_more_than_ninety_percent_grows_by_a_tenth(active, size):
    net = share_net(active)
    policy = FullLayers(Schedule(4))
    Trainer(net, blobs(), lr=0., batch_size=32, device='cpu', callbacks=[policy]).fit(1)
    assert net.get_layer_sizes() == [size]

def test_growth_is_at_least_one_unit_and_keeps_the_function():
    net = share_net(5, 5)
    x = torch.randn(9, 6)
    with torch.no_grad(): old = net(x)
    Trainer(net, blobs(), lr=0., batch_size=32, device='cpu', callbacks=[FullLayers(Schedule(4))]).fit(1)
    assert net.get_layer_sizes() == [6]
    with torch.no_grad(): torch.testing.assert_close(net(x), old)

def test_limits_and_cooldown_of_growth():
    net = share_net(20, 20)
    p = FullLayers(Schedule(1, cooldown=3), max_width=23)
    Trainer(net, blobs(), lr=0., batch_size=32, device='cpu', callbacks=[p]).fit(8)
    assert [e['step'] for e in p.events][:2] == [1, 5] and net.get_layer_sizes() == [23]

def test_a_full_layer_at_its_limit_gets_another_behind_it():
    net = share_net(20, 20)
    x = torch.randn(9, 6)
    with torch.no_grad(): old = net(x)
    p = FullLayers(Schedule(4), max_width=20, max_depth=2)
    Trainer(net, blobs(), lr=0., batch_size=32, device='cpu', callbacks=[p]).fit(1)
    assert net.get_layer_sizes() == [20, 20]
    with torch.no_grad(): torch.testing.assert_close(net(x), old)

@pytest.mark.parametrize('skip', [False, True])
def test_a_layer_that_is_affine_goes_without_a_trace(skip):
    net = AdaptiveMLP(6, 3, (8, 7, 9), skip=skip, seed=0)
    if skip:
        with torch.no_grad():
            for s in net.body.skips: s.weight.normal_()
    x = torch.randn(64, 6, generator=generator(0)).clamp(-3, 3)
    with torch.no_grad():
        net.layers[1].module.bias.fill_(100.)                                                  # always active
        old, size = net(x), num_parameters(net)
    opt = torch.optim.Adam(net.parameters())
    net.attach(opt)
    net(x).sum().backward(); opt.step()
    with torch.no_grad(): old = net(x)
    net.remove_layer(1, x)
    with torch.no_grad(): torch.testing.assert_close(net(x), old, rtol=1e-4, atol=1e-3)
    assert net.get_layer_sizes() == [8, 9] and num_parameters(net) < size
    held = {id(p) for g in opt.param_groups for p in g['params']}
    assert held == {id(p) for p in net.parameters()} and all(s['exp_avg'].shape == p.shape for p, s in opt.state.items())
    net(x).sum().backward(); opt.step()

def test_a_removed_layer_comes_back_with_its_record(tmp_path):
    net = AdaptiveMLP(6, 3, (8, 7), seed=0)
    x = torch.randn(64, 6, generator=generator(0))
    with torch.no_grad(): old, names = net(x), [n for n, _ in net.named_parameters()]
    record = net.remove_layer(0, x)
    assert net.get_layer_sizes() == [7] and record.edits[0]['explained'] < 1
    with torch.no_grad(): gone = net(x)
    record = load_record(record.save(tmp_path/'record'))
    replay(net, record.inverse())
    with torch.no_grad(): assert torch.equal(net(x), old) and [n for n, _ in net.named_parameters()] == names
    replay(net, record)
    with torch.no_grad(): assert torch.equal(net(x), gone)

def test_what_cannot_be_removed_is_refused():
    with pytest.raises(ValueError, match='layer'): AdaptiveMLP(6, 3, (8,), seed=0).remove_layer(3, torch.randn(9, 6))
    net = AdaptiveMLP(6, 3, (8, 7), normalization='batch', seed=0)
    old = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(EditError): net.remove_layer(0, torch.randn(64, 6))
    assert all(torch.equal(v, old[k]) for k, v in net.state_dict().items())

def test_idle_units_go_and_the_last_one_stays():
    for active, left in ((7, 7), (1, 1), (0, 10)):
        net = share_net(active, 10)
        Trainer(net, blobs(), lr=0., batch_size=32, device='cpu', callbacks=[IdleUnits(Schedule(4))]).fit(1)
        assert net.get_layer_sizes() == [left]

def test_weak_units_go():
    net = AdaptiveMLP(6, 2, (10,), seed=0)
    with torch.no_grad(): net.heads.weight[:, [1, 4]] = 1e-5
    Trainer(net, blobs(), lr=0., batch_size=32, device='cpu', callbacks=[WeakUnits(Schedule(4), threshold=1e-3)]).fit(1)
    assert net.get_layer_sizes() == [8]

@pytest.mark.parametrize('skip', [False, True])
def test_everything_together_trains_and_resumes(tmp_path, skip):
    def make():
        net = AdaptiveMLP(6, 2, (6, 6), skip=skip, seed=0)
        parts = adaptation(grow=Schedule(5, cooldown=5), prune=Schedule(7), quantize=3, of='units', bits=6, threshold=.3, max_width=12)
        return Trainer(net, blobs(), batch_size=16, device='cpu', lr=.01, callbacks=parts)
    whole = make().fit(6)
    assert whole.model.get_layer_sizes() != [6, 6]
    part = make().fit(6, steps=23); part.save(tmp_path)
    rest = make().load(tmp_path).fit()
    a, b = whole.model.state_dict(), rest.model.state_dict()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []

def test_affine_layers_go_on_a_schedule_and_checkpoints_know(tmp_path):
    net = AdaptiveMLP(6, 2, (8, 7, 9), seed=0)
    with torch.no_grad(): net.layers[1].module.bias.fill_(100.)
    p = AffineLayers(Schedule(4, limit=1))                                                     # what follows is affine too by then
    Trainer(net, blobs(), lr=0., batch_size=32, device='cpu', callbacks=[p]).fit(3)
    assert net.get_layer_sizes() == [8, 9] and [e['edits'][0]['edit'] for e in p.events] == ['RemoveLayer']
    net.expand_depth(2); net.expand_layer_width(0, 3)
    net.save_checkpoint(tmp_path/'net.safetensors')
    back, x = AdaptiveMLP.from_checkpoint(tmp_path/'net.safetensors'), torch.randn(5, 6)
    with torch.no_grad(): assert torch.equal(back(x), net(x)) and back.get_layer_sizes() == net.get_layer_sizes() == [11, 9, 9]
    assert back.structure == net.structure
    before = net.get_layer_sizes()
    back.remove_layer(1, torch.randn(64, 6)); assert len(back.get_layer_sizes()) == len(before) - 1

KINDS = st.sampled_from(['widen', 'deepen', 'shrink', 'remove', 'train'])

@given(st.lists(st.tuples(KINDS, st.integers(0, 10**6)), min_size=1, max_size=8), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_sequence_of_changes_holds_together(changes, skip):
    net, x = AdaptiveMLP(6, 3, (4, 5), skip=skip, seed=0), torch.randn(32, 6, generator=generator(0, 'x'))
    opt = torch.optim.Adam(net.parameters(), lr=.01)
    net.attach(opt)
    for what, i in changes:
        n = len(net.layers)
        with torch.no_grad(): old = net(x)
        kept = what in ('widen', 'deepen')
        if what == 'train': net(x).square().mean().backward(); opt.step(); opt.zero_grad(); continue
        if what == 'widen' and n: net.expand_layer_width(i % n, 1 + i % 3)
        elif what == 'deepen' and 0 < n < 5: net.expand_depth(1 + i % n)
        elif what == 'shrink' and n and net.get_layer_sizes()[i % n] > 1: net.shrink_layer_width(i % n, 1)
        elif what == 'remove' and n > 1:
            try: net.remove_layer(i % n, x)
            except EditError: kept = True
        with torch.no_grad():
            if kept: torch.testing.assert_close(net(x), old, rtol=1e-3, atol=1e-4)
        held = {id(p): p for g in opt.param_groups for p in g['params']}
        assert set(held) == {id(p) for p in net.parameters()}
        assert all(v.shape == p.shape for p, s in opt.state.items() for k, v in s.items() if k != 'step')

def test_parity_from_a_random_start_is_solved_by_growth():
    d = get_data('parity', bits=4)
    def run(seed, callbacks):
        t = Trainer(AdaptiveMLP(4, 2, (2,), seed=seed), d, batch_size=16, device='cpu', lr=.02, eval_every=0, callbacks=callbacks)
        return t.fit(900)
    for seed in range(3):
        fixed = run(seed, [])
        grown = run(seed, [IdleUnits(Schedule(50)), FullLayers(Schedule(50), of='units', max_width=40, solved=.01)])
        assert fixed.evaluate()['accuracy'] < 1 and grown.evaluate()['accuracy'] == 1.
        assert grown.model.get_layer_sizes()[0] > 2

@pytest.mark.parametrize('words', [['dataset=parity', 'task.bits=16'], ['dataset=digits', 'training.epochs=2'],
                                   ['dataset=digits', 'model=cnn', 'model.channels=[4,4]', 'model.hidden_sizes=[8]', 'training.epochs=1']])
def test_on_the_command_line(tmp_path, words):
    from plasticity.experiments import read_run, run_line
    folder = run_line('training=adaptive', *words, f'hydra.run.dir={tmp_path}/run', 'device=cpu', 'logging.progress=false', 'dryrun=true')
    _, history, _ = read_run(folder)
    assert 0 <= history.where(split='test')[-1]['accuracy'] <= 1
    if 'dataset=parity' in words: assert history.where(split='test')[0]['accuracy'] == 1.

def test_two_rows_are_no_evidence_that_a_layer_is_affine():
    net = AdaptiveMLP(6, 3, (16, 12), seed=0)
    with pytest.raises(ValueError, match='x: got 2 rows'): net.remove_layer(0, torch.randn(2, 6))
    p = AffineLayers(Schedule(5))                                                              # the fifth batch has two rows
    Trainer(AdaptiveMLP(6, 2, (16, 12), seed=0), blobs(66), batch_size=16, device='cpu', callbacks=[p]).fit(2)
    assert p.events == []

def test_a_layer_that_cannot_go_does_not_keep_the_next_one():
    net = AdaptiveMLP(6, 2, (8, 7, 9), seed=0)
    body = net.body
    body.layers[1].linear.register_parameter('bias', None)                                      # the first layer's reader has no bias
    net = grow(body, torch.randn(2, 6), task_type='classification')
    net.__class__ = AdaptiveMLP
    with pytest.raises(EditError, match='no bias'): net.line(0, torch.randn(9, 6))
    p = AffineLayers(Schedule(4, limit=1), explained=0.)
    Trainer(net, blobs(), lr=0., batch_size=32, device='cpu', callbacks=[p]).fit(1)
    assert net.get_layer_sizes() == [8, 9]

@pytest.mark.parametrize('optimizer', ['Adam', 'SGD', 'Adafactor'])
def test_a_layer_of_one_unit_goes_and_comes_back_in_training(optimizer):
    net, x = AdaptiveMLP(5, 2, (1, 4), seed=0), torch.randn(64, 5)
    opt = getattr(torch.optim, optimizer)(net.parameters(), lr=.01, **dict(momentum=.9) if optimizer == 'SGD' else {})
    net.attach(opt)
    def step(): net(x).square().mean().backward(); opt.step(); opt.zero_grad()
    step()
    record = net.remove_layer(0, x); assert net.get_layer_sizes() == [4]; step()
    replay(net, record.inverse(), opt); assert net.get_layer_sizes() == [1, 4]; step()

@pytest.mark.parametrize('options', [dict(normalization='layer'), dict(normalization='batch'), dict(bias=False), dict(activation='tanh')])
def test_parity_is_not_written_into_another_form(options):
    net = AdaptiveMLP(4, 2, (6,), seed=0, **options)
    old = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match='^network: parity takes'): parity_start(net)
    assert all(torch.equal(v, old[k]) for k, v in net.state_dict().items())

@pytest.mark.parametrize(('words', 'own'), [(['model=gpt', 'dataset=text'], 'language'), (['model=vae', 'dataset=digits'], 'vae')])
def test_what_has_its_own_training_is_told_so(tmp_path, words, own):
    from plasticity.experiments import run_line
    with pytest.raises(ValueError, match=f'training: .adaptive.*training={own}'):
        run_line('training=adaptive', *words, f'hydra.run.dir={tmp_path}/run', 'device=cpu', 'logging.progress=false', 'dryrun=true')
