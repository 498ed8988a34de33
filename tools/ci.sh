#!/usr/bin/env bash
# Everything CI checks, in the order that fails fastest. Needs no network.
set -euo pipefail
cd "$(dirname "$0")/.."
export MPLBACKEND=agg WANDB_MODE=offline OMP_NUM_THREADS=1
step() { local t=$SECONDS; echo "== $*"; "$@"; echo "   $((SECONDS - t)) s"; }
same() { git diff --exit-code --stat -- "$@" || { echo "run the step above and commit: $*"; exit 1; }; }
link() { [ -L nbs/_quarto.yml ] && [ "$(readlink nbs/_quarto.yml)" = ../_quarto.yml ]; }

step link
step nbdev_clean;  same nbs
step nbdev_export; same plasticity
[ -z "$(git status --porcelain -- nbs plasticity)" ] || { git status --short -- nbs plasticity; exit 1; }
step python tools/readme.py --check
step ruff check nbs plasticity tests tools
step python tools/sizes.py
step python -m plasticity.results
step nbdev_test --n_workers 2 --timing
if command -v quarto >/dev/null; then step nbdev_docs; test -f _docs/index.html; else step python tools/proc.py; fi
step python -m pytest -q tests/browser
step python -m pytest -q -n 2 tests --ignore=tests/browser
