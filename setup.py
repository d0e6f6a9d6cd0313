"""Build entry point; all metadata and the list of packages are in pyproject.toml.

With NLKERNELS_BUILD=1 the wheel holds the native module `nlkernels._C`, compiled for every
instruction set of this architecture; without, it is the same for all platforms, and the module is
compiled at its first use. The module takes the OpenMP runtime that the process has loaded under
the name libgomp.so.1, which torch brings: torch is not needed here.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from nlkernels import _build, _env  # noqa: E402  (the folder above has them)


class BuildNative(build_ext):
    """Compiles what csrc/sources.json lists, as the loader does."""

    def build_extension(self, extension: Extension) -> None:
        """Compile into the temporary folder, then copy to where setuptools wants the module."""
        work = Path(self.build_temp).resolve() / "native"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        sources = _build.Sources.read(ROOT / "csrc")
        compiler = _build.Compiler.find(_env.compiler())
        openmp = "-lgomp" if _build.links_openmp(compiler, "-lgomp", work) else ""
        recipe = _build.Recipe(sources, tuple(sources.isas()), compiler, openmp)
        _build.build(recipe, work, "_C.so", _build.jobs())
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(work / "_C.so", target)


if _env.read("NLKERNELS_BUILD") == "1":
    setup(
        ext_modules=[Extension("nlkernels._C", sources=[])],
        cmdclass={"build_ext": BuildNative},
        # pip installs these before it builds, in this mode alone.
        setup_requires=["ninja", "pybind11"],
    )
else:
    setup()
