// One call for a whole integer network: no tensor, no Python and no allocation between its steps.
#include <chrono>
#include <new>

#include "core/scratch.h"
#include "core/step_times.h"
#include "ops/columns_check.h"
#include "ops/network_plan.h"

namespace qk {
namespace {

constexpr size_t kept_plans = 8;  // of a thread: batch sizes and image sizes of the models that it runs

#if defined(QK_CUDA_OBJECT)
bool reuse() { return true; }
struct Timer {  // a kernel runs behind its launch: CUDA's own tools time it
  explicit Timer(size_t) {}
  void next() {}
};
#else
bool reuse() { return reuse_memory(); }
class Timer {
 public:
  explicit Timer(size_t steps) : times_(step_times()) {
    if (!times_.wanted) return;
    times_.seconds.clear();
    times_.seconds.reserve(steps);
    last_ = Clock::now();
  }
  void next() {
    if (!times_.wanted) return;
    const auto now = Clock::now();
    times_.seconds.push_back(std::chrono::duration<double>(now - last_).count());
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  StepTimes& times_;
  Clock::time_point last_;
};
#endif

// Where everything lies at this call.
struct Addresses {
  std::vector<char*> value;
  Constants constants;

  Operand operand(const Value& v, int index) const { return {value[index], step(v.scale), zero(v.scale)}; }
  const float* step(const Scale& s) const { return s.codes() ? constants.steps + s.index : nullptr; }
  const int32_t* zero(const Scale& s) const { return s.codes() ? constants.zeros + s.index : nullptr; }
  template <class T>
  T* at(int index) const {
    return reinterpret_cast<T*>(value[index]);
  }
};

// Puts addresses into the arguments of a step and runs its kernel.
struct Runner {
  const Program& program;
  const Step& step;
  const Addresses& a;

  const Value& in(int i) const { return program.values[step.in[i]]; }
  void set(Result& r) const {
    r.data = a.value[step.out];
    r.step = a.step(step.scale), r.zero = a.zero(step.scale);
  }
  void set(Epilogue& e) const {
    e.x_step = a.step(in(0).scale), e.x_zero = a.zero(in(0).scale);
    e.weight_step = a.constants.floats + step.weight_step;
    e.bias = step.bias < 0 ? nullptr : a.constants.floats + step.bias;
    e.out_step = a.step(step.scale), e.out_zero = a.zero(step.scale);
    if (step.in.size() < 2) return;
    const Operand residual = a.operand(in(1), step.in[1]);
    e.residual = residual.data, e.residual_step = residual.step, e.residual_zero = residual.zero;
  }

  void operator()(Nothing&) const {}
  void operator()(QuantizeArgs& k) const {
    k.x = a.at<float>(step.in[0]), k.codes = a.at<uint8_t>(step.out);
    k.step = a.step(step.scale), k.zero = a.zero(step.scale);
    QK_DEVICE::quantize(k);
  }
  void operator()(QuantizeTransposedArgs& k) const {
    k.x = a.at<float>(step.in[0]), k.codes = a.at<uint8_t>(step.out);
    k.step = a.step(step.scale), k.zero = a.zero(step.scale);
    QK_DEVICE::quantize_transposed(k);
  }
  template <class Args>
  void set_product(Args& k) const {
    k.x = a.at<uint8_t>(step.in[0]), k.out = a.value[step.out];
    k.weight = a.constants.bytes + step.weight;
    set(k.epilogue);
  }
  void operator()(Conv2dArgs& k) const {
    set_product(k);
    QK_DEVICE::conv2d(k);
  }
  void operator()(GemmArgs& k) const {
    set_product(k);
    QK_DEVICE::gemm(k);
  }
  void operator()(AddArgs& k) const {
    k.a = a.operand(in(0), step.in[0]), k.b = a.operand(in(1), step.in[1]);
    set(k.out);
    QK_DEVICE::add(k);
  }
  void operator()(MultiplyArgs& k) const {
    k.x = a.operand(in(0), step.in[0]), k.gate = a.operand(in(1), step.in[1]);
    set(k.out);
    QK_DEVICE::multiply(k);
  }
  void operator()(PoolArgs& k) const {
    k.x = a.operand(in(0), step.in[0]);
    set(k.out);
    QK_DEVICE::pool(k);
  }
  void operator()(LookupArgs& k) const {
    k.codes = a.at<uint8_t>(step.in[0]), k.out = a.value[step.out];
    if (k.floats)
      k.table = a.constants.floats + step.table;
    else
      k.table = a.constants.bytes + step.table;
    QK_DEVICE::lookup(k);
  }
  void operator()(SparqArgs& k) const {
    k.codes = a.at<uint8_t>(step.in[0]), k.out = a.at<uint8_t>(step.out);
    k.zero = a.zero(in(0).scale);
    QK_DEVICE::sparq(k);
  }
  void operator()(AttentionArgs& k) const {
    k.q = a.operand(in(0), step.in[0]), k.k = a.operand(in(1), step.in[1]), k.v = a.operand(in(2), step.in[2]);
    k.mask = step.in.size() > 3 ? a.at<uint8_t>(step.in[3]) : nullptr;
    set(k.out);
    QK_DEVICE::attention(k);
  }
  void operator()(IndexPutArgs& k) const {
    k.x = a.value[step.in[0]], k.added = a.at<float>(step.in[1]);
    k.index = a.constants.columns(step.index), k.source = a.constants.columns(step.source);
    k.residual = step.in.size() > 2 ? a.operand(in(2), step.in[2]) : Operand{};
    set(k.out);
    QK_DEVICE::index_put(k);
  }
  void operator()(IndexSelectArgs& k) const {
    k.codes = a.at<uint8_t>(step.in[0]), k.out = a.at<uint8_t>(step.out);
    k.index = a.constants.columns(step.index);
    QK_DEVICE::index_select(k);
  }
  void operator()(Concat& k) const {
    for (size_t i = 0; i < k.parts.size(); ++i) {
      const Operand part = a.operand(in(static_cast<int>(i)), step.in[i]);
      k.parts[i].codes = static_cast<const uint8_t*>(part.data);
      k.parts[i].step = part.step, k.parts[i].zero = part.zero;
    }
    k.args.parts = k.parts.data();
    k.args.out = a.at<uint8_t>(step.out);
    k.args.out_step = a.step(step.scale), k.args.out_zero = a.zero(step.scale);
    QK_DEVICE::concat(k.args);
  }
  void operator()(DequantizeArgs& k) const {
    k.codes = a.at<uint8_t>(step.in[0]), k.out = a.at<float>(step.out);
    k.step = a.step(in(0).scale), k.zero = a.zero(in(0).scale);
    QK_DEVICE::dequantize(k);
  }
};

// Whether x [B, C, ...] lies in memory as [B, ..., C].
bool lies_channels_last(const Tensor& x) {
  if (x.dim() < 3) return false;
  int64_t stride = 1;
  const auto fits = [&](int64_t dim) {
    const bool ok = x.size(dim) == 1 || x.stride(dim) == stride;
    stride *= x.size(dim);
    return ok;
  };
  bool ok = fits(1);
  for (int64_t dim = x.dim() - 1; dim > 1; --dim) ok = fits(dim) && ok;
  return fits(0) && ok;
}

// Whether every reader of the input takes it as a channels_last image: others would see its axes in the wrong order.
bool only_channels_first(const Program& program, int value) {
  for (const Step& s : program.steps)
    for (int v : s.in)
      if (v == value && !(s.op == StepOp::quantize && s.channels_first)) return false;
  return true;
}

// What a thread keeps from call to call.
struct Thread {
  std::vector<std::unique_ptr<Plan>> plans;  // the one used last in front
  std::vector<Lies> input_lies;
  Addresses addresses;
};

std::shared_ptr<const Program> program_of(const Thread& thread, const std::string& text) {
  for (const auto& plan : thread.plans)
    if (plan->program->text == text) return plan->program;
  return parse_program(text);
}

// Inputs as the kernels read them, and what decides about the plan.
std::vector<Tensor> take(const Program& program, const std::vector<Tensor>& inputs, Thread& t) {
  const auto device = inputs[0].device();
  std::vector<Tensor> taken = inputs;
  t.input_lies.assign(inputs.size(), Lies::dense);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool codes = program.values[program.inputs[i]].scale.codes();
    const bool fits = inputs[i].scalar_type() == (codes ? ScalarType::Byte : ScalarType::Float);
    if (!fits || inputs[i].device() != device) {
      const std::string name = "inputs[" + std::to_string(i) + "]";
      check_tensor(fits, "network", name.c_str(), codes ? "uint8 codes" : "float32", inputs[i]);
      check_device("network", inputs[0], {{name.c_str(), &inputs[i]}});
    }
    if (inputs[i].is_contiguous()) continue;
    if (lies_channels_last(inputs[i]) && only_channels_first(program, program.inputs[i]))
      t.input_lies[i] = Lies::channels_last;
    else
      taken[i] = dense(inputs[i]);
  }
  return taken;
}

// constants: steps, zeros, floats and bytes.
Constants constants_of(const std::vector<Tensor>& constants, const Tensor& like) {
  check(constants.size() == 4, "network", "constants", "4 tensors: steps, zeros, floats and bytes", constants.size());
  constexpr ScalarType dtypes[] = {ScalarType::Float, ScalarType::Int, ScalarType::Float, ScalarType::Byte};
  constexpr const char* names[] = {"constants[0], the steps,", "constants[1], the zeros,", "constants[2], the floats,",
                                   "constants[3], the bytes,"};
  const auto device = like.device();
  for (int i = 0; i < 4; ++i) {
    const Tensor& t = constants[i];
    if (t.scalar_type() != dtypes[i] || t.dim() != 1 || !t.is_contiguous())
      fail("network", names[i], std::string("contiguous ") + torch::headeronly::toString(dtypes[i]) + " [...]",
           describe(t));
    if (t.device() != device) check_device("network", like, {{names[i], &t}});
  }
  check(constants[0].numel() == constants[1].numel(), "network", "constants[1], the zeros,", "as many as steps",
        constants[1].numel());
  return {constants[0].const_data_ptr<float>(),
          constants[1].const_data_ptr<int32_t>(),
          constants[2].const_data_ptr<float>(),
          constants[3].const_data_ptr<uint8_t>(),
          constants[0].numel(),
          constants[2].numel(),
          constants[3].numel()};
}

// Headers of weights are compared too: another weight of the same size may need another kernel, or none.
bool fits(const Plan& plan, const std::vector<Tensor>& inputs, const Thread& t) {
  const Constants& c = t.addresses.constants;
  if (plan.scales != c.scales || plan.float_count != c.float_count || plan.byte_count != c.byte_count) return false;
  if (plan.input_lies != t.input_lies) return false;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto sizes = inputs[i].sizes();
    const Sizes& planned = plan.input_sizes[i];
    if (sizes.size() != planned.size() || !std::equal(planned.begin(), planned.end(), sizes.begin())) return false;
  }
  if (!inputs[0].is_cpu()) return true;
  for (size_t i = 0; i < plan.headers.size(); ++i) {
    const int64_t weight = plan.program->steps[i].weight;
    if (weight >= 0 && std::memcmp(c.bytes + weight, &plan.headers[i], sizeof(PackedHeader)) != 0) return false;
  }
  return true;
}

Plan& plan_of(std::shared_ptr<const Program> program, const std::vector<Tensor>& inputs, const Tensor& bytes,
              Thread& t) {
  for (auto& plan : t.plans)
    if (plan->program == program && fits(*plan, inputs, t)) {
      std::swap(plan, t.plans.front());
      return *t.plans.front();
    }
  auto plan = std::make_unique<Plan>();
  plan->program = std::move(program);
  plan->input_lies = t.input_lies;
  const Constants& c = t.addresses.constants;
  plan->scales = c.scales, plan->float_count = c.float_count, plan->byte_count = c.byte_count;
  for (const Tensor& x : inputs) plan->input_sizes.emplace_back(x.sizes().begin(), x.sizes().end());
  Planner(*plan, c, bytes, reuse()).run();
  if (t.plans.size() == kept_plans) t.plans.pop_back();
  t.plans.insert(t.plans.begin(), std::move(plan));
  return *t.plans.front();
}

// Numbers may change in place between calls: those that could do harm are looked at every time, on the CPU.
void check_numbers(const Plan& plan, const std::vector<Tensor>& inputs, const Thread& t) {
  const Program& program = *plan.program;
  const Constants& c = t.addresses.constants;
  for (size_t i = 0; i < program.scale_bits.size(); ++i) {
    if (!program.scale_bits[i]) continue;
    if (!(c.steps[i] > 0) || std::isinf(c.steps[i]))
      fail("network", ("step " + std::to_string(i)).c_str(), "positive and finite", std::to_string(c.steps[i]),
           "Calibrate again on data without NaN, Inf or all-zero ranges.");
    if (c.zeros[i] < 0 || c.zeros[i] > top_code(program.scale_bits[i]))
      fail("network", ("zero " + std::to_string(i)).c_str(),
           "a code from 0 to " + std::to_string(top_code(program.scale_bits[i])), std::to_string(c.zeros[i]));
  }
  const auto below = [](const void* data, int64_t n, int bits) {
    const uint8_t* codes = static_cast<const uint8_t*>(data);
    uint8_t all = 0;
    for (int64_t i = 0; i < n; ++i) all |= codes[i];
    return all <= top_code(bits);
  };
  for (const Step& s : program.steps) {
    if (s.table >= 0 && s.scale.codes() && s.scale.bits < 8)
      check(below(c.bytes + s.table, 256, s.scale.bits), s.where.c_str(), "table", "codes below 2^out_bits",
            "a larger one");
    if (s.index >= 0)
      check_inside(s.where.c_str(), "index", c.columns(s.index), s.count, 0, plan.sizes[s.in[0]].back());
    if (s.source >= 0)
      check_inside(s.where.c_str(), "source", c.columns(s.source), s.terms * s.count, -1, plan.sizes[s.in[1]].back());
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    const int bits = program.values[program.inputs[i]].scale.bits;
    if (bits && bits < 8)
      check(below(inputs[i].const_data_ptr(), inputs[i].numel(), bits), "network",
            ("inputs[" + std::to_string(i) + "]").c_str(), "codes below 2^out_bits", "a larger one");
  }
}

std::vector<Tensor> new_results(const Plan& plan, const Tensor& like) {
  const Program& program = *plan.program;
  std::vector<Tensor> results;
  results.reserve(program.outputs.size());
  for (const ProgramOutput& o : program.outputs) {
    const bool codes = program.values[o.value].scale.codes();
    const Sizes& sizes = plan.sizes[o.value];
    if (o.channels_first && sizes.size() != 4)
      fail("network", "an output with layout nchw", "[B, H, W, C]", text_of(sizes));
    results.push_back(new_values(like, sizes, codes));
  }
  return results;
}

void set_addresses(const Plan& plan, const std::vector<Tensor>& inputs, std::vector<Tensor>& results, char* arena,
                   Thread& t) {
  const auto& values = plan.program->values;
  t.addresses.value.resize(values.size());
  for (size_t v = 0; v < values.size(); ++v) {
    const Value& root = values[values[v].root];
    t.addresses.value[v] = root.input >= 0 ? static_cast<char*>(const_cast<void*>(inputs[root.input].const_data_ptr()))
                           : root.output >= 0 ? static_cast<char*>(results[root.output].mutable_data_ptr())
                                              : arena + plan.at[v];
  }
}

void run(Plan& plan, const Addresses& addresses) {
  const auto& steps = plan.program->steps;
  Timer timer(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    std::visit(Runner{*plan.program, steps[i], addresses}, plan.args[i]);
    timer.next();
  }
}

std::vector<Tensor> network(const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants,
                            const std::string& text) {
  static thread_local Thread thread;
  check(!inputs.empty(), "network", "inputs", "one tensor or more", "none");
  const auto program = program_of(thread, text);
  if (inputs.size() != program->inputs.size())
    fail("network", "inputs", std::to_string(program->inputs.size()) + " tensors", std::to_string(inputs.size()));
  QK_DEVICE_GUARD(inputs[0]);
  const std::vector<Tensor> taken = take(*program, inputs, thread);
  thread.addresses.constants = constants_of(constants, inputs[0]);
  Plan& plan = plan_of(program, taken, constants[3], thread);
  if (inputs[0].is_cpu()) check_numbers(plan, taken, thread);
  std::vector<Tensor> results = new_results(plan, inputs[0]);
#if defined(QK_CUDA_OBJECT)
  // From torch: the memory then belongs to the stream that the kernels are put on.
  const Tensor arena = torch::stable::new_empty(inputs[0], {plan.arena_bytes}, ScalarType::Byte);
  set_addresses(plan, taken, results, static_cast<char*>(arena.mutable_data_ptr()), thread);
#else
  set_addresses(plan, taken, results, static_cast<char*>(thread_arena(plan.arena_bytes)), thread);
#endif
  run(plan, thread.addresses);
  for (size_t i = 0; i < results.size(); ++i)
    if (program->outputs[i].channels_first)  // [B, H, W, C] -> [B, C, H, W]
      results[i] = torch::stable::transpose(torch::stable::transpose(results[i], 1, 3), 2, 3);
  return results;
}

}  // namespace

QK_REGISTER(m) { m.impl("network", TORCH_BOX(&network)); }

}  // namespace qk
