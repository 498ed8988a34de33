import json, math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plasticity.continual import (Continual, MaskClasses, TrainabilityProbe, aged_and_fresh, average_accuracy, backward_transfer,
                                  clear_optimizer, continual, continual_training, forgetting, forward_transfer, plot_forgetting,
                                  plot_matrix, plot_online)
from plasticity.data import get_data
from plasticity.models import MLP
from plasticity.results import seeded
from plasticity.streams import Stream, Task, make_stream
from plasticity.training import Callback, Checkpoint, NoisySGD, Trainer, pack

DIGITS = get_data('digits').subset(train=200, test=60)
SPLIT = make_stream('classes', DIGITS, tasks=3, classes_per_task=3)
PERMUTED = make_stream('permuted', DIGITS, tasks=3)

def model(seed=0, **kw):
    with seeded(seed): return MLP(DIGITS.shape, 10, **(dict(hidden_sizes=(12,), dropout=.2, normalization='batch') | kw))

def trainer(seed=0, net=None, **kw): return Trainer(net or model(seed), DIGITS, seed=0, device='cpu', **(dict(batch_size=32, lr=.01) | kw))

def same(a, b):
    "Bit for bit: weights, buffers, optimizer, history, random states, counters, callbacks"
    ta, tb = {}, {}
    sa, sb = pack(a.state_dict(), ta), pack(b.state_dict(), tb)
    assert json.dumps(sa) == json.dumps(sb)
    assert ta.keys() == tb.keys() and all(torch.equal(ta[k], tb[k]) for k in ta)
    return True

# the numbers of a matrix

R = [[.9, .2, .1], [.6, .8, .3], [.5, .9, .7]]

def test_metrics_by_hand():
    assert average_accuracy(R) == pytest.approx((.5 + .9 + .7)/3)
    assert backward_transfer(R) == pytest.approx(((.5 - .9) + (.9 - .8))/2)
    assert forward_transfer(R, [.1, .15, .2]) == pytest.approx(((.2 - .15) + (.3 - .2))/2)
    assert forgetting(R) == pytest.approx(((.9 - .5) + (.8 - .9))/2)
    assert forgetting(R, after=2) == pytest.approx(.9 - .6)
    assert forgetting([[.5, 0, 0], [.8, .5, 0], [.6, .5, .5]]) == pytest.approx(.1)  # the best was not when it was learned

@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 6), seed=st.integers(0, 2**31))
def test_metrics_agree_with_loops(n, seed):
    g = torch.Generator().manual_seed(seed)
    r, b = torch.rand(n, n, generator=g).double(), torch.rand(n, generator=g).double()
    assert backward_transfer(r) == pytest.approx(sum(r[-1, j] - r[j, j] for j in range(n - 1)).item()/(n - 1))
    assert forward_transfer(r, b) == pytest.approx(sum(r[j - 1, j] - b[j] for j in range(1, n)).item()/(n - 1))
    assert forgetting(r) == pytest.approx(sum(max(r[k, j].item() for k in range(n - 1)) - r[-1, j].item() for j in range(n - 1))/(n - 1))

def test_metrics_of_what_was_seen_only():
    seen = [[.9, None, None], [.6, .8, None], [.5, .9, .7]]
    assert (average_accuracy(seen), backward_transfer(seen), forgetting(seen)) == (average_accuracy(R), backward_transfer(R), forgetting(R))
    with pytest.raises(ValueError, match='forward transfer needs'): forward_transfer(seen, [.1]*3)
    with pytest.raises(ValueError, match='average accuracy needs'): average_accuracy([[.5, .5], [None, .5]])
    assert average_accuracy([[.5]]) == .5

@pytest.mark.parametrize('match,call', [
    ('takes 2 or more', lambda: backward_transfer([[.5]])), ('takes 2 or more', lambda: forgetting([[.5]])),
    (r'got the shape \(1, 2\)', lambda: forgetting([[.5, .5]])), ('after: got 4', lambda: forgetting(R, after=4)),
    ('after: got 1', lambda: forgetting(R, after=1)), ('2 values for 3 tasks', lambda: forward_transfer(R, [0, 0]))])
def test_metric_errors(match, call):
    with pytest.raises(ValueError, match=match): call()

# masks

def test_mask_by_hand():
    logits = torch.tensor([[2., 9., 1., 0.], [0., 0., 3., 5.]], requires_grad=True)
    out = MaskClasses([0, 2])(logits)
    nn.functional.cross_entropy(out, torch.tensor([0, 2])).backward()
    assert out.argmax(1).tolist() == [0, 2] and logits.grad[:, [1, 3]].abs().sum() == 0
    p = torch.softmax(logits[:, [0, 2]], 1).detach()
    assert torch.allclose(logits.grad[:, [0, 2]], (p - torch.eye(2))/2)
    assert MaskClasses()(logits) is logits and MaskClasses([1])(torch.zeros(2, 3, 4)).isinf().sum() == 18
    with pytest.raises(ValueError, match='4 outputs'): MaskClasses([4])(logits)
    with pytest.raises(ValueError, match='got none'): MaskClasses([])

def test_masked_training_is_training_of_the_sub_network():
    "Same bits as a network that only has these outputs"
    classes = SPLIT[1].classes
    data, small = SPLIT[1].data, SPLIT[1].data.subset()
    renumber = torch.full((10,), -1); renumber[list(classes)] = torch.arange(3)
    small.y_train, small.y_test, small.num_classes = renumber[data.y_train], renumber[data.y_test], 3
    whole, part = model(), model()
    with torch.no_grad():
        head = part.head = nn.Linear(12, 3)
        head.weight.copy_(whole.head.weight[list(classes)]); head.bias.copy_(whole.head.bias[list(classes)])
    a = Trainer(whole, data, device='cpu', optimizer='sgd', lr=.1, callbacks=[MaskClasses(classes)]).fit(3)
    b = Trainer(part, small, device='cpu', optimizer='sgd', lr=.1).fit(3)
    for x, y in zip(a.history, b.history, strict=True):
        assert x['loss'] == pytest.approx(y['loss'], abs=1e-6) and x['accuracy'] == y['accuracy']
    assert torch.allclose(whole.head.weight[list(classes)], part.head.weight, atol=1e-5)

def test_mask_refuses_a_label_outside_and_survives_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match='lie outside its classes'): trainer(callbacks=[MaskClasses([1, 2])]).fit(1)
    a = Trainer(model(), SPLIT[0].data, device='cpu', callbacks=[MaskClasses(SPLIT[0].classes)]).fit(1)
    a.save(tmp_path)
    b = Trainer(model(1), SPLIT[0].data, device='cpu', callbacks=[MaskClasses()]).load(tmp_path)
    assert b.callbacks[0].classes == SPLIT[0].classes and b.evaluate() == a.evaluate()

# the driver

def test_the_matrix_is_what_separate_evaluations_give():
    class Keep(Callback):
        order = 80  # just before the task ends
        def __init__(self): self.models = []
        def after_epoch(self, trainer):
            if trainer.task_epoch == 2: self.models.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    keep, start = Keep(), model().state_dict()
    run = continual(trainer(), SPLIT, epochs_per_task=2, callbacks=[keep])
    assert len(keep.models) == 3 and run.ended == 3 and run.trainer.epoch == 6
    for i, weights in enumerate([start, *keep.models]):
        net = model(5); net.load_state_dict(weights); net.eval()
        for j, task in enumerate(SPLIT):
            out = net(task.data.normalize(task.data.x_test))[:, list(task.classes)]
            acc = (torch.tensor(task.classes)[out.argmax(1)] == task.data.y_test).double().mean().item()
            row = run.rows.where(after=i, task=j + 1)[0]
            assert row['accuracy'] == pytest.approx(acc)
            place = torch.searchsorted(torch.tensor(task.classes), task.data.y_test)
            assert row['loss'] == pytest.approx(nn.functional.cross_entropy(out, place).item(), rel=1e-4)
            if i: assert run.matrix()[i - 1, j] == row['accuracy']
    initial = [r['accuracy'] for r in run.rows.where(after=0)]
    r, said = run.matrix(), run.summary()
    assert said.pop('online_accuracy') == pytest.approx(sum(run.tasks.column('online_accuracy'))/3)
    assert said == dict(average_accuracy=average_accuracy(r), backward_transfer=backward_transfer(r), forgetting=forgetting(r),
                        forward_transfer=forward_transfer(r, initial))

def test_online_accuracy_is_counted_before_each_update():
    hits = []
    class Count(Callback):
        order = 99
        def before_step(self, trainer):
            with torch.no_grad(), seeded(0):
                net = trainer.model
                out = net(trainer.x)
            hits.append((trainer.task, trainer.task_epoch, (out.argmax(1) == trainer.y).sum().item(), len(trainer.y)))
    run = continual(trainer(net=model(dropout=0., normalization='none'), callbacks=[Count()]), PERMUTED, epochs_per_task=2, evaluate='none')
    for t, row in enumerate(run.tasks, 1):
        mine, first = [h for h in hits if h[0] == t], [h for h in hits if h[:2] == (t, 0)]
        assert row['online_accuracy'] == pytest.approx(sum(h[2] for h in mine)/sum(h[3] for h in mine))
        assert row['first_pass_accuracy'] == pytest.approx(sum(h[2] for h in first)/sum(h[3] for h in first))
        assert set(row) == {'task', 'name', 'online_accuracy', 'first_pass_accuracy'}

@pytest.mark.parametrize('evaluate,n', [('all', 3 + 9), ('seen', 1 + 2 + 3), ('current', 3), ('none', 0)])
def test_evaluate(evaluate, n):
    run = continual(trainer(), PERMUTED, evaluate=evaluate)
    assert len(run.rows) == n
    s = run.summary()
    assert ('forward_transfer' in s) == (evaluate == 'all') and ('forgetting' in s) == (evaluate in ('all', 'seen'))
    assert 'online_accuracy' in s

def test_evaluating_and_measuring_do_not_change_the_run():
    runs = [continual(trainer(), SPLIT, epochs_per_task=2, **o) for o in (dict(evaluate='none'), dict(evaluate='all', probe=30))]
    assert all(a.equal(b) for a, b in zip(*(r.trainer.model.state_dict().values() for r in runs), strict=True))
    assert list(runs[0].trainer.history) == list(runs[1].trainer.history) and not runs[0].reports
    assert {r['task'] for r in runs[1].reports} == {1, 2, 3} and {'layer', 'metric', 'value'} <= set(runs[1].reports[0])

def test_it_is_the_same_as_tasks_by_hand():
    run, hand = continual(trainer(), PERMUTED, epochs_per_task=2), trainer()
    for t in PERMUTED: hand.begin_task(t.data); hand.fit(2)
    assert list(run.trainer.history)[1:] == [r for r in hand.history if r['step']]
    assert all(a.equal(b) for a, b in zip(run.trainer.model.state_dict().values(), hand.model.state_dict().values(), strict=True))

def test_mask_off():
    run, masked = (continual(trainer(optimizer='sgd', lr=.2), SPLIT, epochs_per_task=12, mask=m) for m in (False, True))
    assert run.summary()['forgetting'] > masked.summary()['forgetting'] + .2

def test_class_incremental_masks_what_has_not_come():
    stream, asked = make_stream('class_incremental', DIGITS, tasks=3, classes_per_task=2), []
    class Spy(Callback):
        def after_forward(self, trainer): asked.append((trainer.task, tuple((~trainer.logits[0].isinf()).nonzero()[:, 0].tolist())))
    class Late(Spy): order = 95
    run = continual(trainer(callbacks=[Late()]), stream)
    assert {c for t, c in asked if t == 2} >= {stream.outputs(1)} and (3, stream.outputs(2)) in asked
    assert run.matrix()[2, 0] <= run.matrix()[0, 0]

# putting things back

def test_reset_goes_back_to_the_first_weights():
    seen = []
    class Spy(Callback):
        def before_task(self, trainer):
            seen.append(({k: v.clone() for k, v in trainer.model.state_dict().items()}, len(trainer.optimizer.state)))
    run = continual(trainer(), PERMUTED, reset=True, callbacks=[Spy()])
    assert all(a.equal(b) for s, _ in seen for a, b in zip(s.values(), model().state_dict().values(), strict=True))
    assert [n for _, n in seen] == [0, 0, 0] and run.reinit_optimizer

def test_reset_draws_anew_from_a_function():
    starts = []
    class Spy(Callback):
        def before_task(self, trainer): starts.append(next(trainer.model.parameters()).clone())
    make = lambda: MLP(DIGITS.shape, 10, hidden_sizes=(12,), dropout=.2, normalization='batch')
    for _ in range(2): continual(trainer(), PERMUTED, reset=make, callbacks=[Spy()])
    assert all(a.equal(b) for a, b in zip(starts[:3], starts[3:], strict=True)) and not starts[1].equal(starts[2])
    other = lambda: MLP(DIGITS.shape, 10, hidden_sizes=(5,))
    with pytest.raises(ValueError, match='another shape'): continual(trainer(), PERMUTED, reset=other)

@pytest.mark.parametrize('reinit,n', [(True, 0), (False, 5), (None, 0)])
def test_reinit_optimizer(reinit, n):
    seen = []
    class Spy(Callback):
        def before_task(self, trainer): seen.append(len(trainer.optimizer.state))
    continual(trainer(), PERMUTED, reset=reinit is None, reinit_optimizer=reinit, callbacks=[Spy()])
    assert seen == [0, n, n]
    if reinit is None:
        kept = continual(trainer(), PERMUTED, reset=True, reinit_optimizer=False, callbacks=[Spy()])
        assert seen[3:] == [0, 5, 5] and kept.reset

def test_a_fresh_optimizer_has_its_options_back():
    net = model()
    opt = NoisySGD(net.parameters(), lr=.1, noise=.5, noise_decay=.9, momentum=.9)
    noise = []
    class Spy(Callback):
        def before_task(self, trainer): noise.append(opt.param_groups[0]['noise'])
    continual(Trainer(net, DIGITS, optimizer=opt, device='cpu'), PERMUTED, reinit_optimizer=True, callbacks=[Spy()])
    assert noise == [.5]*3 and opt.param_groups[0]['noise'] < .5
    clear_optimizer(opt)
    assert not opt.state

def test_reset_makes_equal_tasks_equal():
    stream = Stream('same', [Task(DIGITS, tuple(range(10)), str(i), i) for i in range(3)])
    one_batch = trainer(net=model(dropout=0.), batch_size=200, optimizer='sgd')  # so that the order does not matter
    run = continual(one_batch, stream, reset=True)
    r = run.matrix()
    assert (r - r[0, 0]).abs().max() < 1e-6 and len(set(run.tasks.column('online_accuracy'))) == 1

# resuming

OPTIONS = [dict(), dict(reset=True), dict(reinit_optimizer=True, evaluate='seen'), dict(probe=20)]

@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('stop', [1, 4, 7, 12, 13, 17])
def test_resume_is_bit_for_bit(options, stop, tmp_path):
    def go(seed=0, **kw): return trainer(seed, eval_every=0, **kw)
    through = continual(go(), SPLIT, epochs_per_task=3, **options)
    first = go(); first.callbacks.append(Continual(SPLIT, 3, **options))
    first.fit(9, steps=stop)
    first.save(tmp_path)
    torch.rand(5)  # the world goes on
    second = continual(lambda: go(1), make_stream('classes', DIGITS, tasks=3, classes_per_task=3), 3, resume=tmp_path, **options)
    assert second.ended == 3 and same(through.trainer, second.trainer) and second.tasks == through.tasks
    third = go(2); third.callbacks.append(Continual(SPLIT, 3, **options))
    assert same(through.trainer, third.load(tmp_path).fit())

def test_an_interrupt_while_asking_leaves_a_resumable_run(tmp_path):
    class Fails(Callback):
        order = 89
        def __init__(self, at): self.at = at
        def after_forward(self, trainer):
            if not trainer.model.training and trainer.task == 2 and trainer.task_epoch == 2 and self.at: raise KeyboardInterrupt
    through = continual(trainer(eval_every=0, callbacks=[Fails(0), Checkpoint(tmp_path/'a')]), SPLIT, 2)
    with pytest.raises(KeyboardInterrupt): continual(trainer(eval_every=0, callbacks=[Fails(1), Checkpoint(tmp_path/'b')]), SPLIT, 2)
    resumed = continual(trainer(3, eval_every=0, callbacks=[Fails(0), Checkpoint(tmp_path/'b')]), SPLIT, 2, resume=tmp_path/'b')
    assert same(through.trainer, resumed.trainer)

def test_fitting_past_the_end_does_nothing():
    run = continual(trainer(), PERMUTED)
    before = [p.clone() for p in run.trainer.model.parameters()]
    run.trainer.fit(2)
    assert all(a.equal(b) for a, b in zip(before, run.trainer.model.parameters(), strict=True)) and run.ended == 3

def test_a_checkpoint_of_another_stream_is_refused(tmp_path):
    continual(trainer(), PERMUTED).trainer.save(tmp_path)
    with pytest.raises(ValueError, match='stream: the checkpoint has'): continual(trainer(), SPLIT, resume=tmp_path)
    with pytest.raises(ValueError, match='epochs_per_task: the checkpoint has 1'): continual(trainer(), PERMUTED, 2, resume=tmp_path)

@pytest.mark.parametrize('match,call', [
    ('evaluate: got', lambda: Continual(PERMUTED, evaluate='every')), ('reset: got', lambda: Continual(PERMUTED, reset='yes')),
    ('epochs_per_task: got 0', lambda: Continual(PERMUTED, epochs_per_task=0)), ('probe: got -1', lambda: Continual(PERMUTED, probe=-1)),
    ('has a Continual', lambda: continual(trainer(callbacks=[Continual(PERMUTED)]), PERMUTED)),
    ('takes a function', lambda: aged_and_fresh(trainer(), PERMUTED)), ('nothing to draw', lambda: plot_online({})),
    ('every: got 0', lambda: TrainabilityProbe(every=0))])
def test_errors(match, call):
    with pytest.raises((ValueError, TypeError), match=match): call()

# other tasks and models

def test_regression():
    stream = make_stream('bit_flips', tasks=3, period=60, test=20)
    net = lambda: MLP(20, 1, hidden_sizes=(5,))
    with seeded(0): run = continual(Trainer(net(), stream[0].data, 'sgd', .01, batch_size=4, device='cpu'), stream)
    assert run.key == 'loss' and set(run.summary()) == {'online_loss', 'average_loss'} and not run.matrix().isnan().any()
    assert plot_matrix(run).axes and plot_forgetting(run).axes and 'online loss' in repr(run)

def test_random_labels_are_asked_on_the_training_split():
    run = continual(trainer(net=model(dropout=0.)), make_stream('random_labels', DIGITS, tasks=2), 15)
    assert run.rows[0]['split'] == 'train' and run.matrix()[0, 0] > .3 > run.matrix()[1, 0]

def test_a_network_of_someone_else():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 12))  # two outputs too many are masked
    run = continual(trainer(net=net), SPLIT, reset=True)
    assert run.ended == 3

def test_aged_and_fresh_see_the_same_batches():
    batches = {}
    class Spy(Callback):
        def before_step(self, trainer): batches.setdefault(id(trainer), []).append((trainer.x.sum() + trainer.y.sum()).item())
    rows = aged_and_fresh(lambda: trainer(callbacks=[Spy()]), PERMUTED, 2)
    a, b = batches.values()
    assert a == b and len(rows.where(split='train')) == 6 and all(r['gap'] == r['aged'] - r['fresh'] for r in rows)
    assert [r['gap'] for r in rows.where(task=1)] == [0]*len(rows.where(task=1)) and any(r['gap'] for r in rows.where(task=2))

def test_the_probe_changes_nothing(tmp_path):
    probe = TrainabilityProbe(every=2, make_model=model, steps=5, lr=.01)
    a, b = continual(trainer(), PERMUTED), continual(trainer(), PERMUTED, callbacks=[probe])
    assert list(a.trainer.history) == list(b.trainer.history) and probe.rows.column('task') == [1, 3]
    assert all(x.equal(y) for x, y in zip(a.trainer.model.state_dict().values(), b.trainer.model.state_dict().values(), strict=True))
    fixed = TrainabilityProbe(DIGITS, make_model=model, steps=5)
    continual(trainer(), PERMUTED, callbacks=[fixed]); fixed.load_state_dict(fixed.state_dict())
    assert len(fixed.rows) == 3

def test_loss_of_plasticity_shows_and_the_control_does_not():
    "Fails when the online accuracy of Adam with large steps no longer falls, or that of the reset control does"
    data = get_data('digits')
    def go(seed):
        with seeded(seed): net = MLP(data.shape, 10, hidden_sizes=(64, 64))
        return Trainer(net, data, 'adam', .01, 16, device='cpu', seed=seed, eval_every=0)
    for seed in (11, 12):
        rows = aged_and_fresh(lambda s=seed: go(s), make_stream('permuted', data, tasks=25, seed=seed))
        aged, fresh = rows.column('aged'), rows.column('fresh')
        assert sum(aged[-5:])/5 < sum(aged[:5])/5 - .15 and abs(sum(fresh[-5:]) - sum(fresh[:5]))/5 < .04

def test_continual_training():
    run = continual_training(trainer, DIGITS, tasks=2, classes_per_task=3, epochs_per_task=2, reset=True, seed=4)
    assert run.stream.name == 'classes' and run.trainer.epoch == 4 and run.reinit_optimizer
    assert continual_training(trainer(), DIGITS, tasks=2, kind='rotated', options=dict(degrees=90)).names == ['0 degrees', '45 degrees']
    with pytest.raises(ValueError, match='4 x 3 = 12'): continual_training(trainer, DIGITS, tasks=4, classes_per_task=3)

# pictures

def test_plots():
    import matplotlib
    before = dict(matplotlib.rcParams)
    run = continual(trainer(), SPLIT)
    one, two = {'a': [.1, .2, .3], 'b': torch.rand(5, 3)}, {'p': {'a': torch.rand(5, 9)}, 'q': {'a': torch.rand(9)}}
    figures = (plot_matrix(run), plot_matrix(run, 'loss'), plot_matrix(torch.rand(30, 30)), plot_forgetting(run),
               plot_forgetting([[.5, None], [.2, .9]]), plot_online(one), plot_online(two, window=3))
    for fig in figures: fig.canvas.draw()
    assert dict(matplotlib.rcParams) == before and math.isclose(plot_online({'a': [1., 3.]}).axes[0].lines[0].get_ydata()[1], 3.)

@pytest.mark.parametrize('loss', [torch.nn.CrossEntropyLoss(label_smoothing=.1),
                                  lambda o, y: F.cross_entropy(o, y) + 1e-3*o.square().mean(),
                                  lambda o, y: -(F.log_softmax(o, -1)*F.one_hot(y, 10)).sum(1).mean()])
def test_a_loss_that_reads_masked_logits_is_refused(loss):
    "At the first batch, before a weight changes; without a mask, or with a mask of all classes, it is taken"
    data = get_data('digits').subset(100, 40)
    def trainer(): return Trainer(MLP(data.shape, 10, (8,)), data, loss=loss, eval_every=0, device='cpu')
    for callback in (Continual(make_stream('classes', data, tasks=5)), MaskClasses(range(5))):
        t = trainer()
        kept = [p.detach().clone() for p in t.model.parameters()]
        t.callbacks.append(callback)
        if isinstance(callback, MaskClasses): t.data = make_stream('classes', data, partition=[range(5), range(5, 10)])[0].data
        with pytest.raises(ValueError, match='loss: got (inf|nan) with all logits but those of the classes'): t.fit(1)
        assert all(torch.equal(p, q) for p, q in zip(t.model.parameters(), kept, strict=True))
    assert continual(trainer, make_stream('permuted', data, tasks=2)).ended == 2

def test_metrics_of_every_member_of_a_population():
    from plasticity.population import Population, PopulationTrainer
    def run(**k):
        p = Population(lambda: MLP(DIGITS.shape, 10, hidden_sizes=(6,)), 2)
        return continual(PopulationTrainer(p, DIGITS, 'sgd', lr=.1, batch_size=64, device='cpu'), PERMUTED, **k)
    r = run(probe=20)
    assert [*dict.fromkeys((v['task'], v['member']) for v in r.reports)] == [(t, i) for t in (1, 2, 3) for i in (0, 1)]
    with pytest.raises(ValueError, match='got a population'): run(callbacks=[TrainabilityProbe(epochs=1)])

def test_a_matrix_of_an_unknown_key_is_refused():
    r = continual(trainer(), PERMUTED)
    with pytest.raises(ValueError, match="key: got 'acuracy'; did you mean 'accuracy'"): r.matrix('acuracy')
    assert r.matrix('loss').isfinite().all() and r.matrix('accuracy').equal(r.matrix())
