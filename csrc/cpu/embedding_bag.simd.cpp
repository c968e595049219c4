#include "ops/embedding_bag.h"

#include "cpu/simd.h"

namespace qk::cpu::QK_ISA {

void embedding_bag(const EmbeddingBagArgs& a) {}

}  // namespace qk::cpu::QK_ISA
