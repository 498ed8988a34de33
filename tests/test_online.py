"Edge cases of chapter 13c"
import copy
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plasticity.online import OnlineMLPs, SparseImages, engines_differ, learn_online
from plasticity.results import generator

torch.set_num_threads(1)

def drawn(n=40, inputs=30, black=.7, seed=0, classes=4):
    g = generator(seed, 'images')
    x = torch.randint(1, 256, (n, inputs), generator=g)*(torch.rand(n, inputs, generator=g) > black)
    return x.to(torch.uint8), torch.randint(classes, (n,), generator=g)

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.sampled_from([0., .5, .95, 1.]), st.integers(0, 99))
def test_lists_hold_the_images(inputs, black, seed):
    x, y = drawn(7, inputs, black, seed)
    images = SparseImages(x, y)
    assert torch.equal(images.dense(torch.arange(7)), x.float()/255)
    assert len(images) == 7 and images.count.tolist() == (x > 0).sum(1).tolist()

def test_what_images_must_be():
    with pytest.raises(TypeError, match='takes uint8'): SparseImages(torch.rand(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match='fewer than 32768'): SparseImages(torch.zeros(1, 2**15, dtype=torch.uint8), torch.zeros(1))

def test_steps_are_those_of_sgd():
    images, order = SparseImages(*drawn()), torch.randint(40, (2, 25), generator=generator(1))
    nets = OnlineMLPs([3, 8], [.1, .02], 30, 4, 9)
    pop = nets.population()
    alone, hits, total = [pop.member(i) for i in range(2)], [0, 0], [0., 0.]
    for i, net in enumerate(alone):
        opt = torch.optim.SGD(net.parameters(), lr=[.1, .02][i])
        for e in order[i]:
            out, y = net(images.dense(e[None])), images.label[e][None].long()
            loss = torch.nn.functional.cross_entropy(out, y)
            hits[i] += int(out.argmax() == y); total[i] += loss.item()
            opt.zero_grad(); loss.backward(); opt.step()
    accuracy, loss = learn_online(nets, images, order)
    assert accuracy.tolist() == pytest.approx([h/25 for h in hits]) and loss.tolist() == pytest.approx([v/25 for v in total], rel=1e-4)
    for i, net in enumerate(alone):
        for p, q in zip(nets.population(pop).member(i).parameters(), net.parameters(), strict=True): assert torch.allclose(p, q, atol=1e-5)

def test_permuted_rows_are_permuted_pixels():
    x, y = drawn()
    nets = OnlineMLPs([5], .05, 30, 4, 9)
    same, p = copy.deepcopy(nets), torch.randperm(30, generator=generator(5, 'pixels', 2))
    nets.shuffle(2)
    moved = torch.empty_like(x)
    moved[:, p] = x                                        # what row p[j] saw, row j sees now
    order = torch.arange(40)[None]
    a, b = learn_online(nets, SparseImages(x, y), order), learn_online(same, SparseImages(moved, y), order)
    assert torch.equal(a[0], b[0]) and torch.allclose(a[1], b[1], rtol=1e-4)

def test_neighbours_do_not_matter():
    images, order = SparseImages(*drawn()), torch.randint(40, (3, 12), generator=generator(2))
    many, one = OnlineMLPs([1, 2, 3], .05, 30, 4, 9), OnlineMLPs([2], .05, 30, 4, 9)
    a, b = learn_online(many, images, order), learn_online(one, images, order, stream=[1])
    assert a[0][1] == b[0][0] and torch.allclose(many.w1[1], one.w1[0], atol=1e-6)

def test_seeds_and_streams_draw_other_weights():
    a, b, c = OnlineMLPs([1, 1, 2]), OnlineMLPs([1]), OnlineMLPs([1], stream='fresh')
    assert torch.equal(a.w1[0], a.w1[1]) and torch.equal(a.w1[0], b.w1[0]) and not torch.equal(a.w1[0], a.w1[2])
    assert not torch.equal(b.w1, c.w1) and a.w1.abs().max() <= (6/784)**.5 and a.v.abs().max() <= .03**.5 and len(a) == 3

def test_errors():
    images, nets = SparseImages(*drawn()), OnlineMLPs([1, 2], .05, 30, 4, 9)
    order = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="did you mean 'torch'"): learn_online(nets, images, order, engine='trch')
    with pytest.raises(ValueError, match='stream: got 3 numbers up to 0'): learn_online(nets, images, order, [0, 0, 0])
    with pytest.raises(ValueError, match='stream: got 2 numbers up to 2'): learn_online(nets, images, order, [0, 2])
    with pytest.raises(ValueError, match='30 positions, the networks take 784'): learn_online(OnlineMLPs([1]), images, order[:1])
    with pytest.raises(ValueError, match='takes at least one'): OnlineMLPs([])
    with pytest.raises(ValueError, match='numbers for 2 networks'): OnlineMLPs([0, 1], [1., 2., 3.])

KERNEL = """
import torch
from tests.test_online import drawn
from plasticity.online import SparseImages, engines_differ, OnlineMLPs, learn_online
for inputs, black, width, outputs in ((30, .7, 9, 4), (90, .1, 17, 10), (20, 1., 5, 2)):
    images = SparseImages(*drawn(40, inputs, black, classes=outputs))
    assert engines_differ(images, width, outputs, steps=30) < 1e-5
images, order = SparseImages(*drawn()), torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(0))
a, b = (OnlineMLPs([0, 1, 2], [.1, .01, .05], 30, 4, 9) for _ in range(2))
p, q = learn_online(a, images, order, [1, 0, 1], 'torch'), learn_online(b, images, order, [1, 0, 1], 'triton')
assert torch.equal(p[0], q[0]) and torch.allclose(p[1], q[1], rtol=1e-4)
for k in ('w1', 'w2', 'w3', 'v', 'b1', 'b2', 'b3', 'c'): assert (getattr(a, k) - getattr(b, k)).abs().max() < 1e-5, k
print('the same')
"""

def test_kernel_in_the_interpreter():
    pytest.importorskip('triton')
    env = os.environ | dict(TRITON_INTERPRET='1', OMP_NUM_THREADS='1', PYTHONPATH='.')
    out = subprocess.run([sys.executable, '-c', KERNEL], env=env, capture_output=True, text=True, timeout=200)
    assert out.stdout.strip().endswith('the same'), out.stderr[-2000:]

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_kernel_on_a_gpu():
    x, y = drawn(200, 784, .8, classes=10)
    assert engines_differ(SparseImages(x.cuda(), y.cuda())) < .01
