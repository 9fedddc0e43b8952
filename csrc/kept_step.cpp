// kept_step.h, by the C API of Python objects: slots of torch.Tensor's attributes and methods,
// called past the interpreter. A question costs 30 to 60 ns so.
#include "kept_step.h"

#include <cstring>
#include <stdexcept>

namespace fishfast {
namespace {

constexpr size_t kAhead = 4;  // entries: their lines fit in an L1
constexpr int64_t kLineBytes = 64;
constexpr int64_t kTensorBytes = 256;  // of torch's own record of a tensor, and a bit

class Owned {  // a new reference, or null after an error
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* get() const { return object_; }
  PyObject* give() { return std::exchange(object_, nullptr); }
  bool is(PyObject* other) const { return object_ == other; }

 private:
  PyObject* object_;
};

PyObject* attribute(PyObject* descriptor, PyObject* of) {
  return Py_TYPE(descriptor)
      ->tp_descr_get(descriptor, of, reinterpret_cast<PyObject*>(Py_TYPE(of)));
}

PyObject* call(PyObject* method, PyObject* of) {
  return PyObject_Vectorcall(method, &of, 1, nullptr);
}

// Takes the reference. -1 is no version, size or index that is asked for here.
int64_t number(PyObject* object) {
  const Owned owned(object);
  return object == nullptr ? -1 : PyLong_AsLongLong(object);
}

const void* address(PyObject* object) {
  const Owned owned(object);
  return object == nullptr ? nullptr : PyLong_AsVoidPtr(object);
}

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// The names of what is asked by name, made once.
struct Names {
  PyObject* params = interned("params");
  PyObject* parameters = interned("_parameters");
  PyObject* agreed = interned("agreed");
  PyObject* seen = interned("_seen");
  PyObject* version = interned("version");
};

const Names& names() {
  static const Names* const made = new Names;  // never freed: Python may be gone by then
  return *made;
}

bool equal(PyObject* a, PyObject* b) {
  return a == b || PyObject_RichCompareBool(a, b, Py_EQ) == 1;
}

PyObject* item(PyObject* tuple, Py_ssize_t position) {
  PyObject* found = PyTuple_Check(tuple) ? PyTuple_GetItem(tuple, position) : nullptr;
  if (found == nullptr)
    throw std::invalid_argument("a kept step is made from tuples of one length");
  return found;
}

PyObject* item_or_null(PyObject* tuple, Py_ssize_t position) {
  PyObject* found = item(tuple, position);
  return found == Py_None ? nullptr : found;
}

const void* address_in(PyObject* tuple, Py_ssize_t position) {
  return PyLong_AsVoidPtr(item(tuple, position));
}

}  // namespace

KeptStep::KeptStep(PyObject* questions, PyObject* entries, PyObject* state, char* rows,
                   KeptLayout layout, int64_t device_index)
    : rows_(rows), layout_(layout), device_index_(device_index) {
  PyObject** asked[] = {&grad_,     &version_,    &dtype_,         &shape_,       &tensor_cdata_,
                        &data_ptr_, &numel_,      &is_contiguous_, &is_neg_,      &stride_,
                        &storage_,  &get_device_, &cdata_,         &tensor_type_, &float32_};
  for (size_t i = 0; i < std::size(asked); ++i) *asked[i] = item(questions, Py_ssize_t(i));
  for (PyObject* descriptor : {grad_, version_, dtype_, shape_, tensor_cdata_, cdata_}) {
    if (Py_TYPE(descriptor)->tp_descr_get == nullptr) {
      throw std::invalid_argument("the questions of a kept step must be attributes of a class");
    }
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(entries); ++i) {
    PyObject* given = item(entries, i);
    Entry entry{};
    entry.parameter = item(given, 0);
    entry.group = PyLong_AsLongLong(item(given, 1));
    entry.row = PyLong_AsLongLong(item(given, 2));
    entry.k = PyLong_AsLongLong(item(given, 3));
    PyObject* owners = item(given, 4);
    entry.first_owner = owners_.size();
    for (Py_ssize_t o = 0; o < PyTuple_Size(owners); ++o) {
      owners_.push_back({item(item(owners, o), 0), item(item(owners, o), 1)});
    }
    entry.values_name = item_or_null(given, 5);
    entry.target = item_or_null(given, 6);
    entry.address = address_in(given, 7);
    entry.weight = item_or_null(given, 8);
    if (PyObject* facts = item_or_null(given, 9)) {
      entry.shape = item(facts, 0);
      entry.strides = item(facts, 1);
      entry.dtype = item(facts, 2);
      entry.weight_address = address_in(facts, 3);
      entry.weight_storage = address_in(facts, 4);
      entry.seen = item(facts, 5);
    }
    entry.state = item_or_null(given, 10);
    PyObject* states = item(given, 11);
    entry.first_state = states_.size();
    for (Py_ssize_t s = 0; s < PyTuple_Size(states); ++s) {
      PyObject* one = item(states, s);
      states_.push_back({item(one, 0), item(one, 1), address_in(one, 2)});
    }
    entry.step = static_cast<float*>(const_cast<void*>(address_in(given, 12)));
    entry.last_owner = owners_.size();
    entry.last_state = states_.size();
    find_lines(entry);
    entries_.push_back(std::move(entry));
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(state); ++i) {
    state_.emplace_back(item(item(state, i), 0), item(item(state, i), 1));
  }
  if (PyErr_Occurred()) {
    PyErr_Clear();
    throw std::invalid_argument("a kept step is made from addresses and tensors");
  }
}

// Addresses that may be another's by the time they are fetched, which does no harm.
void KeptStep::find_lines_of_tensor(PyObject* tensor) {
  lines_.push_back(tensor);
  const char* const impl = static_cast<const char*>(address(attribute(tensor_cdata_, tensor)));
  for (int64_t at = 0; at < kTensorBytes; at += kLineBytes) lines_.push_back(impl + at);
  const Owned storage(call(storage_, tensor));
  if (storage.get() == nullptr) return;
  lines_.push_back(storage.get());
  lines_.push_back(address(attribute(cdata_, storage.get())));
}

void KeptStep::find_lines_of_dict(PyObject* dict) {
  if (dict == nullptr || !PyDict_Check(dict)) return;
  const auto* const found = reinterpret_cast<PyDictObject*>(dict);
  const auto* const keys = reinterpret_cast<const char*>(found->ma_keys);
  for (int line = 0; line < 3; ++line) lines_.push_back(keys + line * kLineBytes);
  lines_.push_back(found);
  if (found->ma_values != nullptr) lines_.push_back(found->ma_values);
}

void KeptStep::find_lines_of_attributes(PyObject* object) {
  lines_.push_back(object);
  const Owned dict(PyObject_GenericGetDict(object, nullptr));
  find_lines_of_dict(dict.get());
}

void KeptStep::find_lines(Entry& entry) {
  entry.first_line = lines_.size();
  find_lines_of_tensor(entry.parameter);
  find_lines_of_attributes(entry.parameter);
  if (entry.weight) find_lines_of_tensor(entry.weight);
  if (entry.seen) lines_.push_back(entry.seen);
  entry.last_written = lines_.size();
  for (size_t o = entry.first_owner; o < entry.last_owner; ++o) {
    find_lines_of_dict(owners_[o].module_dict);
    find_lines_of_dict(PyDict_GetItemWithError(owners_[o].module_dict, names().parameters));
  }
  if (entry.values_name) lines_.push_back(entry.values_name);
  if (entry.target) find_lines_of_attributes(entry.target);
  find_lines_of_dict(entry.state);
  for (size_t i = entry.first_state; i < entry.last_state; ++i) {
    find_lines_of_tensor(states_[i].tensor);
    lines_.push_back(states_[i].address);  // for the update
  }
  lines_.push_back(entry.address);
  entry.last_line = lines_.size();
  PyErr_Clear();
}

bool KeptStep::same_groups(PyObject* groups) const {
  if (!PyList_Check(groups)) return false;
  size_t position = 0;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    PyObject* group = PyList_GET_ITEM(groups, g);
    PyObject* list = PyDict_Check(group) ? PyDict_GetItemWithError(group, names().params) : nullptr;
    if (list == nullptr || !PyList_Check(list)) return false;
    for (Py_ssize_t p = 0; p < PyList_GET_SIZE(list); ++p, ++position) {
      if (position == entries_.size()) return false;
      const Entry& entry = entries_[position];
      if (PyList_GET_ITEM(list, p) != entry.parameter || entry.group != g) return false;
    }
  }
  return position == entries_.size();
}

// In order, which asks no key for its hash: that of a tensor is a call into Python.
bool KeptStep::same_state(PyObject* state) const {
  if (!PyDict_Check(state) || size_t(PyDict_Size(state)) != state_.size()) return false;
  Py_ssize_t cursor = 0;
  PyObject *key, *value;
  for (size_t i = 0; PyDict_Next(state, &cursor, &key, &value); ++i) {
    if (i == state_.size() || key != state_[i].first || value != state_[i].second) return false;
  }
  return true;
}

// Whether the model trains this parameter, and every owner of its weight holds that weight.
bool KeptStep::is_held(const Entry& entry) const {
  for (size_t o = entry.first_owner; o < entry.last_owner; ++o) {
    const Owner& owner = owners_[o];
    PyObject* held = PyDict_GetItemWithError(owner.module_dict, names().parameters);
    if (held == nullptr || !PyDict_Check(held)) return false;
    if (o == entry.first_owner &&
        PyDict_GetItemWithError(held, entry.values_name) != entry.parameter)
      return false;
    if (entry.weight && PyDict_GetItemWithError(held, owner.name) != entry.weight) return false;
  }
  return true;
}

bool KeptStep::same_values(Entry& entry) const {
  if (address(call(data_ptr_, entry.parameter)) != entry.address) return false;
  if (entry.target == nullptr) {  // not masked: p.data = x counts no version
    return number(call(numel_, entry.parameter)) == entry.k &&
           Owned(attribute(dtype_, entry.parameter)).is(float32_) &&
           Owned(call(is_contiguous_, entry.parameter)).is(Py_True);
  }
  entry.values_version = number(attribute(version_, entry.parameter));
  return entry.values_version >= 0 &&
         number(PyObject_GetAttr(entry.parameter, names().agreed)) == entry.values_version;
}

bool KeptStep::same_weight(Entry& entry) const {
  if (entry.weight == nullptr) return true;
  if (!Owned(PyObject_GetAttr(entry.target, names().seen)).is(entry.seen)) return false;
  entry.weight_version = number(attribute(version_, entry.weight));
  if (entry.weight_version < 0 ||
      number(PyObject_GetAttr(entry.seen, names().version)) != entry.weight_version) {
    return false;
  }
  // A storage's own address is not used again while `seen` lives: it has a weak reference to it.
  const Owned storage(call(storage_, entry.weight));
  if (storage.get() == nullptr) return false;
  const Owned shape(attribute(shape_, entry.weight)), strides(call(stride_, entry.weight));
  return address(attribute(cdata_, storage.get())) == entry.weight_storage &&
         address(call(data_ptr_, entry.weight)) == entry.weight_address &&
         Owned(attribute(dtype_, entry.weight)).is(entry.dtype) && shape.get() != nullptr &&
         strides.get() != nullptr && equal(shape.get(), entry.shape) &&
         equal(strides.get(), entry.strides);
}

bool KeptStep::same_states(const Entry& entry) const {
  for (size_t i = entry.first_state; i < entry.last_state; ++i) {
    const State& state = states_[i];
    if (PyDict_GetItemWithError(entry.state, state.name) != state.tensor ||
        address(call(data_ptr_, state.tensor)) != state.address) {
      return false;
    }
  }
  return true;
}

// Takes the gradient as it is now; none is right, too, but to a parameter without a row only none.
bool KeptStep::take_gradient(Entry& entry) {
  Owned grad(attribute(grad_, entry.parameter));
  if (grad.is(Py_None)) {
    if (entry.row >= 0) std::memset(row(entry) + layout_.k, 0, sizeof(int64_t));
    return true;
  }
  PyObject* const found = grad.get();
  if (found == nullptr || entry.row < 0) return false;
  if (reinterpret_cast<PyObject*>(Py_TYPE(found)) != tensor_type_ ||
      !Owned(attribute(dtype_, found)).is(float32_) ||
      !Owned(call(is_contiguous_, found)).is(Py_True) ||
      !Owned(call(is_neg_, found)).is(Py_False) || number(call(numel_, found)) != entry.k ||
      number(call(get_device_, found)) != device_index_) {
    return false;
  }
  const void* const data = address(call(data_ptr_, found));  // of a sparse one: an error
  if (data == nullptr && entry.k != 0) return false;
  std::memcpy(row(entry) + layout_.grad, &data, sizeof(data));
  std::memcpy(row(entry) + layout_.k, &entry.k, sizeof(entry.k));
  __builtin_prefetch(data);  // for the update
  entry.grad = grad.give();
  return true;
}

size_t KeptStep::kind_of(const Entry& entry) {
  const std::pair<int64_t, float> kind{entry.group, entry.step ? *entry.step + 1.0f : 0.0f};
  size_t i = kinds_.size();
  // From the last: neighbours are nearly always of one kind.
  while (i > 0 && kinds_[i - 1] != kind) --i;
  if (i > 0) return i - 1;
  kinds_.push_back(kind);
  return kinds_.size() - 1;
}

bool KeptStep::as_before(PyObject* state, PyObject* groups) {
  let_go();
  kinds_.clear();
  bool same = same_groups(groups) && same_state(state);
  for (size_t i = 0; same && i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    if (i + kAhead < entries_.size()) {
      const Entry& next = entries_[i + kAhead];
      for (size_t l = next.first_line; l < next.last_line; ++l) __builtin_prefetch(lines_[l]);
    }
    same = is_held(entry) && take_gradient(entry);
    if (!same || entry.grad == nullptr) continue;
    same = same_values(entry) && same_weight(entry) && same_states(entry);
    if (same) entry.kind = kind_of(entry);
  }
  if (!same) let_go();
  PyErr_Clear();  // a question that failed is a "no", and the full check says why
  return same;
}

void KeptStep::fill(const char* scalars_of_kinds) {
  for (const Entry& entry : entries_) {
    if (entry.grad == nullptr) continue;
    if (entry.step) *entry.step = kinds_[entry.kind].second;
    std::memcpy(row(entry) + layout_.scalars,
                scalars_of_kinds + int64_t(entry.kind) * layout_.scalars_bytes,
                size_t(layout_.scalars_bytes));
  }
}

bool KeptStep::mark_written(PyObject* increment_version) {
  for (const Entry& entry : entries_) {
    for (size_t l = entry.first_line; l < entry.last_written; ++l) {
      __builtin_prefetch(lines_[l], 1);
    }
  }
  const Owned written(PyList_New(0));
  if (written.get() == nullptr) return false;
  for (const Entry& entry : entries_) {
    if (entry.grad == nullptr) continue;
    if (PyList_Append(written.get(), entry.parameter) != 0) return false;
    if (entry.weight == nullptr) continue;
    if (PyList_Append(written.get(), entry.weight) != 0) return false;
    // Said first: another thread that reads the weight just now has nothing to write.
    const Owned agreed(PyLong_FromLongLong(entry.values_version + 1));
    if (PyObject_SetAttr(entry.parameter, names().agreed, agreed.get()) != 0) return false;
    const Owned version(PyLong_FromLongLong(entry.weight_version + 1));
    if (PyObject_SetAttr(entry.seen, names().version, version.get()) != 0) return false;
  }
  const Owned done(PyObject_CallOneArg(increment_version, written.get()));
  return done.get() != nullptr;
}

void KeptStep::let_go() {
  for (Entry& entry : entries_) Py_CLEAR(entry.grad);
}

}  // namespace fishfast
