"Package metadata comes from settings.ini, the same file nbdev reads."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

parser = ConfigParser(delimiters=['='])
parser.read('settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
extras = {k.removesuffix('_requirements'): cfg[k].split() for k in cfg if k.endswith('_requirements')}

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
      author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', url=cfg['git_url'],
      long_description=Path('README.md').read_text(encoding='utf-8'),
      long_description_content_type='text/markdown',
      packages=find_packages(include=['plasticity', 'plasticity.*']),
      package_data={'plasticity': ['static/*']},
      python_requires='>=' + cfg['min_python'],
      install_requires=cfg['requirements'].split(),
      extras_require=extras,
      entry_points={'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
                    'console_scripts': ['plasticity=plasticity.experiments:main', 'plasticity-data=plasticity.data:main',
                                        'plasticity-chat=plasticity.chat:main']})
