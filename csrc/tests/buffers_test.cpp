// Memory that is kept for later results: what is handed out again, and what is dropped.
#include "../cpu/buffers.h"

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"

namespace guard_ops::cpu {
namespace {

constexpr size_t MiB = size_t(1) << 20;

void check_reuse() {
  CONTEXT("reuse");
  Buffers buffers(64 * MiB);
  void* first = buffers.take(3 * MiB);
  void* second = buffers.take(3 * MiB);
  CHECK(first != nullptr && second != nullptr && first != second);
  std::memset(first, 1, 3 * MiB);
  std::memset(second, 2, 3 * MiB);
  buffers.give(first, 3 * MiB);
  CHECK(buffers.take(5 * MiB) != first);               // another size is other memory
  CHECK(buffers.take(3 * MiB - 1) == first);           // the same pages
  CHECK(static_cast<char*>(first)[3 * MiB - 1] == 1);  // as it was left, not cleared
  CHECK(buffers.release() == 0);                       // all of it is in use
}

void check_limits() {
  CONTEXT("limits");
  Buffers buffers(4 * MiB);
  std::vector<void*> taken;
  for (int n = 0; n < 3; ++n) taken.push_back(buffers.take(2 * MiB));
  for (void* memory : taken) buffers.give(memory, 2 * MiB);  // the first no longer fits
  CHECK(buffers.take(2 * MiB) == taken[2]);
  CHECK(buffers.take(2 * MiB) == taken[1]);
  CHECK(buffers.release() == 0);
  void* large = buffers.take(8 * MiB);
  buffers.give(large,
               8 * MiB);  // more than the limit: it is not kept, and nothing is dropped for it
  CHECK(buffers.release() == 0);
  buffers.give(taken[1], 2 * MiB);
  buffers.limit(1 * MiB);
  CHECK(buffers.release() == 0);

  Buffers many(64 * MiB);
  std::vector<void*> small;
  for (size_t n = 0; n < Buffers::most + 3; ++n) small.push_back(many.take(MiB / 4));
  for (void* memory : small) many.give(memory, MiB / 4);
  CHECK(many.release() == Buffers::most * MiB / 4);
}

// Memory is writable from its first byte to its last, and starts on a page; on a large page if it
// holds one.
void check_memory() {
  const auto page = size_t(sysconf(_SC_PAGESIZE));
  Buffers buffers(0);
  for (const size_t bytes : {Buffers::smallest, 2 * MiB - 1, 2 * MiB, 5 * MiB + 1, 33 * MiB}) {
    CONTEXT("%zu bytes", bytes);
    auto* memory = static_cast<char*>(buffers.take(bytes));
    CHECK(reinterpret_cast<uintptr_t>(memory) % (bytes >= 2 * MiB ? 2 * MiB : page) == 0);
    std::memset(memory, 7, bytes);
    CHECK(memory[0] == 7 && memory[bytes - 1] == 7);
    buffers.give(memory, bytes);
  }
}

// The address space that is mapped, in pages: what was mapped for alignment has to be given back.
long mapped_pages() {
  long pages = 0;
  FILE* file = std::fopen("/proc/self/statm", "r");
  if (file == nullptr || std::fscanf(file, "%ld", &pages) != 1) pages = -1;
  if (file != nullptr) std::fclose(file);
  return pages;
}

void check_nothing_is_lost() {
  CONTEXT("address space");
  Buffers buffers(16 * MiB);
  const long before = mapped_pages();
  for (int n = 0; n < 100; ++n) {
    const size_t bytes = MiB + size_t(n) * 100'000;
    buffers.give(buffers.take(bytes), bytes);
  }
  CHECK((mapped_pages() - before) * sysconf(_SC_PAGESIZE) <= long(16 * MiB));
  buffers.release();
  CHECK((mapped_pages() - before) * sysconf(_SC_PAGESIZE) <= long(MiB));
}

void check_threads() {
  CONTEXT("threads");
  Buffers buffers(8 * MiB);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (int me = 0; me < 4; ++me) {
    threads.emplace_back([&, me] {
      for (int n = 0; n < 2000; ++n) {
        const size_t bytes = Buffers::smallest << (n % 3);
        auto* memory = static_cast<volatile char*>(buffers.take(bytes));
        memory[0] = memory[bytes - 1] = char(me);
        if (n % 64 == 0) std::this_thread::yield();
        if (memory[0] != me || memory[bytes - 1] != me) ++wrong[me];
        buffers.give(const_cast<char*>(memory), bytes);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int count : wrong) CHECK(count == 0);
}

}  // namespace
}  // namespace guard_ops::cpu

int main() {
  using namespace guard_ops::cpu;
  check_reuse();
  check_limits();
  check_memory();
  check_nothing_is_lost();
  check_threads();
  return guard_ops::test::finish();
}
