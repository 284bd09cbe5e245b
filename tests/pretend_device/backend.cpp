// A device that pretends to be CUDA: its tensors say cuda:N and their memory is the host's.
//
// Three parts of torch know a device by registration, and all three can be replaced at run time, with a CPU build of torch
// as with a CUDA build that finds no driver:
//
//   device guard  The registry is an array of pointers: ours is stored, and the one before it restored.
//   hooks         The CUDA hooks are made once per process, perhaps before we are loaded. They have no data, so the
//                 object is kept and its virtual table exchanged.
//   kernels       Every operator with a CPU kernel gets a CUDA kernel that runs it on the same memory. Registrations
//                 stack, so those of a CUDA build come back when ours are dropped.
//
// Built and loaded by build.py, driven by device.py through the functions at the end.

#include <ATen/core/Tensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace {

using at::DeviceIndex;
using at::IValue;
using at::Storage;
using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::Stream;

DeviceIndex num_devices = 0;
thread_local DeviceIndex current = -1;  // -1: what the process has set
DeviceIndex current_of_process = 0;

DeviceIndex current_device() {
  return current >= 0 ? current : current_of_process;
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Stream default_stream(Device device) {
    const auto index = device.index() < 0 ? current_device() : device.index();
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, index));
  }
  DeviceIndex deviceCount() const noexcept override { return num_devices; }
  Device getDevice() const override { return Device(DeviceType::CUDA, current_device()); }
  void setDevice(Device device) const override { current = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  Device exchangeDevice(Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  Stream getStream(Device device) const noexcept override { return default_stream(device); }
  Stream getDefaultStream(Device device) const override { return default_stream(device); }
  Stream getNewStream(Device device, int) const override { return default_stream(device); }
  Stream exchangeStream(Stream stream) const noexcept override { return default_stream(stream.device()); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

// Ordinary memory that remembers being pinned: a pointer is pinned if it lies in a range that this gave out.
struct PinnedAllocator final : c10::Allocator {
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static std::map<const char*, size_t>& ranges() {
    static std::map<const char*, size_t> ranges;
    return ranges;
  }
  static void release(void* pointer) {
    const std::lock_guard<std::mutex> lock(mutex());
    ranges().erase(static_cast<const char*>(pointer));
    std::free(pointer);
  }
  static bool holds(const void* pointer) {
    const std::lock_guard<std::mutex> lock(mutex());
    auto next = ranges().upper_bound(static_cast<const char*>(pointer));
    if (next == ranges().begin()) {
      return false;
    }
    --next;
    return pointer < next->first + next->second;
  }
  c10::DataPtr allocate(size_t num_bytes) override {
    void* pointer = std::aligned_alloc(64, (num_bytes / 64 + 1) * 64);
    TORCH_CHECK(pointer != nullptr, "no memory for ", num_bytes, " pinned bytes");
    const std::lock_guard<std::mutex> lock(mutex());
    ranges()[static_cast<const char*>(pointer)] = num_bytes + 1;  // an empty tensor is pinned too
    return {pointer, pointer, &release, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t num_bytes) const override { std::memcpy(to, from, num_bytes); }
};

// Says that it is on the device, and draws what the host's generator of the same seed draws.
struct Generator final : c10::GeneratorImpl {
  Generator(DeviceIndex index, at::Generator host)
      : c10::GeneratorImpl(Device(DeviceType::CUDA, index), DispatchKeySet(DispatchKey::CUDA)), host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(device().index(), host.clone()); }

  at::Generator host;
};

// No data members: see the top.
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return num_devices; }
  int getNumGPUs() const override { return num_devices; }
  DeviceIndex getCurrentDevice() const override { return ::current_device(); }
  DeviceIndex current_device() const override { return ::current_device(); }
  void setCurrentDevice(DeviceIndex device) const override { current = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    const auto before = ::current_device();
    current = device;
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    static const auto generator =
        at::make_generator<Generator>(index < 0 ? DeviceIndex(0) : index, at::detail::getDefaultCPUGenerator());
    return generator;
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? ::current_device() : index, at::detail::createCPUGenerator());
  }
  bool isPinnedPtr(const void* pointer) const override { return PinnedAllocator::holds(pointer); }
  at::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
  void deviceSynchronize(DeviceIndex) const override {}
};

// A pretended storage owns a host storage, the context of its data pointer, and has the same address.
Storage storage_on_device(const Storage& host, DeviceIndex index) {
  c10::DataPtr data(
      const_cast<void*>(host.data()),
      new Storage(host),
      [](void* context) { delete static_cast<Storage*>(context); },
      Device(DeviceType::CUDA, index));
  return Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), host.nbytes(), std::move(data), c10::GetCPUAllocator(), /*resizable=*/true));
}

const Storage& host_of(const Storage& storage) {
  return *static_cast<const Storage*>(storage.data_ptr().get_context());
}

// After the host storage has got other memory.
void adopt_memory_of_host(const Storage& storage) {
  const auto host = host_of(storage);
  if (storage.data() != host.data() || storage.nbytes() != host.nbytes()) {
    auto fresh = storage_on_device(host, storage.device().index());
    auto* changed = storage.unsafeGetStorageImpl();
    changed->set_data_ptr_noswap(std::move(fresh.unsafeGetStorageImpl()->mutable_data_ptr()));
    changed->set_nbytes(host.nbytes());
  }
}

// The arguments and results of one call, taken to the host and back.
class Call {
 public:
  IValue to_host(const IValue& value) {
    if (value.isTensor()) {
      return to_host(value.toTensor());
    }
    if (value.isStorage() && value.toStorage().device().is_cuda()) {
      const auto storage = value.toStorage();
      storages_.emplace_back(storage, host_of(storage));
      return storages_.back().second;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      index_ = value.toDevice().has_index() ? value.toDevice().index() : current_device();
      return Device(DeviceType::CPU);
    }
    if (value.isGenerator()) {
      const auto generator = value.toGenerator();
      TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
      return static_cast<const Generator*>(generator.unsafeGetGeneratorImpl())->host;
    }
    return each_of_a_list(value, [this](const IValue& item) { return to_host(item); });
  }

  IValue to_device(const IValue& value) {
    if (value.isTensor()) {
      return to_device(value.toTensor());
    }
    return each_of_a_list(value, [this](const IValue& item) { return to_device(item); });
  }

  // What a kernel did to an argument besides writing its numbers: out= may have another size, set_ another storage.
  void update_arguments() {
    for (const auto& [tensor, host] : tensors_) {
      if (!tensor.is_cuda()) {
        continue;
      }
      auto* to = tensor.unsafeGetTensorImpl();
      const auto& storage = host.storage();
      if (host_of(tensor.storage()).unsafeGetStorageImpl() != storage.unsafeGetStorageImpl()) {
        to->set_storage_keep_dtype(find_or_make(storage));
      } else {
        adopt_memory_of_host(tensor.storage());
      }
      if (tensor.sizes() != host.sizes() || tensor.strides() != host.strides() ||
          tensor.storage_offset() != host.storage_offset()) {
        to->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
      }
    }
  }

 private:
  Tensor to_host(const Tensor& tensor) {
    if (!tensor.defined()) {
      return tensor;
    }
    for (const auto& [known, host] : tensors_) {
      if (known.is_same(tensor)) {
        return host;
      }
    }
    Tensor host = tensor;
    if (tensor.is_cuda()) {
      index_ = index_ < 0 ? tensor.device().index() : index_;
      auto storage = host_of(tensor.storage());
      storages_.emplace_back(tensor.storage(), storage);
      host = view_of(std::move(storage), DispatchKey::CPU, tensor);
    }
    tensors_.emplace_back(tensor, host);
    return host;
  }

  Tensor to_device(const Tensor& result) {
    if (!result.defined()) {
      return result;
    }
    for (const auto& [tensor, host] : tensors_) {
      if (host.is_same(result)) {
        return tensor;
      }
      if (!tensor.is_cuda() && tensor.has_storage() && result.has_storage() && result.is_alias_of(tensor)) {
        return result;  // a view of what is on the host
      }
    }
    return view_of(find_or_make(result.storage()), DispatchKey::CUDA, result);
  }

  const Storage find_or_make(const Storage& host) {
    for (const auto& [storage, known] : storages_) {
      if (known.unsafeGetStorageImpl() == host.unsafeGetStorageImpl()) {
        return storage;
      }
    }
    storages_.emplace_back(storage_on_device(host, index_ < 0 ? current_device() : index_), host);
    return storages_.back().first;
  }

  static Tensor view_of(Storage storage, DispatchKey key, const Tensor& like) {
    auto tensor = at::detail::make_tensor<at::TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    return tensor;
  }

  // Tensors can be in lists, and in lists of lists; other values and lists stay what they are.
  template <typename Change>
  static IValue each_of_a_list(const IValue& value, const Change& change) {
    if (!value.isList()) {
      return value;
    }
    const auto items = value.toList();
    const auto type = items.elementType();
    const auto kind = type->kind();
    if (kind != c10::TypeKind::TensorType && kind != c10::TypeKind::OptionalType && kind != c10::TypeKind::ListType) {
      return value;
    }
    c10::impl::GenericList changed(type);
    changed.reserve(items.size());
    for (const IValue item : items) {
      changed.push_back(change(item));
    }
    return changed;
  }

  std::vector<std::pair<Tensor, Tensor>> tensors_;
  std::vector<std::pair<Storage, Storage>> storages_;
  DeviceIndex index_ = -1;
};

// Copies between host and device by this thread, those inside of other operators included.
thread_local uint64_t num_transfers = 0;

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto num_arguments = op.schema().arguments().size();
  Call call;
  for (auto i = stack->size() - num_arguments; i < stack->size(); ++i) {
    (*stack)[i] = call.to_host((*stack)[i]);
  }
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  call.update_arguments();
  const auto num_results = op.schema().returns().size();
  for (auto i = stack->size() - num_results; i < stack->size(); ++i) {
    (*stack)[i] = call.to_device((*stack)[i]);
  }
}

void copy(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& to = torch::jit::peek(*stack, 0, op.schema().arguments().size()).toTensor();
  const auto& from = torch::jit::peek(*stack, 1, op.schema().arguments().size()).toTensor();
  num_transfers += to.is_cuda() != from.is_cuda();
  run_on_host(op, stack);
}

void read_number(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  ++num_transfers;
  run_on_host(op, stack);
}

// Fresh memory is zero: what a kernel would have written that only pretends to run is a number.
void allocate(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  run_on_host(op, stack);
  const auto host = host_of(stack->back().toTensor().storage());
  if (host.nbytes() < (1 << 20)) {
    std::memset(host.mutable_data(), 0, host.nbytes());
    return;
  }
  // From the system, whose pages are zero and take no memory before they are written to: buffers can be of gigabytes.
  void* zeros = std::calloc(1, host.nbytes());
  TORCH_CHECK(zeros != nullptr, "no memory for ", host.nbytes(), " bytes");
  host.unsafeGetStorageImpl()->set_data_ptr_noswap({zeros, zeros, &std::free, Device(DeviceType::CPU)});
  adopt_memory_of_host(stack->back().toTensor().storage());
}

struct Silence final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

std::vector<c10::RegistrationHandleRAII> registrations;
const c10::impl::DeviceGuardImplInterface* guard_before = nullptr;
void* hooks_before = nullptr;

void*& virtual_table(const at::CUDAHooksInterface& hooks) {
  return *reinterpret_cast<void**>(const_cast<at::CUDAHooksInterface*>(&hooks));
}

// Other operators are made of these, on whatever device.
bool needs_a_kernel(const c10::OperatorHandle& op) {
  return op.hasKernelForDispatchKey(DispatchKey::CPU) || op.hasKernelForDispatchKey(DispatchKey::CUDA) ||
      op.operator_name().name == "aten::copy_";
}

c10::KernelFunction kernel_of(const std::string& name) {
  if (name == "aten::empty" || name == "aten::empty_strided") {
    return c10::KernelFunction::makeFromBoxedFunction<&allocate>();
  }
  if (name == "aten::copy_") {
    return c10::KernelFunction::makeFromBoxedFunction<&copy>();
  }
  if (name == "aten::_local_scalar_dense") {
    return c10::KernelFunction::makeFromBoxedFunction<&read_number>();
  }
  return c10::KernelFunction::makeFromBoxedFunction<&run_on_host>();
}

void register_kernels() {
  auto& dispatcher = c10::Dispatcher::singleton();
  Silence silence;  // of "overriding a previously registered kernel"
  const c10::WarningUtils::WarningHandlerGuard quiet(&silence);
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findSchema(name);
    const bool is_ours = name.name.rfind("aten::", 0) == 0 || name.name.rfind("c10d::", 0) == 0;
    if (!op || !is_ours || !needs_a_kernel(*op)) {
      continue;
    }
    registrations.push_back(dispatcher.registerImpl(
        name, DispatchKey::CUDA, kernel_of(name.name), std::nullopt, nullptr, "tests/pretend_device"));
  }
}

}  // namespace

extern "C" {

void pretend_device_set_current(int index) {
  current_of_process = static_cast<DeviceIndex>(index);
  current = current_of_process;
}

uint64_t pretend_device_transfers() {
  return num_transfers;
}

// False: it is there already.
bool pretend_device_install(int count) {
  if (!registrations.empty()) {
    return false;
  }
  static const Guard guard;
  static const Hooks hooks;
  num_devices = static_cast<DeviceIndex>(count);
  auto& entry = c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
  guard_before = entry.exchange(&guard);
  hooks_before = std::exchange(virtual_table(at::detail::getCUDAHooks()), virtual_table(hooks));
  at::globalContext().lazyInitDevice(DeviceType::CUDA);  // asked for before a pointer can be pinned
  register_kernels();
  return true;
}

void pretend_device_remove() {
  registrations.clear();
  virtual_table(at::detail::getCUDAHooks()) = hooks_before;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(guard_before);
}

}  // extern "C"
