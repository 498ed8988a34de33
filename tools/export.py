"Export these notebooks to the package (`nbdev_export` does all of them and the index): python tools/export.py nbs/01_data.ipynb ..."
import sys
from nbdev.export import nb_export

if __name__ == '__main__':
    for nb in sys.argv[1:]: nb_export(nb)
