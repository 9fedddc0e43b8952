// A "cuda" device for a build of torch without CUDA, so that tests for a card run on any machine.
// Its memory is the host's, and every operator runs the CPU's kernel on it. What a card refuses is
// refused: operands on several devices. What makes the host wait for a card is counted.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorShape.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <map>
#include <set>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using Stack = torch::jit::Stack;

constexpr int kDevices = 2;
constexpr auto kKeys = c10::DispatchKeySet(c10::DispatchKey::CUDA);

std::map<std::string, int64_t> operators, waits;

// ---- which device is current, and streams, of which there is one ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static thread_local c10::DeviceIndex current;

  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    return c10::Device(c10::kCUDA, std::exchange(current, device.index()));
  }
  c10::Device getDevice() const override { return c10::Device(c10::kCUDA, current); }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Stream getStream(c10::Device device) const override { return only(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return only(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return only(stream.device()); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

 private:
  static c10::Stream only(c10::Device device) { return c10::Stream(c10::Stream::DEFAULT, device); }
};
thread_local c10::DeviceIndex Guard::current = 0;
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return Guard::current; }
  c10::DeviceIndex getCurrentDevice() const override { return Guard::current; }
  void setCurrentDevice(c10::DeviceIndex device) const override { Guard::current = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(Guard::current, device);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};
// In the place of those that torch has by now: it asks its registry once, while it is imported.
void install_hooks() {
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;
}

// ---- memory ----

void release(void* memory) { c10::GetCPUAllocator()->raw_deallocate(memory); }

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* const memory = bytes ? c10::GetCPUAllocator()->raw_allocate(bytes) : nullptr;
    return {memory, memory, &release, c10::Device(c10::kCUDA, Guard::current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
} allocator;

Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(at::Device(c10::kCUDA)));
  return at::detail::empty_generic(sizes, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(at::Device(c10::kCUDA)));
  return at::detail::empty_strided_generic(sizes, strides, &allocator, kKeys,
                                           c10::dtype_or_default(dtype));
}

// The same memory as a CPU tensor.
Tensor on_host(const Tensor& x) {
  if (!x.defined() || !x.is_cuda()) return x;
  const auto options = x.options().device(at::kCPU).requires_grad(false);
  if (x.numel() == 0) return at::empty_strided(x.sizes(), x.strides(), options);
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), options);
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (from.is_cuda() && to.is_cpu() && !non_blocking) ++waits["copy to the host"];
  const at::AutoDispatchBelowADInplaceOrView below;
  on_host(to).copy_(on_host(from));
  return to;
}

// ---- what only touches a tensor's own record ----

const Tensor& resize_(const Tensor& x, c10::IntArrayRef sizes,
                      std::optional<at::MemoryFormat> format) {
  const auto& storage = x.storage();
  const size_t bytes = (c10::multiply_integers(sizes) + x.storage_offset()) * x.element_size();
  if (storage.nbytes() < bytes) {
    const c10::DeviceGuard guard(x.device());
    auto memory = allocator.allocate(bytes);
    if (storage.nbytes()) std::memcpy(memory.get(), storage.data(), storage.nbytes());
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
  x.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  if (format) x.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return x;
}

Tensor& set_storage(Tensor& x, at::Storage storage, int64_t offset, c10::IntArrayRef sizes,
                    c10::IntArrayRef strides) {
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  x.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return x;
}

Tensor& set_whole_storage(Tensor& x, at::Storage storage) {
  const int64_t count = storage.nbytes() / x.element_size();
  return set_storage(x, std::move(storage), 0, {count}, {1});
}

Tensor& set_tensor(Tensor& x, const Tensor& source) {
  return set_storage(x, source.storage(), source.storage_offset(), source.sizes(),
                     source.strides());
}

void record_stream(Tensor&, at::Stream) {}
bool is_pinned(const Tensor&, std::optional<at::Device>) { return false; }

// ---- all other operators: the CPU's, over the same memory ----

// The host must have a result of these before it goes on.
const std::set<std::string> kWaiting = {
    "aten::_local_scalar_dense", "aten::nonzero",        "aten::equal",
    "aten::unique_dim",          "aten::_unique2",       "aten::unique_consecutive",
    "aten::masked_select",       "aten::bincount",       "aten::repeat_interleave.Tensor",
    "aten::is_nonzero",          "aten::segment_reduce", "aten::unique_dim_consecutive",
};

bool indexes_by_mask(const std::string& name, const c10::IValue& indices) {
  if (name != "aten::index.Tensor" && name != "aten::index_put_" &&
      name != "aten::_index_put_impl_")
    return false;
  for (const c10::IValue& index : indices.toListRef()) {
    if (!index.isNone() && index.toTensor().scalar_type() == at::kBool) return true;
  }
  return false;
}

std::vector<Tensor> tensors_in(const c10::IValue& value) {
  std::vector<Tensor> found;
  if (value.isTensor()) {
    found.push_back(value.toTensor());
  } else if (value.isList()) {
    for (const c10::IValue& item : value.toListRef()) {
      if (item.isTensor()) found.push_back(item.toTensor());
    }
  }
  return found;
}

// Returns the device of the operands; one of the CPU is taken only where a card takes it: of no
// dimension, or as indices.
c10::Device only_device(const std::string& name, const c10::FunctionSchema& schema,
                        const c10::IValue* arguments) {
  std::optional<c10::Device> device;
  const auto refuse = [&](const c10::Device& other) {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but ", name, " got ", other,
                " beside ", *device, " (simulated card)");
  };
  const size_t count = schema.arguments().size();
  for (size_t i = 0; i < count; ++i) {
    for (const Tensor& x : tensors_in(arguments[i])) {
      if (!x.defined() || !x.is_cuda()) continue;
      if (device && *device != x.device()) refuse(x.device());
      device = x.device();
    }
  }
  for (size_t i = 0; device && i < count; ++i) {
    const bool takes_indices =
        schema.arguments()[i].name() == "indices" && name.find("index") != std::string::npos;
    for (const Tensor& x : tensors_in(arguments[i])) {
      if (x.defined() && x.is_cpu() && x.dim() > 0 && !takes_indices) refuse(x.device());
    }
  }
  for (size_t i = 0; !device && i < count; ++i) {
    if (arguments[i].isDevice()) device = arguments[i].toDevice();
  }
  return device.value_or(c10::Device(c10::kCUDA, Guard::current));
}

// Tensors of the device and of the host over the same memory.
class Twins {
 public:
  explicit Twins(c10::Device device) : device_(device) {}

  Tensor host(const Tensor& x) {
    if (!x.defined() || !x.is_cuda()) return x;
    for (const auto& [of_device, of_host] : pairs_) {
      if (of_device.is_same(x)) return of_host;
    }
    pairs_.emplace_back(x, on_host(x));
    return pairs_.back().second;
  }

  // An operand that the operator resized, or gave other memory.
  void follow() {
    for (const auto& [of_device, of_host] : pairs_) {
      const bool moved = of_host.numel() && of_host.data_ptr() != of_device.data_ptr();
      if (of_host.sizes() == of_device.sizes() && !moved) continue;
      const auto fresh = at::empty_strided(of_host.sizes(), of_host.strides(),
                                           of_host.options().device(of_device.device()));
      if (of_host.numel()) on_host(fresh).copy_(of_host);
      of_device.unsafeGetTensorImpl()->set_storage_keep_dtype(fresh.storage());
      of_device.unsafeGetTensorImpl()->set_sizes_and_strides(fresh.sizes(), fresh.strides(), 0);
    }
  }

  Tensor device(const Tensor& x) const {
    if (!x.defined()) return x;
    for (const auto& [of_device, of_host] : pairs_) {
      if (of_host.is_same(x)) return of_device;
    }
    for (const auto& [of_device, of_host] : pairs_) {
      if (x.numel() && x.storage().data() == of_host.storage().data()) {
        return record(c10::Storage(of_device.storage()), x,
                      of_device.storage_offset() + x.storage_offset());
      }
    }
    auto* const kept = new Tensor(x);
    c10::DataPtr memory(
        x.storage().mutable_data(), kept, [](void* held) { delete static_cast<Tensor*>(held); },
        device_);
    return record(c10::Storage(c10::Storage::use_byte_size_t(), x.storage().nbytes(),
                               std::move(memory), &allocator, false),
                  x, x.storage_offset());
  }

 private:
  static Tensor record(c10::Storage storage, const Tensor& like, int64_t offset) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), kKeys, like.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), offset);
    return made;
  }

  c10::Device device_;
  std::vector<std::pair<Tensor, Tensor>> pairs_;
};

template <typename Change>
void change_tensors(c10::IValue& value, const Change& change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    auto tensors = value.toTensorVector();
    for (Tensor& x : tensors) x = change(x);
    value = c10::IValue(c10::List<Tensor>(tensors));
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> changed;
    for (const std::optional<Tensor> x : value.toOptionalTensorList()) {
      changed.push_back(x ? std::optional<Tensor>(change(*x)) : std::nullopt);
    }
    value = changed;
  }
}

void run_on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto& schema = op.schema();
  const auto name = c10::toString(op.operator_name());
  c10::IValue* const arguments = stack->data() + stack->size() - schema.arguments().size();
  ++operators[name];
  if (kWaiting.count(name)) ++waits[name];
  if (indexes_by_mask(name, arguments[1])) ++waits[name + " by a mask"];

  const auto device = only_device(name, schema, arguments);
  Twins twins(device);
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    change_tensors(arguments[i], [&](const Tensor& x) { return twins.host(x); });
    if (arguments[i].isDevice() && arguments[i].toDevice().is_cuda()) {
      arguments[i] = c10::Device(c10::kCPU);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  twins.follow();
  const c10::DeviceGuard guard(device);
  for (auto result = stack->end() - schema.returns().size(); result != stack->end(); ++result) {
    change_tensors(*result, [&](const Tensor& x) { return twins.device(x); });
  }
}

auto on_the_host() { return torch::CppFunction::makeFromBoxedFunction<&run_on_host>(); }

// ---- operators that torch has for CUDA alone ----

Tensor& mm_dtype_out(const Tensor& a, const Tensor& b, at::ScalarType dtype, Tensor& out) {
  return out.copy_(a.to(dtype).mm(b.to(dtype)));
}

Tensor mm_dtype(const Tensor& a, const Tensor& b, at::ScalarType dtype) {
  return a.to(dtype).mm(b.to(dtype));
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(on_the_host()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("view.dtype", at::native::view_dtype);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("record_stream", record_stream);
  m.impl("is_pinned", is_pinned);
  m.impl("mm.dtype", mm_dtype);
  m.impl("mm.dtype_out", mm_dtype_out);
  // Their own code asks for the device, and calls what is CUDA's.
  for (const char* name : {"convolution", "convolution_backward", "native_layer_norm",
                           "native_layer_norm_backward", "_thnn_fused_gru_cell"}) {
    m.impl(name, on_the_host());
  }
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  install_hooks();
  m.attr("num_devices") = kDevices;
  m.def("current_device", [] { return int(Guard::current); });
  m.def("set_device", [](int device) { Guard::current = c10::DeviceIndex(device); });
  m.def("operators", [] { return operators; });
  m.def("waits", [] { return waits; });
  m.def("forget", [] {
    operators.clear();
    waits.clear();
  });
}
