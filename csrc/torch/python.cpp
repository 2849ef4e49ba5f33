// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The Python module torchrl_vecnorm._C: the eager hot path, which allocates the outputs
// here and calls typed dispatcher handles (about half of what torch.ops costs a call);
// the same from tensordict to tensordict; and statistics in shared memory.
// torchrl_vecnorm/_C.pyi describes it.

#include <ATen/Functions.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/numpy.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "direct.h"
#include "ops.h"
#include "returns.h"
#include "shared_state.h"
#include "team.h"
#include "tensors.h"
#include "totals.h"

namespace py = pybind11;

namespace vecnorm {
namespace {

using Tensors = std::vector<Tensor>;

// A list or tuple of tensors as an argument. As Tensors, a call's lists would take a
// tenth of the time of one of few values.
struct Listed {
  c10::SmallVector<Tensor, 5> tensors;

  operator TensorList() const { return tensors; }
};

// Whether functorch or forward-mode derivatives look into a tensor: they know plain
// torch only.
bool is_transformed(const Tensor& t) {
  constexpr c10::DispatchKeySet wrappers(
      {c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched});
  return t.key_set().has_any(wrappers) || t._fw_grad(0).defined();
}

bool any_transformed(TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), is_transformed);
}

// Whether a tensor is memory of another process's GPU context.
bool came_from_another_process(const Tensor& t) {
  return t.is_cuda() && t.storage().unsafeGetStorageImpl()->received_cuda();
}

// A rule's fields, as torchrl_vecnorm/rule.py has them. As arguments of their own they
// would take a tenth of a call of few values.
RuleArgs rule_args(const py::tuple& fields) {
  TORCH_CHECK_VALUE(fields.size() == 4, "expected a rule of eps, eps_mode, clip and ",
                    "center, got ", fields.size(), " fields");
  return {fields[0].cast<double>(), fields[1].cast<int64_t>(),
          fields[2].is_none() ? std::nullopt : std::optional(fields[2].cast<double>()),
          fields[3].cast<bool>()};
}

std::optional<Tensors> update_and_normalize(const Tensors& x, const Tensors& state,
                                            const Tensors& mask, double keep,
                                            double weight, std::optional<Tensors> out,
                                            const py::tuple& rule) {
  if (any_transformed(x) || any_transformed(state) ||
      (out.has_value() && any_transformed(*out))) {
    return std::nullopt;
  }
  Tensors y = out.has_value() ? std::move(*out) : outputs_like(x);
  update(x, state, y, mask, keep, weight, rule_args(rule));
  return y;
}

std::optional<Tensors> normalized(const Tensors& x, const Tensors& state,
                                  std::optional<Tensors> out, const py::tuple& rule) {
  if (any_transformed(x) || (out.has_value() && any_transformed(*out))) {
    return std::nullopt;
  }
  if (!out.has_value()) {
    return normalize(x, state, rule_args(rule));
  }
  normalize_out(x, state, *out, rule_args(rule));
  return out;
}

std::optional<Tensors> moments_of(const Tensors& x, int64_t feature_ndim,
                                  const Tensors& mask) {
  if (any_transformed(x)) {
    return std::nullopt;
  }
  return moments(x, feature_ndim, mask);
}

std::optional<Tensors> scale_returns_and_scale(const Listed& x, const Listed& done,
                                               const Listed& returns,
                                               const Listed& state, const Listed& mask,
                                               double gamma, bool clears_before,
                                               double keep, const py::tuple& rule) {
  if (any_transformed(x)) {
    return std::nullopt;
  }
  Tensors y = outputs_like(x);
  scale_returns(x, done, returns, state, y, mask, gamma, clears_before, keep,
                rule_args(rule));
  return y;
}

// The same of one key, without lists on the way.
std::optional<Tensor> scale_returns_of_one(const Tensor& x, const Tensor& done,
                                           const Tensor& returns, const Listed& state,
                                           const Listed& mask, double gamma,
                                           bool clears_before, double keep,
                                           const py::tuple& rule) {
  if (is_transformed(x)) {
    return std::nullopt;
  }
  Tensor y = output_like(x);
  scale_returns(x, done, returns, state, y, mask, gamma, clears_before, keep,
                rule_args(rule));
  return y;
}

// Arrays of numpy, for libraries that know nothing else: as tensors of Python and back
// they would take as long as the call. (torch's own way there is not exported by
// torch 2.7.)
Tensor memory_of(const py::array& array) {
  const char kind = array.dtype().kind();
  const py::ssize_t bytes = array.itemsize();
  const bool is_real = kind == 'f' && (bytes == 4 || bytes == 8);
  TORCH_CHECK_TYPE(
      (is_real || kind == 'b') && (array.flags() & py::array::c_style) != 0,
      "expected a dense array of float32, float64 or bool, got ",
      std::string(py::str(array.dtype())));
  const at::ScalarType type = kind == 'b'  ? at::kBool
                              : bytes == 4 ? at::kFloat
                                           : at::kDouble;
  const c10::SmallVector<int64_t, 5> shape(array.shape(), array.shape() + array.ndim());
  return at::from_blob(const_cast<void*>(array.data()), shape, type);
}

py::array array_like(const py::array& array) {
  return py::array(array.dtype(), std::vector<py::ssize_t>(
                                      array.shape(), array.shape() + array.ndim()));
}

py::array normalize_array(const py::array& x, const Listed& state, bool updating,
                          const py::tuple& rule) {
  const Tensor value = memory_of(x);
  py::array result = array_like(x);
  const Tensor y = memory_of(result);
  if (updating) {
    update(value, state, y, {}, 1, 1, rule_args(rule));
  } else {
    normalize_out(value, state, y, rule_args(rule));
  }
  return result;
}

py::array scale_returns_of_arrays(const py::array& x, const py::array& done,
                                  const py::array& returns, const Listed& state,
                                  double gamma, bool clears_before,
                                  const py::tuple& rule) {
  py::array result = array_like(x);
  scale_returns(memory_of(x), memory_of(done), memory_of(returns), state,
                memory_of(result), {}, gamma, clears_before, 1, rule_args(rule));
  return result;
}

// Since.note() of torchrl_vecnorm/syncing.py, of numbers on the CPU: three operators of
// torch would take twice as long as the call that is noted.
void note_call(const Tensor& kept, const Tensor& count, double keep, double samples) {
  for (const Tensor& t : {kept, count}) {
    TORCH_CHECK_VALUE(
        t.device().is_cpu() && t.scalar_type() == at::kDouble && t.numel() == 1,
        "expected one float64 number on the CPU, got ", t.scalar_type(), " ", t.sizes(),
        " on ", t.device());
  }
  *kept.mutable_data_ptr<double>() *= keep;
  double* const total = count.mutable_data_ptr<double>();
  *total = *total * keep + samples;
}

// An entry of nested tensordicts, as the dictionaries that hold it. Only plain
// TensorDicts have them; others answer by their methods, which is Python's business.
struct Path {
  std::vector<py::object> parents;
  py::object name;

  explicit Path(const py::tuple& parts) : name(parts[parts.size() - 1]) {
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      parents.emplace_back(parts[i]);
    }
  }
};

// What a call of the transform comes down to when nothing is special: values in a plain
// tensordict, every state known and in its place. Python's own steps would take longer
// than the update of a small batch.
class Binding {
 public:
  // `parts` are all steps down to the leaves: (dict, name, what has to be there).
  Binding(py::object td, py::list parts, py::object tensordict_type,
          std::vector<py::tuple> in_keys, std::vector<py::tuple> out_keys,
          std::vector<std::optional<int64_t>> ndims, std::vector<py::object> dtypes,
          Tensors state, std::shared_ptr<shared::SharedState> shared,
          const Tensors& entries,
          std::vector<std::pair<py::object, py::object>> watched)
      : td_(std::move(td)),
        parts_(std::move(parts)),
        type_(std::move(tensordict_type)),
        in_(in_keys.begin(), in_keys.end()),
        out_(out_keys.begin(), out_keys.end()),
        ndims_(std::move(ndims)),
        state_(std::move(state)),
        shared_(std::move(shared)),
        watched_(std::move(watched)),
        direct_(Direct::of(state_)),
        in_place_(entries.empty() ? std::nullopt : Direct::of(entries)),
        default_dtype_(c10::get_default_dtype_as_scalartype()) {
    for (const py::object& dtype : dtypes) {
      dtypes_.push_back(reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type);
    }
  }

  // Normalises the values of `td`, all of them or, where that is tolerated, those that
  // are there. False if anything is special, or an operator refuses a value, which it
  // does before it writes: nothing has happened then.
  bool call(const py::object& state_td, const py::object& td, bool updating,
            double keep, double weight, double eps, double timeout, bool tolerant,
            const std::optional<std::vector<std::optional<Tensor>>>& masks) const {
    if (state_td.ptr() != td_.ptr() || !holds() || !is_unchanged() ||
        !is_plain(td.ptr()) || c10::impl::dispatch_mode_enabled() ||
        c10::get_default_dtype_as_scalartype() != default_dtype_) {
      return false;
    }
    const py::object batch_size = td.attr(names().batch_size);
    const int64_t batch_dims = PyTuple_GET_SIZE(batch_size.ptr());
    Tensors x;
    x.reserve(in_.size());
    Dicts outputs;
    outputs.reserve(in_.size());
    for (size_t i = 0; i < in_.size(); ++i) {
      const py::object from = find(td, in_[i]);
      py::object to = find(td, out_[i]);
      PyObject* value = from ? PyDict_GetItem(from.ptr(), in_[i].name.ptr()) : nullptr;
      if (from && value == nullptr && tolerant) {
        x.emplace_back();
        outputs.emplace_back();
        continue;
      }
      if (!to || value == nullptr || !THPVariable_CheckExact(value)) {
        return false;
      }
      const Tensor& t = THPVariable_Unpack(value);
      if (t.device() != state_[States::kLeaves * i].device() ||
          t.layout() != at::kStrided || t.scalar_type() != dtypes_[i] ||
          is_transformed(t) ||
          (ndims_[i].has_value() && t.dim() - batch_dims != *ndims_[i])) {
        return false;
      }
      x.push_back(t);
      outputs.push_back(std::move(to));
    }
    Tensors mask;
    if (masks.has_value()) {
      for (const std::optional<Tensor>& m : *masks) {
        mask.push_back(m.value_or(Tensor()));
      }
    }
    std::optional<Tensors> y;
    shared::Guard guard(shared_.get(), timeout);
    try {
      if (updating && in_place_.has_value()) {
        y = updated_in_place(x, mask, keep, weight, eps);
      }
      if (!y.has_value()) {
        if (shared_ != nullptr) {
          shared_->load();
          if (!updating) {
            guard.release();
          }
        }
        y = updating ? updated(x, mask, keep, weight, eps) : normalized(x, eps);
        if (!y.has_value()) {
          return false;
        }
        if (updating && shared_ != nullptr) {
          shared_->commit();
        }
      }
      guard.release();
    } catch (const c10::ValueError&) {
      return false;
    } catch (const c10::TypeError&) {
      return false;
    }
    for (size_t i = 0; i < y->size(); ++i) {
      if (!(*y)[i].defined()) {
        continue;
      }
      const auto wrapped =
          py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move((*y)[i])));
      if (PyDict_SetItem(outputs[i].ptr(), out_[i].name.ptr(), wrapped.ptr()) != 0) {
        throw py::error_already_set();
      }
    }
    return true;
  }

 private:
  using Dicts = std::vector<py::object>;

  // None where an operator would have to be called for some of the keys.
  std::optional<Tensors> updated(const Tensors& x, Tensors mask, double keep,
                                 double weight, double eps) const {
    if (direct_.has_value()) {
      const auto always = [] { return true; };
      auto y = direct_->update(x, mask, keep, weight, eps, always);
      if (y.has_value()) {
        return y;
      }
    }
    if (!all_defined(x)) {
      return std::nullopt;
    }
    for (size_t i = 0; i < mask.size(); ++i) {
      if (!mask[i].defined()) {
        mask[i] = at::empty({0}, x[i].options().dtype(at::kBool));
      }
    }
    Tensors y = outputs_like(x);
    update(x, state_, y, mask, keep, weight, {eps});
    return y;
  }

  // Shared statistics where they are, without copies; none where something is special.
  std::optional<Tensors> updated_in_place(const Tensors& x, const Tensors& mask,
                                          double keep, double weight,
                                          double eps) const {
    bool is_open = false;
    try {
      auto y = in_place_->update(x, mask, keep, weight, eps,
                                 [&] { return is_open = shared_->begin(); });
      if (is_open) {
        shared_->end();
      }
      return y;
    } catch (...) {
      if (is_open) {
        shared_->undo();
      }
      throw;
    }
  }

  std::optional<Tensors> normalized(const Tensors& x, double eps) const {
    if (direct_.has_value()) {
      if (auto y = direct_->normalize(x, eps); y.has_value()) {
        return y;
      }
    }
    return all_defined(x) ? std::optional(normalize(x, state_, {eps})) : std::nullopt;
  }

  static bool all_defined(const Tensors& x) {
    return std::all_of(x.begin(), x.end(), [](const Tensor& t) { return t.defined(); });
  }

  struct Names {
    py::str dict = py::str("_tensordict");
    py::str locked = py::str("_is_locked");
    py::str batch_size = py::str("_batch_size");
  };

  static const Names& names() {
    static const auto* all = new Names;  // outlives the interpreter
    return *all;
  }

  bool holds() const {
    for (PyObject* part : parts_as_span()) {
      PyObject* child =
          PyDict_GetItem(PyTuple_GET_ITEM(part, 0), PyTuple_GET_ITEM(part, 1));
      // Statistics in the layout of torchrl's class have no `nonfinite`.
      if ((child == nullptr ? Py_None : child) != PyTuple_GET_ITEM(part, 2)) {
        return false;
      }
    }
    return true;
  }

  // Whether lists that may have been changed in place are what they were.
  bool is_unchanged() const {
    for (const auto& [now, then] : watched_) {
      if (PyList_CheckExact(now.ptr()) && PyList_CheckExact(then.ptr()) &&
          have_same_items(now.ptr(), then.ptr())) {
        continue;
      }
      if (!now.equal(then)) {
        return false;
      }
    }
    return true;
  }

  static bool have_same_items(PyObject* a, PyObject* b) {
    const Py_ssize_t size = PyList_GET_SIZE(a);
    if (size != PyList_GET_SIZE(b)) {
      return false;
    }
    for (Py_ssize_t i = 0; i < size; ++i) {
      if (PyList_GET_ITEM(a, i) != PyList_GET_ITEM(b, i)) {
        return false;
      }
    }
    return true;
  }

  c10::ArrayRef<PyObject*> parts_as_span() const {
    return {reinterpret_cast<PyListObject*>(parts_.ptr())->ob_item,
            static_cast<size_t>(PyList_GET_SIZE(parts_.ptr()))};
  }

  bool is_plain(PyObject* td) const {
    return reinterpret_cast<PyObject*>(Py_TYPE(td)) == type_.ptr();
  }

  // The dictionary that has the entry or may be given it; none where there is none, or
  // where it is locked.
  py::object find(const py::object& td, const Path& path) const {
    py::object node = td;
    for (const py::object& name : path.parents) {
      const py::object dict = node.attr(names().dict);
      PyObject* child = PyDict_GetItem(dict.ptr(), name.ptr());
      if (child == nullptr || !is_plain(child)) {
        return py::object();
      }
      node = py::reinterpret_borrow<py::object>(child);
    }
    if (node.attr(names().locked).cast<bool>()) {
      return py::object();
    }
    py::object dict = node.attr(names().dict);
    return PyDict_CheckExact(dict.ptr()) ? dict : py::object();
  }

  py::object td_;
  py::list parts_;
  py::object type_;
  std::vector<Path> in_;
  std::vector<Path> out_;
  std::vector<std::optional<int64_t>> ndims_;
  std::vector<at::ScalarType> dtypes_;
  Tensors state_;
  std::shared_ptr<shared::SharedState> shared_;  // where others update: its copies
  std::vector<std::pair<py::object, py::object>> watched_;  // now, and as they were
  std::optional<Direct> direct_;
  std::optional<Direct> in_place_;  // of the shared entries themselves, in memory
  at::ScalarType default_dtype_;    // what integers come out in
};

}  // namespace
}  // namespace vecnorm

namespace pybind11::detail {

template <>
struct type_caster<vecnorm::Listed> {
  PYBIND11_TYPE_CASTER(vecnorm::Listed, const_name("Sequence[Tensor]"));

  bool load(handle from, bool) {
    if (!PyList_Check(from.ptr()) && !PyTuple_Check(from.ptr())) {
      return false;
    }
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(from.ptr());
    PyObject** const items = PySequence_Fast_ITEMS(from.ptr());
    value.tensors.reserve(size);
    for (Py_ssize_t i = 0; i < size; ++i) {
      if (!THPVariable_Check(items[i])) {
        return false;
      }
      value.tensors.push_back(THPVariable_Unpack(items[i]));
    }
    return true;
  }
};

}  // namespace pybind11::detail

namespace vecnorm {

PYBIND11_MODULE(_C, m) {
  m.def("update", &update_and_normalize, py::arg("x"), py::arg("state"),
        py::arg("mask"), py::arg("keep"), py::arg("weight"), py::arg("out"),
        py::arg("rule"));
  m.def("normalize", &normalized, py::arg("x"), py::arg("state"), py::arg("out"),
        py::arg("rule"));
  m.def("scale_returns", &scale_returns_and_scale, py::arg("x"), py::arg("done"),
        py::arg("returns"), py::arg("state"), py::arg("mask"), py::arg("gamma"),
        py::arg("clears_before"), py::arg("keep"), py::arg("rule"));
  m.def("scale_returns_of_one", &scale_returns_of_one, py::arg("x"), py::arg("done"),
        py::arg("returns"), py::arg("state"), py::arg("mask"), py::arg("gamma"),
        py::arg("clears_before"), py::arg("keep"), py::arg("rule"));
  m.def("normalize_array", &normalize_array, py::arg("x"), py::arg("state"),
        py::arg("updating"), py::arg("rule"));
  m.def("scale_returns_of_arrays", &scale_returns_of_arrays, py::arg("x"),
        py::arg("done"), py::arg("returns"), py::arg("state"), py::arg("gamma"),
        py::arg("clears_before"), py::arg("rule"));
  m.def("note_call", &note_call, py::arg("kept"), py::arg("count"), py::arg("keep"),
        py::arg("samples"));
  m.def("moments", &moments_of, py::arg("x"), py::arg("feature_ndim"), py::arg("mask"));
  m.def(
      "merge",
      [](const Tensors& state, const Tensors& other, double keep, double weight) {
        merge(state, other, keep, weight);
      },
      py::arg("state"), py::arg("other"), py::arg("keep"), py::arg("weight"));
  m.def(
      "write_totals",
      [](const Tensor& buffer, const Tensor& expected, const Tensor& shift,
         const Tensors& batches, bool asks, bool refused) {
        write_totals(buffer, expected, shift, batches, asks, refused);
      },
      py::arg("buffer"), py::arg("expected"), py::arg("shift"), py::arg("batches"),
      py::arg("asks"), py::arg("refused"));
  m.def(
      "read_totals",
      [](const Tensor& buffer, const Tensor& shift, const Tensors& like) {
        return read_totals(buffer, shift, like);
      },
      py::arg("buffer"), py::arg("shift"), py::arg("like"));
  // What kernels check, for implementations in plain torch.
  m.def(
      "check_values",
      [](const Tensors& x, const Tensors& y, const Tensors& state) {
        check_output(x, y, {state});
      },
      py::arg("x"), py::arg("y"), py::arg("state"));
  m.def(
      "check_update",
      [](const Tensors& x, const Tensors& y, const Tensors& mask, const Tensors& state,
         double keep,
         double weight) { check_update(x, y, mask, {state}, keep, weight); },
      py::arg("x"), py::arg("y"), py::arg("mask"), py::arg("state"), py::arg("keep"),
      py::arg("weight"));
  m.def(
      "check_returns",
      [](const Tensors& x, const Tensors& done, const Tensors& returns,
         const Tensors& state, const Tensors& y, const Tensors& mask, double gamma,
         double keep) {
        check_returns({x, done, returns, {state}, y, mask}, gamma, keep);
      },
      py::arg("x"), py::arg("done"), py::arg("returns"), py::arg("state"), py::arg("y"),
      py::arg("mask"), py::arg("gamma"), py::arg("keep"));
  m.def(
      "check_floating_point", [](const Tensors& x) { check_floating_point(x); },
      py::arg("x"));
  m.def(
      "check_mask",
      [](const Tensor& mask, const Tensor& x, int64_t feature_ndim) {
        check_mask(mask, x, feature_ndim, 0);
      },
      py::arg("mask"), py::arg("x"), py::arg("feature_ndim"));
  m.def(
      "check_merge",
      [](const Tensors& state, const Tensors& other, double keep, double weight) {
        check_merge({state}, {other}, keep, weight);
      },
      py::arg("state"), py::arg("other"), py::arg("keep"), py::arg("weight"));
  py::class_<Binding>(m, "Binding")
      .def(py::init<py::object, py::list, py::object, std::vector<py::tuple>,
                    std::vector<py::tuple>, std::vector<std::optional<int64_t>>,
                    std::vector<py::object>, Tensors,
                    std::shared_ptr<shared::SharedState>, const Tensors&,
                    std::vector<std::pair<py::object, py::object>>>())
      .def("call", &Binding::call, py::arg("state_td"), py::arg("td"),
           py::arg("updating"), py::arg("keep"), py::arg("weight"), py::arg("eps"),
           py::arg("timeout"), py::arg("tolerant") = false,
           py::arg("masks") = py::none());
#ifdef VECNORM_WITH_CUDA
  m.def("cuda_path", &set_cuda_path, py::arg("name"));
  m.def("last_cuda_path", &last_cuda_path);
  m.def("cuda_limits", &cuda_limits);
#endif
  m.def("leave_the_pool_after_fork", &leave_the_pool_after_fork);
  m.def("came_from_another_process", &came_from_another_process, py::arg("tensor"));
  using shared::SharedState;
  py::class_<SharedState, std::shared_ptr<SharedState>>(m, "SharedState")
      .def(py::init<Tensor, std::vector<std::string>, Tensors>(), py::arg("control"),
           py::arg("names"), py::arg("leaves"))
      .def_property_readonly("note", &SharedState::note)
      .def_property_readonly("has_journal", &SharedState::has_journal)
      .def_property_readonly("copies", &SharedState::copies)
      .def("acquire", &SharedState::acquire, py::arg("timeout"))
      .def("try_acquire", &SharedState::try_acquire)
      .def("release", &SharedState::release)
      .def("load", &SharedState::load)
      .def("commit", &SharedState::commit)
      .def("lost", &SharedState::lost)
      .def_static("size_for", &SharedState::size_for, py::arg("names"),
                  py::arg("leaves"), py::arg("note"))
      .def_static("init", &SharedState::init, py::arg("control"), py::arg("note"));
}

}  // namespace vecnorm
