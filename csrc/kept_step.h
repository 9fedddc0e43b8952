// The rows of a step that was checked in full, kept for the next one.
//
// The check of a step takes ten microseconds a tensor in Python. The next step asks the same
// objects one question each, whether anything is other than then, through the C API of Python: this
// links and includes no torch. Whatever differs, and whatever cannot be asked, is a "no": the step
// is checked in full again, with all its messages.
//
// What is asked, and what each question catches:
//   groups hold these parameters, in this order  add_param_group, remask, a list that was edited
//   optimizer.state holds these dicts            load_state_dict, a user's own state
//   the module holds this compact parameter      release, remask, a block of tuned.released()
//   values: address, version                     p.data = x, share_memory_, any write
//   every owner holds this weight                load_state_dict(assign=True), untied weights
//   weight: version                              load_state_dict, nn.init, any write
//           storage, address                     weight.data = x, share_memory_
//           shape, strides, dtype                weight.data = weight.data.t() or .view(dtype)
//   state: object and address                    an entry that was replaced, moved or shared
//   gradient: type, dtype, layout, size, device  set_to_none, backward, another tool's gradient
// A backward leaves none of this in the caches: some sixty lines of memory a tensor, which are
// fetched some entries ahead. The address of a gradient is taken anew each time. Shape and dtype of
// a state are not asked: the kept step holds its memory, so no address of it can be that of
// anything smaller.
#pragma once
#include <Python.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace fishfast {

struct KeptLayout {  // of a row, in bytes
  int64_t row, grad, k, scalars, scalars_bytes;
};

// All references are borrowed from the lists given to the constructor, which the caller keeps.
// Nothing of this is called without the GIL.
class KeptStep {
 public:
  // questions: what kept_step.py lists as _QUESTIONS, in that order: attributes of torch.Tensor.
  // entries: one tuple per parameter of the groups, in their order; kept_step.py makes them.
  // state: the (parameter, dict) of the optimizer's state, in its order.
  // rows: the table, one row per entry that has one. Throws std::invalid_argument.
  KeptStep(PyObject* questions, PyObject* entries, PyObject* state, char* rows, KeptLayout layout,
           int64_t device_index);
  ~KeptStep() { let_go(); }
  KeptStep(const KeptStep&) = delete;
  KeptStep& operator=(const KeptStep&) = delete;

  // Returns whether all is as it was, and if so takes the gradients: rows without one get k = 0,
  // which every kernel skips. Holds the gradients until let_go().
  bool as_before(PyObject* state, PyObject* groups);

  // After as_before: the distinct (group, number of this step) that scalars are needed for.
  const std::vector<std::pair<int64_t, float>>& kinds() const { return kinds_; }

  // Counts the step and fills the scalars of every row with those of its kind.
  void fill(const char* scalars_of_kinds);

  // After the update: counts a version of all that was written, and notes that weight and values
  // agree in it. Returns false with a Python error set if that fails.
  bool mark_written(PyObject* increment_version);

  void let_go();  // of the gradients

 private:
  struct Owner {
    PyObject *module_dict, *name;
  };
  struct State {
    PyObject *name, *tensor;
    const void* address;
  };
  struct Entry {
    PyObject *parameter, *values_name, *target, *seen, *weight;
    PyObject *shape, *strides, *dtype, *state;
    // Where the entry's are in owners_, states_ and lines_: flat, so that they are read in a row.
    size_t first_owner, last_owner, first_state, last_state, first_line, last_written, last_line;
    const void *address, *weight_address, *weight_storage;
    float* step;  // in host memory; null: none is counted
    int64_t group, row, k;
    // Of the present step.
    PyObject* grad = nullptr;
    int64_t values_version = 0, weight_version = 0;
    size_t kind = 0;
  };

  bool same_groups(PyObject* groups) const;
  bool same_state(PyObject* state) const;
  bool is_held(const Entry& entry) const;
  bool same_values(Entry& entry) const;
  bool same_weight(Entry& entry) const;
  bool same_states(const Entry& entry) const;
  bool take_gradient(Entry& entry);
  void find_lines(Entry& entry);
  void find_lines_of_tensor(PyObject* tensor);
  void find_lines_of_attributes(PyObject* object);
  void find_lines_of_dict(PyObject* dict);
  size_t kind_of(const Entry& entry);
  char* row(const Entry& entry) const { return rows_ + entry.row * layout_.row; }

  // Questions, in the order of the constructor's tuple.
  PyObject *grad_, *version_, *dtype_, *shape_;                                  // attributes
  PyObject *data_ptr_, *numel_, *is_contiguous_, *is_neg_, *stride_, *storage_;  // methods
  PyObject* get_device_;                                                         // a method
  PyObject *cdata_, *tensor_cdata_;  // addresses of an untyped storage, of a tensor
  PyObject *tensor_type_, *float32_;
  std::vector<Entry> entries_;
  std::vector<Owner> owners_;
  std::vector<State> states_;
  std::vector<const void*> lines_;  // of memory that is asked about; first what is written, too
  std::vector<std::pair<PyObject*, PyObject*>> state_;
  std::vector<std::pair<int64_t, float>> kinds_;
  char* rows_;
  KeptLayout layout_;
  int64_t device_index_;
};

}  // namespace fishfast
