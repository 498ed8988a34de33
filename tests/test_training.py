import copy, json, math, os, signal, threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plasticity.data import get_data
from plasticity.models import CNN, MLP
from plasticity.results import random_state, seeded
from plasticity.training import (OPTIMIZERS, Callback, Checkpoint, History, NoisySGD, Trainer, evaluating, load_state, lr_factor,
                                 make_optimizer, pack, save_state, unpack)

DIGITS = get_data('digits').subset(train=200, test=50)

def trainer(seed=0, model='mlp', **kw):
    with seeded(seed):
        if model == 'mlp': net = MLP(DIGITS.shape, 10, hidden_sizes=(16,), dropout=.2, normalization='batch')
        else: net = CNN(DIGITS.shape, 10, channels=(4, 8), normalization='batch', dropout=.1)
    return Trainer(net, DIGITS, seed=0, device='cpu', batch_size=32, **kw)

def same(a, b):
    "Bit for bit: weights, buffers, optimizer, history, random states, counters"
    ta, tb = {}, {}
    sa, sb = pack(a.state_dict(), ta), pack(b.state_dict(), tb)
    assert json.dumps(sa) == json.dumps(sb)
    assert ta.keys() == tb.keys() and all(torch.equal(ta[k], tb[k]) for k in ta)
    return True

class Stop(Callback):
    def __init__(self, at): self.at = at
    def after_step(self, trainer): trainer.stop = trainer.step == self.at

OPTIONS = [*(dict(optimizer=o) for o in OPTIMIZERS),
           dict(optimizer='sgd', momentum=.9, schedule='cosine', warmup=3, lr=.1),
           dict(optimizer='noisy_sgd', per='element', clip=1.),
           dict(model='cnn', augment=('rotation',)),
           dict(precision='bf16', accumulate=3),
           dict(optimizer='adam', fused=True)]

@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('stop', [1, 7, 10, 14])  # seven batches an epoch
def test_resume_is_bit_for_bit(options, stop, tmp_path):
    through = trainer(**options).fit(epochs=3)
    first = trainer(**options).fit(epochs=3, steps=stop)
    first.save(tmp_path)
    torch.rand(5)  # the world goes on
    second = trainer(seed=1, **options).load(tmp_path).fit()
    assert second.epoch == 3 and same(through, second)

def test_many_pieces_equal_one(tmp_path):
    through, pieces = trainer().fit(steps=20), trainer()
    for n in (1, 2, 3, 6, 8): pieces.fit(steps=n)
    pieces.goal = through.goal
    assert same(through, pieces)

def test_an_interrupt_leaves_a_resumable_run(tmp_path):
    class Interrupt(Callback):
        def after_forward(self, trainer):
            if trainer.step == 9 and trainer.model.training: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): trainer(callbacks=[Interrupt(), Checkpoint(tmp_path)]).fit(epochs=2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    class Not(Interrupt):
        def after_forward(self, trainer): pass
    Not.__name__ = 'Interrupt'
    through = trainer(callbacks=[Not(), Checkpoint(tmp_path/'other')]).fit(epochs=2)
    resumed = trainer(seed=3, callbacks=[Not(), Checkpoint(tmp_path)]).load(tmp_path)
    assert resumed.step == 10
    assert same(through, resumed.fit())

def test_an_error_in_a_step_keeps_the_last_checkpoint(tmp_path):
    class Fail(Callback):
        def after_backward(self, trainer):
            if trainer.step == 9: raise RuntimeError('broken')
    with pytest.raises(RuntimeError, match='broken'): trainer(callbacks=[Fail(), Checkpoint(tmp_path, every=4)]).fit(epochs=2)
    assert load_state(tmp_path)['counters']['step'] == 8
    assert len(list(tmp_path.iterdir())) == 2

def test_fit_leaves_the_world_alone():
    before = random_state()
    t = trainer()
    modes = [m.training for m in t.model.modules()]
    t.model.eval()
    t.fit(steps=3)
    assert not any(m.training for m in t.model.modules()) and random_state() == before and len(modes)
    threads = threading.Thread(target=lambda: trainer().fit(steps=1))
    threads.start(); threads.join()

def test_seed_decides_and_only_seed():
    torch.manual_seed(1); a = trainer().fit(epochs=1)
    torch.manual_seed(2); b = trainer().fit(epochs=1)
    assert same(a, b)
    c = trainer(); c.seed = 5
    assert not torch.equal(c.fit(epochs=1).model.head.weight if hasattr(c.model, 'head') else next(c.model.parameters()),
                           a.model.head.weight if hasattr(a.model, 'head') else next(a.model.parameters()))

def test_measuring_between_fits_changes_nothing():
    a, b = trainer().fit(steps=10), trainer().fit(steps=4)
    b.evaluate(); b.predict('test'); torch.rand(3)
    b.fit(steps=6); b.goal = a.goal
    assert same(a, b)

def test_plain_loop_gives_the_same_weights():
    t = trainer(optimizer='sgd', lr=.1)
    net = copy.deepcopy(t.model)
    t.fit(epochs=2)
    opt = torch.optim.SGD(net.parameters(), lr=.1)
    net.train()
    with seeded(0, 'fit'):
        for epoch in range(2):
            for x, y in DIGITS.batches(32, seed=0, epoch=epoch):
                opt.zero_grad(); nn.functional.cross_entropy(net(x), y).backward(); opt.step()
    assert all(torch.equal(a, b) for a, b in zip(t.model.state_dict().values(), net.state_dict().values(), strict=True))

def test_accumulation_equals_the_whole_batch_without_batch_norm():
    def go(k):
        with seeded(0): net = MLP(DIGITS.shape, 10, hidden_sizes=(16,)).double()
        data = DIGITS.subset(train=200)
        class Double(Callback):
            def before_step(self, trainer): trainer.x = trainer.x.double()
        t = Trainer(net, data, optimizer='sgd', lr=.1, accumulate=k, device='cpu', eval_every=0, batch_size=60, callbacks=[Double()])
        return t.fit(epochs=2)
    a, b = go(1), go(4)
    assert all(torch.allclose(p, q, atol=1e-12) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert a.history[-1]['accuracy'] == b.history[-1]['accuracy']

def test_history_counts():
    t = trainer()
    t.fit(epochs=1)
    t.begin_task(DIGITS.subset(train=100))
    t.fit(epochs=2)
    rows = t.history.where(split='train')
    counts = [[r[k] for k in ('task', 'epoch', 'task_epoch', 'step', 'task_step')] for r in rows]
    assert counts == [[0, 1, 1, 7, 7], [1, 2, 1, 11, 4], [1, 3, 2, 15, 8]]
    assert t.history.curve('accuracy', split='test')[0] == [0, 1, 2, 3]
    with pytest.raises(KeyError, match='accuracy'): t.history.last('acuracy')
    with pytest.raises(KeyError): History().last('x')

def test_a_last_batch_of_one_is_left_out():
    data = DIGITS.subset(train=65)
    with seeded(0): net = MLP(data.shape, 10, hidden_sizes=(8,), normalization='batch')
    assert Trainer(net, data, device='cpu', batch_size=32).fit(epochs=2).step == 4

def test_regression_and_own_loss():
    data = get_data('synthetic_regression')
    with seeded(0): net = MLP(data.shape, data.num_classes, hidden_sizes=(16,))
    t = Trainer(net, data, device='cpu', lr=1e-2).fit(epochs=3)
    rows = t.history.where(split='train')
    assert 'accuracy' not in rows[0] and rows[-1]['loss'] < rows[0]['loss']
    own = Trainer(copy.deepcopy(net), data, device='cpu', loss=lambda p, y: (p - y).abs().mean()).fit(epochs=1)
    assert own.history[-1]['loss'] > 0

def test_compile_flag():
    a, b = trainer(optimizer='sgd').fit(steps=3), trainer(optimizer='sgd', compile=True)
    b.forward = torch.compile(b.model, backend='eager')
    b.fit(steps=3)
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert a.state_dict()['model'].keys() == b.state_dict()['model'].keys()

BAD = [(dict(batch_size=0), 'batch_size'), (dict(batch_size=2.5), 'batch_size'), (dict(precision='fp8'), 'precision'),
       (dict(schedule='cosin'), 'schedule'), (dict(clip=-1.), 'clip'), (dict(accumulate=0), 'accumulate'),
       (dict(warmup=-5), 'warmup: got -5'), (dict(lr=math.inf), 'lr: got inf'),
       (dict(optimizer='addam'), 'adam'), (dict(device='gpu'), 'device'), (dict(seed=.5), 'seed')]

@pytest.mark.parametrize('bad, name', BAD)
def test_errors_name_the_argument(bad, name):
    with pytest.raises((ValueError, TypeError), match=name): Trainer(MLP((1, 8, 8), 10), DIGITS, **dict(device='cpu') | bad)

def test_fit_errors():
    t = trainer()
    for bad in (-1, 1.5, True, 'a'):
        with pytest.raises(ValueError, match='epochs: got'): t.fit(epochs=bad)
    with pytest.raises(ValueError, match='no earlier goal'): t.fit()
    assert t.fit(epochs=0).step == 0
    with pytest.raises(ValueError, match='x: got'): t.predict('valid')

def test_noisy_sgd_without_noise_is_sgd(tmp_path):
    a = trainer(optimizer='sgd', momentum=.9, weight_decay=.01).fit(epochs=1)
    b = trainer(optimizer='noisy_sgd', noise=0., momentum=.9, weight_decay=.01).fit(epochs=1)
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))

def test_noisy_sgd_size_and_decay():
    p = nn.Parameter(torch.zeros(10_000)); g = torch.randn(10_000)
    for per, size in (('tensor', g.norm()), ('element', g.abs())):
        p.data.zero_(); p.grad = g.clone()
        opt = NoisySGD([p], lr=1., noise=.5, noise_decay=.9, per=per)
        opt.step()
        xi = (-p - g)/(.5*size)
        assert abs(xi.mean()) < .05 and abs(xi.std() - 1) < .05
        assert opt.param_groups[0]['noise'] == .45
    with pytest.raises(ValueError, match='per'): NoisySGD([p], per='row')
    with pytest.raises(ValueError, match='noise'): NoisySGD([p], noise=-1)
    with pytest.raises(ValueError, match='noise_decay'): NoisySGD([p], noise_decay=1.1)

@given(st.sampled_from(['constant', 'linear', 'cosine', 'step']), st.integers(0, 50), st.integers(1, 200), st.integers(0, 20))
def test_schedules_stay_between_zero_and_one(name, step, total, warmup):
    assert 0 <= lr_factor(name, step, total, warmup) <= 1

def test_schedule_ends():
    assert lr_factor('cosine', 100, 100) < 1e-12 and lr_factor('linear', 0, 10) == 1 and lr_factor('step', 80, 100) == pytest.approx(.01)
    assert lr_factor(lambda t: 1 - t**2, 5, 10) == .75

LEAF = st.none() | st.booleans() | st.integers(-2**40, 2**40) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
KEY = st.text(max_size=3) | st.integers(0, 9)
TREE = st.recursive(LEAF, lambda s: st.lists(s, max_size=3) | st.tuples(s, s) | st.dictionaries(KEY, s, max_size=3), max_leaves=10)

@settings(max_examples=60)
@given(TREE)
def test_pack_round_trip(tree):
    tensors = {}
    assert unpack(json.loads(json.dumps(pack(tree, tensors))), tensors) == tree

def test_state_files(tmp_path):
    w = torch.randn(3, 4)
    save_state(tmp_path, dict(a=w, tied=w, view=w.t(), half=w.bfloat16(), empty=torch.zeros(0), scalar=torch.tensor(2)))
    s = load_state(tmp_path)
    assert torch.equal(s['a'], w) and s['tied'] is s['a'] and torch.equal(s['view'], w.t()) and s['half'].dtype == torch.bfloat16
    assert s['empty'].shape == (0,) and s['scalar'] == 2
    with pytest.raises(TypeError, match='object'): save_state(tmp_path, dict(a=object()))
    assert torch.equal(load_state(tmp_path)['a'], w)
    file = next(tmp_path.glob('*.safetensors'))
    blob = bytearray(file.read_bytes()); blob[-1] ^= 1; file.write_bytes(blob)
    with pytest.raises(ValueError, match='checksum'): load_state(tmp_path)
    head = json.loads((tmp_path/'checkpoint.json').read_text())
    (tmp_path/'checkpoint.json').write_text(json.dumps(head | dict(tensors='../x.safetensors')))
    with pytest.raises(ValueError, match='outside'): load_state(tmp_path)
    (tmp_path/'checkpoint.json').write_text(json.dumps(head | dict(format=99)))
    with pytest.raises(ValueError, match='format'): load_state(tmp_path)
    with pytest.raises(FileNotFoundError): load_state(tmp_path/'nowhere')

def test_load_refuses_other_callbacks(tmp_path):
    trainer().save(tmp_path)
    with pytest.raises(ValueError, match='callbacks'): trainer(callbacks=[Stop(3)]).load(tmp_path)

def test_evaluating_restores_every_module():
    t = trainer(model='cnn')
    kids = list(t.model.modules()); kids[1].eval()
    before = [m.training for m in kids]
    with evaluating(t.model): assert not any(m.training for m in kids) and not torch.is_grad_enabled()
    assert [m.training for m in kids] == before

def test_make_optimizer_takes_all_kinds():
    p = [nn.Parameter(torch.zeros(2))]
    ready = torch.optim.SGD(p, lr=1.)
    assert make_optimizer(ready, p) is ready
    assert isinstance(make_optimizer(torch.optim.Adagrad, p, lr=.1), torch.optim.Adagrad)
    with pytest.raises(ValueError, match='options'): make_optimizer(ready, p, lr=.1)

def test_outputs_that_would_be_broadcast_over_the_targets_are_refused():
    from plasticity.data import Data
    x = torch.randn(40, 3).numpy(); y = x.sum(1)
    class Flat(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(3, 1)
        def forward(self, x): return self.l(x)[:, 0]
    with pytest.raises(ValueError, match=r'model: got outputs of shape \(\d+,\), takes .*\(\d+, 1\)'):
        Trainer(Flat(), Data('r', x, y, x, y), device='cpu').fit(1)
    Trainer(nn.Linear(3, 1), Data('r', x, y, x, y), device='cpu').fit(1)

def test_an_interrupt_in_the_last_evaluation_is_raised():
    class Press(Callback):
        def on_log(self, trainer, row):
            if row.get('split') == 'train': trainer._interrupted = True
    t = trainer(callbacks=[Press()])
    with pytest.raises(KeyboardInterrupt): t.fit(1)
    assert t.epoch == 1

def test_hooks_of_a_noisy_step_are_called_once():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # from then on torch calls hooks in every step of SGD
    w, calls = nn.Parameter(torch.ones(2)), []
    opt = NoisySGD([w], lr=.1, noise=0.)
    opt.register_step_pre_hook(lambda *_: calls.append('pre')); opt.register_step_post_hook(lambda *_: calls.append('post'))
    w.grad = torch.ones(2); opt.step()
    assert calls == ['pre', 'post'] and torch.equal(w, torch.full((2,), .9))
