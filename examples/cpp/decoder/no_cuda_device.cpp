// Stands in for cuda_device.cu in a build without CUDA.

#include "device.h"

namespace decoder {

std::unique_ptr<Device> make_cuda_device() { return nullptr; }

}  // namespace decoder
