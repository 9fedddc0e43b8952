// The Python module fishfast._C: the only file that knows pybind11. Tensors arrive as addresses, so
// the module links no torch. Checks here are those that need no Python knowledge.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <tuple>

#include "kept_step.h"
#include "launch.h"

#ifdef FISHFAST_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;
using namespace fishfast;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// FakeTensor, meta tensors and DTensor have address 0: a kernel must never see them.
void require_address(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string(what) + " has no memory (meta or fake tensor?)");
}

template <class Row>
void check_rows(const Row* rows, int64_t num_rows) {
  require_address(rows != nullptr || num_rows == 0, "the table of rows");
  for (int64_t r = 0; r < num_rows; ++r) {
    if (rows[r].k == 0) continue;
    require_address(rows[r].grad != nullptr, "a gradient");
    require_address(rows[r].values != nullptr, "a compact parameter");
    require_address((rows[r].target.weight == nullptr) == (rows[r].target.offsets == nullptr),
                    "a weight or its offsets");
  }
}

void adam_cpu(uintptr_t rows, int64_t num_rows, int num_threads) {
  check_rows(pointer<SparseAdamRow>(rows), num_rows);
  py::gil_scoped_release release;
  sparse_adam_cpu(pointer<SparseAdamRow>(rows), num_rows, num_threads);
}

void sgd_cpu(uintptr_t rows, int64_t num_rows, int num_threads) {
  check_rows(pointer<SparseSgdRow>(rows), num_rows);
  py::gil_scoped_release release;
  sparse_sgd_cpu(pointer<SparseSgdRow>(rows), num_rows, num_threads);
}

void write_cpu(uintptr_t rows, int64_t num_rows, int num_threads) {
  const WriteRow* table = pointer<WriteRow>(rows);
  require_address(table != nullptr || num_rows == 0, "the table of rows");
  for (int64_t r = 0; r < num_rows; ++r) {
    const ScatterTarget& target = table[r].target;
    require_address(table[r].k == 0 || (table[r].values && target.weight && target.offsets),
                    "values, their weight or its offsets");
  }
  py::gil_scoped_release release;
  write_values_cpu(table, num_rows, num_threads);
}

std::unique_ptr<KeptStep> kept_step(const py::tuple& questions, const py::tuple& entries,
                                    const py::tuple& state, uintptr_t rows,
                                    const std::array<int64_t, 5>& layout, int64_t device_index) {
  const auto [row, grad, k, scalars, scalars_bytes] = layout;
  return std::make_unique<KeptStep>(questions.ptr(), entries.ptr(), state.ptr(),
                                    pointer<char>(rows),
                                    KeptLayout{row, grad, k, scalars, scalars_bytes}, device_index);
}

bool kept_as_before(KeptStep& kept, const py::object& state, const py::object& groups) {
  return kept.as_before(state.ptr(), groups.ptr());
}

void kept_fill(KeptStep& kept, uintptr_t scalars) {
  require_address(scalars != 0 || kept.kinds().empty(), "the scalars of a step");
  kept.fill(pointer<const char>(scalars));
}

void kept_mark_written(KeptStep& kept, const py::object& increment_version) {
  if (!kept.mark_written(increment_version.ptr())) throw py::error_already_set();
}

void linear_cpu(uintptr_t score, const std::array<uintptr_t, 3>& grad,
                const std::array<uintptr_t, 3>& x, uintptr_t starts, uintptr_t ends,
                const std::array<int64_t, 4>& sizes, int power, int num_threads) {
  for (uintptr_t address : {score, starts, ends}) require_address(address, "an argument");
  const auto operand = [](const std::array<uintptr_t, 3>& addresses) {
    for (uintptr_t address : addresses) require_address(address, "an operand");
    return FisherOperand{pointer<const float>(addresses[0]), pointer<const int64_t>(addresses[1]),
                         pointer<const int64_t>(addresses[2])};
  };
  const auto [num_outputs, num_inputs, num_samples, score_stride] = sizes;
  const FisherLinear call = {pointer<float>(score),
                             operand(grad),
                             operand(x),
                             pointer<const int64_t>(starts),
                             pointer<const int64_t>(ends),
                             num_outputs,
                             num_inputs,
                             num_samples,
                             score_stride,
                             power};
  py::gil_scoped_release release;
  fisher_linear_cpu(call, num_threads);
}

// Addresses: weight's scores, bias's scores (0: none), grad, x; sizes: outputs, inputs, samples,
// positions, stride of the scores; strides: sample, position and column of grad, then of x.
void linear_blocks_cpu(const std::array<uintptr_t, 4>& addresses,
                       const std::array<int64_t, 5>& sizes, const std::array<int64_t, 6>& strides,
                       bool bias_of_x, int power, int num_threads) {
  for (int i : {0, 2, 3}) require_address(addresses[size_t(i)], "an argument");
  const FisherLinearBlocks call = {
      pointer<float>(addresses[0]),
      pointer<float>(addresses[1]),
      {pointer<const float>(addresses[2]), strides[0], strides[1], strides[2]},
      {pointer<const float>(addresses[3]), strides[3], strides[4], strides[5]},
      bias_of_x,
      sizes[0],
      sizes[1],
      sizes[2],
      sizes[3],
      sizes[4],
      power};
  py::gil_scoped_release release;
  fisher_linear_blocks_cpu(call, num_threads);
}

// Addresses: scores and bias's scores (0: none), grad, x, mean, rstd (0: none); sizes: samples,
// positions, features; strides: sample and position of each of the last four.
void sum_cpu(const std::array<uintptr_t, 6>& addresses, const std::array<int64_t, 3>& sizes,
             const std::array<int64_t, 8>& strides, int power, int num_threads) {
  require_address(addresses[2], "grad");
  const auto block = [&](size_t i, int64_t column) {
    return FisherBlock{pointer<const float>(addresses[i]), strides[2 * i - 4], strides[2 * i - 3],
                       column};
  };
  const FisherSum call = {pointer<float>(addresses[0]),
                          pointer<float>(addresses[1]),
                          block(2, 1),
                          block(3, 1),
                          block(4, 0),
                          block(5, 0),
                          sizes[0],
                          sizes[1],
                          sizes[2],
                          power};
  py::gil_scoped_release release;
  fisher_sum_cpu(call, num_threads);
}

void masked_cpu(uintptr_t out, uintptr_t left, uintptr_t right, uintptr_t indices,
                const std::array<int64_t, 4>& sizes, const std::array<int64_t, 2>& strides,
                int storage, bool wide_indices, int num_threads) {
  for (uintptr_t address : {out, left, right, indices}) require_address(address, "an argument");
  const MaskedGrad call = {pointer<float>(out),
                           pointer<const void>(left),
                           pointer<const void>(right),
                           pointer<const void>(indices),
                           sizes[0],
                           sizes[1],
                           sizes[2],
                           sizes[3],
                           strides[0],
                           strides[1],
                           static_cast<Storage>(storage),
                           wide_indices};
  py::gil_scoped_release release;
  masked_grad_cpu(call, num_threads);
}

void masked_tokens_cpu(uintptr_t out, uintptr_t grad, uintptr_t tokens, uintptr_t indices,
                       const std::array<int64_t, 4>& sizes, int64_t stride, int64_t padding,
                       int storage, bool wide_indices, int num_threads) {
  for (uintptr_t address : {out, grad, tokens, indices}) require_address(address, "an argument");
  const MaskedTokenGrad call = {pointer<float>(out),
                                pointer<const void>(grad),
                                pointer<const int64_t>(tokens),
                                pointer<const void>(indices),
                                sizes[0],
                                sizes[1],
                                sizes[2],
                                sizes[3],
                                stride,
                                padding,
                                static_cast<Storage>(storage),
                                wide_indices};
  py::gil_scoped_release release;
  masked_grad_tokens_cpu(call, num_threads);
}

TopkPasses topk_passes(const std::vector<std::tuple<uintptr_t, int64_t, int>>& tensors,
                       int num_threads) {
  std::vector<ScoreTensor> scores;
  for (const auto& [address, numel, storage] : tensors) {
    require_address(address != 0 || numel == 0, "a score tensor");
    scores.push_back({pointer<const void>(address), numel, static_cast<Storage>(storage)});
  }
  return TopkPasses(std::move(scores), num_threads);
}

std::pair<int64_t, int64_t> topk_histogram(const TopkPasses& passes, int shift, int num_bits,
                                           uint32_t prefix, uintptr_t counts) {
  require_address(counts != 0, "the histogram");
  py::gil_scoped_release release;
  const BadScore bad = passes.histogram(shift, num_bits, prefix, pointer<int64_t>(counts));
  return {bad.tensor, bad.index};
}

std::pair<std::vector<int64_t>, std::vector<int64_t>> topk_count(TopkPasses& passes,
                                                                 uint32_t threshold) {
  py::gil_scoped_release release;
  passes.count(threshold);
  return {passes.greater(), passes.equal()};
}

void topk_emit(const TopkPasses& passes, const std::vector<int64_t>& ties,
               const std::vector<uintptr_t>& outputs, const std::vector<bool>& wide) {
  std::vector<void*> addresses;
  for (uintptr_t output : outputs) addresses.push_back(pointer<void>(output));
  py::gil_scoped_release release;
  passes.emit(ties, addresses, wide);
}

py::dict build_info() {
  py::dict info;
#ifdef __VERSION__
  info["compiler"] = __VERSION__;
#endif
#ifdef FISHFAST_WITH_CUDA
  info["nvcc"] = FISHFAST_NVCC_VERSION;
  info["cuda_archs"] = FISHFAST_CUDA_ARCHS;
#else
  info["nvcc"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  return info;
}

#ifdef FISHFAST_WITH_CUDA
// Works on the tensor's own device. The caller made it the current one (fishfast/_tables.py), or
// this does: to go back makes a context on the device before, which may have had none.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_));
    if (previous_ != device_) check(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  static void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
  }

 private:
  int device_, previous_ = 0;
};

template <class Row>
using RowsLauncher = void (*)(const Row*, const StepChunk*, int64_t, void*);

template <class Row, RowsLauncher<Row> launch>
void rows_cuda(uintptr_t rows, uintptr_t chunks, int64_t num_chunks, int device, uintptr_t stream) {
  require_address((rows != 0 && chunks != 0) || num_chunks == 0, "the table of rows or chunks");
  DeviceGuard guard(device);
  launch(pointer<Row>(rows), pointer<StepChunk>(chunks), num_chunks, pointer<void>(stream));
}

// tables: rows, plans and chunks on the device; sizes: rows and chunks; inputs: the host's array of
// gradient addresses, and found_inf and grad_scale on the device or 0.
using CapturableTables = std::array<uintptr_t, 3>;
using CapturableInputs = std::array<uintptr_t, 3>;
using CapturableSizes = std::array<int64_t, 2>;

template <class Row, class Plan>
void capturable_cuda(void (*launch)(const CapturableStep<Row, Plan>&, const StepInputs&, void*),
                     const CapturableTables& tables, const CapturableSizes& sizes,
                     const CapturableInputs& inputs, int device, uintptr_t stream) {
  const auto [rows, plans, chunks] = tables;
  const auto [num_rows, num_chunks] = sizes;
  require_address((rows != 0 && plans != 0 && inputs[0] != 0) || num_rows == 0, "a table");
  require_address(chunks != 0 || num_chunks == 0, "the table of chunks");
  DeviceGuard guard(device);
  launch(
      {pointer<Row>(rows), pointer<Plan>(plans), pointer<StepChunk>(chunks), num_rows, num_chunks},
      {pointer<const float* const>(inputs[0]), pointer<float>(inputs[1]),
       pointer<float>(inputs[2])},
      pointer<void>(stream));
}

void adam_capturable_cuda(const CapturableTables& tables, const CapturableSizes& sizes,
                          const CapturableInputs& inputs, int device, uintptr_t stream) {
  capturable_cuda(&sparse_adam_capturable_cuda, tables, sizes, inputs, device, stream);
}

void sgd_capturable_cuda(const CapturableTables& tables, const CapturableSizes& sizes,
                         const CapturableInputs& inputs, int device, uintptr_t stream) {
  capturable_cuda(&sparse_sgd_capturable_cuda, tables, sizes, inputs, device, stream);
}

int64_t topk_workspace_bytes(uintptr_t params) {
  return topk_mask_workspace_bytes(*pointer<const TopkParams>(params));
}

void topk_cuda(uintptr_t params, int device, uintptr_t stream) {
  const TopkParams& topk = *pointer<const TopkParams>(params);
  require_address(topk.rows != nullptr && topk.workspace != nullptr && topk.indices != nullptr,
                  "the table of score tensors, the workspace or the indices");
  DeviceGuard guard(device);
  topk_mask_cuda(topk, pointer<void>(stream));
}

// Quiet without a driver: cudaGetDeviceCount returns an error that is kept as the reason.
std::pair<int, std::string> cuda_device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return {count, count == 0 ? "no CUDA device" : ""};
  cudaGetLastError();
  int driver = 0;  // stays 0 without one, which that error calls an insufficient version
  cudaDriverGetVersion(&driver);
  return {0, driver == 0 ? "no NVIDIA driver" : cudaGetErrorString(status)};
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fishfast's compiled kernels; call them through the fishfast package.";
  m.def("build_info", &build_info);

  m.attr("SPARSE_ADAM_ROW_BYTES") = sizeof(SparseAdamRow);
  m.attr("SPARSE_ADAM_PLAN_BYTES") = sizeof(AdamPlan);
  m.attr("ENTRIES_PER_STEP_CHUNK") = kEntriesPerStepChunk;
  m.def("fisher_linear_blocks_cpu", &linear_blocks_cpu, py::arg("addresses"), py::arg("sizes"),
        py::arg("strides"), py::arg("bias_of_x"), py::arg("power"), py::arg("num_threads"));
  m.def("fisher_sum_cpu", &sum_cpu, py::arg("addresses"), py::arg("sizes"), py::arg("strides"),
        py::arg("power"), py::arg("num_threads"));
  m.def("fisher_linear_cpu", &linear_cpu, py::arg("score"), py::arg("grad"), py::arg("x"),
        py::arg("starts"), py::arg("ends"), py::arg("sizes"), py::arg("power"),
        py::arg("num_threads"));
  m.def("masked_grad_cpu", &masked_cpu, py::arg("out"), py::arg("left"), py::arg("right"),
        py::arg("indices"), py::arg("sizes"), py::arg("strides"), py::arg("storage"),
        py::arg("wide_indices"), py::arg("num_threads"));
  m.def("masked_grad_tokens_cpu", &masked_tokens_cpu, py::arg("out"), py::arg("grad"),
        py::arg("tokens"), py::arg("indices"), py::arg("sizes"), py::arg("stride"),
        py::arg("padding"), py::arg("storage"), py::arg("wide_indices"), py::arg("num_threads"));
  m.def("sparse_adam_cpu", &adam_cpu, py::arg("rows"), py::arg("num_rows"), py::arg("num_threads"));
  m.attr("SPARSE_SGD_ROW_BYTES") = sizeof(SparseSgdRow);
  m.attr("SPARSE_SGD_PLAN_BYTES") = sizeof(SgdPlan);
  m.def("sparse_sgd_cpu", &sgd_cpu, py::arg("rows"), py::arg("num_rows"), py::arg("num_threads"));
  m.attr("WRITE_ROW_BYTES") = sizeof(WriteRow);
  m.def("write_values_cpu", &write_cpu, py::arg("rows"), py::arg("num_rows"),
        py::arg("num_threads"));

  py::class_<KeptStep>(m, "KeptStep")
      .def(py::init(&kept_step), py::arg("questions"), py::arg("entries"), py::arg("state"),
           py::arg("rows"), py::arg("layout"), py::arg("device_index"))
      .def("as_before", &kept_as_before, py::arg("state"), py::arg("groups"))
      .def("kinds", &KeptStep::kinds)
      .def("fill", &kept_fill, py::arg("scalars"))
      .def("mark_written", &kept_mark_written, py::arg("increment_version"))
      .def("let_go", &KeptStep::let_go);

  py::class_<TopkPasses>(m, "TopkPasses")
      .def(py::init(&topk_passes), py::arg("tensors"), py::arg("num_threads"))
      .def("histogram", &topk_histogram, py::arg("shift"), py::arg("num_bits"), py::arg("prefix"),
           py::arg("counts"))
      .def("count", &topk_count, py::arg("threshold"))
      .def("emit", &topk_emit, py::arg("ties"), py::arg("outputs"), py::arg("wide"));

#ifdef FISHFAST_WITH_CUDA
  m.def("cuda_device_count", &cuda_device_count);
  const auto def_rows = [&m](const char* name, auto launcher) {
    m.def(name, launcher, py::arg("rows"), py::arg("chunks"), py::arg("num_chunks"),
          py::arg("device"), py::arg("stream"));
  };
  def_rows("sparse_adam_cuda", &rows_cuda<SparseAdamRow, sparse_adam_cuda>);
  def_rows("sparse_sgd_cuda", &rows_cuda<SparseSgdRow, sparse_sgd_cuda>);
  def_rows("write_values_cuda", &rows_cuda<WriteRow, write_values_cuda>);
  m.def("sparse_adam_capturable_cuda", &adam_capturable_cuda, py::arg("tables"), py::arg("sizes"),
        py::arg("inputs"), py::arg("device"), py::arg("stream"));
  m.def("sparse_sgd_capturable_cuda", &sgd_capturable_cuda, py::arg("tables"), py::arg("sizes"),
        py::arg("inputs"), py::arg("device"), py::arg("stream"));
  m.attr("TOPK_ROW_BYTES") = sizeof(TopkRow);
  m.attr("TOPK_PARAMS_BYTES") = sizeof(TopkParams);
  m.attr("TOPK_SCORES_PER_TILE") = kTopkScoresPerTile;
  m.def("topk_mask_workspace_bytes", &topk_workspace_bytes, py::arg("params"));
  m.def("topk_mask_cuda", &topk_cuda, py::arg("params"), py::arg("device"), py::arg("stream"));
#endif
}
