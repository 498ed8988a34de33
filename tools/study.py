"""Run a study notebook's code with plain Python and save its results, on a machine that has PyTorch and no Jupyter.

    python tools/study.py nbs/studies/NAME.ipynb [RESULT ...]     # no RESULT: all of them

Cells run in order, hidden ones too; line magics are skipped. Results go to nbs/results (or PLASTICITY_RESULTS).
"""
import json, linecache, os, sys
from pathlib import Path

def main(path, *names):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ['PLASTICITY_RUN'] = ','.join(names) or 'all'
    os.environ.setdefault('MPLBACKEND', 'agg')
    space = sys.modules['__main__'].__dict__
    for cell in json.loads(Path(path).read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        source = ''.join(line for line in cell['source'] if not line.lstrip().startswith(('%', '!')))
        name = f"<{Path(path).stem} {cell['id']}>"
        linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
        exec(compile(source, name, 'exec'), space)

if __name__ == '__main__':
    if len(sys.argv) < 2: sys.exit(__doc__)
    main(*sys.argv[1:])
