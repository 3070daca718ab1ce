"""Packages of the wheel; everything else is in pyproject.toml.

Recipes and train configs lie beside the package and are installed inside it, as data. pyproject.toml cannot say so: it
either finds packages or lists them all.
"""

from setuptools import find_namespace_packages, setup

BESIDE = ("recipes", "train_configs")


def folders(*tops: str) -> list[str]:
    return find_namespace_packages(include=[pattern for top in tops for pattern in (top, f"{top}.*")])


setup(
    packages=[*folders("nitp_titan"), *(f"nitp_titan.{name}" for name in folders(*BESIDE))],
    package_dir={f"nitp_titan.{top}": top for top in BESIDE},
    package_data={"": ["*.toml"]},
)
