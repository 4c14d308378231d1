"""The packages; everything else is in pyproject.toml, which cannot say that one of them lies elsewhere."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lightning_kfac*"]), "lightning_kfac.configs"],
    package_dir={"lightning_kfac.configs": "configs"},
)
