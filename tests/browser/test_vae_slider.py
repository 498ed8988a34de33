"The slider over latent dimensions, as a reader of a saved page has it: no kernel, no network."
import json
from pathlib import Path

import pytest

NBS = Path(__file__).parents[2]/'nbs'
PICTURE = 'e => e.querySelector("canvas").toDataURL()'

def written(folder, name, html):
    "The address of a page with nothing but this"
    (folder/f'{name}.html').write_text(f'<!doctype html><meta charset="utf-8"><title>{name}</title><body>{html}</body>')
    return f'file://{folder}/{name}.html'

@pytest.fixture(scope='session')
def trained():
    "An autoencoder that has seen the digits for a moment, and images"
    from plasticity.data import get_data
    from plasticity.elbo import pictures
    from plasticity.results import seeded
    from plasticity.vae import AdaptiveVAE, vae_trainer
    digits = pictures(get_data('digits'))
    with seeded(0): model = AdaptiveVAE(digits.shape, (8, 12), 4, 'gaussian')
    vae_trainer(model, digits, lr=8e-3, batch_size=96, eval_every=0, seed=0, device='cpu').fit(2)
    return model, digits.normalize(digits.x_test)

@pytest.fixture
def opened(quiet):
    "Function that opens a page without a network"
    def go(url):
        quiet.goto(url)
        return quiet
    return go

def parts(page, k=0):
    "The k-th slider's two inputs and a function that gives its picture"
    root = page.locator('div[id^=latent]').nth(k)
    return root, root.get_by_label('latent dimension'), root.get_by_label('value', exact=True), lambda: root.evaluate(PICTURE)

def shown(root):
    "Brightness of each pixel of the picture, 0 to 255, as the frames have it"
    return root.evaluate('''e => { const c = e.querySelector('canvas'), copy = new OffscreenCanvas(c.width, c.height)
        const to = copy.getContext('2d', {willReadFrequently: true})
        to.drawImage(c, 0, 0)
        const d = to.getImageData(0, 0, c.width, c.height).data
        return Array.from({length: c.width*c.height}, (_, k) => 255 - d[4*k]) }''')

def test_keyboard_moves_value_and_dimension(opened, trained, tmp_path):
    from plasticity.latents import LatentSlider
    slider = LatentSlider(*trained, most=3, steps=9)
    page = opened(written(tmp_path, 'keys', slider._repr_html_()))
    root, dim, value, picture = parts(page)
    assert value.input_value() == '4' and dim.input_value() == '0'
    seen = {picture()}
    page.keyboard.press('Tab') # the dimension comes first, the value second
    assert page.evaluate('document.activeElement.getAttribute("aria-label")') == 'latent dimension'
    page.keyboard.press('Tab')
    for k in (5, 6): page.keyboard.press('ArrowRight'); assert value.input_value() == str(k); seen.add(picture())
    page.keyboard.press('End'); seen.add(picture())
    page.keyboard.press('Home'); seen.add(picture())
    assert value.input_value() == '0' and len(seen) == 5
    assert root.locator('output').all_inner_texts() == [f'z{slider.dims[0]}', '-2.5']
    assert root.locator('canvas').get_attribute('aria-label') == f'image for z{slider.dims[0]} = -2.5'
    before = picture()
    dim.focus(); page.keyboard.press('ArrowRight')
    assert picture() != before and root.locator('output').first.inner_text() == f'z{slider.dims[1]}'

def test_mouse_moves_both(opened, trained, tmp_path):
    from plasticity.latents import LatentSlider
    slider = LatentSlider(*trained, most=3, steps=9)
    page = opened(written(tmp_path, 'mouse', slider._repr_html_()))
    root, dim, value, picture = parts(page)
    before = picture()
    for e, share, want in ((value, .98, '8'), (value, .02, '0'), (dim, .98, '2')):
        box = e.bounding_box()
        page.mouse.click(box['x'] + share*box['width'], box['y'] + box['height']/2)
        assert e.input_value() == want and picture() != before
        before = picture()
    box = value.bounding_box()
    page.mouse.move(box['x'] + .02*box['width'], box['y'] + box['height']/2); page.mouse.down()
    pictures = set()
    for i in range(1, 9): page.mouse.move(box['x'] + i/8*.96*box['width'], box['y'] + box['height']/2); pictures.add(picture())
    page.mouse.up()
    assert value.input_value() == '8' and len(pictures) > 4

def test_the_picture_is_the_frame(opened, trained, tmp_path):
    from plasticity.latents import LatentSlider
    slider = LatentSlider(*trained, most=3, steps=9)
    page = opened(written(tmp_path, 'frames', slider._repr_html_()))
    root, dim, value, _ = parts(page)
    for i in range(3):
        dim.focus(); page.keyboard.press('Home')
        for _ in range(i): page.keyboard.press('ArrowRight')
        value.focus(); page.keyboard.press('Home')
        for j in range(9):
            assert shown(root) == slider.frames[i, j].flatten().tolist(), (i, j)
            page.keyboard.press('ArrowRight')

def test_two_sliders_on_a_page_are_apart(opened, trained, tmp_path):
    from plasticity.latents import LatentSlider
    model, x = trained
    both = ''.join(LatentSlider(model, x, most=2, steps=s)._repr_html_() for s in (5, 9))
    page = opened(written(tmp_path, 'two', both))
    (_, _, first, one), (_, _, second, two) = parts(page), parts(page, 1)
    kept = two()
    first.focus(); page.keyboard.press('End')
    assert first.input_value() == '4' and second.input_value() == '4' and two() == kept and one() != kept

def test_the_saved_chapter(opened, tmp_path):
    cells = json.loads((NBS/'19_vae.ipynb').read_text())['cells']
    html = [''.join(o.get('data', {}).get('text/html', ())) for c in cells for o in c.get('outputs', ())]
    html = [h for h in html if 'id="latent' in h]
    assert len(html) == 1, 'the chapter is saved without its slider: tools/refresh.py'
    page = opened(written(tmp_path, 'chapter', html[0]))
    _, dim, value, picture = parts(page)
    first = picture()
    value.focus(); page.keyboard.press('End')
    end = picture()
    dim.focus(); page.keyboard.press('End')
    assert len({first, end, picture()}) == 3
