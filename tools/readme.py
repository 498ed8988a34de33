"""Write README.md from nbs/index.ipynb: prose as it is, code as blocks, its text output beneath.

    python tools/readme.py [--check]
"""
import json, re, sys
from pathlib import Path

def text(v): return v if isinstance(v, str) else ''.join(v)

def outputs(cell):
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if 'text/markdown' in data: yield text(data['text/markdown'])
        elif o['output_type'] == 'stream' or 'text/plain' in data:
            yield '```\n' + text(o.get('text') or data['text/plain']).rstrip() + '\n```'

def markdown(nb):
    for c in nb['cells']:
        source = text(c['source'])
        if re.search(r'^#\|\s*hide\b', source, re.M): continue
        if c['cell_type'] == 'markdown': yield re.sub(r'\]\((?=\w+\.ipynb\)|images/|studies/)', '](nbs/', source)
        if c['cell_type'] == 'code':
            code = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
            if code: yield f'```python\n{code}\n```'
            yield from outputs(c)

if __name__ == '__main__':
    nb = json.loads(Path('nbs/index.ipynb').read_text())
    out = '\n\n'.join(['<!-- Made from nbs/index.ipynb by tools/readme.py: edit that. -->', *markdown(nb)]) + '\n'
    if '--check' in sys.argv:
        if Path('README.md').read_text() != out: sys.exit('README.md is not what nbs/index.ipynb gives: run tools/readme.py, commit')
    else: Path('README.md').write_text(out)
