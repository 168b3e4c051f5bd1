#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"

namespace mmfast {
namespace cuda {

template void launch_forward<f16, 128>(const CudaAttentionParams& p, void* stream);
template void launch_backward<f16, 128>(const CudaAttentionParams& p, void* stream);

}  // namespace cuda
}  // namespace mmfast
