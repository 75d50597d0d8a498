// Memory of large results, kept for the next call of the same size.
//
// A fresh page costs the system more than a kernel takes to fill it, and the C library gives large
// blocks back as soon as they are freed: a gradient allocated anew each step would spend most of
// its time in page faults. A training step asks for the same sizes again and again.
#pragma once

#include <cstddef>
#include <list>
#include <mutex>

namespace guard_ops::cpu {

class Buffers {
 public:
  // The C library itself keeps what is smaller.
  static constexpr size_t smallest = size_t(128) << 10;
  static constexpr size_t most = 8;  // buffers kept

  explicit Buffers(size_t limit) : limit_(limit) {}
  ~Buffers() { release(); }
  Buffers(const Buffers&) = delete;

  // Returns at least `bytes` (not 0) of uninitialized memory that starts on a page; null when the
  // system has none.
  void* take(size_t bytes);
  // Takes back and keeps what take(bytes) gave; of all that is kept, the oldest beyond the limit
  // goes back to the system.
  void give(void* memory, size_t bytes);
  // Sets how many bytes are kept at most from now on.
  void limit(size_t bytes);
  // Gives what is kept back to the system, and says how many bytes that were.
  size_t release();

 private:
  struct Block {
    void* memory;
    size_t size;
  };
  std::list<Block> beyond_limit();
  static size_t unmap(const std::list<Block>& blocks);

  size_t limit_, kept_bytes_ = 0;
  std::list<Block> kept_;  // the latest comes first
  // Nobody waits for it: a caller that would have to, or a child forked while it was held, does
  // without kept memory.
  std::mutex mutex_;
};

}  // namespace guard_ops::cpu
