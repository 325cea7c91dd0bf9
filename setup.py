"""Say what pyproject.toml cannot: the command lines are installed inside a package of their own.

train.py, decode.py and benchmarks/ import one another by names that are too common for the top level of site-packages.
`selfspan_commands` is where they lie side by side: this directory in a checkout, a directory of its own in a wheel.
"""

from setuptools import find_packages, setup

COMMANDS = {"selfspan_commands": ".", "selfspan_commands.benchmarks": "benchmarks"}

setup(
    script_name=__file__,  # the one module of this directory that is not installed
    packages=[*find_packages(include=["selfspan_jax*", "pallas_kernels*", "data*"]), *COMMANDS],
    package_dir=COMMANDS,
)
