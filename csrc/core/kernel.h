// QK_KERNEL(name, Args) declares a kernel for every device: qk::cpu::name picks the instruction set, qk::cuda::name
// launches on the current stream. An Args struct holds plain pointers and sizes: below the face there is no tensor.
#pragma once
#include "core/isa.h"

#if defined(QK_WITH_AMX)  // a compiler that knows it
#define QK_DECLARE_AMX(name, Args) \
  namespace amx {                  \
  void name(const Args&);          \
  }
#define QK_PICK_AMX(name, args) amx::name(args)
#else
#define QK_DECLARE_AMX(name, Args)
#define QK_PICK_AMX(name, args) avx512vnni::name(args)
#endif

#if defined(__x86_64__)
#define QK_DECLARE_CPU(name, Args) \
  namespace generic {              \
  void name(const Args&);          \
  }                                \
  namespace avx2 {                 \
  void name(const Args&);          \
  }                                \
  namespace avx512vnni {           \
  void name(const Args&);          \
  }                                \
  QK_DECLARE_AMX(name, Args)
#define QK_PICK(name, args)                              \
  switch (active_isa()) {                                \
    case Isa::generic: return generic::name(args);       \
    case Isa::avx2: return avx2::name(args);             \
    case Isa::avx512vnni: return avx512vnni::name(args); \
    case Isa::amx: return QK_PICK_AMX(name, args);       \
  }
#else
#define QK_DECLARE_CPU(name, Args) \
  namespace generic {              \
  void name(const Args&);          \
  }
#define QK_PICK(name, args) generic::name(args);
#endif

#define QK_KERNEL(name, Args)                                       \
  namespace qk::cpu {                                               \
  QK_DECLARE_CPU(name, Args)                                        \
  static inline void name(const Args& args) { QK_PICK(name, args) } \
  }                                                                 \
  namespace qk::cuda {                                              \
  void name(const Args&);                                           \
  }
