"The live views as a reader has them: on a page without a kernel and without network, and in JupyterLab."
import json

import pytest

pytest.importorskip('anywidget')

NOW = '() => document.querySelector(".plv-clock").textContent'
PICTURE = '() => document.querySelector(".plv-stage canvas").toDataURL()'

@pytest.fixture(scope='session')
def page_of(tmp_path_factory):
    "Function that writes the page of a film and gives its address"
    from plasticity.widgets import TopologyView
    folder = tmp_path_factory.mktemp('views')
    def write(name, film, **options):
        TopologyView(film, **options).page(folder/f'{name}.html')
        return f'file://{folder}/{name}.html'
    return write

@pytest.fixture(scope='session')
def grown():
    "The film of a network that grew"
    from plasticity.data import get_data
    from plasticity.filming import Filming
    from plasticity.growing import grow
    from plasticity.models import make_model
    from plasticity.policies import Growth, LossBasedGrowth
    from plasticity.results import seeded
    from plasticity.training import Trainer
    data, filming = get_data('digits').subset(train=640, test=40), Filming(every=0, share=1.)
    with seeded(1): net = grow(make_model('mlp', data.shape, 10, hidden_sizes=[6, 4]))
    growth = Growth(LossBasedGrowth(patience=1, cooldown=1, min_delta=.3))
    Trainer(net, data, lr=3e-3, seed=0, device='cpu', eval_every=0, callbacks=[growth, filming]).fit(12)
    assert growth.events
    return filming.film

@pytest.fixture
def opened(quiet):
    "Function that opens a page without a network"
    def go(url, scheme='light'):
        quiet.emulate_media(color_scheme=scheme)
        quiet.goto(url)
        quiet.locator('.plv-stage svg text').first.wait_for()
        return quiet
    return go

def selection(page): return page.inner_text('.plv-panel h3')

def test_the_slider_by_keyboard_and_by_mouse(opened, page_of, grown):
    page = opened(page_of('slider', grown))
    slider, last = page.locator('.plv-track input'), len(json.loads(json.dumps(grown.pack(48_000)))['steps']) - 1
    assert int(slider.input_value()) == last
    before, end = page.evaluate(PICTURE), page.evaluate(NOW)
    slider.focus()
    page.keyboard.press('Home')
    assert slider.input_value() == '0' and page.evaluate(NOW).startswith('step 0')
    assert page.evaluate(PICTURE) != before
    for _ in range(3): page.keyboard.press('ArrowRight')
    assert slider.input_value() == '3' and 'step' in slider.get_attribute('aria-valuetext')
    box = slider.bounding_box()
    page.mouse.click(box['x'] + box['width']/2, box['y'] + box['height']/2)
    assert abs(int(slider.input_value()) - last/2) < last/10 + 2
    page.keyboard.press('End')
    assert page.evaluate(NOW) == end and page.evaluate(PICTURE) == before

def test_the_views_by_keyboard_and_by_mouse(opened, page_of, grown):
    page = opened(page_of('views', grown))
    pictures = [page.evaluate(PICTURE)]
    page.locator('[role=tab][aria-selected=true]').focus()
    for name in ('health', 'river'):
        page.keyboard.press('ArrowRight')
        assert page.locator('[role=tab][aria-selected=true]').get_attribute('data-view') == name
        assert page.evaluate('document.activeElement.dataset.view') == name
        pictures.append(page.evaluate(PICTURE))
    assert len(set(pictures)) == 3
    page.click('[data-view=topology]')
    assert page.evaluate(PICTURE) == pictures[0]

def test_the_selection_by_keyboard(opened, page_of, grown):
    page = opened(page_of('keys', grown))
    page.locator('.plv-stage').focus()
    page.keyboard.press('ArrowDown')
    assert selection(page) == 'unit 0' and page.inner_text('.plv-name') == 'body.layers.0.linear'
    page.keyboard.press('ArrowDown'); page.keyboard.press('ArrowDown')
    assert selection(page) == 'unit 2' and 'unit 2' in page.inner_text('.plv-live')
    page.keyboard.press('ArrowRight')
    assert page.inner_text('.plv-name') == 'body.layers.1.linear'
    page.keyboard.press('ArrowRight'); page.keyboard.press('Home')
    assert selection(page) == 'output 0' and page.inner_text('.plv-name') == 'body.head'
    page.keyboard.press('End')
    assert selection(page) == 'output 9'
    page.keyboard.press('Escape')
    assert page.locator('.plv-spark').count() == 0 and page.locator('.plv-ring').count() == 0

def test_the_selection_by_mouse_and_its_past(opened, page_of, grown):
    page = opened(page_of('mouse', grown, metric='incoming'))
    page.locator('.plv-stage').focus()
    page.keyboard.press('ArrowDown'); page.keyboard.press('End')
    ring, chosen = page.locator('.plv-ring').bounding_box(), selection(page)
    assert page.locator('.plv-spark').count() == 1 and page.locator('.plv-panel td').count() >= 4
    page.keyboard.press('Escape')
    page.mouse.click(ring['x'] + ring['width']/2, ring['y'] + ring['height']/2)
    assert selection(page) == chosen
    page.locator('.plv-track input').focus(); page.keyboard.press('Home') # the youngest unit was not there at the start
    assert 'not there' in page.inner_text('.plv-panel')
    box = page.locator('.plv-stage').bounding_box()
    page.mouse.click(ring['x'] + ring['width']/2, box['y'] + box['height']/2)
    assert selection(page).startswith('unit')

def test_edits_on_the_time_line(opened, page_of, grown):
    page = opened(page_of('edits', grown))
    marks = page.locator('.plv-mark')
    assert marks.count() == len({e['step'] for e in grown.edits})
    marks.first.focus(); page.keyboard.press('Enter')
    at = int(page.evaluate(NOW).split()[1].rstrip(','))
    assert at >= grown.edits[0]['step'] and grown.edits[0]['text'] in marks.first.get_attribute('aria-label')

def test_colour_by_another_metric(opened, page_of, grown):
    page = opened(page_of('metric', grown))
    before = page.evaluate(PICTURE)
    page.select_option('.plv-choose select', 'outgoing')
    assert page.evaluate(PICTURE) != before and 'norm of the weights out' in page.inner_text('.plv-legend')

def test_health_and_river_choose_layers_and_moments(opened, page_of, grown):
    page = opened(page_of('layers', grown))
    for view in ('health', 'river'):
        page.click(f'[data-view={view}]')
        page.locator('.plv-stage').focus()
        page.keyboard.press('ArrowDown')
        assert 'body.layers.0.linear' in selection(page)
        now = page.evaluate(NOW)
        page.keyboard.press('ArrowLeft')
        assert page.evaluate(NOW) != now
        page.keyboard.press('Escape'); page.keyboard.press('End')
    box = page.locator('.plv-stage').bounding_box()
    page.mouse.click(box['x'] + .6*box['width'], box['y'] + .5*box['height'])
    assert 'body.layers' in selection(page) and page.evaluate(NOW) != now

def test_light_and_dark(opened, page_of, grown):
    url = page_of('themes', grown)
    def luminance(colour): return sum(map(int, colour[4:-1].split(',')[:3]))/765
    for scheme in ('light', 'dark'):
        page = opened(url, scheme)
        style = page.evaluate('''(() => {
            const s = getComputedStyle(document.querySelector('.plv'))
            return [s.backgroundColor, s.color] })()''')
        back, words = map(luminance, style)
        assert (back > .9 and words < .2) if scheme == 'light' else (back < .15 and words > .85)

def test_words_are_large_enough_and_apart(opened, page_of, grown):
    page = opened(page_of('words', grown))
    for view in ('topology', 'health', 'river'):
        page.click(f'[data-view={view}]')
        small = page.evaluate('''[...document.querySelectorAll('.plv *')].filter(e => [...e.childNodes].some(n => n.nodeType === 3
            && n.textContent.trim())).map(e => parseFloat(getComputedStyle(e).fontSize)).filter(s => s < 11)''')
        over = page.evaluate('''(() => {
            const words = [...document.querySelectorAll('.plv-stage svg text')].filter(e => !e.hasAttribute('transform'))
            const b = words.map(e => e.getBoundingClientRect())
            const meet = (p, q) => p.left < q.right - 1 && q.left < p.right - 1
                && p.top < q.bottom - 3 && q.top < p.bottom - 3
            return b.filter((p, i) => b.some((q, j) => j > i && meet(p, q))).length })()''')
        assert small == [] and over == 0

def test_a_hundred_layers(opened, page_of):
    import numpy as np
    from plasticity.film import Column, Film
    film, rng, columns = Film(), np.random.default_rng(0), [Column(f'blocks.{i}.mlp.fc1', 4096) for i in range(100)]
    for s in range(20): film.add(s, columns, dict(incoming={c.name: rng.random(4096) for c in columns}))
    page = opened(page_of('large', film))
    page.locator('.plv-stage').focus()
    page.keyboard.press('ArrowRight')
    assert selection(page).startswith('units 0–')
    took = page.evaluate('''(() => { const t = performance.now(), i = document.querySelector('.plv-track input')
        for (let k = 0; k < 10; k++) { i.value = k; i.dispatchEvent(new Event('input')) } return (performance.now() - t)/10 })()''')
    assert took < 400 # milliseconds a frame, on a processor

def test_the_report_of_a_script_free_page(browser, page_of, grown):
    "Where scripts may not run, the still is there"
    ctx = browser.browser.new_context(java_script_enabled=False) if browser.browser else None
    if ctx is None: pytest.skip('this browser context cannot be made again')
    page = ctx.new_page()
    page.goto(page_of('still', grown))
    assert page.locator('img').first.get_attribute('alt').startswith('topology of a network')
    ctx.close()

WATCH = """async code => {
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel
    const clock = [...document.querySelectorAll('.plv-clock')].pop(), seen = new Set()
    let going = true
    const done = kernel.requestExecute({ code }).done.then(() => { going = false })
    while (going) { seen.add(clock.textContent); await new Promise(r => setTimeout(r, 40)) }
    await done
    return [...seen] }"""

def test_the_chapter_in_jupyterlab(notebook):
    nb = notebook('20_widgets.ipynb')
    view = nb.page.locator('.jp-OutputArea .plv').first
    view.scroll_into_view_if_needed()
    views = nb.page.locator('.jp-OutputArea .plv')
    views.last.scroll_into_view_if_needed()
    stage = views.last.locator('.plv-stage')
    stage.locator('svg text').first.wait_for()
    stage.focus()
    nb.page.wait_for_timeout(500)
    assert nb.ask('view.selected') == "['body.layers.0.linear', 2]"
    nb.page.keyboard.press('ArrowDown'); nb.page.keyboard.press('ArrowDown')
    nb.page.wait_for_timeout(500)
    assert nb.ask('view.selected') == "['body.layers.0.linear', 4]"
    views.last.locator('.plv-track input').focus()
    nb.page.keyboard.press('Home')
    nb.page.wait_for_timeout(500)
    assert nb.ask('view.time') == '0'
    nb.page.keyboard.press('End')
    width = int(nb.ask("trainer.model.get_layer_sizes()[0]"))
    views.last.locator('[data-act=prune]').click()
    views.last.locator('.plv-do').wait_for()
    assert 'outputs change by' in views.last.locator('.plv-preview').inner_text()
    assert int(nb.ask("trainer.model.get_layer_sizes()[0]")) == width
    views.last.locator('.plv-do').click()
    nb.page.wait_for_function("() => [...document.querySelectorAll('.plv-preview')].some(e => e.textContent.includes('done'))")
    assert int(nb.ask("trainer.model.get_layer_sizes()[0]")) == width - 1
    views.last.locator('[data-act=undo]').click()
    views.last.locator('.plv-do').click()
    nb.page.wait_for_timeout(800)
    assert int(nb.ask("trainer.model.get_layer_sizes()[0]")) == width
    seen = nb.page.evaluate(WATCH, 'trainer.fit(120)') # the picture moves while the kernel trains
    assert len(seen) >= 4 and len({s.split()[1] for s in seen}) == len(seen)
