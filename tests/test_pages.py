"Every page as a reader meets it: links, outputs, sizes, order, and the two pages that are made of the saved results"
import ast
import functools
import json
import os
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from plasticity.results import project_root, results_folder

ROOT = project_root(Path(__file__).parent)
NBS = ROOT/'nbs'
BOOKS = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
NAMES = [p.relative_to(NBS).as_posix() for p in BOOKS]
PAGES = 'results_page.ipynb', 'numbers_page.ipynb'
every_book = pytest.mark.parametrize('book', BOOKS, ids=NAMES)

def text(v): return v if isinstance(v, str) else ''.join(v or ())

@functools.cache
def cells(path): return json.loads(path.read_text())['cells']

def shown(path):
    "Markdown of a page: its prose and its Markdown outputs"
    for c in cells(path):
        if c['cell_type'] == 'markdown': yield text(c['source'])
        for o in c.get('outputs', ()):
            if 'text/markdown' in o.get('data', {}): yield text(o['data']['text/markdown'])

def without_code(s): return re.sub(r'`[^`\n]*`', '`', re.sub(r'^(```|~~~).*?^\1', '', s, flags=re.M | re.S))

def targets(s):
    "Where the links and images of Markdown and of HTML tags in it go"
    s = without_code(s)
    yield from re.findall(r'\]\(<?([^()\s<>]+(?:\([^()\s]*\)[^()\s]*)?)>?(?:\s+"[^"]*")?\)', s)
    yield from re.findall(r'<(?:a|img)\b[^>]*?\b(?:href|src)=["\']([^"\']+)', s)

def slug(heading):
    "The anchor that Pandoc gives a heading"
    s = re.sub(r'[^\w\s.-]', '', re.sub(r'`|\*|\[([^\]]*)\]\([^)]*\)', r'\1', heading).lower())
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', s.strip()))

def anchors(s):
    headings = re.findall(r'^#{1,6} +(.+?)(?: *\{.*\})?$', s, re.M)
    return {slug(h) for h in headings} | set(re.findall(r'\{#([\w-]+)', s))

def dead(path, pieces):
    "Relative links of a page that lead nowhere"
    out = []
    for target in {t for s in pieces for t in targets(s)}:
        if re.match(r'[a-z][a-z0-9+.-]*:|//', target): continue
        file, _, anchor = unquote(target).partition('#')
        to = (path.parent/file) if file else path
        if not to.exists(): out.append(target)
        elif anchor and to.suffix == '.ipynb' and anchor not in set().union(*map(anchors, shown(to))): out.append(target)
        elif anchor and to.suffix == '.md' and anchor not in anchors(to.read_text()): out.append(target)
    return sorted(out)

def test_the_checks_see_what_they_are_for(tmp_path):
    page = tmp_path/'a.ipynb'
    page.write_text(json.dumps(dict(cells=[dict(cell_type='markdown', source='## One `thing`, *two*')])))
    bad = '[x](gone.ipynb) ![p](no.png) [y](a.ipynb#other) <img src="lost.png">'
    assert dead(page, [bad]) == ['a.ipynb#other', 'gone.ipynb', 'lost.png', 'no.png']
    fine = '[x](a.ipynb) [y](#one-thing-two) [z](https://x.org/gone.ipynb) `[c](gone.ipynb)`\n```\n[d](gone.ipynb)\n```'
    assert dead(page, [fine]) == []
    assert expects_output('x = 1\nx') and not expects_output('x;') and not expects_output('x = 1') and not expects_output('f.append(1)')
    assert not expects_output('#| hide\nx') and not expects_output('#| eval: false\nx') and expects_output('#| echo: false\nx')

@every_book
def test_links(book): assert dead(book, shown(book)) == []

@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md'])
def test_links_of_files(name): assert dead(ROOT/name, [(ROOT/name).read_text()]) == []

# %% outputs
SILENT = {'append', 'extend', 'add', 'update', 'backward', 'step', 'fit', 'train', 'eval', 'zero_grad', 'remove', 'close', 'savefig',
          'set_num_threads', 'manual_seed', 'show_doc', 'plot', 'write_text', 'mkdir', 'unlink', 'clear', 'print', 'save_file', 'cleanup',
          'no_waiting_graph'}  # calls that end a cell for what they do

def flags(source): return {m.split(':')[0].strip(): m for m in re.findall(r'^#\| *(.+)$', source, re.M)}

def expects_output(source):
    "Whether a cell that is shown ends in an expression whose value a reader waits for"
    f = flags(source)
    if {'hide', 'export', 'exports', 'exporti', 'default_exp', 'hide_output'} & f.keys() or 'false' in f.get('eval', ''): return False
    if re.sub(r'#.*', '', source).rstrip().endswith(';'): return False
    try: body = ast.parse('\n'.join('pass' if re.match(r'\s*[%!]', v) else v for v in source.split('\n'))).body
    except SyntaxError: return False
    if not body or not isinstance(body[-1], ast.Expr): return False
    v = body[-1].value
    return not (isinstance(v, ast.Call) and getattr(v.func, 'attr', getattr(v.func, 'id', '')) in SILENT)

def shows(o):
    "Whether an output has something in it"
    return o['output_type'] == 'stream' and bool(text(o['text']).strip()) or any(text(v) if not isinstance(v, dict) else v
                                                                                 for v in o.get('data', {}).values())

@every_book
def test_outputs(book):
    code = [c for c in cells(book) if c['cell_type'] == 'code']
    errors = [o['evalue'] for c in code for o in c['outputs'] if o['output_type'] == 'error']
    empty = [text(c['source'])[-100:] for c in code if expects_output(text(c['source'])) and not any(map(shows, c['outputs']))]
    assert errors == [] and empty == []

@every_book
def test_size(book): assert book.stat().st_size < 1_000_000

@every_book
def test_opening(book):
    "A page begins with its title and one line that says what it is about"
    first = next(text(c['source']) for c in cells(book) if c['cell_type'] == 'markdown')
    assert re.match(r'# \S.*\n+> \S', first), first[:80]

# %% the order of the site
def listed():
    "Pages of the sidebar, in order"
    return re.findall(r'^\s*- ([\w/]+\.ipynb)\s*$', (ROOT/'_quarto.yml').read_text(), re.M)

def in_index():
    "Pages that the index's table and its list of studies link to"
    return {t for s in shown(NBS/'index.ipynb') for t in targets(s) if t.endswith('.ipynb')}

def test_sidebar_has_every_page():
    assert sorted(set(NAMES) - set(listed())) == [] and sorted(set(listed()) - set(NAMES)) == [] and len(listed()) == len(set(listed()))

def test_index_has_every_page():
    assert sorted(set(NAMES) - {'index.ipynb'} - in_index()) == [] and sorted(in_index() - set(listed())) == []

# %% the two pages
@functools.cache
def run(name):
    "A page's code, run from top to bottom: its names, and what its last expressions give as Markdown, by cell"
    where, space, out = os.getcwd(), {'__name__': 'page'}, {}
    os.chdir(NBS)
    try:
        for c in cells(NBS/name):
            if c['cell_type'] != 'code': continue
            body = ast.parse(text(c['source']))
            last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
            exec(compile(body, name, 'exec'), space)
            v = eval(compile(ast.Expression(last.value), name, 'eval'), space) if last else None
            if hasattr(v, '_repr_markdown_'): out[c['id']] = v._repr_markdown_()
    finally: os.chdir(where)
    return space, out

def kept(name):
    "Markdown outputs that a page has saved, by cell"
    pairs = [(c['id'], o.get('data', {})) for c in cells(NBS/name) for o in c.get('outputs', ())]
    return {k: text(data['text/markdown']) for k, data in pairs if 'text/markdown' in data}

def test_numbers_page_is_what_the_files_give():
    "Else: python tools/refresh.py nbs/numbers_page.ipynb"
    now, then = run(PAGES[1])[1], kept(PAGES[1])
    assert now.keys() == then.keys() and len(now) >= 3
    for k in now: assert now[k].split('\n') == then[k].split('\n')

def test_results_page_shows_every_result():
    "Else: python tools/refresh.py nbs/results_page.ipynb. Whether one is current changes with every edit of the code: that may lag"
    shown = ' '.join(kept(PAGES[0]).values())
    assert [r['name'] for r in run(PAGES[0])[0]['results'] if f"{r['name']}" not in shown] == []

def test_results_page_has_every_file():
    rows = {r['name']: r for r in run(PAGES[0])[0]['results']}
    files = {p.stem: json.loads(p.read_text())['meta'] for p in results_folder().glob('*.json')}
    assert files.keys() == {k for k, r in rows.items() if r['function']} and len(files) >= 40
    for name, meta in files.items():
        assert all(rows[name][k] == meta[k] for k in ('function', 'device', 'torch', 'seconds', 'date', 'commit'))
        assert (NBS/rows[name]['page']).exists() and rows[name]['state'] != 'missing'
        assert rows[name]['seeds'] == meta['settings'].get('seeds', rows[name]['seeds'])

def study_constant(study, name):
    "A table of published numbers in a study's code"
    code = '\n'.join(text(c['source']) for c in cells(NBS/'studies'/f'{study}.ipynb') if c['cell_type'] == 'code')
    value = next(n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == name)
    return eval(compile(ast.Expression(value), study, 'eval'), {})

def number(v): return float(str(v).lstrip('≥> '))

def test_published_numbers_are_those_of_the_studies():
    space = run(PAGES[1])[0]
    assert study_constant('cloning', 'PAPER') == space['R2_AND_RANKS'] and study_constant('cloning', 'LOSSES') == space['CLONE_LOSS']
    said = study_constant('class_tasks', 'PAPER')
    assert said.keys() == space['CLASSES'].keys()
    for k, row in said.items(): assert {q: number(v) for q, v in row.items()} == {q: number(v) for q, v in space['CLASSES'][k].items()}

def test_verdict():
    verdict = run(PAGES[1])[0]['verdict']
    assert verdict(1., 1.) == 'agrees' and verdict(1., 1.001) == 'higher' and verdict(1., .999) == 'lower'
    assert verdict(1., 1.09, .1, 9) == 'agrees' and verdict(1., 1.11, .1, 9) == 'higher' and verdict(93.3, 93.1, within=.2) == 'agrees'
    assert verdict(.7, .6, sign='>') == 'lower' and verdict(.88, .87, sign='<') == 'agrees' and verdict(.88, .9, sign='<') == 'higher'

def test_numbers_are_read_from_the_files(tmp_path, monkeypatch):
    "Another file gives another number, and a file that is not there is a row that says so"
    space = run(PAGES[1])[0]
    for p in results_folder().glob('*.json'): (tmp_path/p.name).write_text(p.read_text())
    monkeypatch.setenv('PLASTICITY_RESULTS', str(tmp_path))
    file = json.loads((tmp_path/'permuted_remedies.json').read_text())
    i = file['result']['arms'].index('L2 init, weak')
    file['result']['first'][i] = [.811, .813, .809]
    (tmp_path/'permuted_remedies.json').write_text(json.dumps(file))
    row, = space['l2_init']()
    assert row['ours'] == '0.811 ± 0.002' and row['seeds'] == 3 and row['verdict'].startswith('agrees')
    for s in range(3): (tmp_path/f'language_shakespeare_{s}.json').unlink(missing_ok=True)
    assert next(space['language']())['verdict'].startswith('not run')
    for s in range(3):
        run_ = dict(meta={}, result=dict(curve=[[1, 2.], [2, 1.47 + .01*s]]))
        (tmp_path/f'language_shakespeare_{s}.json').write_text(json.dumps(run_))
    row = next(space['language']())
    assert row['ours'] == '1.4800 ± 0.0100' and row['seeds'] == 3 and row['verdict'] == 'agrees'
