// Operators of the `vptq` namespace for the CPU, and the Python module that carries them.
//
// Schemas are declared in Python (src/vptq/ops), so a build without this file has the same operators. Threads come from
// torch's own pool: a second OpenMP runtime would fight it for the cores.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "kernels.h"
#include "operators.h"

namespace {

STABLE_TORCH_LIBRARY_IMPL(vptq, CPU, library) {
  library.impl("nearest", TORCH_BOX(&vptq::nearest));
  library.impl("assign_columns", TORCH_BOX(&vptq::assign_columns));
  library.impl("linear", TORCH_BOX(&vptq::linear));
  vptq::Isa isa;  // elsewhere PyTorch multiplies float32
  if (vptq::choose_isa(&isa) && vptq::product_kernel_for(isa) != nullptr) {
    library.impl("add_products", TORCH_BOX(&vptq::add_products));
  }
}

PyObject* isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(vptq::isa_name(vptq::isa_or_throw()));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef kMethods[] = {
    {"isa", isa, METH_NOARGS, "Instruction set the CPU kernels use: 'amx', 'avx512', 'avx2' or 'generic'."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "vptq._C", "CPU kernels; importing it registers them.", -1, kMethods,
    nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&kModule); }
