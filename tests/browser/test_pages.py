"Pages as a reader opens them: the report of a run with no network, and notebooks in JupyterLab (`make notebooks`: all of them)."
import os
from pathlib import Path

import pytest

NBS = Path(__file__).parents[2]/'nbs'
ALL = [str(p.relative_to(NBS)) for p in sorted(NBS.rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]

@pytest.fixture(scope='session')
def run_folder(tmp_path_factory):
    from plasticity.experiments import run_line
    folder = tmp_path_factory.mktemp('run')/'r'
    return run_line('dryrun=true', 'logging.progress=false', f'hydra.run.dir={folder}')

def test_report_needs_no_network(browser, run_folder):
    page, asked, errors = browser.new_page(), [], []
    page.on('request', lambda r: asked.append(r.url))
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.goto(f'file://{run_folder}/report.html')
    assert [u for u in asked if not u.startswith(('file:', 'data:'))] == [] and errors == []
    sizes = page.evaluate('[...document.images].map(i => i.naturalWidth)')
    assert len(sizes) >= 2 and min(sizes) > 100
    assert page.evaluate('document.documentElement.scrollWidth <= window.innerWidth')
    assert 'mlp on digits' in page.inner_text('h1')
    clock, slider = page.locator('.plv-clock'), page.locator('.plv-track input')
    page.locator('.plv-stage svg text').first.wait_for()
    end = clock.inner_text()
    slider.focus(); page.keyboard.press('Home')
    assert clock.inner_text().startswith('step 0') and clock.inner_text() != end
    page.click('[data-view=health]')
    assert page.get_attribute('[data-view=health]', 'aria-selected') == 'true' and errors == []
    page.close()

@pytest.mark.parametrize('name', ALL if os.environ.get('ALL_NOTEBOOKS') else ['index.ipynb', '00_results.ipynb'])
def test_notebook_runs(notebook, name):
    notebook(name)
