#include "storage.h"

// Whether the compiler knew fp16.
extern "C" int64_t has_half() { return HAS_HALF; }
