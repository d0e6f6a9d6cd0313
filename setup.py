"""Build entry point; all metadata and the list of packages are in pyproject.toml.

With NLKERNELS_BUILD=1 the wheel holds the native module `nlkernels._C`, compiled for every
instruction set of this architecture, and, where nvcc is, `nlkernels._C_cuda` for the architectures
of GPUs that NLKERNELS_CUDA_ARCHS names (all of them when it is unset). Without, the wheel is the
same for all platforms, and modules are compiled at their first use. `_C` takes the OpenMP runtime
that the process has loaded under the name libgomp.so.1, which torch brings: torch is not needed
here.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from nlkernels import _build, _build_cuda, _env  # noqa: E402  (the folder above has them)


class BuildNative(build_ext):
    """Compiles what csrc/sources.json lists, as the loader does."""

    def build_extension(self, extension: Extension) -> None:
        """Compile into the temporary folder, then copy to where setuptools wants the module."""
        work = Path(self.build_temp).resolve() / "native"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        recipe = cuda_recipe() if extension.name.endswith("_cuda") else cpu_recipe(work)
        _build.build(recipe, work, "module.so", _build.jobs())
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(work / "module.so", target)


def cpu_recipe(work: Path) -> _build.Recipe:
    """All instruction sets of this architecture."""
    sources = _build.Sources.read(ROOT / "csrc")
    compiler = _build.Compiler.find(_env.compiler())
    openmp = "-lgomp" if _build.links_openmp(compiler, "-lgomp", work) else ""
    return _build.Recipe(sources, tuple(sources.isas()), compiler, openmp)


def cuda_recipe() -> _build.Recipe | None:
    """The architectures of GPUs that are asked for; None without any, or without nvcc.

    Raises:
        BuildError: architectures are named, and nvcc is missing.
    """
    sources = _build.Sources.read(ROOT / "csrc", _build_cuda.PART)
    named = _env.read("NLKERNELS_CUDA_ARCHS")
    architectures = _build_cuda.asked(named or "all", list(sources.listed.get("architectures", ())))
    if not architectures:
        return None
    try:
        return _build_cuda.recipe(sources, architectures, _env.cuda_homes(), _env.compiler())
    except _build.BuildError:
        if named:
            raise
        return None


def modules() -> list[Extension]:
    """The modules that are compiled."""
    names = ["nlkernels._C", *(["nlkernels._C_cuda"] if cuda_recipe() is not None else [])]
    return [Extension(name, sources=[]) for name in names]


if _env.read("NLKERNELS_BUILD") == "1":
    setup(
        ext_modules=modules(),
        cmdclass={"build_ext": BuildNative},
        # pip installs these before it builds, in this mode alone.
        setup_requires=["ninja", "pybind11"],
    )
else:
    setup()
