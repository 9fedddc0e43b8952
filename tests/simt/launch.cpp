// A launch: checks the configuration as the driver does, and runs the workers.
#include <string>
#include <thread>
#include <vector>

#include "scheduler.h"

namespace simt {

Schedule schedule;

static uint64_t past_traces = 0;
uint64_t trace() { return past_traces; }
void reset_trace() { past_traces = 0; }

namespace {

void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const auto require = [](bool ok, const char* what, uint64_t got, const char* limit) {
    if (ok) return;
    throw Error(std::string("simt: invalid launch: ") + what + " is " + std::to_string(got) +
                ", must be " + limit);
  };
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  require(threads >= 1 && threads <= 1024, "threads per block", threads, "1 to 1024");
  require(block.z <= 64, "blockDim.z", block.z, "at most 64");
  require(grid.x >= 1 && grid.x <= 2147483647, "gridDim.x", grid.x, "1 to 2147483647");
  require(grid.y >= 1 && grid.y <= 65535, "gridDim.y", grid.y, "1 to 65535");
  require(grid.z >= 1 && grid.z <= 65535, "gridDim.z", grid.z, "1 to 65535");
  require(shared_bytes <= 227 * 1024, "dynamic shared memory", shared_bytes, "at most 232448");
}

}  // namespace

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  check_launch(grid, block, shared_bytes);
  Launch launch(schedule);
  launch.grid = grid;
  launch.block = block;
  launch.shared_bytes = shared_bytes;
  launch.body = &body;

  std::vector<std::thread> others;
  for (int number = 1; number < launch.schedule.threads; number++) {
    others.emplace_back([&launch, number] { Worker(launch, number).run(); });
  }
  Worker(launch, 0).run();
  for (std::thread& other : others) other.join();
  past_traces = past_traces * 31 + launch.trace;
  if (!launch.error.empty()) throw Error(launch.error);
}

}  // namespace simt
