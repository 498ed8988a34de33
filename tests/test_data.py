"Data, files and augmentation: the cases at the edges"
import functools, gzip, hashlib, http.server, io, json, pickle, shutil, subprocess, sys, threading, zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import plasticity.data as D
import plasticity.files as Fi
from plasticity.augment import AUGMENTATIONS, crop, flip, jitter, rotation
from plasticity.data import DATASETS, Data, DataMissing, data_root, get_data, get_labels, main, pick, register_data
from plasticity.results import generator

torch.set_num_threads(1)
slow = settings(max_examples=40, deadline=None)


def images(n=40, c=3, h=8, w=8, classes=4, seed=0, **kw):
    g = generator(seed, 'test')
    x, y = torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=g), torch.arange(n) % classes
    return Data('noise', x, y, x[:8], y[:8], **kw)


def write_npz(path, **changes):
    r = np.random.default_rng(0)
    d = dict(x_train=r.integers(0, 256, (12, 6, 6, 3), dtype=np.uint8), y_train=np.arange(12) % 3,
             x_test=r.integers(0, 256, (6, 6, 6, 3), dtype=np.uint8), y_test=np.arange(6) % 3) | changes
    np.savez(path, **{k: v for k, v in d.items() if v is not None})
    return d


@pytest.fixture
def served(tmp_path_factory):
    "A folder and the address under which it is served"
    folder = tmp_path_factory.mktemp('served')
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown(); server.server_close()


# ---- data root

def test_data_root_order(monkeypatch, tmp_path):
    monkeypatch.setenv('PLASTICITY_DATA', str(tmp_path/'env'))
    assert data_root(tmp_path/'arg') == tmp_path/'arg'
    assert data_root() == tmp_path/'env'
    monkeypatch.setenv('PLASTICITY_DATA', '')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    assert data_root() == tmp_path/'xdg'/'plasticity'
    monkeypatch.delenv('XDG_CACHE_HOME'); monkeypatch.setenv('HOME', str(tmp_path))
    assert tmp_path in data_root().parents and data_root().name == 'plasticity'


def test_import_is_light():
    heavy = ['torchvision', 'sklearn', 'scipy', 'matplotlib', 'tqdm', 'PIL', 'pandas', 'fastcore', 'IPython']
    # what torch itself imports is not ours
    code = ('import sys, torch, safetensors.torch; a = set(sys.modules); import plasticity.data; '
            f'print([m for m in {heavy} if m in set(sys.modules) - a])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


# ---- inputs, targets, Data

@pytest.mark.parametrize('shape, want', [((5, 8, 9), (5, 1, 8, 9)), ((5, 8, 9, 3), (5, 3, 8, 9)), ((5, 3, 8, 9), (5, 3, 8, 9)),
                                         ((5, 8, 9, 1), (5, 1, 8, 9)), ((5, 1, 28, 28), (5, 1, 28, 28)), ((5, 2, 8, 8), (5, 2, 8, 8))])
def test_image_layouts(shape, want):
    a = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    x = Fi.as_inputs(a)
    assert tuple(x.shape) == want and x.is_contiguous()
    assert x.double().sum() == a.astype(float).sum()
    if shape[-1] == 3: assert (x[0, :, 1, 2].numpy() == a[0, 1, 2]).all()


def test_image_layouts_that_could_be_either():
    a = np.arange(2*4*4*3, dtype=np.uint8).reshape(2, 4, 4, 3)
    assert Fi.as_inputs(a).shape == (2, 3, 4, 4) and (Fi.as_inputs(a)[1, :, 2, 3].numpy() == a[1, 2, 3]).all()
    for shape in ((2, 3, 4, 4), (2, 3, 3, 4), (2, 1, 4, 3), (2, 4, 4, 3)): # a tensor stays as it is
        assert Fi.as_inputs(torch.zeros(shape, dtype=torch.uint8)).shape == shape


@pytest.mark.parametrize('x', [np.zeros((4, 3, 8, 8), np.float32), np.zeros((4, 8, 8), np.int64), np.zeros(4), np.array(['a', 'b']),
                               np.zeros((0, 3)), np.array([[np.nan]]), np.array([[1j]]), np.array([None])])
def test_bad_inputs(x):
    with pytest.raises(ValueError, match='x_train'): Data('d', x, np.arange(len(x)), x, np.arange(len(x)))


@pytest.mark.parametrize('y', [np.arange(3), np.array([0, 1, -1, 0]), np.zeros((4, 2), int), np.array([0, 1, np.nan, 2]),
                               np.array(list('abcd'))])
def test_bad_targets(y):
    x = np.zeros((4, 2))
    with pytest.raises(ValueError, match='y_train'): Data('d', x, y, x, np.arange(4))


def test_parts_must_agree():
    x, y = np.zeros((4, 2)), np.arange(4)
    with pytest.raises(ValueError, match='x_test'): Data('d', x, y, np.zeros((4, 3)), y)
    with pytest.raises(ValueError, match='y_test'): Data('d', x, y, x, y.astype(float))
    with pytest.raises(ValueError, match='classes'): Data('d', x, y, x, y, classes='abc')
    assert Data('d', x, y, x, y, classes='abcde').num_classes == 5


@pytest.mark.parametrize('dtype', [np.uint8, np.int16, np.int64, '>i4', bool])
def test_label_types(dtype):
    x, y = np.random.default_rng(0).normal(size=(4, 2)), np.array([0, 1, 1, 0])
    d = Data('d', x, y.astype(dtype)[:, None], x, y.astype(dtype))
    assert d.y_train.dtype == torch.int64 and d.y_train.tolist() == y.tolist() and d.task == 'classification' and d.num_classes == 2
    assert d.x_train.dtype == torch.float32


def test_regression_width():
    x = np.random.default_rng(0).normal(size=(9, 2))
    assert Data('d', x, x[:, 0], x, x[:, 0]).num_classes == 1
    d = Data('d', x, np.c_[x, x], x, np.c_[x, x])
    assert d.num_classes == 4 and d.task == 'regression' and d.y_train.shape == (9, 4)
    with pytest.raises(ValueError, match='augment'): d.batches(2, augment='flip')
    assert next(d.batches(2, augment=True))[0].shape == (2, 2)


def test_readonly_array_is_not_shared():
    a = np.zeros((4, 2)); a.setflags(write=False)
    Data('d', a, np.arange(4), a, np.arange(4)).x_train.add_(1)
    assert (a == 0).all()


def test_normalize_against_numpy():
    d = images(c=3)
    x = d.x_train.double().numpy()/255
    want = (x - x.mean((0, 2, 3), keepdims=True))/x.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(d.normalize(d.x_train), want, atol=2e-5)
    assert d.normalize(d.x_train.float()).sub(d.normalize(d.x_train)).abs().max() == 0
    x = torch.randn(30, 4)*3 + 1; x[:, 2] = 7
    f = Data('f', x, torch.arange(30) % 2, x, torch.arange(30) % 2)
    z, before = f.normalize(f.x_train), f.x_train.clone()
    np.testing.assert_allclose(z.std(0, correction=0), [1, 1, 0, 1], atol=1e-5)
    assert torch.equal(f.x_train, before) and z.mean(0).abs().max() < 1e-5


def test_given_moments_are_kept():
    x = np.zeros((4, 2))
    d = Data('d', x, np.arange(4), x, np.arange(4), mean=[1, 2], std=[2, 2])
    assert d.normalize(d.x_train)[0].tolist() == [-.5, -1]


def test_to_and_repr():
    d = images()
    e = d.to('cpu')
    assert e is not d and e.x_train.data_ptr() == d.x_train.data_ptr()
    assert repr(d).count('\n') < 3 and all(w in repr(d) for w in ('noise', '3x8x8', '40', '4 classes', 'cpu'))
    assert d.shape == (3, 8, 8) and str(d.device) == 'cpu'
    with pytest.raises(ValueError, match='device'): d.to('tpu9')


# ---- batches

@slow
@given(n=st.integers(1, 60), b=st.integers(1, 70), seed=st.integers(0, 2**31), epoch=st.integers(0, 99), drop=st.booleans(), data=st.data())
def test_batches_cover_and_continue(n, b, seed, epoch, drop, data):
    x = torch.arange(n).float()[:, None]
    d = Data('d', x, x, x, x)
    total = d.n_batches(b, drop_last=drop)
    whole = list(d.batches(b, seed=seed, epoch=epoch, drop_last=drop))
    assert len(whole) == total == (n//b if drop else -(-n//b))
    seen = [int(v) for _, y in whole for v in y[:, 0]]
    assert len(set(seen)) == len(seen) and len(seen) == (n//b*b if drop else n)
    start = data.draw(st.integers(0, total))
    rest = list(d.batches(b, seed=seed, epoch=epoch, drop_last=drop, start=start))
    assert len(rest) == total - start
    for (xa, ya), (xb, yb) in zip(whole[start:], rest, strict=True): assert torch.equal(xa, xb) and torch.equal(ya, yb)


@pytest.mark.parametrize('augment', [True, ('crop', 'flip', 'rotation', 'jitter'), 'rotation'])
def test_augmented_batches_continue(augment):
    d = images(augment=('crop', 'flip'))
    whole = list(d.batches(7, seed=3, epoch=1, augment=augment))
    for k in (1, 4): assert torch.equal(next(d.batches(7, seed=3, epoch=1, start=k, augment=augment))[0], whole[k][0])
    plain, other = next(d.batches(7, seed=3, epoch=1)), next(d.batches(7, seed=3, epoch=2, augment=augment))
    assert torch.equal(plain[1], whole[0][1]) and not torch.equal(plain[0], whole[0][0])
    assert not torch.equal(other[0], whole[0][0])


def test_batches_leave_the_global_random_state():
    d = images()
    before = torch.get_rng_state()
    list(d.batches(8, augment=('crop', 'flip', 'rotation', 'jitter'))); d.probe(8)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1); a = next(d.batches(8))[1]
    torch.manual_seed(2); assert torch.equal(a, next(d.batches(8))[1])


def test_unshuffled_is_in_order():
    d = images()
    assert torch.equal(torch.cat([y for _, y in d.batches(7, shuffle=False)]), d.y_train)
    assert torch.equal(torch.cat([x for x, _ in d.batches(3, 'test', shuffle=False)]), d.normalize(d.x_test))


@pytest.mark.parametrize('kw, word', [
    (dict(batch_size=0), 'batch_size'), (dict(batch_size=2.5), 'batch_size'), (dict(batch_size=True), 'batch_size'),
    (dict(split='valid'), 'split'), (dict(start=-1), 'start'), (dict(start=99), 'start'), (dict(epoch=-1), 'epoch'),
    (dict(augment='rotate'), "did you mean 'rotation'"), (dict(augment=('flip', 'x')), 'augment')])
def test_batches_refuse_at_the_call(kw, word):
    with pytest.raises(ValueError, match=word): images().batches(**dict(batch_size=8) | kw)


def test_data_unchanged_by_a_training_epoch():
    d = images(augment=('crop', 'flip', 'rotation', 'jitter'))
    before = d.x_train.clone()
    for x, _ in d.batches(8, augment=True): x.zero_()
    for x, _ in d.batches(8, shuffle=False): x.zero_()
    assert torch.equal(before, d.x_train)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_cuda_same_order_and_no_sync():
    cpu = images(n=200, augment=('crop', 'flip', 'rotation', 'jitter'))
    gpu = cpu.to('cuda')
    for (a, ya), (b, yb) in zip(cpu.batches(32, augment=True), gpu.batches(32, augment=True), strict=True):
        assert torch.equal(ya, yb.cpu()) and torch.allclose(a, b.cpu(), atol=1e-3)
    it = gpu.batches(32, augment=True); next(it)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in it: pass
    finally: torch.cuda.set_sync_debug_mode('default')


# ---- augmentation

@slow
@given(b=st.integers(1, 5), c=st.integers(1, 4), h=st.integers(1, 20), w=st.integers(1, 20), seed=st.integers(0, 999))
def test_crop_and_flip_by_hand(b, c, h, w, seed):
    g = generator(seed, 'crop')
    x, u = torch.randint(0, 256, (b, c, h, w), dtype=torch.uint8, generator=g), torch.rand(b, 3, generator=g)
    u[0] = 1 - 2**-24 # the largest number that rand gives
    p, q = max(h//8, 1), max(w//8, 1)
    got, mirrored = crop(x, u), flip(x, u)
    assert got.dtype == torch.uint8
    for i in range(b):
        pad = np.pad(x[i].numpy(), ((0, 0), (p, p), (q, q)))
        t, l = min(int(u[i, 0]*(2*p + 1)), 2*p), min(int(u[i, 1]*(2*q + 1)), 2*q)
        assert (got[i].numpy() == pad[:, t:t + h, l:l + w]).all()
        assert (mirrored[i].numpy() == (x[i].numpy()[:, :, ::-1] if u[i, 0] < .5 else x[i].numpy())).all()


def test_crop_reaches_every_offset():
    x = torch.zeros(2000, 1, 16, 16, dtype=torch.uint8); x[:, :, 8, 8] = 255
    at = crop(x, torch.rand(2000, 3, generator=generator(0))).flatten(1).argmax(1)
    assert set((at//16).tolist()) == set((at % 16).tolist()) == set(range(6, 11))


def test_rotation_against_torchvision_and_angles():
    from torchvision.transforms.functional import InterpolationMode, rotate
    x = images(n=4, h=20, w=12).x_train.float()
    for share in (0., .3, .5, .9):
        u = torch.full((4, 3), share)
        want = rotate(x, (2*share - 1)*10, InterpolationMode.BILINEAR)
        assert torch.allclose(rotation(x, u), want, atol=.05) # torchvision rounds its grid differently
    assert torch.allclose(rotation(x, torch.full((4, 3), .5)), x, atol=1e-2)
    assert torch.allclose(rotation(x, torch.ones(4, 3), degrees=180.), x.flip(2, 3), atol=1e-2)


def test_jitter_range_and_parts():
    x = images(n=6).x_train
    for c in (1, 2, 3):
        y = jitter(x[:, :c], torch.rand(6, 3, generator=generator(1)))
        assert y.shape == x[:, :c].shape and y.min() >= 0 and y.max() <= 255
    mid = torch.full((6, 3), .5)
    grey = torch.full((6, 3, 4, 4), 100, dtype=torch.uint8)
    assert torch.allclose(jitter(grey, torch.tensor([[1., .5, .5]]).expand(6, 3)), torch.tensor(120.))
    assert torch.allclose(jitter(grey, torch.tensor([[.5, 0., 1.]]).expand(6, 3)), torch.tensor(100.), atol=1e-3)
    assert torch.allclose(jitter(x, mid), x.float(), atol=1e-3)


def test_augmentations_treat_samples_apart():
    x, u = images(n=10).x_train, torch.rand(10, 3, generator=generator(2))
    for f in AUGMENTATIONS.values():
        assert torch.allclose(f(x, u)[3:7].float(), f(x[3:7], u[3:7]).float(), atol=1e-3)


# ---- pick, probe, subset

@slow
@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(sum), seed=st.integers(0, 99), data=st.data())
def test_pick_is_as_balanced_as_can_be(counts, seed, data):
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[torch.randperm(sum(counts), generator=generator(seed))]
    n = data.draw(st.integers(1, len(y)))
    i = pick(y, n, seed)
    assert len(i) == n == len(set(i.tolist())) and torch.equal(i, pick(y, len(y), seed)[:n])
    got = torch.bincount(y[i], minlength=len(counts)).tolist()
    open_ = [g for g, c in zip(got, counts, strict=True) if g < c] # a class that still had some to give has at most one less than any
    assert not open_ or max(got) - min(open_) <= 1
    share = torch.bincount(y[pick(y, n, seed, proportional=True)], minlength=len(counts)).tolist()
    assert all(abs(s - c*n/len(y)) <= 1.5 for s, c in zip(share, counts, strict=True))


def test_probe_is_fixed_balanced_plain():
    d = images(n=103, classes=5, augment=('crop', 'flip'))
    x, y = d.probe(33)
    x2, y2 = d.probe(33)
    assert torch.equal(x, x2) and torch.equal(y, y2)
    counts = torch.bincount(y); assert counts.max() - counts.min() <= 1
    stored = {t.numpy().tobytes() for t in d.normalize(d.x_train)}
    assert all(t.numpy().tobytes() in stored for t in x)
    assert len(d.probe()[0]) == 103 and len(d.probe(4, 'test')[0]) == 4
    assert not torch.equal(d.probe(33, seed=1)[0], x)
    with pytest.raises(ValueError, match='n: got 0'): d.probe(0)
    r = get_data('synthetic_regression')
    assert torch.equal(r.probe(9)[0], r.probe(9)[0]) and r.probe(9)[1].shape == (9, 1)


def test_subset():
    d = images(n=100, classes=4)
    s = d.subset(train=40, test=.5)
    assert torch.bincount(s.y_train).tolist() == [10]*4 and len(s.x_test) == 4 and len(d.x_train) == 100
    assert torch.equal(s.mean, d.mean) and s.num_classes == 4
    assert torch.equal(d.subset(train=[5, 3]).x_train, d.x_train[[5, 3]])
    assert torch.equal(d.subset(train=d.y_train == 2).y_train, torch.full((25,), 2))
    assert d.subset(train=d.y_train == 0).num_classes == 4
    for bad in (0, 101, 1.5, 0., [], [100], [-1], [.5], 'a', torch.zeros(100, dtype=torch.bool), torch.ones(99, dtype=torch.bool)):
        with pytest.raises(ValueError, match='train'): d.subset(train=bad)


# ---- registry

def test_digits():
    d, e = get_data('digits'), get_data('digits', seed=1)
    assert (len(d.x_train), len(d.x_test), d.shape, d.num_classes, d.classes) == (1437, 360, (1, 8, 8), 10, tuple('0123456789'))
    assert d.x_train.max() == 255 and d.x_train.dtype == torch.uint8
    a, b = torch.bincount(d.y_train), torch.bincount(d.y_test)
    assert ((b - (a + b)*360/1797).abs() <= 1).all()
    assert not torch.equal(d.x_test, e.x_test) and torch.equal(d.x_test, get_data('digits').x_test)
    both = {t.numpy().tobytes() for t in torch.cat([d.x_train, d.x_test])}
    assert both == {t.numpy().tobytes() for t in torch.cat([e.x_train, e.x_test])}


@pytest.mark.parametrize('name', ['synthetic_regression', 'synthetic_classification', 'spirals'])
def test_synthetic(name):
    d = get_data(name, n=101, features=4, noise=.2, seed=3)
    assert len(d.x_train) == 81 and len(d.x_test) == 20 and d.shape == (4,)
    assert torch.equal(d.x_train, get_data(name, n=101, features=4, noise=.2, seed=3).x_train)
    assert not torch.equal(d.x_train, get_data(name, n=101, features=4, noise=.2, seed=4).x_train)
    with pytest.raises(TypeError, match="did you mean 'noise'"): get_data(name, nose=1)
    with pytest.raises(ValueError, match='n: got 2'): get_data(name, n=2)


def test_synthetic_difficulty_follows_noise():
    def nearest(d): return (d.y_train[torch.cdist(d.x_test, d.x_train).argmin(1)] == d.y_test).float().mean()
    for name in ('synthetic_classification', 'spirals'):
        assert nearest(get_data(name, noise=.01)) > .97 > .8 > nearest(get_data(name, noise=10.))
    assert get_data('spirals', classes=5, n=500).num_classes == 5
    with pytest.raises(ValueError, match='features'): get_data('spirals', features=1)


def test_unknown_names_and_options(tmp_path):
    with pytest.raises(ValueError, match=r"'mnst'; did you mean 'mnist'.*cifar10.*nor is there .*mnst.npz"): get_data('mnst', tmp_path)
    with pytest.raises(ValueError, match='there are: .*digits'): get_data('qqqqqq', tmp_path)
    with pytest.raises(TypeError, match='it takes none|no option'): get_data('mnist', tmp_path, size=3)
    for name in ('npz', 'image_folder'):
        for ask in (get_data, get_labels):
            with pytest.raises(TypeError, match=f'{name}: needs the option path='): ask(name, root=tmp_path)
    with pytest.raises(ValueError, match='device'): get_data('digits', device='gpu')
    with pytest.raises(ValueError, match='split'): get_labels('digits', 'valid')


def test_register(tmp_path):
    x, y = np.eye(4), np.arange(4)
    try:
        register_data('a_tuple')(lambda n=4: (x[:n], y[:n], x, y))
        register_data('a_dict', classes='wxyz')(lambda root: dict(x_train=x, y_train=y, x_test=x, y_test=y))
        @register_data('a_data')
        def f(): return Data('named', x, y, x, y)
        register_data('bad')(lambda: (x, y))
        register_data('worse')(lambda: (x, y, x[:, :2], y))
        assert len(get_data('a_tuple', tmp_path, n=2).x_train) == 2
        assert get_data('a_dict', tmp_path).classes == tuple('wxyz')
        assert get_data('a_data', tmp_path).name == 'named' and f().name == 'named'
        with pytest.raises(TypeError, match='bad: its function gave tuple'): get_data('bad', tmp_path)
        with pytest.raises(ValueError, match='worse: x_test'): get_data('worse', tmp_path)
        assert 'a_tuple' in repr(D.data_table(tmp_path))
    finally:
        for k in ('a_tuple', 'a_dict', 'a_data', 'bad', 'worse'): DATASETS.pop(k, None)


# ---- npz and the cache

def test_npz_first_for_any_name(tmp_path):
    d = write_npz(tmp_path/'digits.npz', classes=np.array(['x', 'y', 'z']))
    write_npz(tmp_path/'own.npz')
    got = get_data('digits', tmp_path)
    assert got.shape == (3, 6, 6) and got.classes == ('x', 'y', 'z') and (got.x_train.permute(0, 2, 3, 1).numpy() == d['x_train']).all()
    assert get_data('own', tmp_path).name == 'own' and get_data('own', tmp_path).classes is None
    assert get_data('npz', tmp_path, path=tmp_path/'own.npz').shape == (3, 6, 6)
    with pytest.raises(TypeError, match='seed'): get_data('digits', tmp_path, seed=1)
    with pytest.raises(DataMissing, match='no file'): get_data('npz', tmp_path, path=tmp_path/'none.npz')
    write_npz(tmp_path/'cifar10.npz')
    assert get_data('cifar10', tmp_path).classes[3] == 'cat' and get_data('cifar10', tmp_path).augment == ('crop', 'flip')


class Bomb:
    def __reduce__(self): return (open, ('/nonexistent/unpickled', 'w'))


@pytest.mark.parametrize('changes, words', [
    (dict(x_test=None), ['x_test', 'x_train, y_train, y_test']), (dict(y_train=np.arange(5)), ['y_train', '5', '12']),
    (dict(x_train=np.zeros((12, 6, 6, 3))), ['x_train', 'float64']), (dict(y_train=np.array([Bomb()]*12, dtype=object)), ['y_train']),
    (dict(y_test=np.array(['a']*6)), ['y_test', '<U1']), (dict(x_test=np.zeros((6, 5, 5, 3), np.uint8)), ['x_test']),
    (dict(y_train=-np.arange(12)), ['y_train', '-11'])])
def test_npz_errors_name_file_and_key(tmp_path, changes, words):
    write_npz(tmp_path/'bad.npz', **changes)
    with pytest.raises(ValueError) as e: get_data('bad', tmp_path)
    assert all(w in str(e.value) for w in [str(tmp_path/'bad.npz'), *words]) and '\n' not in str(e.value)
    assert not (tmp_path/'cache').exists()


def test_npz_that_is_none(tmp_path):
    (tmp_path/'text.npz').write_text('hello')
    with open(tmp_path/'single.npz', 'wb') as f: np.save(f, np.zeros(3))
    (tmp_path/'pickle.npz').write_bytes(pickle.dumps(Bomb()))
    (tmp_path/'cut.npz').write_bytes((write_npz(tmp_path/'ok.npz'), (tmp_path/'ok.npz').read_bytes()[:500])[1])
    for name in ('text', 'single', 'pickle', 'cut'):
        with pytest.raises(ValueError, match=f'{name}.npz'): get_data(name, tmp_path)


def test_cache_follows_the_source(tmp_path):
    write_npz(tmp_path/'own.npz')
    a = get_data('own', tmp_path)
    file, = (tmp_path/'cache').iterdir()
    stamp = file.stat().st_mtime_ns
    b = get_data('own', tmp_path)
    assert torch.equal(a.x_train, b.x_train) and torch.equal(a.mean, b.mean) and file.stat().st_mtime_ns == stamp
    write_npz(tmp_path/'own.npz', y_train=np.arange(12)[::-1] % 3)
    assert get_data('own', tmp_path).y_train[0] == 2
    assert len(list((tmp_path/'cache').iterdir())) == 1 and not file.exists()


def test_cache_is_read_and_its_map_is_private(tmp_path, monkeypatch):
    write_npz(tmp_path/'own.npz')
    want = get_data('own', tmp_path).x_train.clone()
    monkeypatch.setattr(Fi, '_npz', lambda path: pytest.fail('decoded again'))
    d = get_data('own', tmp_path); d.x_train.zero_(); d.mean.zero_()
    assert torch.equal(get_data('own', tmp_path).x_train, want)


def test_damaged_cache_is_made_again(tmp_path):
    write_npz(tmp_path/'own.npz'); want = get_data('own', tmp_path).x_train.clone()
    file, = (tmp_path/'cache').iterdir()
    for junk in (b'', b'x'*50, file.read_bytes()[:300]):
        file.unlink(); file.write_bytes(junk)
        assert torch.equal(get_data('own', tmp_path).x_train, want)


def test_root_that_cannot_be_written(tmp_path):
    write_npz(tmp_path/'own.npz')
    (tmp_path/'cache').write_text('in the way')
    with pytest.warns(UserWarning, match='decoded again'): d = get_data('own', tmp_path)
    assert d.shape == (3, 6, 6)


def test_labels_of_npz_do_not_touch_images(tmp_path):
    write_npz(tmp_path/'own.npz', x_train=np.zeros((12, 6, 6, 3))) # images of a wrong type
    assert get_labels('own', 'train', tmp_path).tolist() == [0, 1, 2]*4
    assert get_labels('digits', 'test').shape == (360,)


# ---- image folders

def folder(root, train=(('a', 3), ('b', 2)), test=(('a', 1), ('b', 1)), second='test', size=(7, 5), mode='RGB'):
    from PIL import Image
    r = np.random.default_rng(0)
    for split, classes in (('train', train), (second, test)):
        for c, n in classes:
            (root/split/c).mkdir(parents=True)
            for i in range(n):
                a = r.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(a).convert(mode).save(root/split/c/f'{i}.png')
    return root


@pytest.mark.parametrize('second', ['test', 'val'])
def test_image_folder(tmp_path, second):
    from PIL import Image
    f = folder(tmp_path/'f', second=second)
    d = get_data('image_folder', tmp_path, path=f)
    assert d.shape == (3, 5, 7) and d.classes == ('a', 'b') and d.y_train.tolist() == [0, 0, 0, 1, 1] and d.y_test.tolist() == [0, 1]
    assert (d.x_train[4].permute(1, 2, 0).numpy() == np.asarray(Image.open(f/'train/b/1.png'))).all()
    assert get_data('image_folder', tmp_path, path=f, size=4).shape == (3, 4, 4)
    assert get_data('image_folder', tmp_path, path=f, size=(4, 6)).shape == (3, 4, 6)
    Image.new('RGB', (7, 5), (9, 9, 9)).save(f/'train/b/1.png')
    assert (get_data('image_folder', tmp_path, path=f).x_train[4] == 9).all()
    Image.new('RGB', (7, 5)).save(f/'train/b/2.png')
    assert len(get_data('image_folder', tmp_path, path=f).x_train) == 6


@pytest.mark.parametrize('kind', ['npz', 'image_folder'])
def test_files_of_ones_own_on_the_command_line(tmp_path, kind):
    from plasticity.experiments import ConfigError, run_line
    path = tmp_path/('own.npz' if kind == 'npz' else 'own')
    if kind == 'npz': write_npz(path)
    else: folder(path)
    words = f'dataset={kind}', 'dryrun=true', 'device=cpu', 'logging.progress=false', f'hydra.run.dir={tmp_path}/run'
    run = run_line(*words, f"dataset.path='{path}'")
    assert json.loads((run/'config.json').read_text())['dataset']['path'] == str(path)
    with pytest.raises(ConfigError, match=f'{kind}: needs the option path='): run_line(*words)


def test_image_folder_labels_open_no_image(tmp_path):
    f = folder(tmp_path/'f')
    for p in f.rglob('*.png'): p.write_bytes(b'no image')
    assert get_labels('image_folder', 'train', tmp_path, path=f).tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(ValueError, match='cannot be read as an image'): get_data('image_folder', tmp_path, path=f)


def test_image_folder_errors(tmp_path):
    from PIL import Image
    with pytest.raises(DataMissing, match='train'): get_data('image_folder', tmp_path, path=tmp_path/'none')
    f = folder(tmp_path/'f', test=(('a', 1), ('c', 1)))
    with pytest.raises(DataMissing, match='also in train'): get_data('image_folder', tmp_path, path=f)
    g = folder(tmp_path/'g', mode='L'); assert get_data('image_folder', tmp_path, path=g).shape == (3, 5, 7)
    Image.new('RGB', (9, 9)).save(g/'train/a/9.png')
    with pytest.raises(ValueError, match=r'9.png: is 9x9.*5x7.*size='): get_data('image_folder', tmp_path, path=g)
    with pytest.raises(ValueError, match='size'): get_data('image_folder', tmp_path, path=g, size=0)
    (tmp_path/'e'/'train'/'a').mkdir(parents=True); (tmp_path/'e'/'test'/'a').mkdir(parents=True)
    with pytest.raises(DataMissing, match='no images'): get_data('image_folder', tmp_path, path=tmp_path/'e')


def test_image_folder_prefers_the_labelled_split(tmp_path):
    f = folder(tmp_path/'f', second='val')
    (f/'test'/'images').mkdir(parents=True); shutil.copy(f/'val/a/0.png', f/'test/images')
    assert get_data('image_folder', tmp_path, path=f).y_test.tolist() == [0, 1]


# ---- MNIST

def idx(a): return bytes([0, 0, 8, a.ndim]) + b''.join(int(n).to_bytes(4, 'big') for n in a.shape) + a.tobytes()


def fake_mnist(root, kind='MNIST', packed=False):
    r, raw = np.random.default_rng(0), root/kind/'raw'
    raw.mkdir(parents=True)
    a = dict(x_train=r.integers(0, 256, (20, 28, 28), dtype=np.uint8), y_train=(np.arange(20) % 10).astype(np.uint8),
             x_test=r.integers(0, 256, (10, 28, 28), dtype=np.uint8), y_test=np.arange(10, dtype=np.uint8))
    for k, name in D._IDX.items(): (raw/(name + '.gz'*packed)).write_bytes(gzip.compress(idx(a[k])) if packed else idx(a[k]))
    return a


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('name, kind', [('mnist', 'MNIST'), ('fashion_mnist', 'FashionMNIST')])
def test_mnist_files(tmp_path, name, kind, packed):
    a = fake_mnist(tmp_path, kind, packed)
    d = get_data(name, tmp_path)
    assert d.shape == (1, 28, 28) and (d.x_train[:, 0].numpy() == a['x_train']).all() and d.y_test.tolist() == list(range(10))
    assert len(d.classes) == 10 and d.augment == ('rotation',)
    assert get_labels(name, 'train', tmp_path).tolist() == a['y_train'].tolist()
    if not packed:
        import torchvision
        t = getattr(torchvision.datasets, kind)(tmp_path, train=True)
        assert torch.equal(t.data, d.x_train[:, 0]) and torch.equal(t.targets, d.y_train)


@pytest.mark.parametrize('junk', [b'', b'\0\0\x08', b'\0\0\x0d\x01\0\0\0\x01\0\0\0\0', b'\0\0\x08\x01\0\0\0\x05abcd'])
def test_idx_damaged(tmp_path, junk):
    fake_mnist(tmp_path)
    (tmp_path/'MNIST/raw/train-labels-idx1-ubyte').write_bytes(junk)
    with pytest.raises(ValueError, match='train-labels-idx1-ubyte'): get_data('mnist', tmp_path)
    (tmp_path/'z.gz').write_bytes(gzip.compress(b'abc'*100)[:20])
    with pytest.raises(ValueError, match='z.gz: damaged'): Fi.read_idx(tmp_path/'z.gz')


def test_mnist_fetched(tmp_path, served, monkeypatch):
    import torchvision
    folder_, url = served
    a = fake_mnist(folder_, packed=True)
    files = sorted((folder_/'MNIST/raw').iterdir())
    cls = torchvision.datasets.MNIST
    monkeypatch.setattr(cls, 'mirrors', ['http://127.0.0.1:9/', f'{url}/MNIST/raw/'])
    monkeypatch.setattr(cls, 'resources', [(f.name, hashlib.md5(f.read_bytes()).hexdigest()) for f in files])
    assert (get_data('mnist', tmp_path).x_train[:, 0].numpy() == a['x_train']).all()
    assert sorted(f.name for f in (tmp_path/'MNIST/raw').iterdir()) == [f.name for f in files]
    (tmp_path/'MNIST/raw'/files[0].name).write_bytes(b'damaged')
    assert main(['mnist', '--root', str(tmp_path)]) == 0 # the command checks, and fetches again
    assert (tmp_path/'MNIST/raw'/files[0].name).read_bytes() == files[0].read_bytes()


# ---- CIFAR

def fake_cifar(root, kind):
    "The published layout with few images; what torchvision has to be told of it"
    r, folder_, fine = np.random.default_rng(0), root/D._CIFAR[kind][0], kind == 'CIFAR100'
    folder_.mkdir(parents=True)
    key = 'fine_label_names' if fine else 'label_names'
    data, sums = {}, {}
    for f in D._CIFAR[kind][1]:
        data[f] = {key: [f'c{i}' for i in range(10)]} if 'meta' in f else {
            'data': r.integers(0, 256, (10, 3072), dtype=np.uint8), 'fine_labels' if fine else 'labels': list(range(10))}
        (folder_/f).write_bytes(pickle.dumps(data[f]))
        sums[f] = hashlib.md5((folder_/f).read_bytes()).hexdigest()
    train = [[f, m] for f, m in sums.items() if f.startswith(('data_batch', 'train'))]
    test = [[f, m] for f, m in sums.items() if f.startswith('test')]
    meta = next(f for f in sums if 'meta' in f)
    return data, dict(train_list=train, test_list=test, meta=dict(filename=meta, key=key, md5=sums[meta]))


@pytest.mark.parametrize('name, kind, n', [('cifar10', 'CIFAR10', 50), ('cifar100', 'CIFAR100', 10)])
def test_cifar_fetched(tmp_path, served, monkeypatch, name, kind, n):
    import torchvision
    folder_, url = served
    cls = getattr(torchvision.datasets, kind)
    data, about = fake_cifar(tmp_path/'made', kind)
    shutil.make_archive(str(folder_/'cifar'), 'gztar', tmp_path/'made')
    monkeypatch.setattr(cls, 'filename', 'cifar.tar.gz'); monkeypatch.setattr(cls, 'url', f'{url}/cifar.tar.gz')
    monkeypatch.setattr(cls, 'tgz_md5', Fi.md5sum(folder_/'cifar.tar.gz'))
    for k, v in about.items(): monkeypatch.setattr(cls, k, v)
    root = tmp_path/'root'
    d = get_data(name, root)
    first = next(v for k, v in data.items() if 'data' in v)
    assert d.shape == (3, 32, 32) and len(d.x_train) == n and d.classes == tuple(f'c{i}' for i in range(10))
    assert (d.x_train[0].numpy() == first['data'][0].reshape(3, 32, 32)).all() and d.augment == ('crop', 'flip')
    (root/'cifar.tar.gz').unlink(); (folder_/'cifar.tar.gz').unlink()
    assert main([name, '--root', str(root)]) == 0 # there, whole and right: nothing to fetch
    (root/D._CIFAR[kind][0]/about['test_list'][0][0]).write_bytes(b'junk')
    with pytest.raises(ValueError, match='damaged'): get_data(name, root)


# ---- Tiny ImageNet

def fake_tiny(folder_):
    from PIL import Image
    def jpeg(v):
        b = io.BytesIO(); Image.new('L' if v == 90 else 'RGB', (64, 64), v if v == 90 else (v, v, v)).save(b, 'JPEG'); return b.getvalue()
    with zipfile.ZipFile(folder_/'tiny-imagenet-200.zip', 'w') as z:
        for i, c in enumerate(('n01', 'n02')):
            for k in range(3): z.writestr(f'tiny-imagenet-200/train/{c}/images/{c}_{k}.JPEG', jpeg(90 if i else 200))
            z.writestr(f'tiny-imagenet-200/train/{c}/{c}_boxes.txt', 'x')
        val = list(enumerate(('n02', 'n01', 'n02')))
        for k, c in val: z.writestr(f'tiny-imagenet-200/val/images/val_{k}.JPEG', jpeg(200 if c == 'n01' else 90))
        z.writestr('tiny-imagenet-200/val/val_annotations.txt', ''.join(f'val_{k}.JPEG\t{c}\t0\t0\t9\t9\n' for k, c in val))
        z.writestr('tiny-imagenet-200/test/images/test_0.JPEG', jpeg(90))
        z.writestr('tiny-imagenet-200/wnids.txt', 'n01\nn02\n')
    return Fi.md5sum(folder_/'tiny-imagenet-200.zip')


def test_tiny_imagenet_fetched(tmp_path, served, monkeypatch, capsys):
    folder_, url = served
    monkeypatch.setattr(D, 'TINY_IMAGENET', (f'{url}/tiny-imagenet-200.zip', fake_tiny(folder_)))
    assert main(['tiny_imagenet', '--root', str(tmp_path)]) == 0
    assert '6 train + 3 test' in capsys.readouterr().out
    d = get_data('tiny_imagenet', tmp_path)
    assert d.shape == (3, 64, 64) and d.classes == ('n01', 'n02') and sorted(d.y_test.tolist()) == [0, 1, 1]
    assert all((d.x_test[i].float().mean() - (90 if y else 200)).abs() < 3 for i, y in enumerate(d.y_test))
    assert get_labels('tiny_imagenet', 'test', tmp_path).tolist() == d.y_test.tolist()
    val = tmp_path/'tiny-imagenet-200'/'val'
    assert not (val/'images').exists() and sorted(p.name for p in val.iterdir()) == ['n01', 'n02', 'val_annotations.txt']
    assert not list(tmp_path.glob('.unpacking*')) and not list(tmp_path.rglob('*.part'))
    (folder_/'tiny-imagenet-200.zip').unlink()
    assert main(['tiny_imagenet', '--root', str(tmp_path)]) == 0


def test_tiny_imagenet_unsorted_and_interrupted(tmp_path):
    fake_tiny(tmp_path)
    zipfile.ZipFile(tmp_path/'tiny-imagenet-200.zip').extractall(tmp_path)
    val = tmp_path/'tiny-imagenet-200'/'val'
    (val/'n02').mkdir(); (val/'images'/'val_0.JPEG').rename(val/'n02'/'val_0.JPEG') # a move that was interrupted
    assert sorted(get_data('tiny_imagenet', tmp_path).y_test.tolist()) == [0, 1, 1]


def test_wrong_checksum_leaves_nothing(tmp_path, served, monkeypatch, capsys):
    folder_, url = served
    fake_tiny(folder_)
    monkeypatch.setattr(D, 'TINY_IMAGENET', (f'{url}/tiny-imagenet-200.zip', '0'*32))
    root = tmp_path/'root'
    assert main(['tiny_imagenet', '--root', str(root)]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'MD5' in err and '0'*32 in err and 'tiny-imagenet-200.zip' in err
    with pytest.raises(DataMissing, match='MD5'): get_data('tiny_imagenet', root)
    assert [p for p in root.rglob('*') if p.is_file()] == [] and not (root/'tiny-imagenet-200').exists()


def test_broken_zip_leaves_nothing(tmp_path, served, monkeypatch, capsys):
    folder_, url = served
    (folder_/'tiny-imagenet-200.zip').write_bytes(b'no zip')
    monkeypatch.setattr(D, 'TINY_IMAGENET', (f'{url}/tiny-imagenet-200.zip', Fi.md5sum(folder_/'tiny-imagenet-200.zip')))
    assert main(['tiny_imagenet', '--root', str(tmp_path)]) == 2
    assert not (tmp_path/'tiny-imagenet-200').exists() and not list(tmp_path.glob('.unpacking*'))


def test_transfer_cut_short(tmp_path):
    class Short(http.server.BaseHTTPRequestHandler):
        def log_message(self, *a): pass
        def do_GET(self):
            self.send_response(200); self.send_header('Content-Length', '1000'); self.end_headers()
            self.wfile.write(b'x'*10)
    server = http.server.HTTPServer(('127.0.0.1', 0), Short)
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/a'
    try:
        with pytest.raises(OSError, match='127.0.0.1') as e: Fi.download(url, tmp_path/'a', '0'*32)
    finally: server.shutdown(); server.server_close()
    assert list(tmp_path.iterdir()) == [] and '\n' not in str(e.value)


def test_silent_server_is_given_up(tmp_path):
    import socket, time
    with socket.create_server(('127.0.0.1', 0)) as s:
        t, url = time.perf_counter(), f'http://127.0.0.1:{s.getsockname()[1]}/a'
        with pytest.raises(OSError, match='timed out'): Fi.download(url, tmp_path/'a', '0'*32, timeout=.3)
        assert time.perf_counter() - t < 5


@pytest.mark.parametrize('name, looked', [('mnist', 'MNIST/raw/train-images-idx3-ubyte'), ('fashion_mnist', 'FashionMNIST/raw'),
                                          ('cifar10', 'cifar-10-batches-py'), ('cifar100', 'cifar-100-python'),
                                          ('tiny_imagenet', 'tiny-imagenet-200')])
def test_no_network_no_file(tmp_path, monkeypatch, name, looked):
    def refuse(*a, **k): raise OSError('no network')
    monkeypatch.setattr(Fi.urllib.request, 'urlopen', refuse)
    root = tmp_path/'my data'
    with pytest.raises(DataMissing) as e: get_data(name, root)
    said = str(e.value)
    assert isinstance(e.value, FileNotFoundError) and e.value.__suppress_context__ and '\n' not in said
    assert str(root/looked) in said and str(root/f'{name}.npz') in said and f"plasticity-data {name} --root '{root}'" in said
    assert not root.exists()


# ---- the command

def test_command(tmp_path, capsys):
    assert main(['digits', 'spirals', '--root', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert '1,437' in out and 'spirals' in out
    assert main(['mnits', 'digits', '--root', str(tmp_path)]) == 2
    done = capsys.readouterr()
    assert "did you mean 'mnist'" in done.err and len(done.err.strip().splitlines()) == 1 and 'digits' in done.out
    assert main(['image_folder', '--root', str(tmp_path)]) == 2 and 'needs the option path=' in capsys.readouterr().err
    for bad in ([], ['--what'], ['digits', '--root']):
        with pytest.raises(SystemExit) as e: main(bad)
        assert e.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_command_lists_what_is_there(tmp_path, capsys):
    write_npz(tmp_path/'own.npz'); fake_mnist(tmp_path); get_data('mnist', tmp_path)
    main(['--list', '--root', str(tmp_path)])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(DATASETS) | {'own'} <= set(lines)
    assert 'own.npz' in lines['own'] and 'decoded' in lines['mnist'] and 'to fetch' in lines['cifar10'] and 'built in' in lines['digits']
