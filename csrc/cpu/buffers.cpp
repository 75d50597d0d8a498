#include "buffers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <iterator>

namespace guard_ops::cpu {
namespace {

const size_t page = size_t(sysconf(_SC_PAGESIZE));  // 64 KiB on many Arm machines
constexpr size_t large_page = size_t(2) << 20;

constexpr size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Returns a new mapping. One that holds a large page starts on one, and asks the system for large
// pages where it fills them; that is a hint, without which nothing changes.
void* map(size_t size) {
  const size_t align = size >= large_page ? large_page : page;
  void* start = mmap(nullptr, size + align - page, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  const auto first = reinterpret_cast<uintptr_t>(start);
  const uintptr_t begin = rounded(first, align), end = begin + size,
                  last = first + size + align - page;
  if (begin > first) munmap(start, begin - first);
  if (last > end) munmap(reinterpret_cast<void*>(end), last - end);
  void* memory = reinterpret_cast<void*>(begin);
#if defined(MADV_HUGEPAGE)
  if (size >= large_page) madvise(memory, size / large_page * large_page, MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace

void* Buffers::take(size_t bytes) {
  const size_t size = rounded(bytes, page);
  if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      if (block->size != size) continue;
      void* memory = block->memory;
      kept_bytes_ -= size;
      kept_.erase(block);
      return memory;
    }
  }
  return map(size);
}

void Buffers::give(void* memory, size_t bytes) {
  const size_t size = rounded(bytes, page);
  std::list<Block> unwanted;
  if (const std::unique_lock lock(mutex_, std::try_to_lock); lock && size <= limit_) {
    kept_.push_front({memory, size});
    kept_bytes_ += size;
    unwanted = beyond_limit();
  } else {
    unwanted.push_back({memory, size});
  }
  unmap(unwanted);
}

void Buffers::limit(size_t bytes) {
  std::list<Block> unwanted;
  if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
    limit_ = bytes;
    unwanted = beyond_limit();
  }
  unmap(unwanted);
}

size_t Buffers::release() {
  std::list<Block> all;
  if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
    all.swap(kept_);
    kept_bytes_ = 0;
  }
  return unmap(all);
}

// Takes the oldest blocks out until the rest is within the limits.
std::list<Buffers::Block> Buffers::beyond_limit() {
  std::list<Block> oldest;
  while (kept_bytes_ > limit_ || kept_.size() > most) {
    kept_bytes_ -= kept_.back().size;
    oldest.splice(oldest.end(), kept_, std::prev(kept_.end()));
  }
  return oldest;
}

size_t Buffers::unmap(const std::list<Block>& blocks) {
  size_t bytes = 0;
  for (const Block& block : blocks) {
    munmap(block.memory, block.size);
    bytes += block.size;
  }
  return bytes;
}

}  // namespace guard_ops::cpu
