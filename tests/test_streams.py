import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plasticity.data import Data, get_data
from plasticity.streams import (STREAMS, Stream, Task, class_partition, class_split, make_stream, register_stream, threshold_output,
                                threshold_units)

DIGITS = get_data('digits').subset(train=200, test=50)
VECTORS = get_data('synthetic_classification', n=200, features=6, classes=5)
REGRESSION = get_data('synthetic_regression', n=100)
LABELLED = ['random_labels', 'shuffled_labels', 'label_noise', 'label_permuted', 'classes', 'class_incremental']
seeds = st.integers(0, 2**31)

def tensors(task): return [getattr(task.data, k) for k in ('x_train', 'y_train', 'x_test', 'y_test', 'mean', 'std')]
def same(a, b): return all(u.equal(v) for u, v in zip(tensors(a), tensors(b), strict=True)) and (a.name, a.classes) == (b.name, b.classes)
def make(kind, **options):
    if kind == 'bit_flips': return make_stream(kind, period=50, **options)
    return make_stream(kind, DIGITS, **options)

@pytest.mark.parametrize('kind', STREAMS)
@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_a_task_depends_on_seed_and_index_alone(kind, seed):
    a, b = make(kind, tasks=3, seed=seed), make(kind, tasks=3, seed=seed)
    assert len(a) == 3 and all(same(a[i], b[i]) for i in (2, 0, 1)) and same(a[-1], a[2])
    assert [t.index for t in a] == [0, 1, 2]
    if kind in ('noise', 'rotated'): return  # spread over the number of tasks
    options = dict(classes_per_task=3) if 'class' in kind else {}
    assert same(make(kind, tasks=2, seed=seed, **options)[1], make(kind, tasks=3, seed=seed, **options)[1])
    assert not all(same(a[1], make(kind, tasks=3, seed=seed + i)[1]) for i in (1, 2, 3, 4))  # one in 120 draws the same three classes

@pytest.mark.parametrize('kind', STREAMS)
def test_a_stream_leaves_its_data_and_the_random_state_alone(kind):
    before, state = [t.clone() for t in tensors(Task(DIGITS, None, '', 0))], torch.get_rng_state()
    tasks = list(make(kind, tasks=3))
    for t in tasks:
        assert t.data.x_train.device == DIGITS.device and len(t.data.x_train) and next(t.data.batches(16))[0].dtype == torch.float32
        assert t.check() is t and t.data.num_classes == (1 if kind == 'bit_flips' else 10)
    assert all(a.equal(b) for a, b in zip(before, tensors(Task(DIGITS, None, '', 0)), strict=True)) and torch.get_rng_state().equal(state)

@settings(max_examples=20, deadline=None)
@given(seed=seeds, k=st.integers(2, 5))
def test_class_splits_are_disjoint_and_whole(seed, k):
    stream = make_stream('classes', DIGITS, tasks=10//k, classes_per_task=k, seed=seed)
    seen = [c for t in stream for c in t.classes]
    assert len(set(seen)) == len(seen) == 10//k*k and all(len(t.classes) == k for t in stream)
    for split in ('train', 'test'):
        assert all(set(t.data.split(split)[1].tolist()) == set(t.classes) for t in stream)
        assert sum(len(t.data.split(split)[0]) for t in stream) == torch.isin(DIGITS.split(split)[1], torch.tensor(seen)).sum()
    assert all(t.data.mean.equal(DIGITS.mean) for t in stream)

def test_partition_by_hand():
    stream = make_stream('classes', DIGITS, partition=[[7, 1], [0, 2, 3]])
    assert [t.classes for t in stream] == [(1, 7), (0, 2, 3)] and stream.outputs(0, 1) == (1, 7)

def test_class_incremental_outputs_and_data():
    new, all_ = (make_stream('class_incremental', DIGITS, partition=[[4], [0, 9], [2]], cumulative=c) for c in (False, True))
    assert [t.classes for t in new] == [(4,), (0, 9), (2,)] and [t.classes for t in all_] == [(4,), (0, 4, 9), (0, 2, 4, 9)]
    assert [new.outputs(i, n) for i, n in ((0, 0), (0, 2), (2, 0), (1, 1))] == [(4,), (0, 2, 4, 9), (0, 2, 4, 9), (0, 4, 9)]

@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_permuted_moves_pixels_of_all_channels_together(seed):
    x = torch.arange(3*12, dtype=torch.uint8).view(1, 3, 3, 4).repeat(4, 1, 1, 1)
    y = torch.tensor([0, 1, 0, 1])
    t = make_stream('permuted', Data('rgb', x, y, x, y), tasks=2, seed=seed)[1]
    p = t.data.x_train[0, 0].flatten().long()
    assert sorted(p.tolist()) == list(range(12)) and all(t.data.x_train[0, c].flatten().equal(x[0, c].flatten()[p]) for c in range(3))
    assert t.data.x_test.equal(t.data.x_train)

def test_permuted_features_keep_their_moments():
    t = make_stream('permuted', VECTORS, tasks=2, seed=1)[1]
    order = [(t.data.x_train[:, i] == VECTORS.x_train.T[:, :]).all(1).nonzero().item() for i in range(6)]
    assert sorted(order) == list(range(6)) and order != list(range(6))
    assert t.data.normalize(t.data.x_test).equal(VECTORS.normalize(VECTORS.x_test)[:, order])

def test_rotated_turns():
    stream = make_stream('rotated', DIGITS, tasks=4, degrees=360)
    quarter = stream[1].data.x_train.float()
    turns = [(quarter - DIGITS.x_train.rot90(k, (2, 3)).float()).abs().max() for k in (1, -1)]
    assert min(turns) <= 1 and stream[0].data.x_train.equal(DIGITS.x_train)
    mixed = make_stream('rotated', DIGITS, tasks=4, degrees=360, shuffle=True)
    assert sorted(t.name for t in mixed) == sorted(t.name for t in stream)

def test_noise_grows():
    for data in (DIGITS, VECTORS):
        stream = make_stream('noise', data, tasks=3, strength=.5)
        d = [(t.data.normalize(t.data.x_train) - data.normalize(data.x_train)).std().item() for t in stream]
        assert d[0] == 0 < d[1] < d[2] < .6

@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_labels(seed):
    y = DIGITS.y_train
    count = lambda v: torch.bincount(v, minlength=10).tolist()
    shuffled = make_stream('shuffled_labels', DIGITS, tasks=2, seed=seed)
    renamed = make_stream('label_permuted', DIGITS, tasks=2, seed=seed)[1].data
    assert count(shuffled[1].data.y_train) == count(y) and not shuffled[1].data.y_train.equal(y) and shuffled.split == 'train'
    names = {a: b for a, b in zip(y.tolist(), renamed.y_train.tolist(), strict=True)}
    assert sorted(names.values()) == list(range(10)) and [names[v] for v in DIGITS.y_test.tolist()] == renamed.y_test.tolist()
    assert (make_stream('random_labels', DIGITS, tasks=2, seed=seed)[1].data.y_train == y).float().mean() < .35

def test_label_noise_hits_its_share_and_spares_the_test_split():
    data = get_data('digits')
    hit = [(t.data.y_train != data.y_train).float().mean().item() for t in make_stream('label_noise', data, tasks=3, share=.5)]
    assert all(abs(h - .45) < .05 for h in hit)
    t = make_stream('label_noise', data, tasks=2, share=0.)[1]
    assert t.data.y_train.equal(data.y_train) and make_stream('label_noise', data, tasks=2)[1].data.y_test.equal(data.y_test)

def test_threshold_units_by_hand():
    net = threshold_units(4, 3, .7, seed=3)
    x = torch.tensor([[0., 1., 1., 0.], [1., 1., 1., 1.]])
    for row, got in zip(x, threshold_output(net, x), strict=True):
        out = net['out'].item()
        for w, b, v in zip(net['w'], net['b'], net['v'], strict=True):
            s = (4 - sum(w.tolist()) + b.item())/2
            out += v.item()*(sum(a*c for a, c in zip(w.tolist(), row.tolist(), strict=True)) + b.item() > .7*5 - s)
        assert got.item() == pytest.approx(out)
    assert set(net['w'].flatten().tolist()) <= {-1., 1.}

@pytest.mark.parametrize('flip', ['all', 'one'])
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_bit_flips(flip, seed):
    stream = make_stream('bit_flips', tasks=6, seed=seed, period=200, test=20, flip=flip)
    slow = torch.stack([t.data.x_train[0, :15] for t in stream])
    assert all((t.data.split(s)[0][:, :15] == b).all() for t, b in zip(stream, slow, strict=True) for s in ('train', 'test'))
    if flip == 'one': assert (slow[1:] != slow[:-1]).sum(1).tolist() == [1]*5
    x = stream[0].data.x_train
    assert .4 < x[:, 15:].mean() < .6 and next(stream[0].data.batches(200, shuffle=False))[0].equal(x)

def test_made_tasks_are_kept_as_far_as_there_is_room():
    made = []
    def make(i): made.append(i); return Task(DIGITS, None, str(i), i)
    size = sum(t.nbytes for k in ('train', 'test') for t in DIGITS.split(k))
    stream = Stream('mine', make, 3, keep=2*size)
    for _ in range(2): list(stream)
    assert made == [0, 1, 2, 2] and stream[-3] is stream[0]

def test_registry():
    @register_stream('twice')
    def twice(data, tasks=2, seed=0): return Stream('twice', lambda i: Task(data, tuple(range(10)), str(i), i), tasks)
    try: assert len(make_stream('twice', DIGITS, tasks=4)) == 4 and make_stream('twice', DIGITS).spec['kind'] == 'twice'
    finally: del STREAMS['twice']
    assert make_stream(data=DIGITS).name == 'permuted' and make_stream(data=DIGITS, classes_per_task=2).name == 'classes'

ERRORS = [
    (ValueError, '6 x 2 = 12, but digits has 10', lambda: make_stream('classes', DIGITS, 6, 2)),
    (ValueError, '1 x 11 = 11', lambda: class_partition(DIGITS, tasks=1, classes_per_task=11)),
    (ValueError, 'tasks x classes_per_task', lambda: make_stream('classes', DIGITS, tasks=11)),
    (ValueError, 'classes_per_task: got 0', lambda: make_stream('classes', DIGITS, classes_per_task=0)),
    (ValueError, '1 x 11 = 11', lambda: make_stream('classes', DIGITS, classes_per_task=11)),
    (ValueError, 'tasks: got 0', lambda: make_stream('permuted', DIGITS, tasks=0)),
    (ValueError, 'tasks: got 1.5', lambda: make_stream('rotated', DIGITS, tasks=1.5)),
    (ValueError, r'overlaps, the classes \[1\]', lambda: make_stream('classes', DIGITS, partition=[[0, 1], [1, 2]])),
    (ValueError, 'overlaps', lambda: make_stream('classes', DIGITS, partition=[[3, 3], [1, 2]])),
    (ValueError, r'got \[10\], takes class numbers from 0 to 9', lambda: make_stream('classes', DIGITS, partition=[[0, 10]])),
    (ValueError, 'takes class numbers', lambda: make_stream('classes', DIGITS, partition=[[0, -1]])),
    (ValueError, 'without classes', lambda: make_stream('classes', DIGITS, partition=[[0, 1], []])),
    (ValueError, 'one class', lambda: make_stream('classes', DIGITS, partition=[[0, 1], [2]])),
    (ValueError, 'takes one or the other', lambda: make_stream('classes', DIGITS, tasks=2, partition=[[0, 1], [2, 3]])),
    (ValueError, r'no test samples of the classes \[3\]', lambda: make_stream('classes', DIGITS.subset(test=DIGITS.y_test != 3), tasks=5)),
    (ValueError, 'rotated needs images', lambda: make_stream('rotated', VECTORS)),
    (ValueError, 'noise needs a data set', lambda: make_stream('noise')),
    (ValueError, 'bit_flips makes its own', lambda: make_stream('bit_flips', DIGITS)),
    (ValueError, 'slow: got 21', lambda: make_stream('bit_flips', slow=21)),
    (ValueError, 'flip: got', lambda: make_stream('bit_flips', flip='two')),
    (ValueError, 'period: got 0', lambda: make_stream('bit_flips', period=0)),
    (ValueError, 'share: got 1.5', lambda: make_stream('label_noise', DIGITS, share=1.5)),
    (ValueError, "share: got 'a', takes a number", lambda: make_stream('label_noise', DIGITS, share='a')),
    (ValueError, "did you mean 'permuted'", lambda: make_stream('permutd', DIGITS)),
    (TypeError, "takes no degree=; did you mean 'degrees'", lambda: make_stream('rotated', DIGITS, degree=3)),
    (TypeError, 'permuted: takes no classes_per_task', lambda: make_stream('permuted', DIGITS, classes_per_task=2)),
    (ValueError, r'labels \[0, .* lie outside its classes \[1, 2\]', lambda: Stream('mine', [Task(DIGITS, (1, 2), 'odd', 0)])[0]),
    (ValueError, r"'b': has \(shape, outputs\)", lambda: list(Stream('mine', [Task(DIGITS, None, 'a', 0), Task(VECTORS, None, 'b', 1)]))),
    (ValueError, 'got no tasks', lambda: Stream('mine', [])),
    (ValueError, 'split: got', lambda: Stream('mine', [Task(DIGITS, None, 'a', 0)], split='valid')),
    (IndexError, 'the stream has 10 tasks', lambda: make_stream('permuted', DIGITS)[10]),
]

@pytest.mark.parametrize('error,match,call', ERRORS, ids=[m for _, m, _ in ERRORS])
def test_errors(error, match, call):
    with pytest.raises(error, match=match): call()

@pytest.mark.parametrize('kind', LABELLED)
def test_label_streams_refuse_regression(kind):
    with pytest.raises(ValueError, match='needs class labels'): make_stream(kind, REGRESSION)

def test_input_streams_take_regression():
    assert make_stream('permuted', REGRESSION)[1].classes is None
    assert make_stream('noise', REGRESSION)[1].data.y_train.equal(REGRESSION.y_train)

def test_a_partition_may_be_an_array():
    import numpy as np
    data = get_data('digits')
    for parts in (np.array([[3, 1], [4, 2]]), torch.tensor([[3, 1], [4, 2]])):
        task = class_split(data, partition=parts)[0]
        assert task.classes == (1, 3) and task.name == 'classes 1 3' and 'int64' not in repr(task.classes)
    assert make_stream('classes', data, partition=np.array([[3, 1], [4, 2]])).spec['partition'] == [[3, 1], [4, 2]]
    with pytest.raises(ValueError, match='takes class numbers from 0 to 9'): class_split(data, partition=[[.5, 1.], [2., 3.]])

@pytest.mark.parametrize('i', [np.int64(1), torch.tensor(1)])
def test_whole_numbers_of_other_kinds_index_a_stream(i):
    s = make_stream('permuted', DIGITS, tasks=3, seed=1)
    assert same(s[i], make_stream('permuted', DIGITS, tasks=3, seed=1)[1]) and s[i] is s[1] and type(s[i].index) is int
    with pytest.raises(TypeError): s[1.]
