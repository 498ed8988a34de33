"The adaptive VAE: growth and pruning that keep the function, bounds in nats, collapse, the command line"
import base64
import copy
import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plasticity.data import get_data
from plasticity.edits import Edit, replay
from plasticity.elbo import VAE, elbo, importance_bound, kl_divergence, latent_stats, pictures
from plasticity.latents import LatentSlider, by_cost, plot_interpolation, plot_map, sheet, traversal
from plasticity.results import generator, seeded
from plasticity.schedules import Schedule
from plasticity.training import Trainer
from plasticity.units import EditError, units
from plasticity.vae import AdaptiveVAE, Busy, Diary, Idle, WidenLatent, adaptation, vae_trainer

torch.set_num_threads(1)

def made(shape=(1, 28, 28), channels=(4, 6, 6), latent=5, steps=3, likelihood='bernoulli', seed=0):
    "A VAE after a few steps on noise, so that norms and moments are no longer what they were at the start; its optimizer, a batch"
    with seeded(seed, 'model'): model = AdaptiveVAE(shape, channels, latent, likelihood)
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.rand(16, *shape, generator=generator(seed, 'x'))
    with seeded(seed, 'steps'):
        for _ in range(steps):
            opt.zero_grad(); model.loss(model(x), x).backward(); opt.step()
    return model, opt, x

@torch.no_grad()
def rebuilt(model, x, noise):
    "Reconstruction with fixed noise for the first dimensions, in evaluation mode"
    model.eval()
    mu, logvar = model.encode(x)
    more = torch.randn(len(x), mu.shape[1], generator=generator(9))
    more[:, :noise.shape[1]] = noise
    out = model.decode(mu + (logvar/2).exp()*more)
    model.train()
    return out

SHAPES = [(1, 28, 28), (3, 28, 28), (1, 32, 32), (3, 32, 32), (1, 64, 64), (3, 64, 64), (1, 8, 8), (2, 13, 9)]

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('likelihood', ['bernoulli', 'gaussian'])
def test_shapes(shape, likelihood):
    model, _, x = made(shape, likelihood=likelihood, steps=1)
    out = model(x)
    assert out.shape == x.shape and torch.isfinite(model.loss(out, x))
    assert model.sample(3).shape == (3, *shape) and 0 <= model.sample(3).min() <= model.sample(3).max() <= 1

def test_units_of_an_encoder_decoder():
    model, _, x = made()
    found = {g.name: g.n for g in units(model, x[:2])}
    assert found == {'encoder.0.conv': 4, 'encoder.1.conv': 6, 'encoder.2.conv': 6, 'mu': 5,
                     'spread': 6, 'decoder.0.conv': 6, 'decoder.1.conv': 4}
    latent = units(model, x[:2])['mu']
    assert {t for t, _ in latent.maps} == {'mu.weight', 'mu.bias', 'logvar.weight', 'logvar.bias', 'spread.weight'}
    assert latent.consumers == {('spread.weight', 1)}

@pytest.mark.parametrize('shape', [(1, 28, 28), (3, 32, 32), (1, 64, 64)])
def test_growth_keeps_the_function(shape):
    model, opt, x = made(shape, latent=16)
    noise = torch.randn(16, 16, generator=generator(3))
    before, state = rebuilt(model, x, noise), copy.deepcopy(opt.state_dict()['state'])
    names, old = [n for n, _ in model.named_parameters()], {n: p.detach().clone() for n, p in model.named_parameters()}
    record = model.grow(channels=3, latent=4, optimizer=opt)
    after = rebuilt(model, x, noise)
    assert (after - before).abs().max() <= 1e-5
    assert model.latent_dim == 20 and model.channels == (7, 9, 9) and model.decoder_channels == (9, 9, 7)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.num_features == len(m.running_mean) == len(m.running_var) == len(m.weight)
            assert m.num_features in (7, 9)
    model.eval()
    with torch.no_grad(): kl = kl_divergence(*model.encode(x))
    assert kl.shape == (16, 20) and kl[:, 16:].abs().max() <= 1e-6
    # every old entry of every weight and of every moment is still there, in order
    kept = {}
    for g in record.edits: kept[g['edit']['group']] = g['new']
    found = list(units(model, x[:2]))
    for i, (n, p) in enumerate(model.named_parameters()):
        assert names[i] == n and opt.state[p]['exp_avg'].shape == p.shape
        here = torch.ones_like(p, dtype=torch.bool)
        for d in range(p.dim()):
            if p.shape[d] == old[n].shape[d]: continue
            group = next(g for g in found if (n, d) in g.maps)
            pos = group.maps[n, d][kept[group.name][group.name]].reshape(-1)
            here.index_fill_(d, pos, False)
        assert torch.equal(p[here], old[n].reshape(-1))
        for k in ('exp_avg', 'exp_avg_sq'): assert torch.equal(opt.state[p][k][here], state[i][k].reshape(-1)), (n, k)
        assert torch.equal(opt.state[p]['exp_avg'][~here], torch.zeros((~here).sum()))
    assert (after - before).abs().max() <= 1e-5
    with seeded(1):
        for _ in range(3): opt.zero_grad(); model.train(); model.loss(model(x), x).backward(); opt.step()

def test_loss_of_old_dimensions_is_kept_in_training_mode():
    model, opt, x = made(latent=4)
    model.train()
    def loss(noise):
        mu, logvar = model.encode(x)
        more = torch.cat([noise, torch.ones(len(x), mu.shape[1] - 4)], 1)
        return model.log_likelihood(model.decode(mu + (logvar/2).exp()*more), x), kl_divergence(mu, logvar).sum(1)
    noise = torch.randn(16, 4, generator=generator(3))
    with torch.no_grad(): a = loss(noise)
    model.grow(channels=2, latent=3, optimizer=opt)
    with torch.no_grad(): b = loss(noise)
    for u, v in zip(a, b, strict=True): torch.testing.assert_close(u, v, rtol=1e-5, atol=1e-4)

@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=1, max_size=3), st.integers(1, 6), st.integers(0, 4), st.integers(0, 4),
       st.sampled_from(SHAPES))
def test_growth_of_any_network(channels, latent, k, m, shape):
    model, opt, x = made(shape, channels, latent, steps=1)
    noise = torch.randn(16, latent, generator=generator(3))
    before = rebuilt(model, x, noise)
    model.grow(channels=k, latent=m, optimizer=opt)
    assert model.latent_dim == latent + m and model.channels == tuple(c + k for c in channels)
    assert (rebuilt(model, x, noise) - before).abs().max() <= 1e-5

def test_pruning_what_is_inactive_is_exact():
    model, opt, x = made(latent=6)
    with torch.no_grad():
        model.spread.weight[:, [1, 4]] = 0.                                    # dimensions that the decoder does not read
        for i, stage in enumerate((*model.encoder, model.first, *model.decoder)): # a channel that is never active
            stage.norm.weight[i % 3] = 0.; stage.norm.bias[i % 3] = -1.
    noise = torch.randn(16, 6, generator=generator(3))
    before = rebuilt(model, x, noise)
    idle = model.inactive(x, channel=0., latent=-1.)
    assert 'mu' not in idle and all(i % 3 in idle[g] for i, g in enumerate(model.stages))
    changes = {g: [i % 3] for i, g in enumerate(model.stages)} | {'mu': [1, 4]}
    model.prune(changes, optimizer=opt)
    keep = [0, 2, 3, 5]
    assert model.latent_dim == 4 and model.channels == (3, 5, 5)
    assert (rebuilt(model, x, noise[:, keep]) - before).abs().max() <= 1e-5
    for p in model.parameters(): assert opt.state[p]['exp_avg'].shape == p.shape

def test_one_channel_that_is_flattened_is_refused_by_name():
    model, _, _ = made((1, 8, 8), (2, 1), 3, steps=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(EditError, match='encoder.1.conv'): model.grow(channels=1)
    with pytest.raises(EditError, match='encoder.9'): model.prune({'encoder.9.conv': [0]})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.grow(latent=2).edits and model.latent_dim == 5

def test_inactive_finds_dead_channels():
    model, _, x = made()
    with torch.no_grad(): model.encoder[1].norm.weight[2] = 0.; model.encoder[1].norm.bias[2] = -1.
    found = model.inactive(x)
    assert found['encoder.1.conv'] == [2]

def test_latent_edit_is_data():
    e = WidenLatent('mu', 3, seed=4)
    again = Edit.from_json(json.dumps(e.to_json()))
    assert again == e
    a, _, x = made(); b, _, _ = made()
    record = a.grow(latent=3, channels=1)
    replay(b, record)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

# --- bounds

def exact(model, x, half=9., n=1201):
    "log p(x) by quadrature over a latent line"
    z = torch.linspace(-half, half, n, dtype=torch.float64)[:, None]
    with torch.no_grad(): out = model.decode(z)
    log = torch.stack([model.log_likelihood(out, v.expand(n, *v.shape)) for v in x], 1)
    return torch.logsumexp(log - z**2/2 - math.log(2*math.pi)/2, 0) + math.log(2*half/(n - 1))

@pytest.mark.parametrize('likelihood', ['bernoulli', 'gaussian'])
def test_bounds_against_quadrature(likelihood):
    model, _, x = made((1, 8, 8), (4,), 1, steps=20, likelihood=likelihood)
    model.double().eval(); x = x.double()
    truth = exact(model, x)
    terms = elbo(model, x, samples=4000, seed=1)
    log_w = importance_bound(model, x, 4000, seed=2)
    assert (log_w - truth).abs().max() < .05
    assert (terms['elbo'] - truth).max() < .02 and terms['elbo'].mean() < truth.mean() + 1e-3
    torch.testing.assert_close(terms['elbo'], terms['reconstruction'] - terms['kl'])
    # the gap is the divergence from the posterior, by quadrature
    z = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    with torch.no_grad():
        mu, logvar = model.encode(x); out = model.decode(z[:, None])
    q = torch.distributions.Normal(mu, (logvar/2).exp()).log_prob(z)                  # (images, grid)
    joint = torch.stack([model.log_likelihood(out, v.expand(len(z), *v.shape)) for v in x]) - z**2/2 - math.log(2*math.pi)/2
    gap = (q.exp()*(q - joint + truth[:, None])).sum(1)*(z[1] - z[0])
    assert (truth - terms['elbo'] - gap).abs().max() < .1

def test_bounds_are_ordered():
    model, _, x = made((1, 8, 8), (4, 4), 3, steps=30)
    bounds = [importance_bound(model, x, k, seed=1).mean().item() for k in (1, 8, 64, 512)]
    assert bounds == sorted(bounds)
    one = elbo(model, x, samples=512, seed=1)['elbo'].mean().item()
    assert one < bounds[-1]

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_kl_is_that_of_torch(n, dims, seed):
    mu, logvar = (torch.randn(n, dims, generator=generator(seed, k), dtype=torch.float64) for k in 'ab')
    q, p = torch.distributions.Normal(mu, (logvar/2).exp()), torch.distributions.Normal(0., 1.)
    torch.testing.assert_close(kl_divergence(mu, logvar), torch.distributions.kl_divergence(q, p))

def test_likelihoods_are_those_of_torch():
    out, x = torch.randn(5, 1, 4, 4, generator=generator(0)), torch.rand(5, 1, 4, 4, generator=generator(1))
    m = VAE((1, 4, 4), (2,), 2)
    b = torch.distributions.Bernoulli(logits=out).log_prob((x > .5).float()).sum((1, 2, 3))
    torch.testing.assert_close(m.log_likelihood(out, (x > .5).float()), b)
    m = VAE((1, 4, 4), (2,), 2, 'gaussian')
    with torch.no_grad(): m.log_scale.fill_(-.7)
    g = torch.distributions.Normal(out.sigmoid(), math.exp(-.7)).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(m.log_likelihood(out, x), g)

def test_loss_is_minus_elbo():
    model, _, x = made((1, 8, 8), (4,), 3)
    model.eval()
    with torch.no_grad(): losses = torch.stack([model.loss(model(x), x) for _ in range(2)])
    assert losses[0] == losses[1]
    model.train(); model.weight = .25
    with seeded(4), torch.no_grad():
        out = model(x); mu, logvar = model.posterior.take(); model.posterior.give(mu, logvar)
        want = -(model.log_likelihood(out, x) - .25*kl_divergence(mu, logvar).sum(1)).mean()
        torch.testing.assert_close(model.loss(out, x), want)
    with pytest.raises(RuntimeError, match='forward'): model.loss(out, x)

def test_latent_stats_sees_collapse():
    model, _, x = made((1, 8, 8), (4,), 4)
    with torch.no_grad():
        for p in (model.mu, model.logvar): p.weight[[0, 2]] = 0.; p.bias[[0, 2]] = 0.
        model.mu.weight[[1, 3]] *= 20.
    t = latent_stats(model, x)
    assert [r['active'] for r in t] == [False, True, False, True]
    assert abs(sum(t.column('share')) - 1) < 1e-6 and t[0]['kl'] == 0.

def test_pictures():
    d = pictures(get_data('digits'))
    (x, y), *_ = d.batches(32)
    assert torch.equal(x, y) and 0 <= x.min() and x.max() <= 1 and d.shape == (1, 8, 8) and d.task == 'regression'
    b = pictures(get_data('digits'), binary=True)
    assert set(next(b.batches(32))[0].unique().tolist()) == {0., 1.}
    x, y = d.probe(16)
    assert torch.equal(x, y)
    with pytest.raises(ValueError, match='images'): pictures(get_data('spirals'))
    assert len(d.subset(100).x_train) == 100 and torch.equal(*next(d.subset(100).batches(8)))

@pytest.mark.parametrize('bad, match', [(dict(likelihood='poisson'), 'likelihood'), (dict(channels=()), 'channels'),
                                        (dict(latent_dim=0), 'latent_dim'), (dict(in_shape=7), 'in_shape'), (dict(beta=-1.), 'beta')])
def test_wrong_arguments(bad, match):
    with pytest.raises(ValueError, match=match): AdaptiveVAE(**bad)

@pytest.mark.parametrize(('make', 'name'), [
    (lambda m, x: m.encode(torch.rand(3, 1, 20, 20)), 'x'), (lambda m, x: m.sample(z=torch.zeros(2, 9)), 'z'),
    (lambda m, x: m.reconstruct(x, noise=torch.zeros(16, 9)), 'noise'), (lambda m, x: elbo(m, x, 0), 'samples'),
    (lambda m, x: importance_bound(m, x, 0), 'k'), (lambda m, x: m.grow(channels=-1), 'channels'),
    (lambda m, x: m.grow(latent=1.5), 'latent'),
    (lambda m, x: Busy(ratio=-1), 'ratio'), (lambda m, x: Busy(threshold='x'), 'threshold'),
    (lambda m, x: Busy(max_latent=0), 'max_latent'),
    (lambda m, x: Idle(min_channels=0), 'min_channels'), (lambda m, x: Idle(threshold='x'), 'threshold'),
    (lambda m, x: Diary(every=0), 'every'),
    (lambda m, x: vae_trainer(m, get_data('digits').subset(32)), 'data'), (lambda m, x: pictures(3), 'data')])
def test_wrong_inputs_are_told_by_name(make, name):
    model, _, x = made(steps=0)
    with pytest.raises(ValueError, match=f'^{name}: got'): make(model, x)

@pytest.mark.parametrize(('make', 'name'), [
    (lambda m, x: traversal(m, dims=[7]), 'dims'), (lambda m, x: traversal(m, torch.zeros(9)), 'z'),
    (lambda m, x: traversal(m, steps=0), 'steps'),
    (lambda m, x: plot_interpolation(m, x[:1]), 'x'), (lambda m, x: sheet(torch.rand(3, 3)), 'images'),
    (lambda m, x: by_cost(m, x, 0), 'most'),
    (lambda m, x: LatentSlider(m, x, steps=0), 'steps'), (lambda m, x: plot_map(m, x, torch.arange(3)), 'y')])
def test_pictures_tell_what_is_wrong_by_name(make, name):
    model, _, x = made(steps=0)
    with pytest.raises(ValueError, match=f'^{name}: got'): make(model, x)

@pytest.mark.parametrize(('n', 'rows'), [(3, 1), (12, 1), (13, 2), (30, 3)])
@pytest.mark.parametrize('channels', [1, 3])
def test_a_sheet_shows_every_image(n, rows, channels):
    fig = sheet(torch.full((n, channels, 4, 4), .5), columns=12)
    shown = fig.axes[0].images[0].get_array()
    assert shown.shape[0] == rows*6 and ((shown[:, :, 0] if channels == 3 else shown) == .5).sum() == n*16

@pytest.mark.parametrize(('shape', 'latent'), [((1, 13, 9), 1), ((3, 16, 16), 2), ((3, 16, 16), 7)])
def test_the_frames_of_the_slider_are_the_traversal(shape, latent):
    model, _, x = made(shape, latent=latent, steps=1)
    slider = LatentSlider(model, x, most=3, steps=5)
    data = json.loads(re.search(r'const d=(\{.*?\}),root', slider._repr_html_()).group(1))
    raw = torch.tensor(list(base64.b64decode(data['bytes'])), dtype=torch.uint8)
    frames = raw.view(len(slider.dims), 5, *shape[1:], shape[0]).permute(0, 1, 4, 2, 3)
    assert (frames/255 - traversal(model, dims=slider.dims, steps=5)).abs().max() < .003
    assert data['dims'] == slider.dims and len(slider.dims) == min(3, latent)

def test_a_policy_of_autoencoders_on_another_model_says_so():
    with pytest.raises(TypeError, match='model: got a Linear'):
        Trainer(nn.Linear(64, 10), get_data('digits').subset(64, 32), device='cpu', callbacks=[Busy()]).fit(1)

# --- policies and training

def run(callbacks, epochs=6, seed=0, data=None, **options):
    with seeded(seed, 'model'): m = AdaptiveVAE((1, 8, 8), (6, 8), 4)
    data = data or get_data('digits').subset(256, 64)
    return vae_trainer(m, data, batch_size=32, seed=seed, device='cpu', callbacks=callbacks, **options).fit(epochs)

def test_growth_and_pruning_while_training():
    grow, prune = Busy(Schedule(20, cooldown=10), threshold=.01, decay=.9), Idle(30, threshold=.0)
    t = run([grow, prune])
    m = t.model
    assert m.latent_dim > 4 and m.channels[0] > 6 and any('edits' in e and 'refused' not in e for e in grow.events)
    assert not any('refused' in e for e in grow.events + prune.events)
    assert t.history.last('loss', split='test') < t.history.where(split='test')[0]['loss']
    for p in m.parameters(): assert t.optimizer.state[p]['exp_avg'].shape == p.shape

def test_policies_obey_their_limits():
    t = run([Busy(Schedule(8), threshold=-1., max_channels=9, max_latent=5, decay=.5)], epochs=3)
    assert max(t.model.channels + t.model.decoder_channels) <= 9 and t.model.latent_dim <= 5
    t = run([Idle(Schedule(16), threshold=9., min_channels=3, min_latent=2, decay=.5)])
    assert min(t.model.channels + t.model.decoder_channels) >= 3 and t.model.latent_dim == 2

def test_thresholds_that_nothing_meets_change_nothing():
    a, b = run([], epochs=2), run([Busy(Schedule(5), threshold=1e9), Idle(Schedule(5), threshold=-1.)], epochs=2)
    assert all(torch.equal(p, q) for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))

def test_a_stopped_run_goes_on(tmp_path):
    def trainer():
        with seeded(0, 'model'): m = AdaptiveVAE((1, 8, 8), (6, 8), 4)
        return vae_trainer(m, get_data('digits').subset(128, 64), batch_size=32, device='cpu', eval_every=0,
                           callbacks=adaptation(Schedule(7), Schedule(9), 3, grow_threshold=-1., prune_threshold=-1., max_channels=9))
    whole = trainer().fit(5)
    part = trainer().fit(5, steps=10)
    part.save(tmp_path)
    again = trainer().load(tmp_path).fit()
    assert whole.model.latent_dim > 4
    for (n, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True): assert torch.equal(a, b), n

def test_warmup_is_a_ramp():
    seen = []
    from plasticity.elbo import Warmup
    from plasticity.training import Callback
    class See(Callback):
        order = 90
        def after_step(self, trainer): seen.append(trainer.model.weight)
    run([Warmup(4), See()], epochs=1)
    assert seen == [.25, .5, .75, 1., 1., 1., 1., 1.]

def test_any_trainer_takes_it():
    m = AdaptiveVAE((1, 8, 8), (4,), 3)
    t = Trainer(m, pictures(get_data('digits').subset(128, 64)), loss=m.loss, batch_size=32, device='cpu').fit(1)
    assert 'accuracy' not in t.history[-1] and math.isfinite(t.history[-1]['loss'])
    assert copy.deepcopy(m).latent_dim == 3

@pytest.mark.parametrize('other', [
    lambda: AdaptiveVAE((3, 64, 64), (4, 6), 3).state_dict(), lambda: AdaptiveVAE((1, 20, 28), (4, 6), 3).state_dict(),
    lambda: AdaptiveVAE((1, 28, 28), (4, 6, 6), 3).state_dict(), lambda: nn.Linear(3, 4).state_dict(),
    lambda: {k: v for k, v in AdaptiveVAE((1, 28, 28), (5, 9), 5).state_dict().items() if k != 'mu.bias'},
    lambda: AdaptiveVAE((1, 28, 28), (5, 9), 5).state_dict() | {'mu.weight': torch.zeros(5)}])
def test_a_state_of_another_network_is_refused_and_changes_nothing(other):
    model, _, x = made(channels=(4, 6), latent=3)
    model.eval()
    with torch.no_grad(): y = model(x)
    with pytest.raises(RuntimeError, match='^state: of a'): model.load_state_dict(other())
    with torch.no_grad(): assert torch.equal(model(x), y) and model.latent_dim == 3
    grown = AdaptiveVAE((1, 28, 28), (5, 9), 7)
    model.load_state_dict(grown.state_dict())
    with torch.no_grad(): assert model.latent_dim == 7 and torch.equal(model(x), grown.eval()(x))

# --- the command line

def test_command_line(tmp_path, monkeypatch):
    from plasticity.experiments import read_run, run_line
    monkeypatch.chdir(tmp_path)
    folder = run_line('model=vae', 'model.channels=[4,6]', 'model.latent_dim=3', 'training.epochs=2', 'training.grow_every=10',
                      'device=cpu', 'training.grow_threshold=-1', 'training.cooldown=10', 'training.prune_threshold=-1',
                      'logging.progress=false')
    config, history, layers = read_run(folder)
    assert config['training']['name'] == 'vae' and config['dataset']['name'] == 'digits'
    assert any('WidenLatent' in r.get('edit', '') for r in history) and [r['elbo'] for r in history if 'elbo' in r][-1] < 0
    assert {p.name for p in folder.glob('*.png')} == {'samples.png', 'reconstructions.png', 'traversals.png', 'costs.png'}
    assert (folder/'report.html').exists() and layers
    on = run_line(f'resume={folder}')
    assert on == folder
    dry = run_line('model=vae', 'dataset=digits', 'dryrun=true', 'device=cpu', 'logging.progress=false')
    assert (dry/'samples.png').exists()

def test_training_vae_takes_a_vae(tmp_path, monkeypatch):
    from plasticity.experiments import ConfigError, run_line
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, ValueError), match='model=vae'): run_line('model=mlp', 'training=vae', 'dryrun=true', 'device=cpu')

def test_a_page_that_defines_a_model_again_is_no_clash():
    from plasticity.models import MODELS, register_model
    was = MODELS['vae']
    def vae(in_shape, num_classes): "As chapter 19 defines it"
    vae.__module__, vae.__qualname__ = '__main__', 'vae'
    try:
        register_model('vae')(vae); register_model('vae')(was)
        def other(in_shape, num_classes): "Another one"
        with pytest.raises(ValueError, match='is taken'): register_model('vae')(other)
    finally: MODELS['vae'] = was
