// The main function of a test that is compiled for one instruction set. It is compiled without that
// set's flags itself, so that it can skip the test on a processor that lacks the set.
#include "../cpu/driver.h"
#include "check.h"

void run_isa_test(const guard_ops::cpu::Kernels& kernels);

int main() {
  const guard_ops::cpu::Kernels* found = guard_ops::cpu::kernels(GUARD_OPS_TEST_ISA);
  if (found == nullptr) {
    std::puts("not on this processor");
    return 77;  // SKIP_RETURN_CODE
  }
  run_isa_test(*found);
  return guard_ops::test::finish();
}
