"""A native module of three small files, in the place of the real one: it compiles in a second.

`python -m tests.toy_extension FOLDER` loads the module whose sources lie in FOLDER and prints what
came of it as JSON.
"""

import json
import sys
import time
from pathlib import Path

NAME = "_toy"

_SOURCES = {
    "cxx_standard": 17,
    "include": ["include"],
    "flags": ["-O0", "-fvisibility=hidden"],
    "bindings": "bindings.cpp",
    "common": ["common.cpp"],
    "units": ["unit.cpp"],
    "isas": {
        "portable": {"machine": "any", "flags": ["-DWIDTH=16"]},
        "avx2": {"machine": "x86_64", "flags": ["-DWIDTH=32"]},
        "avx512": {"machine": "x86_64", "flags": ["-DWIDTH=64"]},
    },
}
_FILES = {
    "include/toy.h": """
#define NLK_STRING_OF(x) #x
#define NLK_STRING(x) NLK_STRING_OF(x)
int threads_of_openmp();
namespace portable { const char* built_for(); int width(); }
namespace avx2 { const char* built_for(); int width(); }
namespace avx512 { const char* built_for(); int width(); }
""",
    "common.cpp": """
#include "toy.h"
#ifdef NLK_STD_THREADS
int threads_of_openmp() { return 0; }
#else
#include <omp.h>
int threads_of_openmp() { return omp_get_max_threads(); }
#endif
""",
    "unit.cpp": """
#include "toy.h"
namespace NLK_ISA {
const char* built_for() { return NLK_STRING(NLK_ISA); }
int width() { return WIDTH; }
}
""",
    "bindings.cpp": """
#include <Python.h>
#include "toy.h"
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "MODULE", nullptr, 0, nullptr};
PyMODINIT_FUNC PyInit_MODULE() {
  PyObject* module = PyModule_Create(&definition);
  PyObject* isas = PyDict_New();
  PyModule_AddObject(module, "isas", isas);
#ifdef NLK_WITH_PORTABLE
  PyDict_SetItemString(isas, portable::built_for(), PyLong_FromLong(portable::width()));
#endif
#ifdef NLK_WITH_AVX2
  PyDict_SetItemString(isas, avx2::built_for(), PyLong_FromLong(avx2::width()));
#endif
#ifdef NLK_WITH_AVX512
  PyDict_SetItemString(isas, avx512::built_for(), PyLong_FromLong(avx512::width()));
#endif
  PyModule_AddStringConstant(module, "sources", NLK_SOURCES);
  PyModule_AddIntConstant(module, "threads_of_openmp", threads_of_openmp());
  PyModule_AddIntConstant(module, "answer", ANSWER);
  return module;
}
""",
}


def write(folder: Path, answer: str = "42", module: str = NAME) -> Path:
    """The sources of a module whose `answer` is a C++ expression."""
    for name, text in _FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("ANSWER", answer).replace("MODULE", module))
    (folder / "sources.json").write_text(json.dumps(_SOURCES))
    return folder


def main() -> None:
    """Load, and say what came of it."""
    from nlkernels._ext import Extension, ExtensionError

    toy = Extension(NAME, lambda: Path(sys.argv[1]))
    start = time.perf_counter()
    try:
        seen = {"answer": toy.load().answer}
    except ExtensionError as error:
        seen = {"error": str(error)}
    print(json.dumps({**seen, "load_s": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
