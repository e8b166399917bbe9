// The dtypes of the kernels, by the codes that infoclip/native.py passes.
#pragma once

namespace infoclip {

enum DType : int { kFloat = 0, kHalf = 1, kBFloat16 = 2, kDouble = 3 };

}  // namespace infoclip
