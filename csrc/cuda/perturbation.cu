// Attack step and random start. Formulas and sources: mmfast/reference/perturbation.py.
//
// A unit (a sample, or a token) is a stretch of elements that share a norm. Tiles of up to kTile elements
// never cross units. Where a unit lies in one tile, or no norm is asked for, one launch does all. Otherwise
// each norm takes a pass more, which leaves float64 sums per tile, and a small kernel that adds them in
// order: sums of squares in float64 neither overflow nor cancel, whatever the gradient's scale.
#include "cuda/grid.h"
#include "cuda/perturbation_tiles.h"
#include "mmfast/rng.h"

namespace mmfast {
namespace cuda {
namespace {

using namespace attack;

// The step

struct Coefficients {
  float step = 0, limit = 0;
  Inverse l1;           // of the gradient's norm, for the momentum
  Inverse l2;           // of the direction's norm
  float keep = 1;       // L2: the projection's factor
  float last = 1;       // L2 with previous: the last projection's factor
  bool update = false;  // the momentum is still the old one
};

template <class T, int V>
__device__ __forceinline__ Values<V> direction(const Launch& p, const PerturbTensor& t, const Coefficients& c,
                                               int64_t at) {
  Values<V> g = read<T, V>(t.momentum && !c.update ? t.momentum : t.grad, at);
#pragma unroll
  for (int i = 0; i < V; ++i) g.v[i] = finite(g.v[i]);
  if (t.momentum && c.update) {
    const Values<V> m = read<T, V>(t.momentum, at);
#pragma unroll
    for (int i = 0; i < V; ++i)
      g.v[i] = to_float(from_float<T>(p.decay * m.v[i] + g.v[i] * c.l1.scale * c.l1.rest));
    write<T, V>(t.momentum, at, g);
  }
  return g;
}

// The step with its projections from delta d; with `previous` the blend as well, still to be projected.
template <class T, int V>
__device__ __forceinline__ Values<V> moved(const Launch& p, const PerturbTensor& t, const Coefficients& c,
                                           const Values<V>& d, const Values<V>& g, const Values<V>& origin,
                                           int64_t at) {
  Values<V> v;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (p.l2) {
      v.v[i] = (d.v[i] + g.v[i] * c.l2.scale * (c.l2.rest * c.step)) * c.keep;
    } else {
      v.v[i] = d.v[i] + (g.v[i] > 0 ? c.step : g.v[i] < 0 ? -c.step : 0.0f);
      v.v[i] = within(v.v[i], -c.limit, c.limit);
    }
    if (t.origin) v.v[i] = within(v.v[i], t.low - origin.v[i], t.high - origin.v[i]);
  }
  if (t.previous) {
    const Values<V> before = read<T, V>(t.previous, at);
#pragma unroll
    for (int i = 0; i < V; ++i)
      v.v[i] = d.v[i] + p.blend * (v.v[i] - d.v[i]) + (1 - p.blend) * (d.v[i] - before.v[i]);
  }
  return v;
}

template <class T, int V>
__device__ __forceinline__ Values<V> origin_at(const PerturbTensor& t, int64_t at) {
  return t.origin ? read<T, V>(t.origin, at) : Values<V>{};
}

template <class T, int V>
__device__ __forceinline__ void apply(const Launch& p, const PerturbTensor& t, const Coefficients& c,
                                      int64_t at) {
  const Values<V> g = direction<T, V>(p, t, c, at), d = read<T, V>(t.delta, at);
  const Values<V> x = origin_at<T, V>(t, at);
  Values<V> v = moved<T, V>(p, t, c, d, g, x, at);
  if (t.previous) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      v.v[i] = p.l2 ? v.v[i] * c.last : within(v.v[i], -c.limit, c.limit);
      if (t.origin) v.v[i] = within(v.v[i], t.low - x.v[i], t.high - x.v[i]);
    }
    write<T, V>(t.previous, at, d);
  }
  write<T, V>(t.delta, at, v);
}

template <class T, int kThreads, int V>
__device__ void measure_and_step(const Launch& p, const Part& part, int64_t slot) {
  const PerturbTensor& t = part.tensor;
  const Tile tile = tile_of(part, slot - part.first_slot);
  const bool whole = p.stage == Stage::whole;
  const bool first = threadIdx.x % kThreads == 0;
  Coefficients c;
  if (tile.n) {
    c.step = t.step_size ? t.step_size[tile.sample] : t.step_value;
    c.limit = t.eps ? t.eps[tile.sample] : t.eps_value;
  }
  const float eps = c.limit;
  if (!p.l2) c.limit = round_down<T>(eps);

  if (t.momentum) {
    double sum = 0;
    if (whole || p.stage == Stage::l1) {
      for_elements<kThreads, V>(tile, [&](int64_t i) {
        const Values<V> g = read<T, V>(t.grad, tile.at + i);
#pragma unroll
        for (int k = 0; k < V; ++k) sum += fabsf(finite(g.v[k]));
      });
      sum = group_sum<kThreads>(sum);
      if (!whole) {
        if (first) p.partial[slot] = sum;
        return;
      }
    } else if (tile.n) {
      sum = p.l1[tile.unit];
    }
    c.l1 = inverse_of(sum);
    c.update = true;
  }
  if (p.l2) {
    double gg = 0, dg = 0, dd = 0;
    if (whole || p.stage == Stage::l2) {
      for_elements<kThreads, V>(tile, [&](int64_t i) {
        const Values<V> g = direction<T, V>(p, t, c, tile.at + i), d = read<T, V>(t.delta, tile.at + i);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          gg += double(g.v[k]) * g.v[k];
          dg += double(d.v[k]) * g.v[k];
          dd += double(d.v[k]) * d.v[k];
        }
      });
      gg = group_sum<kThreads>(gg);
      dg = group_sum<kThreads>(dg);
      dd = group_sum<kThreads>(dd);
      if (!whole) {
        if (first) {
          p.partial[slot] = gg;
          p.partial[p.slots + slot] = dg;
          p.partial[2 * p.slots + slot] = dd;
        }
        return;
      }
    } else if (tile.n) {
      gg = p.l2_sums[tile.unit];
      dg = p.l2_sums[p.units + tile.unit];
      dd = p.l2_sums[2 * p.units + tile.unit];
    }
    c.update = false;
    const double norm = sqrt(gg), length = norm > 0 ? c.step : 0;
    c.l2 = inverse_of(norm);
    c.keep = shrink(dd + (norm > 0 ? 2 * length * dg / norm : 0) + length * length, eps);
    if (t.previous) {
      double vv = 0;
      if (whole || p.stage == Stage::blend) {
        for_elements<kThreads, V>(tile, [&](int64_t i) {
          const int64_t at = tile.at + i;
          const Values<V> g = direction<T, V>(p, t, c, at), d = read<T, V>(t.delta, at);
          const Values<V> v = moved<T, V>(p, t, c, d, g, origin_at<T, V>(t, at), at);
#pragma unroll
          for (int k = 0; k < V; ++k) vv += double(v.v[k]) * v.v[k];
        });
        vv = group_sum<kThreads>(vv);
        if (!whole) {
          if (first) p.partial[slot] = vv;
          return;
        }
      } else if (tile.n) {
        vv = p.blended[tile.unit];
      }
      c.last = shrink(vv, eps);
    }
  }
  for_elements<kThreads, V>(tile, [&](int64_t i) { apply<T, V>(p, t, c, tile.at + i); });
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kBlock, 3) step_kernel(const __grid_constant__ Launch p) {
  int64_t slot;
  const Part* part = part_of<kThreads>(p, slot);
  if (!part) return;
  if (part->vector)
    measure_and_step<T, kThreads, 16 / sizeof(T)>(p, *part, slot);
  else
    measure_and_step<T, kThreads, 1>(p, *part, slot);
}

// The L-inf step without momentum: no norm, so no sums.
template <class T, int kThreads, int V>
__device__ void step_without_norm(const Launch& p, const Part& part, int64_t slot) {
  const PerturbTensor& t = part.tensor;
  const Tile tile = tile_of(part, slot - part.first_slot);
  if (!tile.n) return;
  Coefficients c;
  c.step = t.step_size ? t.step_size[tile.sample] : t.step_value;
  c.limit = round_down<T>(t.eps ? t.eps[tile.sample] : t.eps_value);
  for_elements<kThreads, V>(tile, [&](int64_t i) { apply<T, V>(p, t, c, tile.at + i); });
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kBlock) linf_kernel(const __grid_constant__ Launch p) {
  int64_t slot;
  const Part* part = part_of<kThreads>(p, slot);
  if (!part) return;
  if (part->vector)
    step_without_norm<T, kThreads, 16 / sizeof(T)>(p, *part, slot);
  else
    step_without_norm<T, kThreads, 1>(p, *part, slot);
}

// Adds the sums of a unit's tiles in order, a warp for each unit.
__global__ void __launch_bounds__(kBlock) add_kernel(const __grid_constant__ Launch p) {
  const int64_t unit = int64_t(blockIdx.x) * (kBlock / 32) + threadIdx.x / 32;
  if (unit >= p.units) return;
  int which = 0;
  for (int i = 1; i < p.count; ++i) which += unit >= p.part[i].first_unit;
  const Part& part = p.part[which];
  const PerturbTensor& t = part.tensor;
  const int64_t own = unit - part.first_unit;
  int64_t begin = part.first_slot + own * part.tiles, end = begin + part.tiles;
  if (part.tiles == 0) {
    const int64_t elements = (end_of(t, own) - begin_of(t, own)) * t.row_size;
    begin = part.first_slot + slot_of(t, own);
    end = least(begin + (elements + kTile - 1) / kTile, p.slots);
  }
  for (int plane = 0; plane < p.planes; ++plane) {
    double sum = 0;
    for (int64_t i = begin + threadIdx.x % 32; i < end; i += 32) sum += p.from[plane * p.slots + i];
    sum = group_sum<32>(sum);
    if (threadIdx.x % 32 == 0) p.to[plane * p.units + unit] = sum;
  }
}

// The random start

enum Kind : uint32_t { kUniform = 0, kNormal = 1, kRadius = 2 };

// Sine and cosine of 2 pi u, u in [0, 1): reduced to an eighth of a turn around the nearest quarter.
__device__ __forceinline__ void sine_cosine(float u, float& sine, float& cosine) {
  const int quarter = int(u * 4.0f + 0.5f);
  const float x = (u - float(quarter) * 0.25f) * 6.2831853f, z = x * x;
  const float s = ((-1.9515296e-4f * z + 8.3321609e-3f) * z - 1.6666655e-1f) * z * x + x;
  const float c = ((2.4433157e-5f * z - 1.3887316e-3f) * z + 4.1666646e-2f) * z * z - 0.5f * z + 1.0f;
  const bool odd = quarter & 1;
  sine = odd ? c : s;
  cosine = odd ? s : c;
  if (quarter & 2) sine = -sine;
  if ((quarter + 1) & 2) cosine = -cosine;
}

// Numbers of V elements of a sample from the given one on, a multiple of V: uniform in [0, 1), or normal.
template <int V>
__device__ __forceinline__ Values<V> numbers(uint64_t seed, int64_t sample, uint32_t stream, int64_t element,
                                             bool normal) {
  Values<V> out;
#pragma unroll
  for (int k = 0; k < V; k += 4) {
    const uint64_t counter = uint64_t(element + k) / 4;
    const Philox4 r = philox(seed, uint32_t(counter), uint32_t(sample), stream, uint32_t(counter >> 32));
    float u[4] = {uniform_from(r.x), uniform_from(r.y), uniform_from(r.z), uniform_from(r.w)};
    if (normal) {
#pragma unroll
      for (int w = 0; w < 4; w += 2) {  // Box, Muller
        const float radius = sqrtf(-2 * logf(u[w] + 0x1p-24f));
        float sine, cosine;
        sine_cosine(u[w + 1], sine, cosine);
        u[w] = radius * cosine;
        u[w + 1] = radius * sine;
      }
    }
    if constexpr (V == 1) {
      const int word = int(element & 3);
      out.v[0] = word < 2 ? (word == 0 ? u[0] : u[1]) : (word == 2 ? u[2] : u[3]);
    } else {
#pragma unroll
      for (int w = 0; w < 4; ++w) out.v[k + w] = u[w];
    }
  }
  return out;
}

template <class T, int kThreads, int V>
__device__ void start(const Launch& p, const Part& part, int64_t slot) {
  const PerturbTensor& t = part.tensor;
  const Tile tile = tile_of(part, slot - part.first_slot);
  const bool whole = p.stage == Stage::whole;
  const uint64_t seed = uint64_t(*p.seed);
  const uint32_t stream = 4 * uint32_t(part.index);
  float factor = 0, limit = 0;
  if (tile.n) factor = t.eps ? t.eps[tile.sample] : t.eps_value;
  if (p.l2) {
    double square = 0;
    if (whole || p.stage == Stage::l2) {
      for_elements<kThreads, V>(tile, [&](int64_t i) {
        const Values<V> z = numbers<V>(seed, tile.sample, stream + kNormal, tile.place + i, true);
#pragma unroll
        for (int k = 0; k < V; ++k) square += double(z.v[k]) * z.v[k];
      });
      square = group_sum<kThreads>(square);
      if (!whole) {
        if (threadIdx.x % kThreads == 0) p.partial[slot] = square;
        return;
      }
    } else if (tile.n) {
      square = p.l2_sums[tile.unit];
    }
    if (!tile.n) return;
    const uint64_t token = t.token_size ? uint64_t(tile.place / t.token_size) : 0;
    const Philox4 r =
        philox(seed, uint32_t(token), uint32_t(tile.sample), stream + kRadius, uint32_t(token >> 32));
    const double u = double(uniform_from(r.x)) + 0x1p-24;
    factor = square > 0 ? float(factor * exp(log(u) / double(tile.count)) / sqrt(square)) : 0.0f;
  } else {
    limit = round_down<T>(factor);
  }
  for_elements<kThreads, V>(tile, [&](int64_t i) {
    Values<V> v = numbers<V>(seed, tile.sample, stream + (p.l2 ? kNormal : kUniform), tile.place + i, p.l2);
    const Values<V> x = origin_at<T, V>(t, tile.at + i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      v.v[k] = p.l2 ? v.v[k] * factor : within(factor * (2 * v.v[k] - 1), -limit, limit);
      if (t.origin) v.v[k] = within(v.v[k], t.low - x.v[k], t.high - x.v[k]);
    }
    write<T, V>(t.delta, tile.at + i, v);
  });
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kBlock) start_kernel(const __grid_constant__ Launch p) {
  int64_t slot;
  const Part* part = part_of<kThreads>(p, slot);
  if (!part) return;
  if (part->vector)
    start<T, kThreads, 16 / sizeof(T)>(p, *part, slot);
  else
    start<T, kThreads, 1>(p, *part, slot);
}

// Launchers

// Some of the tensors, cut into tiles.
struct Plan {
  Launch launch{};
  bool whole = true;  // every unit lies in one tile
  bool small = true;  // and is left to a warp
};

bool aligned(const PerturbTensor& t, int64_t size_of_element) {
  for (const void* p : {static_cast<const void*>(t.delta), t.grad, t.origin,
                        static_cast<const void*>(t.momentum), static_cast<const void*>(t.previous)})
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  const int64_t unit = t.token_size ? t.token_size : t.row_size;
  return unit % (16 / size_of_element) == 0;
}

// From tensor `next` on, as many as one launch takes; `next` moves behind them.
Plan plan_of(const PerturbParams& p, int64_t& next, bool norms) {
  Plan plan;
  Launch& l = plan.launch;
  l.l2 = p.l2;
  l.decay = p.decay;
  l.blend = p.blend;
  l.seed = p.seed_on_device;
  for (; next < p.count && l.count < kTensors; ++next) {
    PerturbTensor t = p.tensors[next];
    if (t.rows == 0 || t.batch == 0 || t.row_size == 0) continue;
    if (!norms) t.token_size = 0;
    Part& part = l.part[l.count++];
    part.first_slot = l.slots;
    part.first_unit = l.units;
    part.index = int32_t(next);
    part.vector = aligned(t, p.dtype == DType::f32 ? 4 : 2);
    const int64_t unit = t.token_size ? t.token_size : t.cu_seqlens ? 0 : t.row_size;
    if (unit) {
      const int64_t units = t.token_size ? t.rows * (t.row_size / t.token_size) : t.batch;
      part.tiles = (unit + kTile - 1) / kTile;
      l.slots += units * part.tiles;
      l.units += units;
    } else {
      l.slots += t.rows * t.row_size / kTile + t.batch;
      l.units += t.batch;
    }
    plan.whole &= unit && unit <= kTile;
    plan.small &= unit && unit <= kWarpUnit;
    part.tensor = t;
  }
  return plan;
}

bool any_momentum(const PerturbParams& p) {
  for (int64_t i = 0; i < p.count; ++i)
    if (p.tensors[i].momentum) return true;
  return false;
}

struct Kernels {
  Kernel<Launch> by_block, by_warp;
};

template <class T>
Kernels step_of(bool norms) {
  if (norms) return {step_kernel<T, kBlock>, step_kernel<T, 32>};
  return {linf_kernel<T, kBlock>, linf_kernel<T, 32>};
}

template <class T>
Kernels start_of() {
  return {start_kernel<T, kBlock>, start_kernel<T, 32>};
}

void run(const Plan& plan, const Kernels& kernels, void* stream, const char* op) {
  const int64_t each = plan.small ? kBlock / 32 : 1;
  launch(plan.small ? kernels.by_warp : kernels.by_block, blocks_of(op, plan.launch.slots, each),
         dim3(kBlock), 0, stream, plan.launch, op);
}

// A pass that measures, and the sum of what it found.
void measure(Plan& plan, Stage stage, int planes, double* to, const Kernels& kernels, void* stream,
             const char* op) {
  Launch& l = plan.launch;
  l.stage = stage;
  run(plan, kernels, stream, op);
  l.planes = planes;
  l.from = l.partial;
  l.to = to;
  launch(add_kernel, blocks_of(op, l.units, kBlock / 32), dim3(kBlock), 0, stream, l, op);
}

// Where each sum of a plan lies in the workspace.
void place(Launch& l, double* workspace) {
  l.partial = workspace;
  l.l1 = l.partial + 3 * l.slots;
  l.l2_sums = l.l1 + l.units;
  l.blended = l.l2_sums + 3 * l.units;
}

}  // namespace

int64_t perturb_workspace(const PerturbParams& p, bool momentum) {
  int64_t most = 0;
  if (!p.l2 && !momentum) return 0;
  for (int64_t next = 0; next < p.count;) {
    const Plan plan = plan_of(p, next, true);
    const int64_t needed = plan.whole ? 0 : 3 * plan.launch.slots + 5 * plan.launch.units;
    most = most < needed ? needed : most;
  }
  return most;
}

void perturb(const PerturbParams& p, void* stream) {
  const char* op = "perturb_";
  const bool momentum = any_momentum(p), norms = p.l2 || momentum;
  const Kernels kernels = p.dtype == DType::f32    ? step_of<float>(norms)
                          : p.dtype == DType::bf16 ? step_of<bf16>(norms)
                                                   : step_of<f16>(norms);
  for (int64_t next = 0; next < p.count;) {
    Plan plan = plan_of(p, next, norms);
    Launch& l = plan.launch;
    place(l, p.workspace);
    bool previous = false;
    for (int i = 0; i < l.count; ++i) previous |= l.part[i].tensor.previous != nullptr;
    l.stage = Stage::whole;
    if (norms && !plan.whole) {
      if (momentum) measure(plan, Stage::l1, 1, l.l1, kernels, stream, op);
      if (p.l2) measure(plan, Stage::l2, 3, l.l2_sums, kernels, stream, op);
      if (p.l2 && previous) measure(plan, Stage::blend, 1, l.blended, kernels, stream, op);
      l.stage = Stage::apply;
    }
    run(plan, kernels, stream, op);
  }
}

void random_start(const PerturbParams& p, void* stream) {
  const char* op = "random_start_";
  const Kernels kernels = p.dtype == DType::f32    ? start_of<float>()
                          : p.dtype == DType::bf16 ? start_of<bf16>()
                                                   : start_of<f16>();
  for (int64_t next = 0; next < p.count;) {
    Plan plan = plan_of(p, next, p.l2);
    Launch& l = plan.launch;
    place(l, p.workspace);
    l.stage = Stage::whole;
    if (p.l2 && !plan.whole) {
      measure(plan, Stage::l2, 1, l.l2_sums, kernels, stream, op);
      l.stage = Stage::apply;
    }
    run(plan, kernels, stream, op);
  }
}

}  // namespace cuda
}  // namespace mmfast
